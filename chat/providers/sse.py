"""The bytes of an answer to its events: server-sent events, without a vendor's SDK.

The SDKs split and decode what they carry in pure Python, three layers of it and a model of everything a vendor may
say, for 200 µs a token. An adapter wants five fields.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import re
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from io import IncrementalNewlineDecoder
from typing import Annotated, Any, TypeVar

import msgspec

from . import ProviderError

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # a number of tokens

EVENT_MAX = 3_000_000  # characters: the longest answer that is kept fits into one event, each character written as \u…
DATA = re.compile(r"^data(?:: ?(.*))?$", re.MULTILINE)  # a line of an event's data
DRAIN = 0.1  # seconds for the body's end after [DONE]: only a connection whose answer was read whole is used again


def decoder(kind: type[T]) -> Callable[[str], T]:
    """Return what reads an event's data. Raises `ValueError` for data of another shape than `kind`."""
    strict = msgspec.json.Decoder(kind).decode

    def decode(event: str) -> T:
        try:
            return strict(event)
        except msgspec.DecodeError:  # half of an emoji, or NaN in a field that nobody reads: json is less strict
            return msgspec.convert(json.loads(event), kind)

    return decode


class Splitter:
    """Bytes in, in whatever pieces they come; out, the data of every event that they complete."""

    def __init__(self) -> None:
        utf8 = codecs.getincrementaldecoder("utf-8-sig")("replace")  # without the byte order mark some servers send
        self._decoder = IncrementalNewlineDecoder(utf8, translate=True)
        self._parts = [""]
        self._size = 0

    def feed(self, data: bytes, *, final: bool = False) -> list[str]:
        """Return the events that end in `data`. Raises `ProviderError` for an event without end."""
        text = self._decoder.decode(data, final=final)
        whole = "\n\n" in self._parts[-1][-1:] + text
        self._parts.append(text or self._parts.pop())
        self._size += len(text)
        if not whole:  # the parts wait unread: reading them each time would cost the square of an endless event
            if self._size > EVENT_MAX:
                raise ProviderError("provider_protocol")
            return []
        *blocks, rest = "".join(self._parts).split("\n\n")
        self._parts, self._size = [rest], len(rest)
        return [event for block in blocks if (event := "\n".join(DATA.findall(block)))]


class Events:
    """The events of a streamed response, one after the other, up to [DONE] or the end of the body."""

    def __init__(self, response: Any) -> None:
        self._response = response
        # The iterators that undo gzip and its like would cost each token of a plain stream 3 µs for nothing.
        encoded = "content-encoding" in response.headers
        self._bytes: AsyncGenerator[bytes, None] = response.aiter_bytes() if encoded else aiter(response.stream)
        self._splitter = Splitter()
        self._ready: deque[str] = deque()
        self._ended = False

    async def next(self) -> str | None:
        """Return the data of the next event, None after the last. An event that is not finished is none."""
        while not self._ready:
            if self._ended:
                return None
            data = await anext(self._bytes, b"")
            self._ended = not data
            self._ready.extend(self._splitter.feed(data, final=self._ended))
        event = self._ready.popleft()
        if event.startswith("[DONE]"):
            await self._drain()
            return None
        return event

    async def _drain(self) -> None:
        with suppress(Exception):  # whatever the connection does now, the answer is whole
            async with asyncio.timeout(DRAIN):
                async for _ in self._bytes:
                    pass

    async def aclose(self) -> None:
        try:
            await self._bytes.aclose()
        finally:
            await self._response.aclose()
