"""Redis as a bus: pub/sub that reconnects by itself, and a few pipelined commands beside it.

`RedisBus` is a backend for broadcaster. Broadcaster's own backend receives nothing more after one dropped connection.
A connection receives messages, another one sends commands. Both reconnect with backoff (50 ms → 2 s) after any failure.
A new listening connection subscribes to all channels again. A gap marker follows each confirmation of a subscription,
the first as well: later messages are received, and earlier ones may have been lost. `next_published` never raises, and
`subscribe` never fails or waits: a Redis that is away is a state.

Commands given in one turn of the loop leave in one write, and a batch of messages read together is queued together:
one round trip and one wake-up carry many of them.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import hiredis
from broadcaster import BroadcastBackend, Event

from ..errors import RelayUnavailable
from ..tasks import Tasks, settle
from .events import LearnAgain, encode
from .wire import ANSWER_TIMEOUT, Address, Answered, Wire, guarded

log = logging.getLogger("parley.bus")

GAP = encode(LearnAgain()).decode()  # a channel gets this message whenever Redis has confirmed its subscription
BACKOFF = (0.05, 2.0)  # seconds, first and longest wait between two tries
IDLE_PING = 5.0  # seconds; the listening connection is pinged after half as long a silence, and dead after twice
BURST = 4  # gathered runs one after the other before they are spread out

Serve = Callable[[], Awaitable[None]]


class Gather:
    """Runs gathered work as a batch, at most once per interval; after a quiet time a few batches run at once.

    The generic cell rate algorithm: https://en.wikipedia.org/wiki/Generic_cell_rate_algorithm
    """

    def __init__(self, every: float, then: Callable[[], None] = lambda: None) -> None:
        self.every = every
        self._then = then
        self._calls: dict[Callable[[], None], None] = {}  # in the order they came
        self._waits = False  # a run is scheduled or goes on
        self._due = 0.0  # loop time of the next run, if runs came exactly every so many seconds

    def soon(self, call: Callable[[], None]) -> None:
        """Have the next run make this call, once however often it was asked for."""
        self._calls[call] = None
        self.wake()

    def wake(self) -> None:
        """Schedule a run, after which `then` is called."""
        if self._waits:
            return
        self._waits = True
        loop = asyncio.get_running_loop()
        wait = self._due - (BURST - 1) * self.every - loop.time()
        if wait <= 0:
            loop.call_soon(self._run)
        else:
            loop.call_later(wait, self._run)

    def _run(self) -> None:
        self._due = max(self._due, asyncio.get_running_loop().time()) + self.every
        calls, self._calls = self._calls, {}
        for call in calls:
            guarded(call)
        guarded(self._then)
        self._waits = False
        if self._calls:
            self.wake()


class RedisBus(BroadcastBackend):
    """Broadcaster's backend over Redis, and the commands the relay and the limits need."""

    def __init__(
        self, url: str, *, verify: bool = True, origin: str = "", every: float = 0.0, prefix: str = "parley"
    ) -> None:
        """every: seconds between two writes of gathered commands under load; origin: this worker's name."""
        self.address = Address(url, verify)
        self._name = f"{prefix}:{self.address.db}:"
        self.gather = Gather(every, self._flush)
        self._origin = origin.encode()  # messages that start with it are our own echo
        self._heard: asyncio.Queue[Event] = asyncio.Queue()  # broadcaster empties it before the loop reads again
        self._stopping = False
        self.failures = 0  # connections that were lost or could not be made
        self.on_return: Callable[[], None] = lambda: None  # called when commands work: at first, and after each outage
        self._wanted: set[str] = set()
        self._said: set[str] = set()  # problems logged since a connection last worked
        self._commands: list[bytes] = []  # gathered for the next write
        self._waiting: list[Answered] = []  # one callback for each gathered command
        self._listener: Wire | None = None
        self._wire: Wire | None = None
        self._tried: dict[Serve, asyncio.Future[None]] = {}  # done when a connection was tried once
        self._tasks = Tasks()

    # -- what broadcaster calls

    async def connect(self) -> None:
        """Start both connections and wait a second for their first attempt; a Redis that is away is no error."""
        for serve in (self._listen, self._command):
            self._tried[serve] = asyncio.get_running_loop().create_future()
            self._tasks.spawn(self._keep(serve))
        await asyncio.wait(self._tried.values(), timeout=1.0)

    async def disconnect(self) -> None:
        self._stopping = True
        await self._tasks.cancel()

    async def subscribe(self, group: str) -> None:
        """Subscribe to a channel. Never waits: a gap marker follows whenever Redis has confirmed the subscription."""
        self._wanted.add(group)
        if self._listener is not None:
            self._listener.send("SUBSCRIBE", group)

    async def unsubscribe(self, group: str) -> None:
        self._wanted.discard(group)
        if self._listener is not None:
            self._listener.send("UNSUBSCRIBE", group)

    async def publish(self, channel: str, message: Any) -> None:
        await self.command("PUBLISH", channel, message)

    async def next_published(self) -> Event:
        return await self._heard.get()

    # -- what the relay and the limits call

    @property
    def connected(self) -> bool:
        """Whether commands can be sent."""
        return self._wire is not None

    @property
    def listening(self) -> bool:
        """Whether there is a connection over which Redis can confirm a subscription."""
        return self._listener is not None

    def name(self, *parts: str) -> str:
        """Return the channel or key of these parts, this deployment's own.

        The name holds the database's number, because pub/sub ignores SELECT, and the deployment's prefix, because two
        deployments may share a database.
        """
        return self._name + ":".join(parts)

    def command(self, *command: Any) -> asyncio.Future[Any]:
        """Send one command as `ask` does. The future raises `RelayUnavailable`."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.ask(partial(settle, future), *command)
        return future

    def tell(self, channel: str, payload: bytes, answered: Answered = None) -> None:
        """Publish to other workers only."""
        self.ask(answered, "PUBLISH", channel, self._origin + payload)

    def ask(self, answered: Answered, *command: Any) -> None:
        """Send one command with whatever else gathers.

        `answered` is called once, perhaps before this returns, with Redis' answer or with `RelayUnavailable`, of which
        `RelayRefused` is one.
        """
        if self._wire is None or not self._wire.writable:
            guarded(answered, RelayUnavailable("Redis is away"))
            return
        self._commands.append(hiredis.pack_command(command))
        self._waiting.append(answered)
        self.gather.wake()

    def _flush(self) -> None:
        if not self._commands:
            return
        data, waiting = b"".join(self._commands), self._waiting
        self._commands, self._waiting = [], []
        if self._wire is None:
            for answered in waiting:
                guarded(answered, RelayUnavailable("Redis is away"))
        else:
            self._wire.write(data, waiting)

    # -- the two connections

    async def _keep(self, serve: Serve) -> None:
        """Run one connection again and again until cancelled."""
        wait = BACKOFF[0]
        while True:
            started = asyncio.get_running_loop().time()
            try:
                await serve()
            except Exception as problem:  # any: without this task the worker would hear nothing until its restart
                self._fail(problem)
            settle(self._tried[serve], None)
            if asyncio.get_running_loop().time() - started > BACKOFF[1]:  # the connection had worked, or failed slowly
                wait = BACKOFF[0]
            await asyncio.sleep(wait * random.uniform(0.75, 1.25))  # workers must not come back in step
            wait = min(wait * 2, BACKOFF[1])

    def _fail(self, problem: Exception) -> None:
        """Count a failure, and log each different one once: connecting is tried all the time."""
        self.failures += 1
        said = f"{type(problem).__name__}: {problem}"
        if said not in self._said:
            self._said.add(said)
            expected = isinstance(problem, OSError | RelayUnavailable)
            log.warning("redis %r: %s", self.address, said, exc_info=None if expected else problem)

    async def _command(self) -> None:
        """Serve commands over one connection. Ends only by an exception."""
        wire = await Wire.open(self.address)
        try:
            self._wire = wire
            log.warning("redis %r is connected", self.address)
            self._said.clear()
            settle(self._tried[self._command], None)
            guarded(self.on_return)
            while True:
                await wire.watch(1.0)
                if wire.busy and asyncio.get_running_loop().time() - wire.heard_at > ANSWER_TIMEOUT:
                    raise TimeoutError("no answer")
        finally:
            self._wire = None
            wire.close()
            if not self._stopping:  # a stop of ours is no failure of Redis
                log.warning("redis %r is away", self.address)
            self._flush()

    async def _listen(self) -> None:
        """Listen over one connection. Ends only by an exception."""
        wire = await Wire.open(self.address, self._read)
        try:
            self._listener = wire
            if self._wanted:
                wire.send("SUBSCRIBE", *self._wanted)
            settle(self._tried[self._listen], None)
            while True:
                await wire.watch(IDLE_PING / 2)
                silent = asyncio.get_running_loop().time() - wire.heard_at
                if silent > 2 * IDLE_PING:
                    raise TimeoutError("the listening connection is silent")
                if silent > IDLE_PING / 2:
                    wire.send("PING")
        finally:
            self._listener = None
            wire.close()

    def _read(self, pushed: list[Any]) -> None:
        """Handle pushes of Redis: messages and confirmations."""
        for push in pushed:
            if isinstance(push, Exception) and self._listener is not None:
                self._fail(push)  # a refused SUBSCRIBE: Redis does not say which channels this user may not read
                self._listener.close()
            if not isinstance(push, list) or len(push) != 3:
                continue  # the answer to our PING
            kind, channel, payload = push
            if kind == b"message":
                self._hear(channel, payload)
            elif kind == b"subscribe":
                self._said.clear()
                self._heard.put_nowait(Event(channel.decode(), GAP))

    def _hear(self, channel: bytes, payload: bytes) -> None:
        if self._origin and payload.startswith(self._origin):
            return
        # Broken text from others becomes U+FFFD here, and the room refuses the message.
        self._heard.put_nowait(Event(channel.decode(), payload.decode(errors="replace")))
