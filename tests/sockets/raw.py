"""A socket spoken byte by byte: what no client library would send."""

from __future__ import annotations

import asyncio
import itertools
import json
import struct
from typing import Any, Self
from urllib.parse import urlsplit


def frame(opcode: int, payload: bytes = b"", *, first: int = 0x80, mask: bool = True, claim: int = 0) -> bytes:
    """One frame: `first` are its flags, `claim` the length it says to have."""
    size = claim or len(payload)
    short = size if size < 126 else 126 if size < 65_536 else 127
    head = bytes([first | opcode, (0x80 if mask else 0) | short])
    head += {126: struct.pack("!H", size & 0xFFFF), 127: struct.pack("!Q", size)}.get(short, b"")
    return head + (b"\0\0\0\0" if mask else b"") + payload


class Raw:
    """A socket spoken byte by byte: what no client library would send."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: str) -> None:
        self.reader, self.writer, self.head = reader, writer, head
        self.status = int(head.split(" ", 2)[1])

    @classmethod
    async def open(cls, base: str, session_id: str, *headers: str, host: str | None = None) -> Self:
        parts = urlsplit(base)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        lines = [
            f"GET /ws/chat/session/{session_id}/ HTTP/1.1",
            f"Host: {parts.netloc if host is None else host}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            *headers,
        ]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        return cls(reader, writer, (await reader.readuntil(b"\r\n\r\n")).decode("latin-1"))

    def send(self, opcode: int, payload: bytes = b"", *, first: int = 0x80, mask: bool = True, claim: int = 0) -> None:
        self.writer.write(frame(opcode, payload, first=first, mask=mask, claim=claim))

    async def frame(self) -> tuple[int, bytes]:
        """The next frame that is no ping; those are answered."""
        while True:
            opcode, payload = await self._frame()
            if opcode != 9:
                return opcode, payload
            self.send(10, payload)

    async def _frame(self) -> tuple[int, bytes]:
        opcode, size = await self.reader.readexactly(2)
        if size == 126:
            (size,) = struct.unpack("!H", await self.reader.readexactly(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", await self.reader.readexactly(8))
        return opcode & 0x0F, await self.reader.readexactly(size)

    async def event(self, kind: str) -> dict[str, Any]:
        async with asyncio.timeout(5):
            while True:
                opcode, payload = await self.frame()
                if opcode == 1 and (event := json.loads(payload))["type"] == kind:
                    return event

    async def end(self, within: float = 5.0) -> tuple[int, str]:
        """The code and reason it is closed with; 1006 when the connection just ends."""
        try:
            async with asyncio.timeout(within):
                while True:
                    opcode, payload = await self.frame()
                    if opcode == 8:
                        return struct.unpack("!H", payload[:2])[0], payload[2:].decode()
        except (asyncio.IncompleteReadError, ConnectionError):
            return 1006, ""
        finally:
            self.close()

    async def code(self, within: float = 5.0) -> int:
        return (await self.end(within))[0]

    def close(self) -> None:
        self.writer.close()


async def handshake(base: str, *headers: str, host: str | None = None, session_id: str = "any") -> int:
    """The status it is answered with. Each comes from an address of its own: those before it may not be gone yet."""
    number = next(_callers)
    raw = await Raw.open(base, session_id, f"X-Forwarded-For: 10.1.{number // 250}.{number % 250}", *headers, host=host)
    raw.close()
    return raw.status


_callers = itertools.count()
