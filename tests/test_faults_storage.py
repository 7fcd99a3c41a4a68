"""Storage that refuses, clocks that differ, keys that change, and many posts at once: exact counts on both stores."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.conftest import CLOSED, SECRET, STORES, absent, store
from tests.harness import until
from tests.harness.api import Guest, call, guest, http, messages, new_session, post_turn, stop
from tests.harness.chaos import KEY, models
from tests.harness.checker import Allowed, check, gather, read_rows
from tests.harness.client import SocketReader
from tests.harness.journal import Journal
from tests.harness.noise import prompt
from tests.harness.proxy import Direction, Link, Proxy
from tests.harness.scene import FLUENT, counted
from tests.harness.servers import Postgres, Redis
from tests.harness.service import Service
from tests.vendors import Vendors


@pytest.fixture(scope="module")
def vendors() -> Iterator[Vendors]:
    with Vendors() as running:
        yield running


def two_workers(name: str, request: pytest.FixtureRequest, folder: Path) -> dict[str, str]:
    """The environment of two workers on this kind of storage: SQLite with Redis beside it, or PostgreSQL."""
    redis: Redis = request.getfixturevalue("redis_server")
    return CLOSED | store(name, request, folder) | {"REDIS_URL": redis.url, "PARLEY_ENV": "local"}


@pytest.fixture(params=STORES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The environment of two workers whose model is a demo: to import a vendor's SDK takes a second."""
    return two_workers(request.param, request, tmp_path) | {"PARLEY_MODELS": json.dumps([FLUENT | {"id": "alpha"}])}


