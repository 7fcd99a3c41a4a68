"""Tokens over time: tickets that open one door, what revoking ends, what deleting an account leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from chat.errors import ChatError
from chat.tokens import LIFETIMES, Tokens
from tests.conftest import CLOSED, SECRET
from tests.harness import until
from tests.harness.api import Guest, call, guest, http, messages, new_session, post_turn, ticket
from tests.harness.client import SocketReader
from tests.harness.journal import Journal
from tests.harness.service import Service
from tests.harness.sse import SSEParser
from tests.test_http import rows, running


def at(second: float) -> Tokens:
    """The tokens of a worker whose clock shows this second."""
    return Tokens(["key-of-the-tests-0123456789abcdef"], lambda: second)


@pytest.mark.parametrize("kind", LIFETIMES)
def test_a_ticket_ends_when_it_says_and_others_a_minute_later(kind: str) -> None:
    """A minute more is for clocks that differ; a ticket's, from the database, do not."""
    text, end = at(0).make(kind, "ann"), LIFETIMES[kind] + (0 if kind == "ticket" else 60)
    assert at(end).verify(text, kind).id == "ann"
    with pytest.raises(ChatError) as refused:
        at(end + 1).verify(text, kind)
    assert refused.value.code == "token_expired"


def test_a_pseudonym_is_the_same_until_its_key_goes_and_another_for_another_purpose() -> None:
    old, both, new = Tokens(["old" * 12]), Tokens(["old" * 12, "new" * 12]), Tokens(["new" * 12])
    assert old.pseudonym("judge", "ann") == both.pseudonym("judge", "ann") != new.pseudonym("judge", "ann")
    assert len({old.pseudonym(purpose, name) for purpose in ("judge", "place") for name in ("ann", "ben")}) == 4


# -- tickets


async def spoken(service: Service) -> tuple[Guest, str, str]:
    """Somebody, their session with a turn, and the path of its stream."""
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access)
    await post_turn(service.url, someone.access, session["id"], "/echo one two three")
    return someone, session["id"], f"/api/sessions/{session['id']}/stream/"


async def read(base: str, path: str, text: str, cursor: str = "") -> httpx.Response:
    headers = {"Last-Event-ID": cursor} if cursor else {}
    return await call(base, "GET", path, params={"ticket": text}, headers=headers)


def cursors(answer: httpx.Response) -> list[str]:
    return [event.id for event in SSEParser().feed(answer.content) if event.id]


async def test_an_event_source_comes_back_with_the_address_it_has(service: Service) -> None:
    """With the cursor of the stream, on every worker, as often as it is cut; without it the ticket is used up."""
    someone, _, path = await spoken(service)
    text = await ticket(service.url, someone.access)
    first = await read(service.url, path, text)
    *before, last = cursors(first)
    for n, cursor in enumerate(before):
        again = await read(service.urls[n % len(service.urls)], path, text, cursor)
        assert again.status_code == 200 and cursors(again)[-1] == last
    assert (await read(service.urls[-1], path, text, last)).status_code == 204
    assert (await read(service.url, path, text)).json()["error"] == "token_invalid"


async def test_an_event_source_that_was_cut_before_its_first_event_comes_back(service: Service) -> None:
    """Nobody else does while the stream is open; and after its end the ticket is used up."""
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access)
    path, text = f"/api/sessions/{session['id']}/stream/", await ticket(service.url, someone.access)
    used = f"SELECT id FROM used_tokens WHERE id = '{Tokens([SECRET]).read(text, 'ticket').jti}'"
    async with running(service.url, someone.access, session["id"]) as following:
        for n in range(3):
            base = service.urls[n % len(service.urls)]
            async with http(base) as client, client.stream("GET", path, params={"ticket": text}) as opened:
                assert opened.status_code == 200
                assert (await read(service.urls[-1], path, text)).json()["error"] == "token_invalid"
            await until(lambda: not rows(service, used), 5, "the cut to be noticed")
        assert await following.stopped(service.url)
    assert (await read(service.url, path, text)).status_code == 200
    assert (await read(service.url, path, text)).json()["error"] == "token_invalid"


async def test_a_ticket_comes_back_to_its_own_stream_alone(service: Service) -> None:
    """Who reads it in a log lacks the cursor; with one of another session, or for another session, it opens nothing."""
    someone, _, path = await spoken(service)
    text = await ticket(service.url, someone.access)
    cursor = cursors(await read(service.url, path, text))[0]
    other = await new_session(service.url, someone.access)
    await post_turn(service.url, someone.access, other["id"], "/echo elsewhere")
    elsewhere = f"/api/sessions/{other['id']}/stream/"
    foreign = cursors(await read(service.url, elsewhere, await ticket(service.url, someone.access)))[0]
    for where, what in [(path, foreign), (path, "made-up.0"), (path, "0"), (elsewhere, foreign), (elsewhere, cursor)]:
        assert (await read(service.urls[-1], where, text, what)).json()["error"] == "token_invalid", (where, what)
    unused = await ticket(service.url, someone.access)
    assert (await read(service.url, path, unused, cursor)).status_code == 200  # the first time it needs no memory
    assert (await call(service.url, "POST", "/api/auth/revoke/", someone.access)).status_code == 204
    assert (await read(service.urls[-1], path, text, cursor)).json()["error"] == "token_invalid"


