"""The bytes of an answer to its events: server-sent events, without a vendor's SDK.

The SDKs split and decode what they carry in pure Python, three layers of it and a model of everything a vendor may
say, for 200 µs a token. An adapter wants five fields.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from typing import Annotated, TypeVar

import msgspec

from . import ProviderError

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # a number of tokens

EVENT_MAX = 3_000_000  # bytes: the longest answer that is kept fits into one event, each character written as \u…
DATA = re.compile(rb"^data(?:: ?(.*))?$", re.MULTILINE)  # a line of an event's data


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
