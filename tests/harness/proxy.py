"""A TCP proxy that misbehaves on request, in the test's own loop, in front of any server or client.

    async with Proxy.before(redis.url) as proxy:      # or Proxy(host, port)
        url = proxy.through(redis.url)                # the same URL with the proxy's port
        proxy.stall()                                 # everything, from now on
        proxy.ok()

Bytes are read from a socket only when they may go on, so a stalled or slow side feels back-pressure as on a real
network: the proxy holds at most one piece. Faults apply to open connections and to new ones; `to="new"` or
`to="open"` narrows that. One fault at a time: setting one replaces the last.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit

from .processes import HOST, Port

Direction = Literal["to_client", "to_server"]
Scope = Literal["all", "new", "open"]
BOTH: tuple[Direction, Direction] = ("to_client", "to_server")
PIECE = 65_536  # bytes read at once
RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close sends RST instead of FIN
CONNECT_TIMEOUT = 10.0  # seconds a paused server has to accept
LATE = 0.5  # seconds that a limited connection makes up for, where a busy machine kept the proxy from its next piece
TICK = 0.05  # seconds between pieces of a limited connection: finer than anything a test measures


@dataclass(frozen=True)
class Fault:
    """What happens to bytes on their way. The default is nothing."""

    delay: float = 0.0  # seconds each piece is late; pieces that arrive meanwhile go together
    stalled: tuple[Direction, ...] = ()
    rate: int = 0  # bytes per second towards the client; 0: no limit
    cut_after: int | None = None  # bytes still let through in `cut_direction`, then both sides are closed
    cut_direction: Direction = "to_client"
    cut_with_reset: bool = False


@dataclass(eq=False)
class Link:
    """One connection through the proxy: two sockets, the bytes that went each way, the fault it is under."""

    client: socket.socket
    server: socket.socket
    fault: Fault
    opened: float = field(default_factory=time.monotonic)
    sent: dict[Direction, int] = field(default_factory=lambda: dict.fromkeys(BOTH, 0))
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    left: int | None = None  # bytes until the cut
    due: float = 0.0  # when a limited connection's next piece may go
    shut: set[Direction] = field(default_factory=set)  # FIN said early: what still comes is dropped
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.impose(self.fault)

    def impose(self, fault: Fault) -> None:
        self.fault = fault
        self.left = fault.cut_after
        self.due = time.monotonic()
        self.changed.set()

    def ends(self, direction: Direction) -> tuple[socket.socket, socket.socket]:
        """Where this direction's bytes come from and go to."""
        return (self.server, self.client) if direction == "to_client" else (self.client, self.server)

    def close(self, reset: bool = False) -> None:
        """End both sides now: with FIN, or with RST. Tasks first: the loop must not watch a closed descriptor."""
        for task in self.tasks:
            task.cancel()
        asyncio.get_running_loop().call_soon(self._close_sockets, reset)

    def _close_sockets(self, reset: bool) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                if reset:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                end.close()