async def test_a_ticket_comes_back_after_its_answer_was_made_again(service: Service) -> None:
    """The turn of its cursor is gone. As with an access token, it is told the new turn from its start."""
    someone, session_id, path = await spoken(service)
    text = await ticket(service.url, someone.access)
    cursor = cursors(await read(service.url, path, text))[1]
    reply = (await messages(service.url, someone.access, session_id))[1]["id"]
    new = await call(service.url, "POST", f"/api/messages/{reply}/regenerate/?format=sse", someone.access)
    for base in (service.url, service.urls[-1]):
        again = await read(base, path, text, cursor)
        assert (again.status_code, again.headers["X-Turn-Id"]) == (200, new.headers["X-Turn-Id"])
        assert (again.headers["X-Cursor"], cursors(again)[-1]) == ("earliest", cursors(new)[-1])
    assert (await read(service.url, path, text, cursor.replace("0", "1"))).json()["error"] == "token_invalid"


async def test_a_ticket_opens_no_other_route(service: Service) -> None:
    someone, session_id, path = await spoken(service)
    text = await ticket(service.url, someone.access)
    for method, place in (
        ("GET", "/api/users/me/"), ("GET", "/api/sessions/"), ("POST", "/api/sessions/"), ("POST", "/api/auth/ticket/"),
        ("GET", f"/api/messages/?session_id={session_id}"), ("DELETE", "/api/users/me/"),
    ):  # fmt: skip
        answer = await call(service.url, method, place, params={"ticket": text, "session_id": session_id})
        assert answer.json()["error"] == "authentication_required", place
    assert (await read(service.url, path, text)).status_code == 200  # and it is not used up by trying


# -- the end of tokens, and of accounts


async def test_a_revoked_token_closes_what_it_opened(service: Service) -> None:
    """Sockets with 4401 on every worker, within seconds; a new guest is somebody else."""
    someone, session_id, _ = await spoken(service)
    journal = Journal()
    async with (
        SocketReader(journal, "one", service.urls[0], session_id, token=someone.access, resume=False) as one,
        SocketReader(journal, "two", service.urls[-1], session_id, token=someone.access, resume=False) as two,
    ):
        for reader in (one, two):
            await reader.event("session_state")
        assert (await call(service.url, "POST", "/api/auth/revoke/", someone.access)).status_code == 204
        for reader in (one, two):
            await reader.until(lambda reader=reader: reader.codes, 5, "the end")
            assert reader.codes == [4401]
    for base in service.urls:
        assert (await call(base, "POST", "/api/auth/refresh/", json={"refresh": someone.refresh})).status_code == 401


async def test_a_deleted_account_takes_everything_along_but_its_votes(service: Service) -> None:
    """Running answers are ended first; afterwards no row knows its id, and the vote counts on, nobody's."""
    someone, session_id, _ = await spoken(service)
    battle = await new_session(service.url, someone.access, mode="random")
    await post_turn(service.url, someone.access, battle["id"], "/count 3")
    user = (await messages(service.url, someone.access, battle["id"]))[0]
    vote = {"session_id": battle["id"], "message_id": user["id"], "feedback_type": "preference", "preference": "tie"}
    assert (await call(service.url, "POST", "/api/feedback/", someone.access, json=vote)).status_code == 201
    running = asyncio.create_task(post_turn(service.urls[-1], someone.access, session_id, "/slow 0.05 a long question"))
    await until_running(service, session_id)
    assert (await call(service.url, "DELETE", "/api/users/me/", someone.access)).status_code == 204
    answer = await asyncio.wait_for(running, 10)
    assert answer.status == 200
    for base in service.urls:
        assert (await call(base, "GET", "/api/users/me/", someone.access)).json()["error"] == "token_invalid"
    for table, column in {
        "accounts": "id", "sessions": "account_id", "turns": "account_id", "votes": "account_id",
    }.items():  # fmt: skip
        assert rows(service, f"SELECT COUNT(*) FROM {table} WHERE {column} = '{someone.id}'") == [(0,)], table
    assert rows(service, f"SELECT COUNT(*) FROM messages WHERE session_id IN ('{session_id}', '{battle['id']}')") == [(0,)]
    assert rows(service, f"SELECT COUNT(*) FROM budgets WHERE name LIKE '%{someone.id}%'") == [(0,)]
    assert rows(service, f"SELECT preference FROM votes WHERE session_id = '{battle['id']}'") == [("tie",)]


async def until_running(service: Service, session_id: str) -> None:
    async with asyncio.timeout(5):
        while rows(service, f"SELECT COUNT(*) FROM turns WHERE session_id = '{session_id}' AND status = 'running'") == [(0,)]:
            await asyncio.sleep(0.02)


# -- how often


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A production start with small limits."""
    environment = CLOSED | {
        "DATABASE_URL": f"sqlite:///{tmp_path_factory.mktemp('limited') / 'parley.db'}",
        "PARLEY_ENV": "production",
        "PARLEY_REFRESHES_PER_MINUTE": "5",
    }
    with Service(environment) as running:
        yield running


async def test_refreshing_without_end_is_refused(limited: Service) -> None:
    """By address, before the token is looked at: each was a row in the database once."""
    someone = await guest(limited.url)
    for text in (someone.refresh, "nonsense"):
        answers = [await call(limited.url, "POST", "/api/auth/refresh/", json={"refresh": text}) for _ in range(12)]
        refused = next(answer for answer in answers if answer.status_code == 429)  # the last may be another minute's
        assert int(refused.headers["Retry-After"]) <= 60
    assert rows(limited, "SELECT COUNT(*) FROM used_tokens") == [(0,)]
