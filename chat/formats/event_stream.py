"""Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

from __future__ import annotations

from . import EventFormat, one_line
from .events import event_json, resumed_json
from .tellings import Telling


class EventStream(EventFormat):
    opening = b": ok\nretry: 1000\n\n"
    closing = b"event: done\ndata: {}\n\n"

    @staticmethod
    def resumed(turn_id: str, cursor: str) -> bytes:
        return _event(cursor, resumed_json(turn_id, cursor))

    @staticmethod
    def dialect(turn_id: str, tellings: list[Telling]) -> list[bytes]:
        return [b"".join([_event(telling.cursor, event_json(turn_id, telling)) for telling in tellings])]


def _event(cursor: str, data: bytes) -> bytes:
    kind = data[9 : data.index(b'"', 9)]  # {"type":"<kind>"
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (cursor.encode(), kind, one_line(data))
