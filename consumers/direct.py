"""uvicorn's WebSocket protocol with its transport within reach: a frame is built once and written to many sockets.

Sending through ASGI costs a message, a frame and a task's wake-up per socket and token. `DirectProtocol` is given to
uvicorn as its `--ws` (`service.py` does); a consumer then finds itself in the scope's extensions. On any other server
there is none, and the consumer sends through ASGI.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from chat.events import Entry, TurnLog, socket_json

EXTENSION = "parley.direct"


class DirectProtocol(WebSocketsSansIOProtocol):
    """A socket that can be written to without a task. `blocked` while its kernel buffer and ours are full."""

    on_resume: Callable[[], None] | None = None

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if self.handshake_initiated and not self.handshake_complete:
            self.scope["extensions"][EXTENSION] = self  # type: ignore[assignment]

    @property
    def blocked(self) -> bool:
        return not self.writable.is_set()

    def write(self, frames: bytes) -> None:
        """Write whole frames, unless the socket is closing."""
        if self.handshake_complete and not (self.close_sent or self.disconnected or self.transport.is_closing()):
            self.transport.write(frames)

    def abort(self, code: int, reason: str) -> None:
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


def socket_frames(log: TurnLog, entries: list[Entry]) -> list[bytes]:
    """The dialect of direct sockets: every event of the span as finished frames, in one piece."""
    return [b"".join([framed(event) for event in socket_json(log, entries)])]
