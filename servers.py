"""Everything that reaches into a server: uvicorn's protocols made our own, the listening socket, signals, access logs.

The service runs on any ASGI server. Started by `serve`, uvicorn gets two protocols of ours: one reads heads with a
deadline, both offer their transport (`chat.direct`), so that a frame is built once and written to many sockets. Sending
through ASGI would cost a message, a frame and a task's wake-up for each socket and token.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import http
import logging
import re
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn
from starlette.types import Message, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from chat.direct import EXTENSION, Sleeper
from chat.errors import StartupError
from chat.formats.events import encode
from chat.settings import Settings, read_settings

STARTUP_FAILURE = 3  # uvicorn's word for "the same would happen again": its parent process stops as well
BACKLOG = 16_384  # bytes that wait here before a reader counts as blocked: what it has not got yet still merges
UNSENT = 8_192  # bytes the kernel takes beyond those under way; else it takes megabytes, and pings wait behind them
PATIENCE = 10.0  # seconds for the head of a request, as long as a socket has to say who it is


# -- starting


def settings_or_exit() -> Settings:
    try:
        return read_settings()
    except StartupError as problem:
        print(f"parley: {problem}", file=sys.stderr)
        sys.exit(STARTUP_FAILURE)


def serve(settings: Settings, hello: Callable[[], None]) -> None:
    """Run uvicorn with what the service needs: small frames, no deflate, a bound on blocked sockets, a bounded stop.

    `hello` is called once the service listens, where one process is all there is.
    """
    listener = _listen(settings)
    config = uvicorn.Config(
        "service:app",
        workers=settings.workers,
        http=HeadProtocol,
        ws=DirectProtocol,
        ws_max_size=settings.frame_max,
        ws_per_message_deflate=False,
        ws_ping_interval=settings.ping_interval,
        ws_ping_timeout=settings.ping_timeout,
        timeout_graceful_shutdown=5,
        access_log=False,  # request lines carry tokens of clients that put them into the URL
        log_level="warning" if settings.log_level == "info" else settings.log_level,
        server_header=False,
        proxy_headers=False,  # whose word on the caller's address counts is `trusted_proxies` alone
    )
    if settings.workers > 1:
        from uvicorn.supervisors import Multiprocess

        parent = Multiprocess(config, sockets=[listener])
        parent.run()
        if any(worker.exitcode == STARTUP_FAILURE for worker in parent.processes):
            sys.exit(STARTUP_FAILURE)
        return

    class SingleServer(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            hello()

    SingleServer(config).run(sockets=[listener])


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Without it a peer that vanished with unread bytes holds its connection for a quarter of an hour.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(settings.tcp_user_timeout * 1000))
    try:
        listener.bind((settings.host, settings.port))
    except (OSError, OverflowError) as problem:
        reason = getattr(problem, "strerror", None) or "a port is a number up to 65535"
        raise StartupError(f"cannot listen on {settings.host}:{settings.port}: {reason}") from None
    listener.listen(2048)
    listener.set_inheritable(True)
    return listener


def calm_the_collector() -> None:
    """Look for cycles seldom: with many turns Python's default looks through all that lives again and again, in vain.

    What is opened at the start stays and is never looked at; nearly all that comes and goes has no cycles.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


# -- uvicorn's protocols, with their transport within reach


