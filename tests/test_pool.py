"""PostgreSQL's few connections: what waits for a row somebody else holds takes them from nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from chat.store import database as door
from chat.store.budgets import Refunds, Reservation
from chat.store.database import Database, StorageUnavailable
from chat.store.queries import Call, Fate, PostgresQuery, Query
from tests.harness import until
from tests.harness.proxy import Proxy
from tests.harness.servers import Postgres

POOL = 5


@pytest.fixture
async def database(postgres_server: Postgres) -> AsyncIterator[Database]:
    database = Database(postgres_server.create_database(), pool_size=POOL)
    await database.connect()
    await database.execute("CREATE TABLE counts (name TEXT PRIMARY KEY, count INTEGER NOT NULL)")
    names = [f"row {n}" for n in range(8)]
    await database.transaction(
        lambda query: query.execute_many(
            "INSERT INTO counts (name, count) VALUES (:name, 0)", [{"name": name} for name in names]
        )
    )
    yield database
    await database.disconnect()


@pytest.fixture
async def holder(database: Database) -> AsyncIterator[asyncpg.Connection]:
    """Somebody who has all rows but the last locked, until a rollback."""
    other = await asyncpg.connect(database.url)
    await other.execute("BEGIN")
    await other.execute("SELECT * FROM counts WHERE name < 'row 7' FOR UPDATE")
    yield other
    await other.close()


async def count(database: Database, name: str, line: str | None = None, patience: float | None = 0.0) -> None:
    async def work(query: Query) -> None:
        await query.execute("UPDATE counts SET count = count + 1 WHERE name = :name", {"name": name})

    await database.transaction(work, line=line, patience=patience)


async def counted(database: Database, name: str) -> int:
    rows = await database.fetch_all("SELECT count FROM counts WHERE name = :name", {"name": name})
    return int(rows[0]["count"])


async def waiting(holder: asyncpg.Connection) -> int:
    """How many connections wait for a lock."""
    await holder.execute("SELECT pg_stat_clear_snapshot()")  # one transaction sees the same for ever otherwise
    return int(
        await holder.fetchval(
            "SELECT COUNT(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
    )


async def test_eight_writers_of_one_locked_row_hold_one_connection(
    database: Database, holder: asyncpg.Connection
) -> None:
    writing = [asyncio.create_task(count(database, "row 0", line="row 0")) for _ in range(8)]
    await until(lambda: waiting(holder), what="somebody to wait")
    await count(database, "row 7")
    assert await counted(database, "row 7") == 1 and await waiting(holder) == 1
    assert not any(each.done() for each in writing)
    await holder.execute("ROLLBACK")
    await asyncio.gather(*writing)
    assert await counted(database, "row 0") == 8


async def test_writers_of_many_locked_rows_leave_a_connection_to_readers(
    database: Database, holder: asyncpg.Connection
) -> None:
    writing = [asyncio.create_task(count(database, f"row {n % 7}")) for n in range(14)]
    await until(lambda: _all_wait(holder), what="all who may to wait")
    assert await asyncio.gather(*(counted(database, "row 7") for _ in range(20))) == [0] * 20
    assert not any(each.done() for each in writing)
    await holder.execute("ROLLBACK")
    await asyncio.gather(*writing)


async def _all_wait(holder: asyncpg.Connection) -> bool:
    return await waiting(holder) == POOL - 1


async def test_a_row_somebody_holds_does_not_make_storage_away(
    postgres_server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for it is told to come back; nobody believes that the database was gone."""
    monkeypatch.setitem(door.SERVER_SETTINGS, "lock_timeout", "200ms")
    database = Database(postgres_server.create_database())
    await database.connect()
    await database.execute("CREATE TABLE counts (name TEXT PRIMARY KEY, count INTEGER NOT NULL)")
    await database.execute("INSERT INTO counts (name, count) VALUES ('row', 0)")
    other = await asyncpg.connect(database.url)
    await other.execute("BEGIN")
    await other.execute("SELECT * FROM counts FOR UPDATE")
    try:
        with pytest.raises(StorageUnavailable):
            await count(database, "row", patience=None)
        assert not database.disturbed_at
    finally:
        await other.close()
        await database.disconnect()


async def test_a_caller_without_patience_for_its_line_has_done_nothing(
    database: Database, holder: asyncpg.Connection
) -> None:
    """What has not been begun is not begun later either: nobody would know of it."""
    first = asyncio.create_task(count(database, "row 0", line="row 0", patience=None))
    await until(lambda: waiting(holder), what="the first to wait")
    with pytest.raises(StorageUnavailable) as refused:
        await count(database, "row 0", line="row 0", patience=0.1)
    assert refused.value.__cause__ is None and not database.disturbed_at
    await holder.execute("ROLLBACK")
    await first
    await count(database, "row 0", line="row 0")
    assert await counted(database, "row 0") == 2


