"""Statements on one connection, named values in and dictionaries out, on PostgreSQL and on SQLite.

A SQLite connection works in a thread of its own, and a visit there costs more than most statements do: the thread
takes calls from `Connections` as long as there are any.
"""

from __future__ import annotations

import asyncio
import functools
import re
import sqlite3
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeVar

from ..tasks import settle

T = TypeVar("T")
Row = dict[str, Any]
Values = dict[str, Any]
NAME = re.compile(r":([a-z_][a-z0-9_]*)")


class Query(ABC):
    """Statements on one connection: what `Database` hands out and what a transaction works with."""

    one_at_a_time = False  # whether no transaction that writes runs beside another: there is nothing to lock

    @abstractmethod
    async def fetch_all(self, sql: str, values: Values | None = None) -> list[Row]: ...

    @abstractmethod
    async def execute_many(self, sql: str, values: list[Values]) -> None: ...

    async def fetch_one(self, sql: str, values: Values | None = None) -> Row | None:
        rows = await self.fetch_all(sql, values)
        return rows[0] if rows else None

    async def execute(self, sql: str, values: Values | None = None) -> None:
        await self.fetch_all(sql, values)


class PostgresQuery(Query):
    """Statements on a connection of the pool."""

    def __init__(self, connection: Any) -> None:
        self._raw = connection.raw_connection

    async def fetch_all(self, sql: str, values: Values | None = None) -> list[Row]:
        statement, names = _numbered(sql)
        return [dict(row) for row in await self._raw.fetch(statement, *[(values or {})[name] for name in names])]

    async def execute_many(self, sql: str, values: list[Values]) -> None:
        statement, names = _numbered(sql)
        await self._raw.executemany(statement, [[each[name] for name in names] for each in values])


class SQLiteQuery(Query):
    """Statements inside the thread of a connection: the coroutines here never wait."""

    one_at_a_time = True

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._raw = connection

    async def fetch_all(self, sql: str, values: Values | None = None) -> list[Row]:
        return [dict(row) for row in self._raw.execute(sql, values or {}).fetchall()]

    async def execute_many(self, sql: str, values: list[Values]) -> None:
        self._raw.executemany(sql, values)


@functools.cache
def _numbered(sql: str) -> tuple[str, list[str]]:
    """`:name` → `$1`, as asyncpg wants it, and the names in order. Statement texts hold no other colon."""
    names = list(dict.fromkeys(NAME.findall(sql)))
    return NAME.sub(lambda match: f"${names.index(match[1]) + 1}", sql), names


def is_locked(problem: BaseException | None) -> bool:
    """Whether a statement failed because another transaction held what it needed: the database is there all the same.

    55P03 lock_not_available, 40P01 deadlock_detected.
    """
    busy = getattr(problem, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
    return busy or getattr(problem, "sqlstate", None) in ("55P03", "40P01")


Work = Callable[[Query], Awaitable[Any]]
Fate = Literal["commit", "give up"]


class Call:
    """A unit of work for a connection.

    A call that writes is a transaction. The connection decides to commit it, or the caller to give it up, whoever is
    first: a change that is written after the caller has told an error contradicts the error.
    """

    def __init__(self, work: Work, reading: bool) -> None:
        self.work = work
        self.reading = reading
        self._fate: dict[str, Fate] = {}

    def decide(self, fate: Fate) -> bool:
        """Decide the fate. False when the other one is decided. May be called in any thread: `setdefault` is atomic."""
        return self._fate.setdefault("fate", fate) == fate


Line = deque[tuple[Call, asyncio.Future[Any]]]


class Connections:
    """Connections of SQLite that do the same kind of work, and the calls that stand in line for them."""

    def __init__(self, connections: list[Any]) -> None:
        """connections: open ones of `databases`, closed by `close`."""
        self._connections = connections
        self._free = list(connections)
        self._calls: Line = deque()
        self._visits: set[asyncio.Task[None]] = set()

    def ask(self, call: Call) -> asyncio.Future[Any]:
        """Have the call done, in its turn."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls.append((call, answer))
        if self._free:
            visit = asyncio.create_task(self._visit(self._free.pop()))
            self._visits.add(visit)
            visit.add_done_callback(self._visits.discard)
        return answer

    async def _visit(self, connection: Any) -> None:
        """Have the waiting calls done in the connection's thread, and those that arrive meanwhile."""
        raw, loop = connection.raw_connection, asyncio.get_running_loop()
        while self._calls:
            try:
                # aiosqlite's own way into its thread; its public calls go there for one statement each.
                await raw._execute(_in_thread, raw._conn, self._calls, loop)
            except BaseException as problem:  # closed, or the worker ends: who waits must not wait for ever
                while self._calls:
                    settle(self._calls.popleft()[1], problem)
        self._free.append(connection)

    async def close(self) -> None:
        """Close the connections after their running calls."""
        await asyncio.gather(*(each.__aexit__() for each in self._connections), return_exceptions=True)


def _in_thread(connection: sqlite3.Connection, calls: Line, loop: asyncio.AbstractEventLoop) -> None:
    """Run calls until none is left. The loop gets each answer at once; a busy loop does not hold up the next call."""
    while calls:
        try:
            call, answer = calls.popleft()
        except IndexError:
            return  # another connection has taken the last one
        loop.call_soon_threadsafe(settle, answer, _outcome(connection, call))
        del call, answer  # a cycle: the answer has the error, whose traceback knows this frame


def _outcome(connection: sqlite3.Connection, call: Call) -> Any:
    try:
        return _done(connection, call)
    except Exception as problem:  # any: the exception is that caller's, and the others have calls to be run
        return problem


def _done(connection: sqlite3.Connection, call: Call) -> Any:
    """The result of a call. The write lock comes first: a read-then-write would fail beside another writer."""
    if call.reading:
        return _driven(call.work(SQLiteQuery(connection)))
    connection.execute("BEGIN IMMEDIATE")
    try:
        answer = _driven(call.work(SQLiteQuery(connection)))
        if not call.decide("commit"):
            raise TimeoutError
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk has ended it already
            connection.execute("ROLLBACK")
        raise
    return answer


def _driven(work: Awaitable[T]) -> T:
    """The result of a coroutine that never waits."""
    try:
        next(work.__await__())
    except StopIteration as done:
        answer: T = done.value
        return answer
    raise RuntimeError("a transaction waited for something else than its statements")
