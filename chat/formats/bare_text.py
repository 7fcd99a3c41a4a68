"""The answer's text alone, for `curl -N`: side a as it comes, then a rule and side b."""

from __future__ import annotations

from collections.abc import Sequence

from . import Format, sentence
from .tellings import Ended, Message, Over, Telling, Words

RULE = "\n\n────────\n\n"


class BareText(Format):
    closing = b"\n"

    @staticmethod
    def dialect(turn_id: str, tellings: list[Telling]) -> list[bytes]:
        return ["".join([_text(telling) for telling in tellings]).encode()]

    @staticmethod
    def broken_off(problem: str, sides: Sequence[str]) -> bytes:
        return f"\n[{problem}]\n".encode()


def _text(telling: Telling) -> str:
    if isinstance(telling, Words):
        return telling.text if telling.participant == "a" else ""
    if isinstance(telling, Ended):
        return _problem(telling.message) if telling.participant == "a" else ""
    if isinstance(telling, Over):
        others = [reply for reply in telling.messages if reply["participant"] == "b"]
        return "".join([RULE + reply["content"] + _problem(reply) for reply in others])
    return ""


def _problem(reply: Message) -> str:
    return f"\n[{problem}]" if (problem := sentence(reply)) else ""
