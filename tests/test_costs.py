"""What a turn costs, from the request to the row: asked of the service itself, with demo models that are paid for."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chat.store.budgets import prompt_tokens
from tests.conftest import CLOSED, STORES, store
from tests.harness import until
from tests.harness.api import Guest, call, guest, http, messages, new_session, post_turn, stop
from tests.harness.client import SocketReader
from tests.harness.journal import Journal
from tests.harness.service import Service
from tests.test_http import rows
from tests.vendors import Vendors

MODELS = [
    {"id": "quick", "provider": "demo", "paid": True, "pace": 0.001},
    {"id": "other", "provider": "demo", "paid": True, "pace": 0.001, "personality": "poet"},
    {"id": "free", "provider": "demo", "pace": 0.001},
]
MOST = 2048  # tokens of an answer, where nobody says


@pytest.fixture(scope="module", params=STORES)
def paid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    environment = CLOSED | store(request.param, request, tmp_path_factory.mktemp("paid"))
    environment |= {"PARLEY_MODELS": json.dumps(MODELS), "PARLEY_CHECKPOINT_EVERY": "0.1", "PARLEY_FIRST_TOKEN_TIMEOUT": "5"}
    with Service(environment, workers=1 if request.param == "sqlite" else 2) as running:
        yield running


async def talk(base: str, model: str = "quick", **body: Any) -> tuple[Guest, str]:
    someone = await guest(base)
    return someone, (await new_session(base, someone.access, model_a_id=model, **body))["id"]


def spent(service: Service, someone: Guest) -> int:
    found = rows(service, f"SELECT tokens FROM budgets WHERE name = 'account:{someone.id}'")
    return int(found[0][0]) if found else 0


async def settled(service: Service, someone: Guest, expected: int) -> None:
    """Far more is reserved while a turn runs; what is left comes back soon after."""
    await until(lambda: spent(service, someone) == expected, 5, f"{expected} tokens spent, of {spent(service, someone)}")


async def test_a_whole_answer_costs_what_its_provider_counts(paid: Service) -> None:
    """The demo's tokens are words: three asked, two said; then those, and what was said before, and four more."""
    someone, session = await talk(paid.url)
    await post_turn(paid.url, someone.access, session, "/echo one two")
    await settled(paid, someone, 3 + 2)
    await post_turn(paid.urls[-1], someone.access, session, "/echo one two three")
    await settled(paid, someone, 3 + 2 + (3 + 2 + 4) + 3)


async def test_both_sides_of_a_battle_are_paid_for(paid: Service) -> None:
    someone = await guest(paid.url)
    session = await new_session(paid.url, someone.access, mode="compare", model_a_id="quick", model_b_id="other")
    await post_turn(paid.url, someone.access, session["id"], "/echo one two")
    await settled(paid, someone, 2 * (3 + 2))


@pytest.mark.parametrize("script", ["a question of plain words ", "एक लंबा सवाल ", "一个很长的问题 "])
async def test_a_stopped_answer_costs_its_bytes(paid: Service, script: str) -> None:
    """The prompt's, and those that came: stopping early was free once, and other scripts cost a fraction."""
    someone, session = await talk(paid.url)
    content = "/slow 0.05 " + script * 100
    journal = Journal()
    async with SocketReader(journal, "ann", paid.url, session, token=someone.access) as ann:
        await ann.event("session_state")
        await ann.say(content)
        await ann.tokens(3)
        assert await stop(paid.urls[-1], someone.access, session)
        await ann.turn_ended()
    said = (await messages(paid.url, someone.access, session))[1]["content"]
    await until(lambda: spent(paid, someone) < MOST + prompt_tokens([content]), 5, "given back")
    assert prompt_tokens([content]) + len(said.encode()) <= spent(paid, someone) < prompt_tokens([content]) + MOST


async def test_an_answer_stopped_in_silence_costs_as_much_as_it_might_have(paid: Service) -> None:
    someone, session = await talk(paid.url)
    journal = Journal()
    async with SocketReader(journal, "ann", paid.url, session, token=someone.access) as ann:
        await ann.event("session_state")
        await ann.say("/silent")
        await ann.event("message_update")
        await until(lambda: stop(paid.url, someone.access, session), 5, "something to stop")
        await ann.turn_ended()
    await settled(paid, someone, prompt_tokens(["/silent"]) + MOST)


async def test_a_completion_that_fails_in_silence_costs_its_prompt(paid: Service) -> None:
    """It was charged all it might have said."""
    someone = await guest(paid.url)
    body = {"model": "quick", "messages": [{"role": "user", "content": "/fail 0"}]}
    assert (await call(paid.url, "POST", "/v1/chat/completions", someone.access, json=body)).status_code == 502
    await settled(paid, someone, prompt_tokens(["/fail 0"]))