@pytest.fixture(scope="module", params=STORES)
def asking(
    request: pytest.FixtureRequest, vendors: Vendors, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """Two workers whose models are the vendor's, of one API."""
    alpha = models(vendors)[0]
    environment = two_workers(request.param, request, tmp_path_factory.mktemp("asking")) | {
        "PARLEY_MODELS": json.dumps([alpha, alpha | {"id": "beta"}]),
        "VENDOR_KEY": KEY,
        "PARLEY_FIRST_TOKEN_TIMEOUT": "10",  # no test here is about a vendor's clock
        "PARLEY_IDLE_TIMEOUT": "10",
    }
    with Service(environment, workers=2) as running:
        yield running


# -- a database that cannot write (row 14)


async def _refused(base: str, token: str, session: str) -> None:
    """A new turn is refused in time, in the one shape, as something to try again."""
    started = time.monotonic()
    answer = await post_turn(base, token, session, "/count 3")
    assert (answer.status, answer.error["error"]) == (503, "storage_unavailable"), answer.error
    assert time.monotonic() - started < 5.5
    assert "Retry-After" in answer.headers


@pytest.mark.slow
async def test_a_read_only_postgres_refuses_politely_and_recovers(postgres_server: Postgres, redis_server: Redis) -> None:
    """A running answer is said to its end and stored once it may be; new turns are refused meanwhile."""
    url, journal = postgres_server.create_database(), Journal()
    name = url.rpartition("/")[2]
    async with Service(CLOSED | {"DATABASE_URL": url, "REDIS_URL": redis_server.url}, workers=2) as service:
        token = (await guest(service.url)).access
        session, other = [(await new_session(service.url, token))["id"] for _ in range(2)]
        async with SocketReader(journal, "reader", service.urls[-1], session, token=token) as reader:
            await reader.say("/count 60")
            await reader.tokens(3)
            journal.fault("read-only")
            await postgres_server.sql(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
            await _drop_connections(postgres_server, name)
            for base in service.urls:
                await _refused(base, token, other)
                assert len((await call(base, "GET", "/api/sessions/", token)).json()) == 2  # reading goes on
            await reader.until(lambda: reader.view.texts() == [COUNTED], what="the whole text")
            journal.fault("writable again")
            await postgres_server.sql(f'ALTER DATABASE "{name}" SET default_transaction_read_only = off')
            await _drop_connections(postgres_server, name)
            await reader.turn_ended()
            answer = await post_turn(service.url, token, other, "/count 3")
            assert answer.status == 200 and answer.ended
            check(await gather(journal, [reader], url, logs=service.log()))


COUNTED = " ".join(f"⟨{n}⟩" for n in range(60))


async def _drop_connections(server: Postgres, database: str) -> None:
    """A setting of the database is for those who connect from now on."""
    await server.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid()", database
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "parley-test", str(place)]
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("needs to mount a small file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=False)


@pytest.mark.slow
async def test_a_full_disk_refuses_politely_and_recovers(small_disk: Path) -> None:
    """SQLite on a full disk: the text so far is shown and the reply ends as not saved; with room again all works."""
    url, journal, ballast = f"sqlite:///{small_disk / 'parley.db'}", Journal(), small_disk / "ballast"
    async with Service(CLOSED | {"DATABASE_URL": url}) as service:
        token = (await guest(service.url)).access
        session, other = [(await new_session(service.url, token))["id"] for _ in range(2)]
        async with SocketReader(journal, "reader", service.url, session, token=token) as reader:
            await reader.say("/count 60")
            await reader.tokens(3)
            journal.fault("disk full")
            _fill(ballast)
            await until(lambda: _is_refused(service.url, token, other), 10, "a refusal", journal.story)
            await _refused(service.url, token, other)
            await reader.until(lambda: reader.view.texts() == [COUNTED], what="the whole text")
            journal.fault("room again")
            ballast.unlink()
            await reader.turn_ended()
            answer = await post_turn(service.url, token, other, "/count 3")
            assert answer.status == 200 and answer.ended
            check(await gather(journal, [reader], url, logs=service.log()))
    with contextlib.closing(sqlite3.connect(small_disk / "parley.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def _fill(ballast: Path) -> None:
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)


async def _is_refused(base: str, token: str, session: str) -> bool:
    """The write-ahead log may have room for a few pages more."""
    return (await post_turn(base, token, session, "/count 1")).status == 503


# -- a change of which nobody knows whether it was made


class LosesCommits(Proxy):
    """A proxy before PostgreSQL. Once there is a `word`, the next transaction that names it is written, and its
    connection is reset in place of the answer to its COMMIT."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.word = b""
        self._naming: set[Link] = set()

    async def _carry(self, link: Link, direction: Direction, target: socket.socket, data: bytes) -> None:
        if direction == "to_server" and b"BEGIN;" in data:
            self._naming.discard(link)
        elif direction == "to_server" and self.word and self.word in data:
            self._naming.add(link)
        elif link in self._naming and self.word and b"COMMIT\0" in data:
            self.word = b""
            self._end(link, reset=True)
            await asyncio.sleep(0)  # cancelled here
        await super()._carry(link, direction, target, data)


async def test_readers_learn_of_a_change_without_an_answer(postgres_server: Postgres, redis_server: Redis) -> None:
    """The connection is lost behind COMMIT: the caller is told to come again, and what is stored is told everywhere."""
    url, journal, admin = postgres_server.create_database(), Journal(), "the-operators-token-of-these-tests"
    environment = CLOSED | {"DATABASE_URL": url, "REDIS_URL": redis_server.url, "ADMIN_TOKEN": admin}
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(LosesCommits.before(url))
        ways = [{"DATABASE_URL": proxy.through(url)}, {}]
        service = await stack.enter_async_context(Service(environment, workers=2, each=ways))
        here, there = service.urls
        someone = await guest(there)
        id = (await new_session(there, someone.access))["id"]

        async def lost(method: str, path: str, token: str, **body: Any) -> None:
            proxy.word = id.encode()
            answer = await call(here, method, path, token, json=body)
            assert (answer.status_code, answer.json()["error"], proxy.word) == (503, "storage_unavailable", b"")

        async def reader(name: str, base: str, **options: Any) -> SocketReader:
            return await stack.enter_async_context(SocketReader(journal, name, base, id, **options))

        own = [await reader(f"own {n}", base, token=someone.access) for n, base in enumerate(service.urls)]

        async def all_have(text: str) -> None:
            for each in own:
                await each.until(lambda each=each: each.view.texts()[-1:] == [text], 10, text)

        await lost("PATCH", f"/api/sessions/{id}/", someone.access, title="Rivers")
        for each in own:
            await each.until(lambda each=each: journal.events(each.name, "session_update"), 10, "the new title")
            assert journal.events(each.name, "session_update")[-1]["session"]["title"] == "Rivers"

        shared = await call(there, "POST", f"/api/sessions/{id}/share/", someone.access)
        query = {"share_token": shared.json()["share_token"]}
        guests = [await reader(f"guest {n}", base, query=query) for n, base in enumerate(service.urls)]
        await lost("POST", f"/api/sessions/{id}/unshare/", someone.access)
        for each in guests:
            await each.ended()
            assert each.codes == [4404]

        await call(there, "PATCH", f"/api/admin/sessions/{id}/", admin, json={"operator": "Anna"})
        key = (await call(there, "GET", f"/api/admin/sessions/{id}/", admin)).json()["token"]
        person = await reader("person", here, token=key)
        proxy.word = id.encode()
        await person.say("I am Anna.")
        await all_have("I am Anna.")
        await lost("POST", "/api/messages/stream/", someone.access, session_id=id, content="Who is there?")
        await all_have("Anna will answer you here.")
    assert not journal.violations(), journal.story()


# -- the same thing many times at once (rows 15 and 33)


@pytest.mark.slow
async def test_one_message_id_ten_times_is_one_turn(asking: Service, vendors: Vendors) -> None:
    """In parallel on two workers: one message, one call, ten equal streams."""
    token = (await guest(asking.url)).access
    for round in range(3):
        session = (await new_session(asking.url, token, model_a_id="alpha"))["id"]
        content, id = f"[[tokens:60 pace:0.01 id:m]] {session}", str(uuid.uuid4())
        answers = await asyncio.gather(
            *[post_turn(asking.urls[n % 2], token, session, content, id=id) for n in range(10)]
        )
        assert [answer.status for answer in answers] == [200] * 10
        assert {answer.turn_id for answer in answers} == {answers[0].turn_id}, round
        whole = "".join(f"⟨m:{n}⟩ " for n in range(60))
        assert [answer.sides() for answer in answers] == [{"a": whole}] * 10
        assert vendors.count(content) == 1
        rows = await messages(asking.url, token, session)
        assert [(row["role"], row["status"]) for row in rows] == [("user", "success"), ("assistant", "success")]
        later = await post_turn(asking.urls[1], token, session, content, id=id)
        assert later.turn_id == answers[0].turn_id and later.sides() == {"a": whole}
        assert vendors.count(content) == 1


@pytest.mark.slow
async def test_one_turn_runs_in_a_session_whoever_asks(asking: Service, vendors: Vendors) -> None:
    """Fifty different messages at once on two workers: one is answered, the others are told that it is busy."""
    token = (await guest(asking.url)).access
    session = (await new_session(asking.url, token, model_a_id="alpha"))["id"]
    posts = [
        asyncio.create_task(post_turn(asking.urls[n % 2], token, session, f"[[mode:stall]] {n} of {session}"))
        for n in range(50)
    ]
    await until(lambda: sum(post.done() for post in posts) == 49, 20, "the answers to all but one")
    assert await stop(asking.url, token, session)
    answers = await asyncio.gather(*posts)
    assert Counter(answer.status for answer in answers) == {200: 1, 409: 49}, [a.error for a in answers]
    assert {answer.error["error"] for answer in answers if answer.error} == {"busy"}
    assert len([call for call in vendors.calls if session in call.prompt]) == 1
    rows = await read_rows(_database(asking), session)
    assert [row.role for row in rows.messages] == ["user", "assistant"] and len(rows.turns) == 1


def _database(service: Service) -> str:
    return str((service.processes[0].env or {})["DATABASE_URL"])


PAID = {"PARLEY_MODELS": '[{"id": "paid", "provider": "demo", "paid": true}]'}  # a demo model that costs a budget


@pytest.mark.slow
async def test_the_daily_cap_is_exact(pair: dict[str, str]) -> None:
    """Fifty posts at once in fifty sessions with twenty messages a day: twenty are answered, whoever counts."""
    async with Service(pair | {"PARLEY_DAILY_MESSAGES": "20"}, workers=2) as service:
        someone = await guest(service.url)
        sessions = await _sessions(service, someone, 50)
        answers = await asyncio.gather(
            *[post_turn(service.urls[n % 2], someone.access, session, "/count 3") for n, session in enumerate(sessions)]
        )
        assert Counter(answer.status for answer in answers) == {200: 20, 403: 30}, [a.error for a in answers]
        assert {answer.error["error"] for answer in answers if answer.error} == {"daily_limit_reached"}
        assert len((await read_rows(pair["DATABASE_URL"])).turns) == 20


async def test_what_a_turn_did_not_use_is_there_for_the_next(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The budget is for one turn's `max_tokens` and a little more; the next one asks before the rest was written down."""
    environment = CLOSED | PAID | store("sqlite", request, tmp_path)
    async with Service(
        environment | {"PARLEY_DAILY_TOKENS_ACCOUNT": "2200", "PARLEY_CHECKPOINT_EVERY": "5"}
    ) as service:
        token = (await guest(service.url)).access
        session = (await new_session(service.url, token))["id"]
        answers = [await post_turn(service.url, token, session, f"/count {n}") for n in (2, 3, 4)]
        assert [answer.status for answer in answers] == [200] * 3, [answer.error for answer in answers]
        greedy = {"session_id": session, "content": "/count 5", "max_tokens": 8000}
        answer = await post_turn(service.url, token, session, "", body=greedy)
        assert (answer.status, answer.error["error"]) == (429, "budget_exhausted")


@pytest.mark.slow
async def test_what_was_not_used_comes_back_once(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Storage keeps the give-back waiting longer than anyone waits for it: it is tried again and done once."""
    environment = CLOSED | PAID | store("sqlite", request, tmp_path)
    async with Service(
        environment | {"PARLEY_CHECKPOINT_EVERY": "1", "PARLEY_STORAGE_TIMEOUT": "0.5"}
    ) as service:
        someone = await guest(service.url)
        sessions = [(await new_session(service.url, someone.access))["id"] for _ in range(2)]
        said = 2 + 1  # tokens in and out, as the model counts them

        def spent() -> int:
            row = other.execute("SELECT tokens FROM budgets WHERE name = ?", (f"account:{someone.id}",)).fetchone()
            return int(row[0])

        database = urlsplit(environment["DATABASE_URL"]).path[1:]
        with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
            await post_turn(service.url, someone.access, sessions[0], "/echo one")
            await until(lambda: spent() == said, 5, "a beat that gives back")  # the next one comes in a second
            await post_turn(service.url, someone.access, sessions[1], "/echo one")
            other.execute("BEGIN IMMEDIATE")
            assert spent() > 2 * said, "it is given back already"
            await asyncio.sleep(4)
            other.execute("ROLLBACK")
            await until(lambda: spent() == 2 * said, 5, "the tokens to come back")
            # what is written down now stands in line behind all that waited
            await new_session(service.url, someone.access)
            assert spent() == 2 * said


@pytest.mark.slow
async def test_turns_at_once_are_counted_exactly(pair: dict[str, str]) -> None:
    """Fifty sessions of one account asked at once, three may run: three do."""
    async with Service(pair | {"PARLEY_TURNS_PER_ACCOUNT": "3"}, workers=2) as service:
        someone = await guest(service.url)
        sessions = await _sessions(service, someone, 50)
        posts = {
            session: asyncio.create_task(post_turn(service.urls[n % 2], someone.access, session, "/count 2000"))
            for n, session in enumerate(sessions)
        }
        await until(lambda: sum(post.done() for post in posts.values()) == 47, 20, "the answers to all but three")
        for session in [session for session, post in posts.items() if not post.done()]:
            assert await stop(service.url, someone.access, session)
        answers = await asyncio.gather(*posts.values())
        refused = [answer.error["error"] for answer in answers if answer.status != 200]
        assert len(refused) == 47 and set(refused) == {"rate_limited"}, Counter(refused)


async def _sessions(service: Service, someone: Guest, count: int) -> list[str]:
    made = [new_session(service.urls[n % 2], someone.access, model_a_id="alpha") for n in range(count)]
    return [session["id"] for session in await asyncio.gather(*made)]


@pytest.mark.slow
async def test_positions_are_distinct_under_parallel_posts(asking: Service) -> None:
    """Twenty turns forced into one session from both workers: positions have no gap and no pair, in order of time."""
    token = (await guest(asking.url)).access
    session = (await new_session(asking.url, token, mode="compare", model_a_id="alpha", model_b_id="beta"))["id"]
    done: list[int] = []

    async def talk(base: str, n: int) -> None:
        while len(done) < 20:
            answer = await post_turn(base, token, session, f"[[tokens:2 id:m{n}x{len(done)}]] {uuid.uuid4()}")
            assert answer.status in (200, 409), answer.error
            if answer.status == 200:
                done.append(n)

    await asyncio.gather(*[talk(asking.urls[n % 2], n) for n in range(8)])
    rows = (await read_rows(_database(asking), session)).messages
    first = rows[0].position
    assert [row.position for row in rows] == list(range(first, first + 3 * len(done)))
    assert [row.role for row in rows] == ["user", "assistant", "assistant"] * len(done)


SLOW = """CREATE TRIGGER slow BEFORE INSERT ON turns BEGIN
    SELECT COUNT(*) FROM (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 200000) SELECT i FROM n);
END"""


async def test_turns_that_stand_in_line_are_not_refused(tmp_path: Path) -> None:
    """Each turn takes some hundredths of a second to write, so the last ones wait longer than storage may be silent."""
    file = tmp_path / "parley.db"
    limits = {"PARLEY_STORAGE_TIMEOUT": "0.5", "PARLEY_TURNS_PER_ACCOUNT": "100"}
    async with Service(CLOSED | {"DATABASE_URL": f"sqlite:///{file}"} | limits) as service:
        someone = await guest(service.url)
        sessions = [(await new_session(service.url, someone.access))["id"] for _ in range(24)]
        with contextlib.closing(sqlite3.connect(file)) as other:
            other.execute(SLOW)
        answers = await asyncio.gather(
            *[post_turn(service.url, someone.access, session, "/count 1") for session in sessions]
        )
    assert [answer.error for answer in answers if answer.status != 200] == []


async def test_a_locked_session_holds_up_nobody_else(postgres_server: Postgres, redis_server: Redis) -> None:
    """Eight posts wait for a row that somebody holds; others read and are answered meanwhile."""
    import asyncpg

    url = postgres_server.create_database()
    async with Service(CLOSED | {"DATABASE_URL": url, "REDIS_URL": redis_server.url}) as service:
        people = [await guest(service.url) for _ in range(2)]
        locked, free = [(await new_session(service.url, person.access))["id"] for person in people]
        other = await asyncpg.connect(url)
        try:
            await other.execute("BEGIN")
            await other.execute("SELECT * FROM sessions WHERE id = $1 FOR UPDATE", locked)
            posts = [asyncio.create_task(post_turn(service.url, people[0].access, locked, "/count 1")) for _ in range(8)]
            await until(lambda: _waiting(other), what="a post to wait")
            answer = await post_turn(service.url, people[1].access, free, "/count 3")
            assert answer.status == 200 and answer.ended
            assert len((await call(service.url, "GET", "/api/sessions/", people[0].access)).json()) == 1
            assert await _waiting(other) <= 1
        finally:
            await other.close()
        # A machine so slow that a post waited three seconds has told its client to come again.
        assert {(await post).status for post in posts} <= {200, 409, 503}
        assert (await post_turn(service.url, people[0].access, locked, "/count 1")).status == 200


async def _waiting(connection: Any) -> int:
    """How many connections to this database wait for a lock."""
    await connection.execute("SELECT pg_stat_clear_snapshot()")  # one transaction sees the same for ever otherwise
    return int(await connection.fetchval(
        "SELECT COUNT(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    ))  # fmt: skip


# -- clocks and keys (rows 35 and 36)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["postgres+redis"], indirect=True)  # SQLite's clock is its only machine's
@pytest.mark.parametrize("skew", ["-50", "+50"])
async def test_a_worker_whose_clock_is_wrong(pair: dict[str, str], skew: str) -> None:
    """50 seconds off: its tokens are good everywhere, leases are kept, turns are in order, a dead worker is noticed."""
    # A demo model: while an SDK is imported in a thread, a faked clock can keep all other threads waiting for a minute.
    pair = pair | {"PARLEY_MODELS": json.dumps([FLUENT | {"id": "alpha"}])}
    wrong = faked(FAKETIME=f"{skew}s")
    journal = Journal()
    async with Service(pair, workers=2, each=[{}, wrong]) as service:
        # The server writes the date of its answers once a second, later on a busy machine; 50 s are far from both.
        offset = await _clock_of(service.urls[1]) - time.time()
        assert abs(offset - int(skew)) < 25, "the clock is not faked"

        async def meet(mint: int, use: int) -> Guest:
            someone = await guest(service.urls[mint])
            assert (await call(service.urls[use], "GET", "/api/users/me/", someone.access)).status_code in (200, 404)
            session = (await new_session(service.urls[use], someone.access, model_a_id="alpha"))["id"]
            async with SocketReader(
                journal, f"of {use}", service.urls[use], session, token=someone.access, credentials="ticket"
            ) as reader:
                for n in range(2):
                    asked = "/count 150"  # longer than a lease
                    answer = await post_turn(service.urls[(mint + n) % 2], someone.access, session, asked)
                    assert answer.ended, answer.error
                    assert answer.events[-2]["failure_reason"] is None and answer.sides() == {"a": counted(150)}
                await reader.turn_ended(2)
                check(await gather(journal, [reader], pair["DATABASE_URL"], logs=service.log(), allowed=Allowed(running=True)))
            return someone

        _, someone = await asyncio.gather(meet(0, 1), meet(1, 0))
        for owner in (0, 1):
            session = (await new_session(service.urls[1 - owner], someone.access, model_a_id="alpha"))["id"]
            async with SocketReader(
                journal, f"orphan of {owner}", service.urls[1 - owner], session, token=someone.access
            ) as reader:
                posting = asyncio.create_task(
                    post_turn(service.urls[owner], someone.access, session, "/count 2000")
                )
                await reader.tokens(3)
                journal.fault(f"worker {owner} killed")
                async with prompt(5, service.worker(1 - owner).pid):  # lease 2, sweep 1, and what it takes
                    service.kill(owner)
                    await reader.turn_ended()
                posting.cancel()
                await asyncio.gather(posting, return_exceptions=True)
                await service.launch(owner)
                await gather(journal, [reader], pair["DATABASE_URL"], allowed=Allowed(codes=(1006,)))


@pytest.mark.slow
async def test_a_clock_that_is_set_ends_no_answer(pair: dict[str, str], tmp_path: Path) -> None:
    """A worker whose clock was set by a minute took the turns of the other one, until it asked for the time again.

    SQLite's clock is the machine's, which is set for all workers: each has to know before it looks at a lease.
    """
    clock = tmp_path / "clock"
    clock.write_text("+0\n")
    wrong = faked(FAKETIME_TIMESTAMP_FILE=str(clock), FAKETIME_NO_CACHE="1")
    right = {} if pair["DATABASE_URL"].startswith("postgres") else wrong
    clocks = {"PARLEY_LEASE": "10", "PARLEY_LEASE_RENEW": "3", "PARLEY_SWEEP_EVERY": "1"}  # as far apart as usual
    async with Service(pair | clocks, workers=2, each=[right, wrong]) as service:
        someone = await guest(service.url)
        session = (await new_session(service.url, someone.access, model_a_id="alpha"))["id"]
        posting = asyncio.create_task(post_turn(service.url, someone.access, session, "/count 350"))
        for offset in ("+60", "+0", "+120", "+60", "+180"):
            await asyncio.sleep(1.1)
            clock.write_text(f"{offset}\n")
        answer = await posting
        assert answer.events[-2]["status"] == "success" and answer.sides() == {"a": counted(350)}, service.log()[-3000:]


def faked(**clock: str) -> dict[str, str]:
    """The environment of a process whose clock says what libfaketime is told."""
    library = next((str(path) for path in Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
    if library is None or shutil.which("faketime") is None:
        absent("faketime is not installed")
    return {"LD_PRELOAD": str(library), "FAKETIME_DONT_FAKE_MONOTONIC": "1", "TZ": "UTC"} | clock


async def _clock_of(base: str) -> float:
    """A worker's time, as its answers are dated."""
    from email.utils import parsedate_to_datetime

    return parsedate_to_datetime((await call(base, "GET", "/livez")).headers["date"]).timestamp()


@pytest.mark.slow
async def test_keys_are_rotated_under_load(pair: dict[str, str]) -> None:
    """[old] → [old, new] → [new] by rolling restarts: no 401 for anybody who renewed in between."""
    new = "another-secret-key-of-more-than-32-characters"
    refused: list[str] = []
    done: Counter[str] = Counter()
    async with Service(pair | {"SECRET_KEY": SECRET}, workers=2) as service:
        people = [await guest(service.url) for _ in range(6)]
        tokens = {person.id: (person.access, person.refresh) for person in people}
        finished = asyncio.Event()

        async def use(person: Guest, client: httpx.AsyncClient) -> None:
            n = 0
            while not finished.is_set():
                n += 1
                with contextlib.suppress(httpx.TransportError):  # that worker is being restarted
                    headers = {"Authorization": f"Bearer {tokens[person.id][0]}"}
                    answer = await client.get(f"{service.urls[n % 2]}/api/sessions/", headers=headers)
                    done[person.id] += 1
                    if answer.status_code == 401:
                        refused.append(answer.text)
                await asyncio.sleep(0.03)  # a load, not all there is of the machine: workers start meanwhile

        async def renew() -> None:
            for person in people:
                answer = await call(
                    service.url, "POST", "/api/auth/refresh/", json={"refresh": tokens[person.id][1]}
                )
                body = answer.json()
                given = body.get("tokens", body)
                tokens[person.id] = given["access"], given.get("refresh", tokens[person.id][1])

        async def roll(keys: str) -> None:
            for n in range(2):
                service.processes[n].env = dict(service.processes[n].env or {}) | {"SECRET_KEY": keys}
                await service.restart(n)

        async with http(service.url) as client, asyncio.TaskGroup() as group:
            for person in people:
                group.create_task(use(person, client))
            await roll(f"{SECRET},{new}")
            await renew()
            await roll(new)
            seen = dict(done)
            await until(lambda: all(done[p.id] > seen[p.id] + 5 for p in people), 10, "requests with the new key")
            finished.set()
        assert not refused, refused[:3]
        old = await call(service.url, "GET", "/api/sessions/", people[0].access)
        assert (old.status_code, old.json()["error"]) == (401, "token_invalid")