async def test_who_waits_to_the_end_gets_the_answer(postgres_server: Postgres) -> None:
    database = Database(postgres_server.create_database())
    await database.connect()

    async def work(query: Query) -> int:
        await query.fetch_all("SELECT pg_sleep(0.6)")
        return 7

    with pytest.raises(StorageUnavailable) as refused:
        await database.transaction(work, patience=0.2)
    assert isinstance(refused.value.__cause__, TimeoutError) and not refused.value.in_doubt
    assert await database.transaction(work, patience=None) == 7
    await database.disconnect()


async def test_a_write_that_was_refused_is_not_carried_out_later(
    database: Database, holder: asyncpg.Connection
) -> None:
    """Its caller has told an error, and perhaps made another change since."""
    with pytest.raises(StorageUnavailable) as refused:
        await count(database, "row 0", patience=0.2)
    assert not refused.value.in_doubt
    await holder.execute("ROLLBACK")
    await until(lambda: not database._running, what="the statement to end")
    assert await counted(database, "row 0") == 0


@pytest.fixture
async def proxy(database: Database) -> AsyncIterator[Proxy]:
    """A way to the database that can be stalled."""
    async with Proxy.before(database.url) as proxy:
        yield proxy


@pytest.fixture
async def away(database: Database, proxy: Proxy) -> AsyncIterator[Database]:
    """The database at the end of that way."""
    away = Database(proxy.through(database.url))
    await away.connect()
    yield away
    proxy.ok()
    await away.disconnect()


async def test_a_commit_on_its_way_is_waited_for(
    database: Database, proxy: Proxy, away: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It arrives when its caller's patience is over, and not before."""
    decide = Call.decide

    def decided(self: Call, fate: Fate) -> bool:
        if fate == "give up":
            proxy.ok()
        return decide(self, fate)

    async def work(query: Query) -> int:
        await query.execute("UPDATE counts SET count = 7 WHERE name = 'row 0'")
        proxy.stall("to_server")
        return 7

    monkeypatch.setattr(Call, "decide", decided)
    assert await away.transaction(work, patience=1.0) == 7
    assert await counted(database, "row 0") == 7


async def test_the_clock_is_right_after_a_stall(database: Database, proxy: Proxy, away: Database) -> None:
    """The answer was held up on its way: the time in it is long past."""
    proxy.stall("to_client")
    asyncio.get_running_loop().call_later(1.0, proxy.ok)
    await away.set_clock()
    assert abs(away.now() - database.now()) < 250


async def test_tokens_are_not_given_back_twice(
    database: Database, proxy: Proxy, away: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is lost after COMMIT and before the answer: nobody knows whether they were given back."""
    await database.execute("CREATE TABLE budgets (name TEXT, day TEXT, tokens BIGINT)")
    await database.execute("INSERT INTO budgets (name, day, tokens) VALUES ('service', 'today', 100)")
    refunds, execute_many = Refunds(away), PostgresQuery.execute_many
    refunds.settle(Reservation("today", ("service",), 40), [])

    async def committed() -> bool:
        return await database.fetch_all("SELECT tokens FROM budgets") == [{"tokens": 60}]

    async def cut() -> None:
        await until(committed, what="the COMMIT")
        proxy.rst()

    async def before_the_cut(self: PostgresQuery, *given: Any) -> None:
        await execute_many(self, *given)
        proxy.stall("to_client")
        cutting.append(asyncio.create_task(cut()))

    cutting: list[asyncio.Task[None]] = []
    with monkeypatch.context() as patch:
        patch.setattr(PostgresQuery, "execute_many", before_the_cut)
        with pytest.raises(StorageUnavailable) as lost:
            await refunds.give_back()
    assert lost.value.in_doubt
    proxy.ok()
    await refunds.give_back()
    assert await committed()


async def test_a_table_that_is_missing_for_a_moment_is_storage_that_is_away(database: Database) -> None:
    """A backup is put back: callers are told to come again, and no loop of a worker ends of it."""
    with pytest.raises(StorageUnavailable):
        await database.fetch_all("SELECT word FROM words")
    with pytest.raises(asyncpg.UndefinedColumnError):
        await database.fetch_all("SELECT word FROM counts")
