"""The bytes of an answer to its events: server-sent events, without a vendor's SDK.

The SDKs split and decode what they carry in pure Python, three layers of it and a model of everything a vendor may
say, for 200 µs a token. An adapter wants five fields.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, TypeVar

import msgspec

from . import ProviderError

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # a number of tokens

EVENT_MAX = 3_000_000  # bytes: the longest answer that is kept fits into one event, each character written as \u…
DATA = re.compile(rb"^data(?:: ?(.*))?$", re.MULTILINE)  # a line of an event's data
DRAIN = 0.1  # seconds for the body's end after [DONE]: only a connection whose answer was read whole is used again


def decoder(kind: type[T]) -> Callable[[bytes], T]:
    """Return what reads an event's data. Raises `ValueError` for data of another shape than `kind`."""
    strict = msgspec.json.Decoder(kind).decode

    def decode(event: bytes) -> T:
        try:
            return strict(event)
        except ValueError:  # no UTF-8, half of an emoji, or NaN in a field that nobody reads: json is less strict
            return msgspec.convert(json.loads(event.decode(errors="replace")), kind)

    return decode


class Splitter:
    """Bytes in, in whatever pieces they come; out, the data of every event that they complete."""

    def __init__(self) -> None:
        self._mark = codecs.BOM_UTF8  # some servers begin with it
        self._return = b""  # a carriage return at the end of the last piece: a line feed may follow
        self._parts = [b""]
        self._size = 0

    def feed(self, data: bytes, *, final: bool = False) -> list[bytes]:
        """Return the events that end in `data`. Raises `ProviderError` for an event without end."""
        if self._return or b"\r" in data:
            data = self._return + data
            self._return = b"\r" if data.endswith(b"\r") and not final else b""
            data = data[: len(data) - len(self._return)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        whole = b"\n\n" in self._parts[-1][-1:] + data
        self._parts.append(data or self._parts.pop())
        self._size += len(data)
        if not whole:  # the parts wait unread: reading them each time would cost the square of an endless event
            if self._size > EVENT_MAX:
                raise ProviderError("provider_protocol")
            return []
        *blocks, rest = b"".join(self._parts).removeprefix(self._mark).split(b"\n\n")
        self._mark, self._parts, self._size = b"", [rest], len(rest)
        return [event for block in blocks if (event := b"\n".join(DATA.findall(block)))]


def reading(response: Any) -> Callable[[], Awaitable[bytes]] | None:
    """Return what waits for the next bytes of a plain response over aiohttp, b"" at the end; None for any other.

    The three iterators that the SDKs and httpx have above aiohttp's reader cost each token 5 µs.
    """
    reader = None if "content-encoding" in response.headers else response.stream
    for name in ("_stream", "_aiohttp_response", "content", "readany"):
        reader = getattr(reader, name, None)
    return reader


class Body:
    """The bytes of a streamed response. `read` waits for the next, b"" at the end."""

    def __init__(self, response: Any) -> None:
        self._response = response
        self._bytes: AsyncGenerator[bytes, None] = response.aiter_bytes()
        self.read = reading(response) or partial(anext, self._bytes, b"")

    async def drain(self) -> None:
        with suppress(Exception):  # whatever the connection does now, the answer is whole
            async with asyncio.timeout(DRAIN):
                while await self.read():
                    pass

    async def aclose(self) -> None:
        try:
            await self._bytes.aclose()
        finally:
            await self._response.aclose()