async def test_thoughts_aloud_are_paid_for_when_the_answer_is_stopped(tmp_path: Path) -> None:
    """Only what was shown of it counted: five thoughts of eleven characters come first."""
    with Vendors() as vendors:
        model = {"id": "thinker", "provider": "openai_chat", "base_url": f"{vendors.url}/v1", "model_code": "fake-reasoning"}
        environment = CLOSED | {"DATABASE_URL": f"sqlite:///{tmp_path / 'parley.db'}", "PARLEY_MODELS": json.dumps([model])}
        async with Service(environment) as service:
            someone, session = await talk(service.url, "thinker")
            content = "[[pace:0.05 tokens:1000]]"
            async with SocketReader(Journal(), "ann", service.url, session, token=someone.access) as ann:
                await ann.event("session_state")
                await ann.say(content)
                await ann.tokens(3)
                assert await stop(service.url, someone.access, session)
                await ann.turn_ended()
            said = (await messages(service.url, someone.access, session))[1]["content"]
            least = prompt_tokens([content]) + 5 * len("thinking 0 ") + len(said.encode())
            await until(lambda: spent(service, someone) < MOST, 5, "given back")
            assert least <= spent(service, someone) < least + 200


async def test_an_answer_made_again_is_paid_for_again(paid: Service) -> None:
    someone, session = await talk(paid.url)
    await post_turn(paid.url, someone.access, session, "/echo one two")
    reply = (await messages(paid.url, someone.access, session))[1]
    again = await call(paid.urls[-1], "POST", f"/api/messages/{reply['id']}/regenerate/", someone.access)
    assert again.status_code == 200
    await settled(paid, someone, 2 * (3 + 2))


async def test_a_second_call_is_paid_for_as_well(paid: Service) -> None:
    """The provider fails before its first word, twice: two prompts were sent."""
    someone, session = await talk(paid.url)
    await post_turn(paid.url, someone.access, session, "/fail 0")
    await settled(paid, someone, 2 * prompt_tokens(["/fail 0"]))


async def test_a_long_question_is_paid_for_whatever_the_answer(paid: Service) -> None:
    """Twelve prompts of 31,500 characters were free, as only what was shown was counted."""
    someone, session = await talk(paid.url)
    await post_turn(paid.url, someone.access, session, "/fail 1 " + "word " * 6000)
    assert spent(paid, someone) >= 30_000


async def test_silent_turns_of_free_models_hold_nothing(tmp_path: Path) -> None:
    """They held the whole service's budget, and everybody else was refused."""
    path = tmp_path / "parley.db"
    environment = CLOSED | {"DATABASE_URL": f"sqlite:///{path}", "PARLEY_MODELS": json.dumps(MODELS)}
    environment |= {"PARLEY_DAILY_TOKENS_SERVICE": "3000", "PARLEY_FIRST_TOKEN_TIMEOUT": "20"}
    async with Service(environment) as service:
        journal = Journal()
        for n in range(5):
            someone, session = await talk(service.url, "free")
            async with SocketReader(journal, f"r{n}", service.url, session, token=someone.access) as reader:
                await reader.event("session_state")
                await reader.say("/silent")
                await reader.event("message_update")
        someone, session = await talk(service.url)
        answers = [await post_turn(service.url, someone.access, session, "/echo paid") for _ in range(2)]
        assert [answer.status for answer in answers] == [200, 200]
        with sqlite3.connect(path) as database:
            held = database.execute("SELECT COUNT(*) FROM turns WHERE status = 'running'").fetchone()
        assert held == (5,)


async def test_one_address_cannot_take_the_whole_day(tmp_path: Path) -> None:
    """However many guests it makes; the address is nowhere to be read."""
    path = tmp_path / "parley.db"
    environment = CLOSED | {"DATABASE_URL": f"sqlite:///{path}", "PARLEY_MODELS": json.dumps(MODELS)}
    environment |= {"PARLEY_DAILY_TOKENS_ADDRESS": "3000", "PARLEY_TRUSTED_PROXIES": "1"}
    environment |= {"PARLEY_FIRST_TOKEN_TIMEOUT": "20"}  # what fails in silence is given back
    async with Service(environment) as service:
        fates = []
        customer = [f"2001:db8:1:{n}::1" for n in range(12)]  # a /48 counts as eight addresses
        for place in ("192.0.2.1", "192.0.2.1", "192.0.2.2", *customer):
            someone, session = await talk(service.url)
            body = {"session_id": session, "content": "/silent", "max_tokens": 2000}
            headers = {"X-Forwarded-For": place, "Accept": "text/event-stream"}
            fates.append(await _begun(service.url, someone.access, body, headers))
        assert fates == [200, 429, 200] + [200] * 11 + [429]
        someone = await guest(service.url)  # nor on another road
        said = {"model": "quick", "messages": [{"role": "user", "content": "/echo x"}], "max_tokens": 2000}
        for place, status in (("192.0.2.1", 429), ("192.0.2.3", 200)):
            headers = {"X-Forwarded-For": place}
            answer = await call(service.url, "POST", "/v1/chat/completions", someone.access, json=said, headers=headers)
            assert answer.status_code == status, answer.text
        with sqlite3.connect(path) as database:
            names = [name for (name,) in database.execute("SELECT name FROM budgets")]
        assert len([name for name in names if name.startswith("address:")]) >= 2
        assert not [name for name in names if "192.0.2" in name or "2001" in name]


async def _begun(base: str, token: str, body: dict[str, Any], headers: dict[str, str]) -> int:
    """The status a posted turn is answered with; its stream is left."""
    async with http(base, token) as client:
        async with client.stream("POST", "/api/messages/stream/", json=body, headers=headers) as response:
            return response.status_code
