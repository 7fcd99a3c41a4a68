"""Server-sent events out of bytes that come as they like: the parsing rules of the HTML standard, and no I/O."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

LINE_END = re.compile(r"\r\n|\r|\n")


@dataclass
class SSEEvent:
    """`id` is the one this event carries, not the last one seen; None when it has none."""

    data: str
    event: str = "message"
    id: str | None = None


@dataclass
class SSEParser:
    """Feed it bytes, get the events that are complete. Comments and `retry` are kept for whoever asks."""

    comments: list[str] = field(default_factory=list)
    retry: int | None = None  # milliseconds
    last_id: str = ""
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8-sig")("replace")
    )
    _rest: str = ""
    _skip_newline: bool = False  # the last line ended in CR: an LF now belongs to it
    _data: list[str] = field(default_factory=list)
    _event: str = ""
    _id: str | None = None

    def feed(self, data: bytes) -> list[SSEEvent]:
        return [event for line in self._lines(self._decoder.decode(data)) for event in self._line(line)]

    def _lines(self, text: str) -> Iterator[str]:
        """The lines that are complete: they end in LF, CR, or both, even when a chunk ends between the two."""
        if self._skip_newline and text:
            text = text.removeprefix("\n")
            self._skip_newline = False
        text = self._rest + text
        start = 0
        for end in LINE_END.finditer(text):
            yield text[start : end.start()]
            start = end.end()
        self._skip_newline = self._skip_newline or (start == len(text) and text.endswith("\r"))
        self._rest = text[start:]

    def _line(self, line: str) -> Iterator[SSEEvent]:
        if not line:
            yield from self._dispatch()
            return
        name, colon, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "" if colon:
                self.comments.append(value)
            case "data":
                self._data.append(value)
            case "event":
                self._event = value
            case "id" if "\0" not in value:
                self._id = value
            case "retry" if value.isdecimal():
                self.retry = int(value)

    def _dispatch(self) -> Iterator[SSEEvent]:
        """An empty line: what has been gathered is an event, if it has data; an id counts even without."""
        if self._id is not None:
            self.last_id = self._id
        if self._data:
            yield SSEEvent("\n".join(self._data), self._event or "message", self._id)
        self._data, self._event, self._id = [], "", None
