"""The bytes of a WebSocket frame as a server sends it. Pure."""

from __future__ import annotations

import struct


def framed(payload: bytes) -> bytes:
    """Return a text frame: final, unmasked (RFC 6455 §5.2)."""
    size = len(payload)
    if size < 126:
        return b"\x81" + bytes((size,)) + payload
    if size < 65536:
        return b"\x81\x7e" + struct.pack("!H", size) + payload
    return b"\x81\x7f" + struct.pack("!Q", size) + payload
