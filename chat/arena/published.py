"""A counted vote as a line of the published file: FastChat's record of a battle, without its texts. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

WINNERS = {"model_a": "model_a", "model_b": "model_b", "tie": "tie", "both_bad": "tie (bothbad)"}  # FastChat's words


def vote_line(vote: Mapping[str, Any], name: Callable[[str, str], str]) -> bytes:
    """A vote as JSON, ended by a newline.

    name: a pseudonym by purpose and id. Accounts and turns have other ids elsewhere, where people see them: the file
    must not say how somebody voted. A deleted account's votes are each somebody's own.
    """
    judge = name("judge", vote["account_id"] or vote["turn_id"])
    record = {
        "question_id": name("question", vote["turn_id"]),
        "model_a": vote["model_a"],
        "model_b": vote["model_b"],
        "winner": WINNERS[vote["preference"]],
        "judge": f"arena_user_{judge}",
        "turn": max(1, vote["turn"]),
        "anony": vote["mode"] == "random",
        "language": "unknown",
        "tstamp": vote["created_at"] / 1000,
    }
    return msgspec.json.encode(record) + b"\n"
