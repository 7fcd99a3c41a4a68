"""Who meets whom: drawn by need and doubt, never a model that is failing, the same under the same seed."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from chat.arena.integrity import names_itself
from chat.arena.matches import draw, pick
from chat.arena.ratings import Rating
from chat.errors import ChatError
from chat.providers import ChatMessage, Limits, Providers, fighters, offered
from chat.settings import HERE, Model, Settings
from chat.store.database import Database
from chat.store.votes import Leaderboard

MODELS = ["ant", "bee", "cat", "dog"]
DRAWS = 6000


def rating(name: str, battles: int, lower: float | None = None, upper: float | None = None) -> Rating:
    middle = None if lower is None or upper is None else (lower + upper) / 2
    return Rating(name, middle, lower, upper, 1, battles, 0, 0, 0, 0, 0.0, True)


def shares(*ratings: Rating) -> dict[frozenset[str], float]:
    """How often each pair is drawn."""
    dice, rated = random.Random(7), {each.model: each for each in ratings}
    drawn = Counter(frozenset(pick(MODELS, rated, dice)) for _ in range(DRAWS))
    return {pair: number / DRAWS for pair, number in drawn.items()}


def test_unknown_models_all_meet_alike() -> None:
    found = shares()
    assert len(found) == 6
    assert all(abs(share - 1 / 6) < 0.02 for share in found.values())


def test_sides_are_shuffled_after_the_draw() -> None:
    dice = random.Random(7)
    firsts = Counter(pick(["ant", "bee"], {}, dice)[0] for _ in range(DRAWS))
    assert abs(firsts["ant"] / DRAWS - 0.5) < 0.02


def test_a_new_model_meets_others_more_often() -> None:
    """Weights 1/√(1 + n): with 99 battles behind the others, a pair with the new one is ten times as likely."""
    found = shares(*[rating(name, 99) for name in MODELS[1:]])
    new = sum(share for pair, share in found.items() if "ant" in pair)
    assert abs(new - 30 / 33) < 0.02


def test_pairs_nobody_can_tell_apart_meet_twice_as_often() -> None:
    apart = [rating(name, 50, at, at + 50) for name, at in zip(MODELS, (900, 920, 1100, 1300), strict=True)]
    found = shares(*apart)
    assert abs(found[frozenset({"ant", "bee"})] - 2 / 7) < 0.02
    assert abs(found[frozenset({"cat", "dog"})] - 1 / 7) < 0.02


def test_the_same_seed_draws_the_same_battles() -> None:
    first, second = random.Random(42), random.Random(42)
    assert [draw(MODELS, [], [], first) for _ in range(50)] == [draw(MODELS[::-1], [], [], second) for _ in range(50)]


def test_a_failing_model_is_not_drawn_while_two_others_are_well() -> None:
    dice = random.Random(7)
    drawn = {name for _ in range(200) for name in draw(MODELS, ["ant", "bee"], [], dice)}
    assert drawn == {"cat", "dog"}
    drawn = {name for _ in range(200) for name in draw(MODELS, ["ant", "bee", "cat"], [], dice)}
    assert drawn == set(MODELS)  # one alone is no battle: better a model that may fail than none


def test_a_battle_needs_two_models() -> None:
    with pytest.raises(ChatError) as refused:
        draw(["ant"], [], [rating("ant", 3)], random.Random(7))
    assert refused.value.code == "invalid"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("I am Gnat Prime and glad to help.", True),
        ("I'm GPT-4, a model by OpenAI.", True),
        ("As a large model trained by Anthropic, I cannot.", True),
        ("I was MADE BY insectia.", True),
        ("Gnats are made by nature; insects abound.", False),
        ("OpenAI and Anthropic publish papers.", False),
        ("I am gnatprimer than you.", False),
        ("", False),
    ],
)
def test_an_answer_that_names_its_model_or_maker_is_known(text: str, named: bool) -> None:
    assert names_itself(text, ["gnat", "Insectia", "Gnat Prime", "gp-1", ""]) is named


PLAIN = "plain words, and so on to the end. " * 6000


@pytest.mark.parametrize("text", ["as a ", "I'm ", "made by gp", "as a gp. ", "x"])
def test_an_answer_full_of_claims_is_judged_as_fast_as_any(text: str) -> None:
    """A vote is judged where every socket waits: a reply made to claim something at each word took twenty times as long."""
    text = (text * 200_000)[: len(PLAIN)]
    assert _cost(text) < 8 * _cost(PLAIN)


def _cost(text: str) -> float:
    """Processor seconds of this thread: what else the machine does is not in them."""
    spent = []
    for _ in range(5):
        began = time.thread_time()
        names_itself(text, ["gnat"])
        spent.append(time.thread_time() - began)
    return min(spent)


class Counting(Database):
    """Counts how often votes are read."""

    read = 0

    async def fetch_all(self, sql: str, values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        self.read += "FROM votes" in sql
        return await super().fetch_all(sql, values)


async def test_who_asks_together_waits_for_one_computation(tmp_path: Path) -> None:
    """A leaderboard of a million votes takes a while: a hundred pages that find it old must not each begin it."""
    database = Counting(f"sqlite:///{tmp_path / 'votes.db'}")
    await database.connect()
    try:
        await database.migrate((HERE / "models.sql").read_text())
        board = Leaderboard(database, 60.0)
        assert await asyncio.gather(*(board.standings("all_time", ("random",)) for _ in range(20))) == [[]] * 20
        once = database.read
        assert once and await board.standings("all_time", ("random",)) == [] and database.read == once
        await board.standings("daily", ("random",))
        assert database.read == 2 * once
    finally:
        await database.disconnect()


DEMOS = tuple(Model(id=id, provider="demo") for id in ("scholar", "poet"))
REAL = tuple(Model(id=id, provider="openai_chat") for id in ("gpt", "claude"))


@pytest.mark.parametrize(
    ("env", "demo_models", "models", "on_offer", "drawn"),
    [
        ("local", "auto", DEMOS, "scholar poet", "scholar poet"),
        ("production", "auto", DEMOS, "scholar poet", "scholar poet"),
        ("production", "auto", (*DEMOS, *REAL), "gpt claude", "gpt claude"),
        ("production", "auto", (*DEMOS, REAL[0]), "gpt", "gpt"),
        ("production", "always", (*DEMOS, *REAL), "scholar poet gpt claude", "gpt claude"),
        ("production", "always", (*DEMOS, REAL[0]), "scholar poet gpt", "scholar poet gpt"),
        ("local", "auto", (*DEMOS, *REAL), "scholar poet gpt claude", "gpt claude"),
    ],
)
def test_demo_models_stand_back_where_there_are_real_ones(
    env: str, demo_models: str, models: tuple[Model, ...], on_offer: str, drawn: str
) -> None:
    """In production they are not on offer beside them, and nowhere does one meet two real models in a battle."""
    settings = Settings(env=env, demo_models=demo_models, models=models)
    found = offered({model.id: model for model in models}, settings)
    assert (list(found), fighters(found)) == (on_offer.split(), drawn.split())


async def test_a_session_goes_on_with_a_model_that_is_no_longer_on_offer() -> None:
    """Its owner adds a key, and a conversation with a demo model must not end for it."""
    models = (*DEMOS, Model(id="gpt", provider="openai_chat", api_key_env="KEY"))
    providers = Providers(Settings(env="production", models=models), {"KEY": "sk-none"})
    assert list(providers.models) == ["gpt"]
    said: list[str] = []
    await providers.answer("poet", [ChatMessage("user", "/echo still here")], Limits(10), said.append, print)
    assert "".join(said) == "still here"
    await providers.close()
