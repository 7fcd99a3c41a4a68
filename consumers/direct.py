"""uvicorn's protocols with their transport within reach: a frame is built once and written to many sockets.

Sending through ASGI costs a message, a frame and a task's wake-up per socket and token. `DirectProtocol` is given to
uvicorn as its `--ws` (`service.py` does); a consumer then finds it in the scope's extensions. For streams over HTTP
`routes/head.py` has the like. On any other server there is none, and what is said goes through ASGI.
"""

from __future__ import annotations

import asyncio
import http
import socket
import struct
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from chat.direct import EXTENSION, Sleeper
from chat.formats.events import encode, event_json
from chat.formats.tellings import Telling

BACKLOG = 16_384  # bytes that wait here before a reader counts as blocked: what it has not got yet still merges
UNSENT = 8_192  # bytes the kernel takes beyond what is on its way; else it takes megabytes, and pings wait behind them


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
        if self.handshake_initiated and not self.handshake_complete:
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


def direct_of(scope: Any) -> DirectProtocol | None:
    found: DirectProtocol | None = scope.get("extensions", {}).get(EXTENSION)
    # A client that negotiated compression needs each frame made for it alone.
    return found if found is not None and not found.config.ws_per_message_deflate else None


def framed(payload: bytes) -> bytes:
    """A text frame from a server: final, unmasked (RFC 6455 §5.2)."""
    size = len(payload)
    if size < 126:
        return b"\x81" + bytes((size,)) + payload
    if size < 65536:
        return b"\x81\x7e" + struct.pack("!H", size) + payload
    return b"\x81\x7f" + struct.pack("!Q", size) + payload


def socket_frames(turn_id: str, tellings: list[Telling]) -> list[bytes]:
    """Speak to direct sockets: all events as finished frames, in one piece."""
    return [b"".join([framed(event_json(turn_id, telling)) for telling in tellings])]
