"""What a day may cost: reserved before the call and settled after, exactly, however many ask at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from chat.errors import ChatError
from chat.settings import HERE, Model
from chat.store.budgets import (
    Budget,
    Meter,
    Refunds,
    Reservation,
    budgets_of,
    metered,
    prompt_tokens,
    reserve,
    tokens_of,
)
from chat.store.database import Database
from chat.store.queries import Query
from tests.conftest import STORES, store

DEMO = Model(id="demo", provider="demo")
REAL = Model(id="real", provider="openai_chat", max_tokens=300)
LIMITS = (1000, 2000, 3000)


@pytest.fixture(params=STORES)
async def databases(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[list[Database]]:
    """What two workers have of one database."""
    url = store(request.param, request, tmp_path)["DATABASE_URL"]
    async with AsyncExitStack() as stack:
        workers = [Database(url) for _ in range(2)]
        for worker in workers:
            await worker.connect()
            stack.push_async_callback(worker.disconnect)
            await worker.migrate((HERE / "models.sql").read_text())
        yield workers


async def take(
    database: Database, budgets: tuple[Budget, ...], tokens: int, daily_messages: int = 0
) -> Reservation | str:
    """The reservation, or the code of its refusal."""

    async def work(query: Query) -> Reservation:
        return await reserve(query, database.now(), budgets, tokens, daily_messages)

    try:
        return await database.transaction(work)
    except ChatError as problem:
        return problem.code


async def spent(database: Database) -> dict[str, int]:
    rows = await database.fetch_all("SELECT name, tokens FROM budgets WHERE tokens <> 0")
    return {row["name"]: row["tokens"] for row in rows}


# -- counting


@pytest.mark.parametrize("text", ["", "plain words", "नमस्ते दुनिया", "你好，世界", "👋🏽", "x9$k!", "\ud800"])
def test_no_script_is_cheaper_than_its_bytes(text: str) -> None:
    """A quarter of the characters, as it once was, made Devanagari and CJK cost a fraction of what was paid for them."""
    assert tokens_of(text) == len(text.encode("utf-8", "surrogatepass")) >= len(text)


def test_a_prompt_costs_its_texts_and_what_stands_around_them() -> None:
    assert prompt_tokens(["system", "hello"]) == len("systemhello") + 3 * 8


def test_a_reply_reserves_its_prompt_and_the_longest_answer() -> None:
    assert metered(REAL, ["hello"], 2000).most == prompt_tokens(["hello"]) + 300
    assert metered(REAL, ["hello"], 100).most == prompt_tokens(["hello"]) + 100
    assert metered(DEMO, ["hello"], 2000).most == 0


def test_a_provider_that_counts_is_believed() -> None:
    meter = Meter(100, 50)
    meter.call()
    meter.came("a long word")
    meter.told(31, 7)
    assert meter.spent == 38


@pytest.mark.parametrize("counts", [(None, None), (0, 0)])
def test_one_that_does_not_is_measured(counts: tuple[int | None, int | None]) -> None:
    meter = Meter(100, 50)
    meter.call()
    meter.came("नमस्ते")
    meter.told(*counts)
    assert meter.spent == 100 + 18


def test_a_stopped_answer_costs_its_input_and_all_that_came() -> None:
    meter = Meter(100, 50)
    meter.call()
    meter.came("twelve bytes")
    meter.cut()
    assert meter.spent == 112


def test_what_was_stopped_in_silence_may_have_thought_as_long_as_it_was_allowed() -> None:
    meter = Meter(100, 50)
    meter.call()
    meter.cut()
    assert meter.spent == 150


def test_what_a_model_may_have_thought_in_silence_is_paid_for_when_it_is_stopped() -> None:
    """It is told only at the end: an answer stopped at its first word was nearly free, whatever had gone before."""
    meter = metered(msgspec.structs.replace(REAL, thinks=True), ["hello"], 50)
    meter.call()
    meter.came("a word")
    meter.cut()
    assert meter.spent == meter.most


def test_a_call_that_was_never_begun_costs_nothing() -> None:
    meter = Meter(100, 50)
    meter.cut()
    assert meter.spent == 0


def test_a_call_that_fails_and_is_made_again_is_charged_its_input_twice() -> None:
    meter = Meter(100, 50)
    meter.call()
    meter.call()
    meter.came("four")
    assert meter.spent == 204
    meter.told(90, 2)
    assert meter.spent == 192


def test_a_demo_model_costs_nothing_whatever_it_says() -> None:
    meter = metered(DEMO, ["hello"], 2000)
    meter.call()
    meter.came("word " * 1000)
    meter.told(10, 1000)
    meter.cut()
    assert (meter.most, meter.spent) == (0, 0)


# -- reserving


async def test_together_they_never_pass_a_limit(databases: list[Database]) -> None:
    """A hundred at once on two workers, of ten accounts at five addresses: as many as the service's budget has room for."""
    asked = [take(databases[n % 2], budgets_of(f"{n % 10}", [(f"{n % 5}", 1)], LIMITS), 100) for n in range(100)]
    answers = await asyncio.gather(*asked)
    assert sum(isinstance(answer, Reservation) for answer in answers) == 30
    assert {answer for answer in answers if isinstance(answer, str)} == {"budget_exhausted"}
    assert (await spent(databases[0]))["service"] == 3000


