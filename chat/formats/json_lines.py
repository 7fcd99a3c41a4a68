"""JSON lines, an object per line: https://github.com/ndjson/ndjson-spec"""

from __future__ import annotations

from . import Format, one_line
from .events import event_json, resumed_json
from .tellings import Telling


class JsonLines(Format):
    content_type = "application/x-ndjson"

    @staticmethod
    def resumed(turn_id: str, cursor: str) -> bytes:
        return resumed_json(turn_id, cursor) + b"\n"

    @staticmethod
    def dialect(turn_id: str, tellings: list[Telling]) -> list[bytes]:
        return [b"".join([one_line(event_json(turn_id, telling)) + b"\n" for telling in tellings])]