class Proxy:
    """Listens on a port of its own and forwards to `host:port`, badly when told to.

    `buffer` bounds the kernel's buffers (bytes) on both sides, so that a slow client is felt after kilobytes, not
    megabytes. Counters: `connections` so far, `refused` upstream, `bytes_to_client`, `bytes_to_server`.
    """

    def __init__(self, host: str, port: int, *, buffer: int = 0) -> None:
        self.host, self.target_port, self.buffer = host, port, buffer
        self._port = Port()
        self.port = self._port.number
        self.fault = Fault()
        self.links: list[Link] = []
        self.connections = 0
        self.refused = 0
        self._past: dict[Direction, int] = dict.fromkeys(BOTH, 0)
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    def before(cls, url: str, *, buffer: int = 0) -> Self:
        parts = urlsplit(url)
        if parts.hostname is None or parts.port is None:
            raise ValueError(f"expected a URL with a host and a port, got {parts.scheme}://{parts.hostname}")
        return cls(parts.hostname, parts.port, buffer=buffer)

    def through(self, url: str) -> str:
        """`url` as it is reached through this proxy: user, path and query stay."""
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{user}{at}{HOST}:{self.port}").geturl()

    @property
    def open(self) -> int:
        return len(self.links)

    @property
    def bytes_to_client(self) -> int:
        return self._past["to_client"] + sum(link.sent["to_client"] for link in self.links)

    @property
    def bytes_to_server(self) -> int:
        return self._past["to_server"] + sum(link.sent["to_server"] for link in self.links)

    # faults

    def ok(self, to: Scope = "all") -> None:
        """Forward everything, and listen again after `refuse`."""
        self._impose(Fault(), to)
        self._listen()

    def delay(self, seconds: float, to: Scope = "all") -> None:
        self._impose(Fault(delay=seconds), to)

    def stall(self, direction: Direction | Literal["both"] = "both", to: Scope = "all") -> None:
        """Accept, forward nothing: a network that swallows, a peer that hangs."""
        self._impose(Fault(stalled=BOTH if direction == "both" else (direction,)), to)

    def limit(self, rate: int, to: Scope = "all") -> None:
        """At most `rate` bytes per second towards each client."""
        self._impose(Fault(rate=rate), to)

    def cut(self, after: int = 0, direction: Direction = "to_client", reset: bool = False, to: Scope = "all") -> None:
        """Let exactly `after` more bytes through in `direction`, then close both sides, with RST if `reset`."""
        self._impose(Fault(cut_after=after, cut_direction=direction, cut_with_reset=reset), to)

    def rst(self) -> None:
        """RST on both sides of every open connection, now. New ones are as before."""
        for link in list(self.links):
            self._end(link, reset=True)

    def close_all(self) -> None:
        """FIN on both sides of every open connection, now."""
        for link in list(self.links):
            self._end(link)

    def half_close(self, direction: Direction = "to_client") -> None:
        """Say FIN in one direction of every open connection; the other goes on."""
        for link in self.links:
            link.shut.add(direction)
            with contextlib.suppress(OSError):
                link.ends(direction)[1].shutdown(socket.SHUT_WR)

    def refuse(self) -> None:
        """Stop listening: new connections get ECONNREFUSED until `ok`. Open ones stay as they are."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _impose(self, fault: Fault, to: Scope) -> None:
        if to != "open":
            self.fault = fault
        if to != "new":
            for link in self.links:
                link.impose(fault)

    # life

    async def start(self) -> Self:
        self._listen()
        return self

    async def stop(self) -> None:
        self.refuse()
        self.close_all()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._port.release()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        await self.stop()

    def _listen(self) -> None:
        if self._listener is not None:
            return
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._shrink(self._listener)  # before listen: accepted sockets inherit it, and the window is agreed on in SYN
        self._listener.bind((HOST, self.port))
        self._listener.listen(1024)
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            client, _ = listener.accept()
            client.setblocking(False)
            self.connections += 1
            task = asyncio.create_task(self._serve(client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: socket.socket) -> None:
        """Ends when both directions have, or when the link is ended by a fault or by `stop`."""
        server = await self._connect(client)
        if server is None:
            return
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = Link(client, server, self.fault)
        self.links.append(link)
        link.tasks = [asyncio.create_task(self._pump(link, direction)) for direction in BOTH]
        try:
            await asyncio.wait(link.tasks)
        finally:
            self._end(link)

    async def _connect(self, client: socket.socket) -> socket.socket | None:
        """Reach the server, or give the client what the server would: a reset."""
        server = socket.socket()
        server.setblocking(False)
        self._shrink(server)
        reached = False
        try:
            reaching = asyncio.get_running_loop().sock_connect(server, (self.host, self.target_port))
            await asyncio.wait_for(reaching, CONNECT_TIMEOUT)
            reached = True
        except (OSError, TimeoutError):
            self.refused += 1
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        finally:
            if not reached:
                client.close()
                server.close()
        return server if reached else None

    def _shrink(self, end: socket.socket) -> None:
        if self.buffer:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.buffer)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.buffer)

    def _end(self, link: Link, reset: bool = False) -> None:
        if link in self.links:
            self.links.remove(link)
            for direction in BOTH:
                self._past[direction] += link.sent[direction]
            link.close(reset)

    # bytes

    async def _pump(self, link: Link, direction: Direction) -> None:
        """Carry one direction until its sender says FIN (passed on) or anything breaks (both sides are reset)."""
        loop = asyncio.get_running_loop()
        source, target = link.ends(direction)
        try:
            while True:
                await _may_go(link, direction)
                data = await loop.sock_recv(source, _piece(link, direction))
                if not data:
                    break
                await self._carry(link, direction, target, data)
            await _may_go(link, direction)
            target.shutdown(socket.SHUT_WR)
        except OSError as problem:
            if problem.errno != errno.ENOTCONN:  # the other direction has closed it already
                self._end(link, reset=True)

    async def _carry(self, link: Link, direction: Direction, target: socket.socket, data: bytes) -> None:
        """Pass `data` on, in pieces as the fault of the moment wants them; a fault that begins meanwhile counts."""
        if link.fault.delay:
            await asyncio.sleep(link.fault.delay)
        while data and direction not in link.shut:
            await _may_go(link, direction)
            size = min(len(data), _piece(link, direction))
            if _cuts(link, direction):
                size = min(size, link.left or 0)
            await asyncio.get_running_loop().sock_sendall(target, data[:size])
            data = data[size:]
            link.sent[direction] += size
            if _cuts(link, direction):
                link.left = max(0, (link.left or 0) - size)
                if link.left == 0:
                    self._end(link, link.fault.cut_with_reset)
                    await asyncio.sleep(0)  # cancelled here
            if link.fault.rate and direction == "to_client":
                link.due = max(link.due, time.monotonic() - LATE) + size / link.fault.rate
                await asyncio.sleep(link.due - time.monotonic())


class Narrow(Proxy):
    """A proxy whose server believes in a thin line: the kernel keeps kilobytes for it, not megabytes."""

    def _shrink(self, end: socket.socket) -> None:
        super()._shrink(end)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)


async def _may_go(link: Link, direction: Direction) -> None:
    """Wait until no stall holds this direction."""
    while direction in link.fault.stalled:
        link.changed.clear()
        await link.changed.wait()


def _cuts(link: Link, direction: Direction) -> bool:
    return link.left is not None and direction == link.fault.cut_direction


def _piece(link: Link, direction: Direction) -> int:
    """How many bytes to take at once. A slow link reads no more than may go on, or the proxy would be a buffer."""
    if link.fault.rate and direction == "to_client":
        return max(1, int(link.fault.rate * TICK))
    return PIECE
