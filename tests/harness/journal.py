"""What happened, in order: every frame of every reader, every fault put in, and what a reader found wrong.

One `Journal` per scenario, shared by its readers. Times are `time.monotonic()` seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

LINES = 400  # of a story: what a terminal can still be scrolled through
ALL = "*"  # the reader of entries that concern everybody


@dataclass(frozen=True)
class Entry:
    """`kind`, and what `data` holds:

    event: the event as it came. sent: a frame as it went. connect: url, cursor. closed: code, reason.
    refused: status, body, of an HTTP answer that was not a stream. unreachable: why.
    duplicate: message_id, offset, chunk, of text that was dropped. violation: rule, text. takeover: message_id, seen, stored.
    shrunk: message_id, seen, stored, where text that was shown is gone. fault, note: text.
    """

    at: float
    reader: str
    kind: str
    data: dict[str, Any]


@dataclass
class Journal:
    """`chunks=False` counts chunks and keeps none of them; what they said is in the views."""

    entries: list[Entry] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    chunks: bool = True
    heard: int = 0  # characters of text, by all readers

    def add(self, reader: str, kind: str, data: dict[str, Any]) -> Entry:
        entry = Entry(time.monotonic(), reader, kind, data)
        chunk = kind == "event" and data.get("type") == "message_chunk"
        if chunk:
            self.heard += len(data.get("chunk") or "")
        if self.chunks or not chunk:
            self.entries.append(entry)
        return entry

    def fault(self, text: str) -> float:
        """Write down what is being done to the system now; returns when."""
        return self.add(ALL, "fault", {"text": text}).at

    def note(self, text: str) -> float:
        return self.add(ALL, "note", {"text": text}).at

    def of(self, reader: str | None = None, *kinds: str) -> list[Entry]:
        """The entries of one reader, or of all, of these kinds, or of every kind."""
        return [e for e in self.entries if reader in (None, e.reader) and (not kinds or e.kind in kinds)]

    def events(self, reader: str | None = None, *types: str) -> list[dict[str, Any]]:
        """The events as they came, duplicates included."""
        found = (entry.data for entry in self.of(reader, "event"))
        return [event for event in found if not types or event.get("type") in types]

    def violations(self, reader: str | None = None, rules: Collection[str] = ()) -> list[Entry]:
        return [e for e in self.of(reader, "violation") if not rules or e.data["rule"] in rules]

    def readers(self) -> list[str]:
        """Their names, in the order they appeared."""
        return list(dict.fromkeys(entry.reader for entry in self.entries if entry.reader != ALL))

    def story(self, lines: int = LINES, only: Callable[[str], bool] = lambda text: True) -> str:
        """The whole timeline as text, one line per thing that happened, runs of chunks folded into one.

        only: whether to tell a line, by its reader or, for a fault or a note, by its text.
        """
        told = list(self._told(only))
        if len(told) > lines:
            head = lines // 3
            cut = len(told) - lines
            told = [*told[:head], f"          … {cut} lines left out …", *told[head - lines :]]
        return "\n".join(told)

    def _told(self, only: Callable[[str], bool]) -> Iterator[str]:
        width = max((len(name) for name in self.readers()), default=1)
        for start, end, reader, text in sorted(_folded(self.entries), key=lambda line: line[0]):
            if not only(reader if reader != ALL else text):
                continue
            when = f"{start - self.started:8.3f}" + (f"–{end - self.started:<8.3f}" if end > start else " " * 9)
            yield f"{when} {reader:<{width}}  {text}" if reader != ALL else f"{when} {'─' * width}── {text} ──────"


@dataclass
class _Run:
    """Chunks of one reader with nothing else of that reader, and no fault, between them."""

    start: float
    end: float = 0.0
    frames: int = 0
    characters: int = 0
    cursor: str = ""  # of the last
    sides: set[str] = field(default_factory=set)

    def add(self, at: float, event: dict[str, Any]) -> None:
        self.end, self.frames, self.cursor = at, self.frames + 1, str(event.get("cursor"))
        self.characters += len(event.get("chunk") or "")
        self.sides.add(str(event.get("participant") or "-"))

    def __str__(self) -> str:
        sides = "+".join(sorted(self.sides))
        return f"← {self.frames} × chunk {sides}, {self.characters} characters, to {_short_cursor(self.cursor)}"


Line = tuple[float, float, str, str]  # start, end, reader, text


def _folded(entries: list[Entry]) -> Iterator[Line]:
    runs: dict[str, _Run] = {}
    for entry in entries:
        if entry.kind == "event" and entry.data.get("type") == "message_chunk":
            runs.setdefault(entry.reader, _Run(entry.at)).add(entry.at, entry.data)
            continue
        for reader in list(runs) if entry.reader == ALL else [entry.reader]:
            if run := runs.pop(reader, None):
                yield run.start, run.end, reader, str(run)
        yield entry.at, entry.at, entry.reader, _said(entry)
    for reader, run in runs.items():
        yield run.start, run.end, reader, str(run)


def _said(entry: Entry) -> str:
    """One entry as one line."""
    data = entry.data
    match entry.kind:
        case "event":
            return f"← {_event(data)}"
        case "sent":
            return f"→ {_cut(data)}"
        case "violation":
            return f"!! {data['rule']}: {data['text']}"
        case "connect":
            return f"connects to {data['url']}" + (f" from {data['cursor']}" if data.get("cursor") else "")
        case "closed":
            return f"closed {data['code']} {data['reason']}".rstrip()
        case "fault" | "note":
            return data["text"]
        case "duplicate":
            return f"   dropped, has it: {data['message_id']} from {data['offset']}: {data['chunk']!r:.60}"
        case kind:
            return f"{kind} {_cut(data)}"


def _event(event: dict[str, Any]) -> str:
    kind = str(event.get("type"))
    where = f" {_short_cursor(event['cursor'])}" if "cursor" in event else ""
    match kind:
        case "message_complete":
            length = len((event.get("message") or {}).get("content") or "")
            reason = f"/{event['failure_reason']}" if event.get("failure_reason") else ""
            detail = f"{event.get('participant') or '-'} {event.get('status')}{reason} ({length} characters)"
        case "message_update":
            message = event.get("message") or {}
            detail = f"{message.get('role')} {message.get('participant') or ''} {message.get('id')}"
        case "session_state":
            turn = event.get("turn")
            held = [f"{m.get('status')}:{len(m.get('content') or '')}" for m in event.get("messages") or []]
            detail = f"{', '.join(held) or 'no messages'}; turn {turn and _short_cursor(turn['cursor'])}"
        case "resumed":
            return f"resumed from {_short_cursor(event.get('cursor'))}"
        case "turn_complete":
            detail = ""
        case _:
            detail = _cut({name: value for name, value in event.items() if name not in ("type", "requestId")})
    return f"{kind}{where} {detail}".rstrip()


def _short(name: str) -> str:
    """Enough of an id to tell it from the others: the end, as time-ordered ids begin alike."""
    return name if len(name) <= 12 else f"…{name[-6:]}"


def _short_cursor(cursor: object) -> str:
    turn_id, dot, place = str(cursor).partition(".")
    return f"{_short(turn_id)}{dot}{place}"


def _cut(data: dict[str, Any]) -> str:
    text = " ".join(f"{name}={value!r}" for name, value in data.items())
    return text if len(text) <= 160 else text[:159] + "…"
