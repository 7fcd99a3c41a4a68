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
import resource
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import httptools
import uvicorn
from starlette.types import Message, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState
from websockets.frames import Frame, Opcode
from websockets.server import ServerProtocol

from chat.callers import address
from chat.direct import EXTENSION, Sleeper
from chat.errors import StartupError
from chat.formats.events import encode
from chat.limits import Crowd
from chat.settings import Settings, read_settings

STARTUP_FAILURE = 3  # the exit status by which uvicorn's parent process knows that a new worker would fail as well
WRITE_BUFFER = 16_384  # bytes that wait in a connection before its reader counts as blocked; later text merges
UNSENT = 8_192  # bytes the kernel takes beyond those on their way: without a limit, pings wait behind megabytes
PATIENCE = 10.0  # seconds for the head of a request; a socket has as long to authenticate
PIECE = 4096  # bytes parsed at once: the limits are checked between two pieces, and one read may bring 256 KiB
HEAD_MAX = 32_768  # bytes of a head or of trailers: enough for every cookie a browser keeps
LINES_MAX = 128  # header lines
BODY_RATE = 500  # bytes a second: a slower body is refused; a phone with a bad signal is faster
BODY_PATIENCE = 6  # times PATIENCE that a body may take in all
PIPELINE_MAX = 32  # requests that wait for the answers before them
BODIES_MAX = 4 * 1024 * 1024  # bytes of unanswered bodies of one address: 16 of the largest
FRAMES_MAX = 500  # control frames and fragments a second of one socket: a few bytes each, but each costs CPU time
CONTROL = (Opcode.PING, Opcode.PONG, Opcode.CLOSE)
ACCEPT_QUEUE = 65_535  # connections that wait to be accepted; the kernel allows fewer, as net.core.somaxconn says
ACCEPTS = 8  # connections accepted in one pass of the loop: each copy costs a new connection 4 µs
DESCRIPTORS = 65_536  # descriptors we ask for: with an unlimited number some libraries loop over all of them


log = logging.getLogger("parley.servers")


# -- starting


def settings_or_exit() -> Settings:
    try:
        return read_settings()
    except StartupError as problem:
        print(f"parley: {problem}", file=sys.stderr)
        sys.exit(STARTUP_FAILURE)


