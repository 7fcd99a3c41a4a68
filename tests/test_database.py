"""The door to storage by itself: who waits, for how long, and what a transaction may do."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sqlite3
import threading
import time
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from chat.errors import ChatError
from chat.store.database import Database, StorageUnavailable
from chat.store.queries import Query

SLOW = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 150000) SELECT COUNT(*) AS n FROM n"


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'a.db'}", timeout=0.3)
    await database.connect()
    await database.execute("CREATE TABLE words (word TEXT PRIMARY KEY)")
    yield database
    await database.disconnect()


async def say(database: Database, word: str, *, slowly: bool = False) -> None:
    async def work(query: Query) -> None:
        await query.execute("INSERT INTO words (word) VALUES (:word)", {"word": word})
        if slowly:
            await query.fetch_all(SLOW)

    await database.transaction(work)


async def words(database: Database) -> list[str]:
    return [row["word"] for row in await database.fetch_all("SELECT word FROM words ORDER BY word")]


async def test_who_stands_in_line_is_not_told_that_storage_is_away(database: Database) -> None:
    """A burst that takes longer than one call may: all of it is done."""

    def pause() -> None:  # the same time on every machine: a busy one would take 20 s for a thousand computations
        time.sleep(0.01)

    async def work(query: Query, n: int) -> None:
        await query.execute("INSERT INTO words (word) VALUES (:word)", {"word": f"{n:04}"})
        pause()

    await asyncio.gather(*(database.transaction(lambda query, n=n: work(query, n)) for n in range(100)))  # type: ignore[misc]
    assert len(await words(database)) == 100
    assert not database.disturbed_at


async def test_storage_that_answers_no_write_is_away_in_time(database: Database, tmp_path: Path) -> None:
    """Somebody else has the file's lock: reads go on, and writes must not wait for them."""
    with sqlite3.connect(tmp_path / "a.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        writing = [asyncio.create_task(say(database, f"{n}")) for n in range(3)]
        while not all(each.done() for each in writing):
            assert await words(database) == []
            assert time.monotonic() - began < 5
        assert [type(each.exception()) for each in writing] == [StorageUnavailable] * 3
        other.execute("ROLLBACK")
    await say(database, "again")
    assert await words(database) == ["again"], "a refused write was carried out later"


async def test_a_transaction_that_fails_leaves_nothing(database: Database) -> None:
    async def work(query: Query) -> None:
        await query.execute("INSERT INTO words (word) VALUES ('half')")
        raise LookupError("changed its mind")

    with pytest.raises(LookupError):
        await database.transaction(work)
    await say(database, "whole")
    assert await words(database) == ["whole"]


async def test_a_transaction_waits_for_its_statements_alone(database: Database) -> None:
    """On SQLite it runs in a thread: what waited there for the loop would wait for ever."""

    async def work(query: Query) -> None:
        await query.execute("INSERT INTO words (word) VALUES ('half')")
        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="waited for something else"):
        await database.transaction(work)
    assert await words(database) == []


async def test_a_caller_that_leaves_takes_nothing_along(database: Database) -> None:
    leaving = asyncio.create_task(say(database, "said", slowly=True))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await say(database, "too")
    assert await words(database) == ["said", "too"]


async def test_calls_done_together_succeed_and_fail_by_themselves(database: Database) -> None:
    """What gathers while a visit goes on is done in the next one, each call in a transaction of its own."""
    await say(database, "5")
    calls = [asyncio.create_task(say(database, f"{n % 8}")) for n in range(16)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(each) for each in outcomes] == [
        ChatError if n > 7 or n == 5 else type(None) for n in range(16)
    ], "a word is taken once"
    assert await words(database) == [f"{n}" for n in range(8)]


async def test_a_long_read_holds_up_nobody(database: Database) -> None:
    """There are two connections that read, and who reads shortly does not stand behind who reads long."""
    gate = threading.Event()
    for connection in database._lines[True]._free:
        await connection.raw_connection.create_function("gate", 0, lambda: gate.wait(10))
    long = asyncio.create_task(database.fetch_all("SELECT gate() AS opened"))
    await asyncio.gather(*(database.fetch_all("SELECT 1 AS one") for _ in range(20)))
    assert not long.done()
    gate.set()
    assert await long == [{"opened": 1}]


async def test_who_is_done_is_told_before_the_rest(database: Database) -> None:
    """One that takes long must not make others look as if nobody had answered them."""
    told = [threading.Event() for _ in range(20)]

    async def one(n: int) -> None:
        async def work(query: Query) -> bool:
            await query.execute("INSERT INTO words (word) VALUES (:word)", {"word": f"{n:03}"})
            return n == 0 or told[n - 1].wait(5)

        assert await database.transaction(work), "the one before was not told"
        told[n].set()

    await asyncio.gather(*(one(n) for n in range(20)))


async def test_the_threads_end_though_one_is_stuck(tmp_path: Path) -> None:
    """What is left open keeps the process from ending for ever."""
    before = set(threading.enumerate())
    database = Database(f"sqlite:///{tmp_path / 'a.db'}", timeout=0.1)
    await database.connect()
    await database.execute("CREATE TABLE words (word TEXT PRIMARY KEY)")
    with sqlite3.connect(tmp_path / "a.db", isolation_level=None, check_same_thread=False) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageUnavailable):
            await say(database, "stuck")
        asyncio.get_running_loop().call_later(5.5, other.execute, "ROLLBACK")
        await database.disconnect()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)  # its last call is answered a moment before it ends
    assert set(threading.enumerate()) <= before


async def test_a_failure_keeps_nothing_of_its_caller(database: Database) -> None:
    """An error knows the frames it came through: were one of them to know the error, a request would keep itself."""

    class Asked:
        """Stands for all that a request has."""

    async def ask() -> None:
        asked = Asked()
        kept.append(weakref.ref(asked))
        await database.transaction(refuse)

    async def refuse(query: Query) -> None:
        raise LookupError("not so")

    kept: list[weakref.ref[Asked]] = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            with contextlib.suppress(LookupError):
                await ask()
        await words(database)
        assert [each() for each in kept] == [None] * 3
    finally:
        gc.enable()


async def test_who_waits_to_the_end_gets_the_answer(database: Database, tmp_path: Path) -> None:
    """Somebody else has the file's lock for longer than a caller's usual patience."""
    with sqlite3.connect(tmp_path / "a.db", isolation_level=None, check_same_thread=False) as other:
        other.execute("BEGIN IMMEDIATE")

        async def work(query: Query) -> int:
            await query.execute("INSERT INTO words (word) VALUES ('late')")
            return 7

        waiting = asyncio.create_task(database.transaction(work, patience=None, line="words"))
        with pytest.raises(StorageUnavailable):
            await say(database, "impatient")
        assert not waiting.done()
        other.execute("ROLLBACK")
        assert await waiting == 7


async def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    """Everybody's conversations are in it, and in what SQLite puts beside it."""
    old = tmp_path / "old.db"
    with sqlite3.connect(old) as other:
        other.execute("CREATE TABLE words (word TEXT)")
    old.chmod(0o644)
    for path in (tmp_path / "new" / "a.db", old):
        database = Database(f"sqlite:///{path}", exclusive=True)
        await database.connect()
        await database.execute("CREATE TABLE more (word TEXT)")
        modes = {each.name: each.stat().st_mode & 0o777 for each in path.parent.glob(f"{path.name}*")}
        await database.disconnect()
        assert modes == dict.fromkeys((path.name, f"{path.name}-wal", f"{path.name}-shm", f"{path.name}.lock"), 0o600)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
