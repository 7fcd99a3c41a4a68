"""Dialects of a turn over HTTP: events in, bytes out. Pure; each file is one dialect.

A dialect is opened per response and asked with every span of new entries; those without memory share their bytes
among all followers in step.
"""

from __future__ import annotations

from ..errors import REPLY_SENTENCES
from ..live.events import Entry, TurnLog, entry_json


class Format:
    """How a response speaks: its content type, first and last bytes, and the dialect of what is between."""

    content_type = "application/x-ndjson"
    opening = b""
    closing = b""
    ping = b""

    @staticmethod
    def dialect(log: TurnLog, entries: list[Entry]) -> list[bytes]:
        raise NotImplementedError


def _sentence(log: TurnLog, entry: Entry) -> str:
    """What a reader is told of a reply that failed."""
    reason = log.bodies[entry.message_id]["failure_reason"] or "internal"
    return REPLY_SENTENCES.get(reason, REPLY_SENTENCES["internal"])


class EventStream(Format):
    """Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

    content_type = "text/event-stream; charset=utf-8"
    opening = b": ok\nretry: 1000\n\n"
    closing = b"event: done\ndata: {}\n\n"
    ping = b": ping\n\n"

    @staticmethod
    def dialect(log: TurnLog, entries: list[Entry]) -> list[bytes]:
        return [b"".join(_sse(log.id, entry) for entry in entries)]


LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


def _one_line(data: bytes) -> bytes:
    """JSON for clients that read lines: many (Python's `splitlines`, httpx) also end them at what JSON may hold."""
    for plain, escaped in LINE_ENDS:
        data = data.replace(plain, escaped)
    return data


def _sse(turn_id: str, entry: Entry) -> bytes:
    data = _one_line(entry_json(turn_id, entry))
    kind = data[9 : data.index(b'"', 9)]  # {"type":"<kind>"
    return b"id: %b.%d\nevent: %b\ndata: %b\n\n" % (turn_id.encode(), entry.seq, kind, data)


class JsonLines(Format):
    """One JSON object a line: https://github.com/ndjson/ndjson-spec"""

    @staticmethod
    def dialect(log: TurnLog, entries: list[Entry]) -> list[bytes]:
        return [b"".join(_one_line(entry_json(log.id, entry)) + b"\n" for entry in entries)]


class ArenaLines(Format):
    """The arena's own lines: `a0:"text"` and `ad:{…}`. Their escaping is not JSON: backslash, LF, and CR dropped."""

    content_type = "text/plain; charset=utf-8"

    @staticmethod
    def dialect(log: TurnLog, entries: list[Entry]) -> list[bytes]:
        return [b"".join(_arena_line(log, entry) for entry in entries)]


def _arena_line(log: TurnLog, entry: Entry) -> bytes:
    if entry.kind == "chunk":
        text = entry.text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "")
        return f'{entry.participant}0:"{text}"\n'.encode()
    if entry.kind != "complete":
        return b""
    message = log.bodies[entry.message_id]
    if message["status"] in ("success", "stopped"):
        return f'{entry.participant}d:{{"finishReason":"stop"}}\n'.encode()
    return f'{entry.participant}d:{{"finishReason": "error", "error": "{_sentence(log, entry)}"}}\n'.encode()


RULE = "\n\n────────\n\n"


class BareText(Format):
    """The answer's text alone, for `curl -N`: side a as it comes, then a rule and side b."""

    content_type = "text/plain; charset=utf-8"
    closing = b"\n"

    @staticmethod
    def dialect(log: TurnLog, entries: list[Entry]) -> list[bytes]:
        parts: list[str] = []
        for entry in entries:
            if entry.kind == "chunk" and entry.participant == "a":
                parts.append(entry.text)
            elif entry.kind == "complete" and log.bodies[entry.message_id]["status"] == "failed":
                parts.append(f"\n[{_sentence(log, entry)}]" if entry.participant == "a" else "")
            elif entry.kind == "end":
                other = next((id for id, body in log.bodies.items() if body["participant"] == "b"), None)
                parts.append("" if other is None else RULE + log.text(other))
        return ["".join(parts).encode()]