def serve(settings: Settings, hello: Callable[[], None]) -> None:
    """Run uvicorn as the service needs it: small frames, no deflate, a bound on blocked sockets, a bounded stop.

    `hello` is called once the service listens, when the service is one process.
    """
    log.info("room for %d open connections and files", raise_descriptor_limit())
    listeners = _listen(settings)
    config = uvicorn.Config(
        "service:app",
        workers=settings.workers,
        http=HeadProtocol,
        ws=DirectProtocol,
        backlog=ACCEPT_QUEUE,
        ws_max_size=settings.frame_max,
        ws_per_message_deflate=False,
        ws_ping_interval=settings.ping_interval,
        ws_ping_timeout=settings.ping_timeout,
        timeout_graceful_shutdown=int(settings.drain + settings.storage_timeout) + 2,  # the drain is over sooner
        access_log=False,  # request lines carry tokens of clients that put them into the URL
        log_level="warning" if settings.log_level == "info" else settings.log_level,
        server_header=False,
        proxy_headers=False,  # the setting `trusted_proxies` alone decides which proxy is believed
    )
    if settings.workers > 1:
        from uvicorn.supervisors import Multiprocess

        parent = Multiprocess(config, sockets=listeners)
        parent.run()
        if any(worker.exitcode == STARTUP_FAILURE for worker in parent.processes):
            sys.exit(STARTUP_FAILURE)
        return

    class SingleServer(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            hello()

    SingleServer(config).run(sockets=listeners)


def _listen(settings: Settings) -> list[socket.socket]:
    """Return the listening socket and copies of its descriptor.

    In a pass of the loop libuv accepts one connection of each descriptor: a burst would wait for thousands of passes.
    """
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
    listener.listen(ACCEPT_QUEUE)
    listener.set_inheritable(True)
    return [listener, *(listener.dup() for _ in range(ACCEPTS - 1))]


def raise_descriptor_limit() -> int:
    """Raise the limit of open descriptors as far as this process may, and return it: many shells start with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    with contextlib.suppress(ValueError, OSError):  # macOS allows fewer than its limit says: then the limit stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def calm_the_collector() -> None:
    """Have the garbage collector look for cycles seldom: Python's default scans all objects again and again, in vain.

    Objects made at the start are never scanned; nearly all later objects have no cycles.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


# -- uvicorn's protocols, with their transport within reach


class Bounded(asyncio.Protocol):
    """A connection that buffers little for a slow reader. `blocked`: its buffers are full."""

    blocked = False
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(WRITE_BUFFER)
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
        self.blocked = False  # a lost transport never calls `resume_writing`: a writer would wait for ever

    async def writable_again(self) -> None:
        raise NotImplementedError

    async def drained(self, patience: float) -> None:
        """Wait until more may be written. Raises `TimeoutError` when nothing leaves for `patience` seconds."""
        while self.blocked:
            waiting = self.transport.get_write_buffer_size()
            try:
                async with asyncio.timeout(patience):
                    await self.writable_again()
            except TimeoutError:
                if self.transport.get_write_buffer_size() >= waiting:
                    raise


class ConsumerQueue(Sleeper):
    """The messages that wait for a consumer. Uvicorn's `asyncio.Queue` would cost 2.6 KB for each idle socket."""

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


class FrameParser(ServerProtocol):
    """The parser of `websockets`, but a close frame between two fragments is taken, as RFC 6455 allows it."""

    def recv_frame(self, frame: Frame) -> None:
        if frame.opcode is Opcode.CLOSE:
            self.current_size = None
        super().recv_frame(frame)


class DirectProtocol(Bounded, WebSocketsSansIOProtocol):
    """A socket that is written to without a task, and whose peer can cost us little CPU and memory."""

    _stuck = 0  # bytes in the buffer when a pong was late
    _rest = b""  # bytes that were read and are not parsed yet
    _second = 0  # the second of the loop's time in which `_frames` are counted
    _frames = 0  # control frames and fragments of this second
    sockets_of = Crowd()  # this worker's sockets by address; a peer that ignores our close is counted for seconds
    _address = ""  # the address under which the socket is counted; "" before

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.queue = ConsumerQueue()  # type: ignore[assignment]
        if not self.config.ws_per_message_deflate:
            self.conn = FrameParser(max_size=self.config.ws_max_size, logger=QUIET)

    def keepalive_timeout(self) -> None:
        """A pong is late while its ping waits behind a backlog that moves: such a reader is slow, not gone."""
        waiting = self.transport.get_write_buffer_size()
        if waiting and waiting != self._stuck:
            self._stuck = waiting
            self.pong_timer = self.loop.call_later(self.ping_timeout or 0, self.keepalive_timeout)
        else:
            super().keepalive_timeout()

    def data_received(self, data: bytes) -> None:
        self._rest += data
        if len(self._rest) > len(data):  # earlier bytes are not parsed yet: read no more from this peer until they are
            self.transport.pause_reading()
        else:
            self._take()

    def _take(self) -> None:
        """Parse one piece while the consumer keeps up; other connections come before the next piece."""
        if self.read_paused or self.transport.is_closing():
            return
        piece, self._rest = self._rest[:PIECE], self._rest[PIECE:]
        super().data_received(piece)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            self.transport.close()  # a head that the parser refused: nothing else would close this connection
        elif self._rest:
            self.transport.pause_reading()
            self.loop.call_soon(self._take)
        elif not (self.read_paused or self.transport.is_closing()):
            self.transport.resume_reading()

    async def receive(self) -> Any:
        """Give the consumer a message. Uvicorn's own `receive` would read more while bytes wait unparsed."""
        message = await self.queue.get()
        if self.read_paused and self.queue.empty():
            self.read_paused = False
            self._take()
        return message

    async def send(self, message: Any) -> None:
        await super().send(message)
        if self._rest and self.close_sent:
            self._take()  # the peer's answer to our close may be in it

    def handle_events(self) -> None:
        """Count control frames and fragments, which the consumer never sees, and end a socket that sends too many."""
        second = int(self.loop.time())
        if second != self._second:
            self._second, self._frames = second, 0
        self._frames += sum(
            [isinstance(each, Frame) and (not each.fin or each.opcode in CONTROL) for each in self.conn.events]
        )
        if self._frames > FRAMES_MAX:
            self.conn.events.clear()
            self.abort(4429, "too many frames")
        else:
            super().handle_events()

    def handle_ping(self) -> None:
        """Answer a ping unless the peer reads nothing: its pongs would fill our memory."""
        if self.blocked:
            self.conn.data_to_send()
        else:
            super().handle_ping()

    def send_receive_event_to_app(self) -> None:
        with contextlib.suppress(InvalidState):  # uvicorn would close for broken text; the peer has closed already
            super().send_receive_event_to_app()

    def start_keepalive(self) -> None:
        super().start_keepalive()
        self.response.headers.clear()  # these have been sent and would stay in memory

    def handle_connect(self, event: Any) -> None:
        settings = getattr(self.app, "settings", None)
        if settings is not None:
            forwarded = event.headers.get_all("X-Forwarded-For")
            self._address = address(self.client, forwarded, settings.trusted_proxies)
            # The consumer accepts a socket to say why it is refused, and the socket counts meanwhile: twice as many.
            if not self.sockets_of.enter(self._address, 2 * settings.sockets_per_address):
                self._reject(429, "rate_limited", "There are too many sockets from this address.")
                self.close_sent = True
                self.transport.close()
                return
        super().handle_connect(event)
        event.headers.clear()  # the scope has a copy; the parser would keep these as long as the socket lives
        # A client that negotiated compression needs each frame made for it alone.
        if self.handshake_initiated and not (self.handshake_complete or self.config.ws_per_message_deflate):
            self.scope["extensions"][EXTENSION] = self  # type: ignore[assignment]

    def send_500_response(self) -> None:
        """Answer a handshake that uvicorn aborts with an error in our shape."""
        if not (self.initial_response or self.handshake_complete):
            self._reject(503, "draining", "The service is restarting.")

    def _reject(self, status: int, code: str, sentence: str) -> None:
        response = self.conn.reject(status, encode({"error": code, "message": sentence, "detail": sentence}).decode())
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "application/json"
        self.conn.send_response(response)
        self.transport.write(b"".join(self.conn.data_to_send()))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._address:
            self.sockets_of.leave(self._address)

    async def writable_again(self) -> None:
        await self.writable.wait()

    def write(self, frames: bytes) -> None:
        """Write whole frames to an accepted socket, unless it is closing."""
        transport = self.transport
        if not (self.close_sent or transport.is_closing()):
            transport.write(frames)

    def abort(self, code: int = 1006, reason: str = "") -> None:
        """Close a socket whose peer reads nothing. The reason waits behind the unsent bytes; TCP decides how long."""
        if not (self.close_sent or self.disconnected):
            with contextlib.suppress(InvalidState):  # the peer has begun to close the socket
                self.conn.send_close(code, reason)
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = True
            self.transport.close()


class HeadProtocol(Bounded, HttpToolsProtocol):
    """A connection whose head, body and trailers are bounded in bytes, lines and time, and whose address has a share.

    Between two requests uvicorn's keep-alive counts.
    """

    connections_of = Crowd()  # this worker's connections
    bodies_of: Counter[str] = Counter()  # noqa: RUF012  # address → bytes of bodies not answered yet
    _waiting: asyncio.TimerHandle | None = None
    _address = ""  # once it is counted
    _begun = False  # a head has begun and is not complete
    _lines = 0  # of this head and its trailers
    _spare = 0  # bytes since the head began, or since the last byte of a body: chunk sizes and trailers
    _body = 0  # bytes of the body so far
    _checked = 0  # … when its rate was looked at last
    _checks = 0
    _held = 0  # bytes of it that count in `bodies_of`

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._address = address(self.client, (), 0)
        settings = getattr(self.app, "settings", None)
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        # Behind a proxy all come from its address; the gate counts their requests there.
        if settings is not None and not settings.trusted_proxies:
            most = min(settings.connections_per_address, most // 2)
        if not self.connections_of.enter(self._address, most):
            self._refuse(429, "rate_limited", "There are too many connections from this address.")
            return
        self._wait(self.transport.close)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        for start in range(0, len(data), PIECE):
            if self.parser is None or self.transport.is_closing():
                return
            self._parse(data[start : start + PIECE])
        if self._waiting is not None or self.parser is None:
            return
        # Most heads come in one piece: a timer each would be for nothing. An empty line ends uvicorn's keep-alive.
        answering = self.cycle is not None and not self.cycle.response_complete
        if self._begun or not (answering or self.timeout_keep_alive_task):
            self._wait(self.transport.close)
        elif answering and self.cycle.more_body:
            self._wait(self._check_body)

    def _parse(self, piece: bytes) -> None:
        self._spare += len(piece)
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
            else:
                self._stay(piece[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(400, "bad_request", "This is not HTTP as we understand it.")
        if self._spare > HEAD_MAX or self._lines > LINES_MAX:
            self._refuse(431, "too_large", "The head of this request is too large.")
        elif max(self.bodies_of.get(self._address, 0), self._body) > BODIES_MAX or len(self.pipeline) > PIPELINE_MAX:
            self._refuse(429, "rate_limited", "Too much is being sent from this address.")

    def _stay(self, rest: bytes) -> None:
        """Go on in HTTP/1.1 with a client that offers another protocol (h2c, say): the parser would skip its body."""
        lines = [b" ".join((self.parser.get_method(), self.url, b"HTTP/1.1"))]
        lines += [name + b": " + value for name, value in self.headers if name not in (b"upgrade", b"http2-settings")]
        self.parser = httptools.HttpRequestParser(self)
        self._parse(b"\r\n".join([*lines, b"", rest]))

    def _refuse(self, status: int, code: str, sentence: str) -> None:
        """Say why and close the connection; where an answer has begun, close without a word."""
        if self.transport.is_closing():
            return
        answering = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not (answering or self.pipeline):
            body = encode({"error": code, "message": sentence, "detail": sentence})
            head = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
            head += "Retry-After: 5\r\n" if status == 429 else ""  # the others would fail again
            head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()

    # -- the parser's callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun = True
        self._lines = self._spare = self._body = self._checked = self._checks = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self._lines += 1
        if self._begun and self._lines <= LINES_MAX:  # trailers are no headers: those have been judged already
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._begun = False
        self._done()
        if self.parser.should_upgrade() and not self._should_upgrade():
            return  # `_stay` begins again
        super().on_headers_complete()
        self._spare = 0
        if self.cycle is not None and self.cycle.scope is self.scope:  # else it becomes a socket
            self.scope["extensions"] = {EXTENSION: DirectAnswer(self, self.cycle)}  # type: ignore[dict-item]

    def on_body(self, body: bytes) -> None:
        self._spare = 0
        self._body += len(body)
        if not (self.cycle.response_complete or self.parser.should_upgrade()):
            self._held += len(body)
            self.bodies_of[self._address] += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._spare = 0
        self._done()
        if not (self.parser.should_upgrade() and not self._should_upgrade()):
            super().on_message_complete()

    def on_response_complete(self) -> None:
        self._give_back()
        super().on_response_complete()

    def shutdown(self) -> None:
        """Have the service end its answers while uvicorn waits for their readers."""
        self.app.begin_drain()
        super().shutdown()

    # -- what is counted and waited for

    def handle_websocket_upgrade(self) -> None:
        self._leave()  # a socket is counted by DirectProtocol and the consumer
        super().handle_websocket_upgrade()
        self.parser = None  # type: ignore[assignment]  # the two hold each other, and nothing else ends that here

    def connection_lost(self, exc: Exception | None) -> None:
        self._done()
        self._leave()
        super().connection_lost(exc)

    def _leave(self) -> None:
        self._give_back()
        if self._address:
            self.connections_of.leave(self._address)
            self._address = ""

    def _give_back(self) -> None:
        if self._held:
            self.bodies_of[self._address] -= self._held
            self._held = 0
            if not self.bodies_of[self._address]:
                del self.bodies_of[self._address]

    def _check_body(self) -> None:
        """Give up a body that comes too slowly or takes too long; one we do not read ourselves has time."""
        self._waiting = None
        self._checks += 1
        slow = self._body - self._checked < BODY_RATE * PATIENCE or self._checks >= BODY_PATIENCE
        if slow and not self.flow.read_paused:
            self._refuse(408, "bad_request", "The body of this request came too slowly.")
        else:
            self._checked = self._body
            self._wait(self._check_body)

    async def writable_again(self) -> None:
        await self.flow.drain()

    def _wait(self, then: Callable[[], None]) -> None:
        self._waiting = self.loop.call_later(PATIENCE, then)

    def _done(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class DirectAnswer:
    """The body of a streamed answer, which is written to without a task between its head and its last part."""

    def __init__(self, connection: HeadProtocol, cycle: RequestResponseCycle) -> None:
        self._connection = connection
        self._cycle = cycle

    @property
    def streams(self) -> bool:
        """Whether the answer's head is sent and announces a chunked body."""
        return self._cycle.chunked_encoding is True

    @property
    def blocked(self) -> bool:
        return self._connection.blocked

    async def drained(self, patience: float) -> None:
        """Wait until more may be written. Raises `TimeoutError` when nothing leaves for `patience` seconds."""
        await self._connection.drained(patience)

    def write(self, part: bytes) -> None:
        """Write a part, as a chunk: https://www.rfc-editor.org/rfc/rfc9112#section-7.1"""
        transport = self._cycle.transport
        if part and not transport.is_closing():  # an empty chunk would be the end
            transport.write(b"%x\r\n%b\r\n" % (len(part), part))

    def abort(self, code: int = 1006, reason: str = "") -> None:
        """Drop a reader that reads nothing. No reason can be given: unsent bytes stand before it."""
        self._cycle.transport.abort()


# -- servers without a lifespan, or with an opinion on close codes: Daphne


def end_first(end: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `end` before a server ends that runs no lifespan: its signals come here first and are passed on afterwards.

    Otherwise Daphne would cut every answer off and then wait for ever for the threads of SQLite's connections.
    """
    loop = asyncio.get_running_loop()
    ending: list[asyncio.Task[None]] = []  # one task, even if a platform sends the signal twice

    def begin(theirs: Any, number: int) -> None:
        def pass_on(ended: asyncio.Task[None]) -> None:
            signal.signal(number, theirs)
            signal.raise_signal(number)

        if not ending:
            ending.append(asyncio.create_task(end()))
            ending[0].add_done_callback(pass_on)

    def hear(theirs: Any, number: int, frame: Any) -> None:
        loop.call_soon_threadsafe(begin, theirs, number)

    with contextlib.suppress(ValueError):  # only the main thread can handle signals
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, functools.partial(hear, signal.getsignal(number)))


NEAREST = {1003: 4400, 1009: 4400, 1012: 4408}  # code → the one sent instead: clients treat both alike


def closing(send: Send) -> Send:
    """Send other close codes to a server that refuses the standard's own, as Daphne does with all but 1000."""

    async def send_closing(message: Message) -> None:
        try:
            await send(message)
        except Exception:  # Daphne raises a bare Exception
            if message["type"] != "websocket.close" or message["code"] not in NEAREST:
                raise
            await send({**message, "code": NEAREST[message["code"]]})

    return send_closing


# -- logs


QUIET = logging.getLogger("parley.frames")  # DEBUG would print whole frames and heads: prompts and credentials
QUIET.setLevel(logging.WARNING)
REDACTED = re.compile(r"\b(token|anonymous_token|ticket|share_token|key)=[^&\s\"]+")


class Discreet(logging.Filter):
    """A server's log of its clients, without secrets and text that clients can inject.

    Some clients can put their token only into the URL, which is in the request line. For each text that is not UTF-8
    uvicorn would print a traceback, and for each handshake that we refuse an error; neither is a fault of ours.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        frames = record.levelno < logging.INFO and "websockets" in record.pathname
        if frames or text.startswith(("Invalid UTF-8 sequence", "ASGI callable returned without completing")):
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


LOQUACIOUS = ("aiosqlite", "websockets", "httpcore", "httpcore2", "httpx", "hpack", "python_multipart", "multipart")


def keep_logs_discreet() -> None:
    """Keep credentials out of the logs of every server we know."""
    for name in LOQUACIOUS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("uvicorn.error", "uvicorn.access", "hypercorn.access", "granian.access"):
        logging.getLogger(name).addFilter(Discreet())
    if "daphne.access" in sys.modules:
        _redact_daphne(sys.modules["daphne.access"].AccessLogGenerator)