async def test_an_address_has_a_share_however_many_accounts_it_makes(databases: list[Database]) -> None:
    answers = [await take(databases[0], budgets_of(f"{n}", [("office", 1)], LIMITS), 500) for n in range(6)]
    assert [isinstance(answer, Reservation) for answer in answers] == [True] * 4 + [False] * 2
    assert isinstance(await take(databases[1], budgets_of("7", [("home", 1)], LIMITS), 500), Reservation)


async def test_a_network_has_a_share_however_many_addresses_it_has(databases: list[Database]) -> None:
    """An IPv6 customer picks from 65,536 of what counts as an address."""
    asked = [budgets_of(f"{n}", [(f"home-{n}", 1), ("network", 1)], LIMITS) for n in range(6)]
    answers = [await take(databases[n % 2], budgets, 500) for n, budgets in enumerate(asked)]
    assert [isinstance(answer, Reservation) for answer in answers] == [True] * 4 + [False] * 2


async def test_an_account_has_a_share_wherever_it_comes_from(databases: list[Database]) -> None:
    answers = [await take(databases[n % 2], budgets_of("ann", [(f"{n}", 1)], LIMITS), 400) for n in range(3)]
    assert [isinstance(answer, Reservation) for answer in answers] == [True, True, False]


async def test_what_costs_nothing_holds_nothing_and_is_refused_nothing(databases: list[Database]) -> None:
    """Silent demo turns once held the service's whole budget; and a budget used up is no reason to refuse one."""
    for _ in range(30):
        assert isinstance(await take(databases[0], budgets_of("ann", [("home", 1)], LIMITS), 0), Reservation)
    assert await spent(databases[0]) == {}
    assert isinstance(await take(databases[0], budgets_of("ann", [("home", 1)], LIMITS), 1000), Reservation)
    assert await take(databases[0], budgets_of("ann", [("home", 1)], LIMITS), 1) == "budget_exhausted"
    assert isinstance(await take(databases[0], budgets_of("ann", [("home", 1)], LIMITS), 0), Reservation)


async def test_the_days_messages_are_counted_for_the_account_alone(databases: list[Database]) -> None:
    answers = [await take(databases[n % 2], budgets_of("ann", [("home", 1)], LIMITS), 0, 3) for n in range(5)]
    assert answers[3:] == ["daily_limit_reached"] * 2
    assert isinstance(await take(databases[0], budgets_of("ben", [("home", 1)], LIMITS), 0, 3), Reservation)


# -- settling


async def test_what_was_not_used_comes_back_and_what_was_used_beyond_is_taken(databases: list[Database]) -> None:
    """The day it was reserved on, from all three budgets, once."""
    refunds, budgets = Refunds(databases[0]), budgets_of("ann", [("home", 1)], LIMITS)
    held = await take(databases[0], budgets, 700)
    more = await take(databases[1], budgets, 200)
    assert isinstance(held, Reservation) and isinstance(more, Reservation)
    first, second = Meter(100, 600), Meter(150, 50)
    first.call()
    first.told(60, 40)
    refunds.settle(held, [first])
    for _ in range(2):
        second.call()
    refunds.settle(more, [second])
    await refunds.give_back()
    assert await spent(databases[1]) == dict.fromkeys(("account:ann", "address:home", "service"), 400)
    await refunds.give_back()
    assert (await spent(databases[0]))["service"] == 400
