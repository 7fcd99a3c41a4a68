"""How often and how many: rates, and sockets open at once. Across workers with Redis, per process without.

Rates are fixed windows: one counter per name and window, which lets a burst straddle a border but needs no history.
Sockets are counted per worker in one hash per name; what a dead worker left is ignored because its name is no longer
among the living. When Redis is away the process counts for itself: a limit that fails closed would be an outage.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Any, Protocol

from .errors import ChatError, RelayUnavailable
from .settings import Settings

ANSWER = 0.5  # seconds to wait for Redis before counting alone
WIDER = 8  # times the limit of a /64 for all of a /48: a university has one as well
ALIVE = 30.0  # seconds since its last sign of life that a worker's sockets still count
UNTOLD_MAX = 10_000  # names whose numbers Redis may lack: those of an outage with very many callers
TOLD_AT_ONCE = 1_000  # of them in one beat: each holds the loop for some microseconds


class Shared(Protocol):
    """The store of counters that all workers share: Redis, through its bus."""

    def name(self, *parts: str) -> str:
        """The key of these parts, this deployment's own."""
        ...

    def command(self, *command: Any) -> asyncio.Future[Any]:
        """Send a command; the future has its answer. Raises `RelayUnavailable`."""
        ...


class RateLimits:
    """Counters of this worker, shared over `bus` where there is one."""

    def __init__(self, worker: str, bus: Shared | None = None) -> None:
        self._worker = worker
        self._bus = bus
        self._windows: Counter[tuple[str, float]] = Counter()  # by name and end of its window
        self.open: Counter[str] = Counter()
        self._untold: set[str] = set()  # names whose number Redis may not have

    async def hit(self, name: str, limit: int, window: float, message: str) -> None:
        """Count one more of `name` in this window of so many seconds. Raises `rate_limited` beyond the limit."""
        number = int(time.time() // window)
        end = (number + 1) * window
        count = await self._shared_hit(name, number, window)
        if count is None:
            self._windows[name, end] += 1
            count = self._windows[name, end]
        if count > limit:
            raise ChatError("rate_limited", message, retry_after=round(max(1.0, end - time.time())))

    async def hit_guest(self, address: str, settings: Settings) -> None:
        """Count one more guest made from this address. Raises `rate_limited`."""
        if settings.production or not is_loopback(address):
            message = "Too many new guests from this address."
            await self.hit_from(address, "guests", settings.guests_per_minute, 60, message)

    async def hit_session(self, account_id: str, settings: Settings) -> None:
        """Count one more session that this account makes. Raises `rate_limited`."""
        message = "You are making sessions too quickly."
        await self.hit(f"sessions:{account_id}", settings.sessions_per_minute, 60, message)

    async def hit_from(self, address: str, name: str, limit: int, window: float, message: str) -> None:
        """Count one more of `name` from this address, and from the network around it. Raises `rate_limited`."""
        for bucket, most in buckets(name, address, limit):
            await self.hit(bucket, most, window, message)

    async def _shared_hit(self, name: str, number: int, window: float) -> int | None:
        if self._bus is None:
            return None
        key = self._bus.name("rate", name, str(number))
        counted = self._bus.command("INCR", key)
        self._bus.command("EXPIRE", key, int(window) + 1)
        try:
            async with asyncio.timeout(ANSWER):
                return int(await counted)
        except (RelayUnavailable, TimeoutError):
            return None

    async def enter(self, limits: Iterable[tuple[str, int]], message: str) -> list[str]:
        """Take one place under each of these names; return the names, to give to `leave`.

        Raises `rate_limited` when one is full.
        """
        names = [name for name, _ in limits]
        self.open.update(names)
        try:
            counts = await self._places(names)
            if any(count > limit for count, (_, limit) in zip(counts, limits, strict=True)):
                raise ChatError("rate_limited", message, retry_after=5)
        except BaseException:  # a caller that is cancelled while it waits for Redis would keep its places for ever
            self.leave(names)
            raise
        return names

    def leave(self, names: Iterable[str]) -> None:
        for name in names:
            self.open[name] -= 1
            if self.open[name] <= 0:
                del self.open[name]
            self._tell(name)

    def _tell(self, name: str) -> None:
        """Say how many are in here. The number itself, not a step: a step that is lost or said twice stays wrong."""
        if self._bus is None:
            return
        key = self._bus.name("open", name)
        if name in self.open:
            told = self._bus.command("HSET", key, self._worker, self.open[name])
            self._bus.command("EXPIRE", key, 86400)
        else:
            told = self._bus.command("HDEL", key, self._worker)
        told.add_done_callback(partial(self._told, name))

    def _told(self, name: str, answer: asyncio.Future[Any]) -> None:
        self._untold.discard(name)
        if (answer.cancelled() or answer.exception() is not None) and len(self._untold) < UNTOLD_MAX:
            self._untold.add(name)

    async def _places(self, names: list[str]) -> list[int]:
        """How many are in under each name, on every worker that lives; here alone while Redis is away."""
        if self._bus is None:
            return [self.open[name] for name in names]
        now = time.time()
        self._bus.command("ZADD", self._bus.name("workers"), int(now), self._worker)
        for name in names:
            self._tell(name)
        # The live workers are read each time: a worker that started a moment ago must count for the others at once.
        asked = [self._bus.command("ZRANGEBYSCORE", self._bus.name("workers"), int(now - ALIVE), "+inf")]
        asked += [self._bus.command("HGETALL", self._bus.name("open", name)) for name in names]
        try:
            async with asyncio.timeout(ANSWER):
                living, *answers = await asyncio.gather(*asked)
        except (RelayUnavailable, TimeoutError):
            return [self.open[name] for name in names]
        return [
            sum(int(count) for worker, count in zip(answer[::2], answer[1::2], strict=True) if worker in living)
            for answer in answers
        ]

    async def beat(self) -> None:
        """Say that this worker lives, and the numbers that Redis lacks; forget dead workers and windows that are over.

        Called every few seconds.
        """
        now = time.time()
        self._windows = Counter({window: count for window, count in self._windows.items() if window[1] > now})
        if self._bus is not None:
            self._bus.command("ZADD", self._bus.name("workers"), int(now), self._worker)
            self._bus.command("ZREMRANGEBYSCORE", self._bus.name("workers"), "-inf", int(now - ALIVE))
            for name in list(islice(self._untold, TOLD_AT_ONCE)):  # a place left in an outage would count for a day
                self._tell(name)


class Crowd:
    """Counts something in this process (connections, say) for each address and for the network around it."""

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()

    def enter(self, address: str, limit: int) -> bool:
        """Count one more until `leave`. Returns whether the count is within the limit."""
        for name, _ in networks(address):
            self._count[name] += 1
        return all(self._count[name] <= limit * times for name, times in networks(address))

    def leave(self, address: str) -> None:
        for name, _ in networks(address):
            self._count[name] -= 1
            if self._count[name] <= 0:
                del self._count[name]


def networks(address: str) -> list[tuple[str, int]]:
    """Return an address and the IPv6 network around it, each with how many times the limit it may use.

    A customer may have the whole network. address: as `callers.address` returns it, an IPv6 address as its /64.
    """
    found = [(address, 1)]
    if address.endswith("/64"):
        found.append((str(ipaddress.ip_network(address).supernet(new_prefix=48)), WIDER))
    return found


def buckets(name: str, address: str, limit: int) -> list[tuple[str, int]]:
    """Return the names a caller is counted under and their limits."""
    return [(f"{name}:{network}", limit * times) for network, times in networks(address)]


def is_loopback(address: str) -> bool:
    """Whether the caller sits at this machine: a developer is not limited in guests."""
    return address in ("127.0.0.1", "::/64", "testclient")
