"""What a cursor says. A client passes it on unread; the harness reads it, to see whether it is true. Pure.

`<turn_id>.<a>` or `<turn_id>.<a>.<b>`: how many characters (code points) of each reply a reader has, `e` for a reply
whose ending it was told; `<turn_id>.start` inside the turn's beginning, `<turn_id>.end` after its end.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

CURSOR = re.compile(r"([^.]+)\.(start|end|(?:[0-9]+|e)(?:\.(?:[0-9]+|e))?)")
STAGES = ("start", "text", "end")


@dataclass(frozen=True)
class Place:
    """`parts`: characters of each reply, side a first, `math.inf` for one that has ended; empty outside `text`."""

    turn_id: str
    stage: str
    parts: tuple[float, ...] = ()

    def is_before(self, other: Place) -> bool:
        """Whether a reader that was told `other` has more, of either side."""
        if self.stage != other.stage:
            return STAGES.index(self.stage) < STAGES.index(other.stage)
        if len(self.parts) != len(other.parts):
            return True
        return any(mine < theirs for mine, theirs in zip(self.parts, other.parts, strict=True))


def read_cursor(text: object) -> Place | None:
    """The cursor's place; None for what is no cursor."""
    found = CURSOR.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        return None
    turn_id, rest = found.groups()
    if rest in STAGES:
        return Place(turn_id, rest)
    return Place(turn_id, "text", tuple(math.inf if part == "e" else int(part) for part in rest.split(".")))


def characters(cursor: str | None) -> float:
    """Characters of all replies up to a cursor, `math.inf` once one has ended, 0 at a turn's beginning or without one."""
    place = read_cursor(cursor)
    if place is None or place.stage == "start":
        return 0
    return math.inf if place.stage == "end" else sum(place.parts)
