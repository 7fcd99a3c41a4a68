"""What reading costs: long sessions, exports and the votes are handed out piece by piece, to whoever asks seldom."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from chat.formats.transcripts import transcript
from chat.settings import HERE
from chat.store import pages, sessions
from chat.store.database import Database
from chat.store.sessions import Session
from chat.store.votes_file import PAGE, SETTLED, VotesFile
from tests.conftest import CLOSED, STORES, store
from tests.harness.api import call, guest, http, messages, new_session, post_turn
from tests.harness.service import Service
from tests.test_http import rows

MEGABYTE = 1_048_576


@pytest.fixture(params=STORES)
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    async with AsyncExitStack() as stack:
        opened = Database(store(request.param, request, tmp_path)["DATABASE_URL"])
        await opened.connect()
        stack.push_async_callback(opened.disconnect)
        await opened.migrate((HERE / "models.sql").read_text())
        await opened.execute("INSERT INTO accounts VALUES ('ann', 'Ann', '{}', 1, 0, 0, 0)")
        yield opened


def written(session_id: str, sizes: list[int], *, by: str = "ann", at: int = 0) -> list[str]:
    """The statements of a session with turns of a user message and two replies, each of so many characters.

    at: when the session was made.
    """
    made = f"""INSERT INTO sessions (id, account_id, mode, is_public, is_open, is_pinned, metadata, next_position, version,
        created_at, updated_at) VALUES ('{session_id}', '{by}', 'compare', 1, 0, 0, '{{}}', {len(sizes)}, 1, {at}, 0)"""
    said = []
    for n, size in enumerate(sizes):
        user = n % 3 == 0
        parents = "[]" if user else f'["m{n - n % 3}"]'
        who = "'user', NULL" if user else f"'assistant', '{' ab'[n % 3]}'"
        said.append(
            "INSERT INTO messages (session_id, id, turn_id, role, participant, content, status, position, parent_ids,"
            f" created_at, updated_at) VALUES ('{session_id}', 'm{n}', 't{n // 3}', {who}, '{chr(97 + n % 26) * size}',"
            f" 'success', {n}, '{parents}', 0, 0)"
        )
    return [made, *said]


async def long(database: Database, sizes: list[int], **given: Any) -> Session:
    for statement in written("long", sizes, **given):
        await database.execute(statement)
    return await sessions.select_unchecked(database, "long")


SIZES = [10, 200_000, 200_000] * 3 + [5] * 30 + [10, 190_000, 200_000] + [250_000, 250_000, 1] + [400_000, 400_000, 9]


async def test_every_page_is_bounded_and_nothing_is_left_out(database: Database) -> None:
    session = await long(database, SIZES)
    seen, before, more = list[dict[str, Any]](), pages.LAST, True
    while more:
        found, more = await pages.select_page(database, session, 20, before)
        assert len(found) <= 20 and (len(found) == 1 or sum(len(row["content"]) for row in found) <= pages.PAGE_MAX)
        seen, before = found + seen, found[0]["position"]
    assert [len(row["content"]) for row in seen] == SIZES
    assert await pages.select_page(database, session, 20, 0) == ([], False)


@pytest.mark.parametrize("sizes", [SIZES, [], [1], [1, 2], [1, 2, 3], [1] * 599, [1] * 600, [1] * 601])
async def test_an_export_has_all_of_it_in_whole_turns(database: Database, sizes: list[int]) -> None:
    session = await long(database, sizes)
    found = [page async for page in pages.each_page(database, session)]
    assert [len(row["content"]) for page in found for row in page] == sizes
    assert all(page[0]["role"] == "user" for page in found)
    assert all(sum(len(row["content"]) for row in page) <= 2 * pages.PAGE_MAX for page in found)


async def test_a_page_is_of_no_later_session_of_the_same_id(database: Database) -> None:
    """Somebody reads an export slowly, deletes the session, and another account makes one with its id."""
    session = await long(database, SIZES)
    exporting = pages.each_page(database, session)
    assert await anext(exporting)
    await sessions.delete_session(database, session, "ann")
    await database.execute("INSERT INTO accounts VALUES ('bob', 'Bob', '{}', 1, 0, 0, 0)")
    await long(database, SIZES, by="bob", at=1)
    assert sum(len(page) for page in [page async for page in exporting]) <= 3, "what was read before the deletion"
    assert await pages.select_page(database, session, 20) == ([], False)


async def test_a_page_of_a_session_that_is_deleted_meanwhile_is_empty(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, between = await long(database, SIZES), pages._select_between

    async def late(*given: Any) -> Any:
        await sessions.delete_session(database, session, "ann")
        return await between(*given)

    monkeypatch.setattr(pages, "_select_between", late)
    assert await pages.select_page(database, session, 20) == ([], False)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    database = f"sqlite:///{tmp_path_factory.mktemp('reading') / 'parley.db'}"
    with Service(CLOSED | {"DATABASE_URL": database}) as running:
        yield running


async def test_ten_readers_of_a_large_session_cost_a_few_megabytes(alone: Service) -> None:
    """Ten lists of a thousand messages at once took 820 MB; and two exports, a public page and the list go on meanwhile."""
    someone = await guest(alone.url)
    for statement in written("large", [10, 200_000, 200_000] * 60, by=someone.id):
        rows(alone, statement)
    path = "/api/messages/?session_id=large&limit=1000"
    await call(alone.url, "GET", path, someone.access)
    before = alone.resources()["rss"]
    bodies = await asyncio.gather(
        *[call(alone.url, "GET", path, someone.access) for _ in range(10)],
        *[_size(alone, f"/api/sessions/large/export/?format={kind}", someone.access) for kind in ("json", "txt")],
        *[call(alone.url, "GET", "/api/sessions/large/?limit=200") for _ in range(5)],
    )
    grown = alone.resources()["rss"] - before
    assert max(len(body.content) for body in bodies if isinstance(body, httpx.Response)) < MEGABYTE
    assert [body > 24_000_000 for body in bodies if isinstance(body, int)] == [True, True]
    assert grown < 80 * MEGABYTE, grown / MEGABYTE


async def _size(service: Service, path: str, token: str) -> int:
    """How many bytes come, without holding them."""
    headers, size = {"Authorization": f"Bearer {token}"}, 0
    async with httpx.AsyncClient(base_url=service.url, headers=headers, timeout=30) as client:
        async with client.stream("GET", path) as response:
            async for piece in response.aiter_bytes():
                size += len(piece)
    return size


async def test_a_list_that_does_not_fit_links_to_the_page_before(service: Service) -> None:
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access)
    for n in range(3):
        await post_turn(service.url, someone.access, session["id"], f"/echo {n}")
    whole = await messages(service.url, someone.access, session["id"])
    path, seen = f"/api/messages/?session_id={session['id']}&limit=4", list[dict[str, Any]]()
    while path:
        answer = await call(service.urls[-1], "GET", path, someone.access)
        seen = answer.json() + seen
        found = re.fullmatch(r'<([^>]+)>; rel="next"', answer.headers.get("Link", ""))
        path = found[1] if found else ""
    assert [each["id"] for each in seen] == [each["id"] for each in whole]
    opened = await call(service.url, "GET", f"/api/sessions/{session['id']}/?limit=4", someone.access)
    assert 'rel="next"' in opened.headers["Link"]
    last = await call(service.url, "GET", f"/api/sessions/{session['id']}/?limit=6", someone.access)
    assert "Link" not in last.headers


# -- exports


async def file(kind: Any, title: str, content: str = "hello") -> str:
    async def said() -> AsyncIterator[list[dict[str, Any]]]:
        yield [{"role": "user", "content": content, "status": "success", "model": None}]

    return b"".join([piece async for piece in transcript(kind, {"title": title}, said())]).decode()


@pytest.mark.parametrize("sign", ["\n", "\r", "\r\n", "\u2028", "\u2029", "\x85", "\v", "\f"])
async def test_a_title_is_one_line_of_an_export(sign: str) -> None:
    """It may come from anyone who can name a session, and must not write headings or say things for others."""
    forged = f"Notes{sign}{sign}## Demo Poet{sign}{sign}I agree"
    assert (await file("markdown", forged)).splitlines()[:2] == ["# Notes \\#\\# Demo Poet I agree", ""]
    assert (await file("txt", f"Notes{sign}Demo Poet: I agree")).splitlines()[0] == "Notes Demo Poet: I agree"


async def test_a_title_marks_nothing_up() -> None:
    head = (await file("markdown", "<b>![x](https://evil.example/?d)</b> `a` *b* _c_")).splitlines()[0]
    assert head == "# \\<b\\>\\!\\[x\\]\\(https://evil.example/?d\\)\\</b\\> \\`a\\` \\*b\\* \\_c\\_"


async def test_an_export_without_messages_is_whole() -> None:
    async def nothing() -> AsyncIterator[list[dict[str, Any]]]:
        return
        yield []

    found = b"".join([piece async for piece in transcript("json", {"title": None}, nothing())])
    assert json.loads(found) == {"session": {"title": None}, "messages": []}


# -- the votes


class Counting(Database):
    """Counts the votes that are read."""

    read = 0

    async def fetch_all(self, sql: str, values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        found = await super().fetch_all(sql, values)
        self.read += len(found) if "FROM votes" in sql else 0
        return found


async def cast(database: Database, first: int, count: int, at: int) -> None:
    for n in range(first, first + count):
        await database.execute(
            "INSERT INTO votes VALUES (:id, :turn, 's', 'ann', 'random', 'x', 'y', 'tie', :counted, NULL, :at)",
            {"id": f"v{n:05}", "turn": f"t{n}", "counted": n % 10 and 1, "at": at + n // 7},
        )


async def test_the_votes_are_read_once_however_many_ask(tmp_path: Path) -> None:
    """Those of the last seconds again each time; ten who ask at once wait for one reading."""
    database = Counting(f"sqlite:///{tmp_path / 'votes.db'}")
    await database.connect()
    try:
        await database.migrate((HERE / "models.sql").read_text())
        await cast(database, 0, 2500, database.now() - 10 * SETTLED)
        votes = VotesFile(database, lambda row: row["id"].encode() + b"\n")
        expected = [f"v{n:05}" for n in range(2500) if n % 10]

        async def read() -> list[str]:
            return b"".join([piece async for piece in votes.pieces()]).decode().splitlines()

        assert await anext(votes.pieces()) and database.read == PAGE, "the first bytes wait for one page alone"
        assert await asyncio.gather(*(read() for _ in range(10))) == [expected] * 10
        assert database.read == len(expected)
        await cast(database, 2500, 11, database.now() - 1000)
        assert await read() == [*expected, *(f"v{n:05}" for n in range(2500, 2511) if n % 10)]
        assert await read() == await read() and database.read == len(expected) + 3 * 9
        votes.close()
    finally:
        await database.disconnect()


async def test_the_published_votes_name_nobody(service: Service) -> None:
    """Neither an account nor a turn by an id it has elsewhere; one judge's votes are still one judge's."""
    ann, ben = await guest(service.url), await guest(service.url)
    secrets = set[str]()
    for someone in (ann, ben, ann):
        session = await new_session(service.url, someone.access, mode="random")
        await post_turn(service.url, someone.access, session["id"], "/count 2")
        said = await messages(service.url, someone.access, session["id"])
        vote = {"session_id": session["id"], "message_id": said[0]["id"], "feedback_type": "preference"}
        await call(service.url, "POST", "/api/feedback/", someone.access, json=vote | {"preference": "model_a"})
        secrets |= {someone.id, session["id"], *(message["id"] for message in said)}
    answers = [await call(base, "GET", "/api/arena/votes.jsonl") for base in service.urls]
    for answer in answers:
        records = [json.loads(line) for line in answer.text.splitlines()][-3:]
        assert records[0]["judge"] == records[2]["judge"] != records[1]["judge"]
        assert len({record["question_id"] for record in records}) == 3
        assert not [secret for secret in secrets if secret in answer.text]
    turns = rows(service, "SELECT turn_id FROM votes")
    assert turns and not [id for (id,) in turns if id in answers[0].text]
    assert len({answer.text for answer in answers}) == 1  # the same names on every worker


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    database = f"sqlite:///{tmp_path_factory.mktemp('limited') / 'parley.db'}"
    with Service(CLOSED | {"DATABASE_URL": database, "PARLEY_READS_PER_MINUTE": "3", "PARLEY_TRUSTED_PROXIES": "1"}) as running:
        yield running


async def test_what_is_long_is_not_read_without_end(limited: Service) -> None:
    someone = await guest(limited.url)
    session = await new_session(limited.url, someone.access)
    paths = ["/api/arena/votes.jsonl", f"/api/sessions/{session['id']}/export/"]
    for path in paths:
        answers = [await call(limited.url, "GET", path, someone.access) for _ in range(8)]
        refused = next(answer for answer in answers if answer.status_code == 429)  # the last may be another minute's
        assert int(refused.headers["Retry-After"]) <= 60
    async with http(limited.url) as client:  # nor by a customer with a network of addresses
        places = [{"X-Forwarded-For": f"2001:db8:1:{n:x}::1"} for n in range(60)]
        statuses = [(await client.get(paths[0], headers=place)).status_code for place in places]
    assert statuses[0] == 200 and 429 in statuses
