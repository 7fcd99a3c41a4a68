"""Which models answer in a session: what a client may choose, the same on every road to a turn."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Literal

import msgspec

from ..arena import matches
from ..errors import invalid
from ..providers import fighters
from ..store.sessions import MODES, Session
from ..store.votes import Leaderboard
from .generation import Generation

Mode = Literal["direct", "compare", "random"]


class Choice(msgspec.Struct, kw_only=True):
    """A client's choice. `model` is the one model of direct mode, by every name that other clients have for it."""

    mode: Mode | None = None
    model: str | None = None
    modelId: str | None = None
    model_id: str | None = None
    model_a_id: str | None = None
    model_b_id: str | None = None

    def __post_init__(self) -> None:
        self.model = self.model or self.modelId or self.model_id


def chosen(query: Mapping[str, str]) -> Choice:
    """Return the choice a URL's query makes. Raises `invalid`."""
    if query.get("mode") not in (None, *MODES):
        raise invalid("mode", f"expected one of {', '.join(MODES)}")
    return msgspec.convert({name: query[name] for name in Choice.__struct_fields__ if name in query}, Choice)


async def choose(
    choice: Choice, generation: Generation, leaderboard: Leaderboard, dice: random.Random
) -> tuple[Mode, tuple[str, str | None]]:
    """Return the mode and the models of a new session. Raises `invalid` naming the field."""
    mode, offered = choice.mode or "direct", generation.providers.models
    _check_model(choice, mode)
    if mode == "random":
        ratings = await leaderboard.standings("all_time", ("random",))
        return mode, matches.draw(fighters(offered), generation.outages(), ratings, dice)
    if mode == "direct" and choice.model_b_id is not None:
        raise invalid("model_b_id", "direct mode has one model")
    first = choice.model_a_id or choice.model or (next(iter(offered), None) if mode == "direct" else None)
    field = "model" if choice.model and not choice.model_a_id else "model_a_id"
    wanted = {field: first} | ({"model_b_id": choice.model_b_id} if mode == "compare" else {})
    for field, id in wanted.items():
        if id is None:
            raise invalid(field, f"{mode} mode needs a model here")
        if id not in offered:
            raise invalid(field, "there is no such model")
    if mode == "compare" and choice.model_a_id == choice.model_b_id:
        raise invalid("model_b_id", "compare mode needs two different models")
    assert first is not None
    return mode, (first, wanted.get("model_b_id"))


def check(session: Session, choice: Choice) -> None:
    """Refuse a choice that an existing session was not made with; a blind battle's client knows none, and is let be."""
    if choice.mode not in (None, session.mode):
        raise invalid("mode", f"this session is in {session.mode} mode")
    _check_model(choice, session.mode)
    if session.mode == "random":
        return
    for field, side in (("model", "a"), ("model_a_id", "a"), ("model_b_id", "b")):
        wanted = getattr(choice, field)
        if wanted is not None and (side not in session.sides or wanted != session.model(side).for_server()):
            raise invalid(field, "not this session's model")


def _check_model(choice: Choice, mode: str) -> None:
    if choice.model is not None and mode != "direct":
        raise invalid("model", f"{mode} mode has two models, model_a_id and model_b_id")
    if choice.model is not None and choice.model_a_id not in (None, choice.model):
        raise invalid("model", "model_a_id names another one")