class Bounded(asyncio.Protocol):
    """A connection that holds little of what its reader does not take. `blocked` while its buffers are full."""

    blocked = False
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(BACKLOG)
        connection = self.transport.get_extra_info("socket")
        if connection is not None and hasattr(socket, "TCP_NOTSENT_LOWAT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.blocked = True

    def resume_writing(self) -> None:
        super().resume_writing()
        self.blocked = False

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.blocked = False  # a transport that is lost while paused never resumes: who waits would wait for ever

    async def writable_again(self) -> None:
        raise NotImplementedError

    async def room(self, patience: float) -> None:
        """Wait until more may be written. Raises `TimeoutError` when for so many seconds nothing leaves."""
        while self.blocked:
            waiting = self.transport.get_write_buffer_size()
            try:
                async with asyncio.timeout(patience):
                    await self.writable_again()
            except TimeoutError:
                if self.transport.get_write_buffer_size() >= waiting:
                    raise


class Inbox(Sleeper):
    """What waits for a consumer. In its place uvicorn has an `asyncio.Queue`: 2.6 KB for a socket that says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._messages: list[Any] = []

    def put_nowait(self, message: Any) -> None:
        self._messages.append(message)
        self.rouse()

    async def get(self) -> Any:
        while not self._messages:
            await self.sleep()
        return self._messages.pop(0)

    def empty(self) -> bool:
        return not self._messages


class DirectProtocol(Bounded, WebSocketsSansIOProtocol):
    """A socket that can be written to without a task."""

    _stuck = 0  # bytes that waited when a pong was late

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.queue = Inbox()  # type: ignore[assignment]

    def keepalive_timeout(self) -> None:
        """A pong is late while its ping waits behind a backlog that moves: such a reader is slow, not gone."""
        waiting = self.transport.get_write_buffer_size()
        if waiting and waiting != self._stuck:
            self._stuck = waiting
            self.pong_timer = self.loop.call_later(self.ping_timeout or 0, self.keepalive_timeout)
        else:
            super().keepalive_timeout()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            self.transport.close()  # a head the parser gave up: nobody else would end this connection

    def start_keepalive(self) -> None:
        super().start_keepalive()
        self.response.headers.clear()  # they are sent

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        event.headers.clear()  # the scope has its own; the parser keeps these as long as the socket lives
        # A client that negotiated compression needs each frame made for it alone.
        if self.handshake_initiated and not (self.handshake_complete or self.config.ws_per_message_deflate):
            self.scope["extensions"][EXTENSION] = self  # type: ignore[assignment]

    def send_500_response(self) -> None:
        """What uvicorn says to a handshake it stops in the middle of, in the one shape of our errors."""
        if not (self.initial_response or self.handshake_complete):
            sentence = "The service is restarting."
            body = {"error": "draining", "message": sentence, "detail": sentence}
            response = self.conn.reject(http.HTTPStatus.SERVICE_UNAVAILABLE, encode(body).decode())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "application/json"
            self.conn.send_response(response)
            self.transport.write(b"".join(self.conn.data_to_send()))

    async def writable_again(self) -> None:
        await self.writable.wait()

    def write(self, frames: bytes) -> None:
        """Write whole frames to an accepted socket, unless it is closing."""
        transport = self.transport
        if not (self.close_sent or transport.is_closing()):
            transport.write(frames)

    def abort(self, code: int = 1006, reason: str = "") -> None:
        """Close a socket that takes nothing: say why behind what is stuck, and let the kernel's patience decide."""
        if not (self.close_sent or self.disconnected):
            self.conn.send_close(code, reason)
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = True
            self.transport.close()


class HeadProtocol(Bounded, HttpToolsProtocol):
    """Closes the connection when a head is not complete in time. Between two requests uvicorn's keep-alive counts."""

    _waiting: asyncio.TimerHandle | None = None
    _begun = False  # a head has begun and is not complete

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._waiting is not None or self.parser is None:
            return
        # Most heads come in one piece: a timer each would be for nothing. An empty line ends uvicorn's keep-alive.
        answering = self.cycle is not None and not self.cycle.response_complete
        if self._begun or not (answering or self.timeout_keep_alive_task):
            self._wait()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun = True

    def on_headers_complete(self) -> None:
        self._begun = False
        self._done()
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:  # else it becomes a socket
            self.scope["extensions"] = {EXTENSION: DirectAnswer(self, self.cycle)}  # type: ignore[dict-item]

    def handle_websocket_upgrade(self) -> None:
        super().handle_websocket_upgrade()
        self.parser = None  # type: ignore[assignment]  # the two hold each other, and nothing else ends that here

    def connection_lost(self, exc: Exception | None) -> None:
        self._done()
        super().connection_lost(exc)

    async def writable_again(self) -> None:
        await self.flow.drain()

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(PATIENCE, self.transport.close)

    def _done(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class DirectAnswer:
    """One answer's body, to be written to without a task between its head and its last part."""

    def __init__(self, connection: HeadProtocol, cycle: RequestResponseCycle) -> None:
        self._connection = connection
        self._cycle = cycle

    @property
    def streams(self) -> bool:
        """Whether its head is sent and says that a body of any length follows."""
        return self._cycle.chunked_encoding is True

    @property
    def blocked(self) -> bool:
        return self._connection.blocked

    async def room(self, patience: float) -> None:
        """Wait until more may be written. Raises `TimeoutError` when for so many seconds nothing leaves."""
        await self._connection.room(patience)

    def write(self, part: bytes) -> None:
        """Write a part, as a chunk: https://www.rfc-editor.org/rfc/rfc9112#section-7.1"""
        transport = self._cycle.transport
        if part and not transport.is_closing():  # an empty chunk would be the end
            transport.write(b"%x\r\n%b\r\n" % (len(part), part))

    def abort(self, code: int = 1006, reason: str = "") -> None:
        """Give up a reader that takes nothing. There is no saying why: what is stuck is before it."""
        self._cycle.transport.abort()


# -- servers without a lifespan, or with an opinion on close codes: Daphne


def end_first(end: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `end` before the server ends where it runs no lifespan: its signals come here first and are passed on after.

    Else Daphne would cut every answer off, and then wait for ever for the threads of SQLite's connections.
    """
    loop = asyncio.get_running_loop()
    ending: list[asyncio.Task[None]] = []  # one, even if a platform says it twice

    def begin(theirs: Any, number: int) -> None:
        def pass_on(ended: asyncio.Task[None]) -> None:
            signal.signal(number, theirs)
            signal.raise_signal(number)

        if not ending:
            ending.append(asyncio.create_task(end()))
            ending[0].add_done_callback(pass_on)

    def hear(theirs: Any, number: int, frame: Any) -> None:
        loop.call_soon_threadsafe(begin, theirs, number)

    with contextlib.suppress(ValueError):  # not the main thread: nobody can take signals here
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, functools.partial(hear, signal.getsignal(number)))


NEAREST = {1003: 4400, 1009: 4400, 1012: 4408}  # a client does the same on both


def closing(send: Send) -> Send:
    """Close sockets also where the server refuses the standard's own codes, as Daphne does with all but 1000."""

    async def send_closing(message: Message) -> None:
        try:
            await send(message)
        except Exception:  # Daphne's raises no narrower one
            if message["type"] != "websocket.close" or message["code"] not in NEAREST:
                raise
            await send({**message, "code": NEAREST[message["code"]]})

    return send_closing


# -- logs


REDACTED = re.compile(r"\b(token|anonymous_token|ticket|share_token|key)=[^&\s\"]+")


class Discreet(logging.Filter):
    """What a server prints of its clients, without what they can put there.

    Request lines have the tokens of those that cannot do better; and for each text that is not UTF-8, which closes its
    socket with 1007 and is no matter of ours, uvicorn would print a traceback.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if text.startswith("Invalid UTF-8 sequence"):
            return False
        if "?" not in text:
            return True
        # Argument by argument: uvicorn's formatter takes them apart, hypercorn's are a dictionary of its own kind.
        if isinstance(record.args, dict):
            record.args.update({name: _redacted(value) for name, value in record.args.items()})
        elif record.args:
            record.args = tuple(_redacted(value) for value in record.args)
        text = record.getMessage()
        if (clean := _redacted(text)) != text:
            record.msg, record.args = clean, ()
        return True


def _redact_daphne(generator: Any) -> None:
    """Daphne writes its request lines by itself, past `logging`."""
    write = generator.write_entry
    generator.write_entry = lambda self, **entry: write(self, **{name: _redacted(text) for name, text in entry.items()})


def _redacted(value: object) -> object:
    return REDACTED.sub(r"\1=***", value) if isinstance(value, str) else value

def keep_logs_discreet() -> None:
    """Have every server we know print nothing that opens a session."""
    for name in ("uvicorn.error", "uvicorn.access", "hypercorn.access", "granian.access"):
        logging.getLogger(name).addFilter(Discreet())
    if "daphne.access" in sys.modules:
        _redact_daphne(sys.modules["daphne.access"].AccessLogGenerator)
