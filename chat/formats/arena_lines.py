"""The arena's own lines: `a0:"text"` and `ad:{…}`. Their escaping is not JSON: backslash, LF, and CR dropped."""

from __future__ import annotations

from collections.abc import Sequence

from . import Format, sentence
from .tellings import Ended, Telling, Words


class ArenaLines(Format):
    @staticmethod
    def dialect(turn_id: str, tellings: list[Telling]) -> list[bytes]:
        return ["".join([_line(telling) for telling in tellings]).encode()]

    @staticmethod
    def broken_off(problem: str, sides: Sequence[str]) -> bytes:
        return "".join([_failed(side, problem) for side in sides]).encode()


def _line(telling: Telling) -> str:
    if isinstance(telling, Words):
        text = telling.text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "")
        return f'{telling.participant}0:"{text}"\n'
    if not isinstance(telling, Ended):
        return ""
    if problem := sentence(telling.message):
        return _failed(telling.participant, problem)
    return f'{telling.participant}d:{{"finishReason":"stop"}}\n'


def _failed(side: str, problem: str) -> str:
    return f'{side}d:{{"finishReason": "error", "error": "{problem}"}}\n'
