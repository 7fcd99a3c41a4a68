"""The one door to storage: SQL with named values in, dictionaries out, on SQLite and PostgreSQL alike.

`databases` opens the connections, the pool and the transactions. Statements go to the driver underneath it with our
own `:name` translation: its text path %-formats the statement, compiles it anew for every call and hands out records
whose values depend on how they are read.

No caller's cancellation reaches a call that has begun: inside a transaction (a tab that closes) it would leak the
pool's connection for ever. This file does not depend on the schema.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import databases

from ..errors import ChatError, StartupError
from .places import checked_url, place, private_file, take_lock
from .queries import Call, Connections, PostgresQuery, Query, Row, Values, is_locked
from .schema import Migration, schema_steps

log = logging.getLogger("parley.database")
logging.getLogger("databases").setLevel(logging.WARNING)  # its DEBUG lines print every value, prompts included
logging.getLogger("asyncpg.pool").setLevel(logging.ERROR)  # it prints a traceback a second while the server is away

T = TypeVar("T")
SQLITE = {False: 1, True: 2}  # connections for calls that write, and for those that read
OPEN_WAIT = 5.0  # seconds a start waits for a file of SQLite that another program has locked
BUSY_WAIT = 30_000  # milliseconds a statement waits for that lock later
IN_LINE = 20.0  # seconds a call may wait behind others while the database answers those
PIECE, PIECES_MAX = 500, 100  # rows that one DELETE of many takes at most, and how many such DELETEs run in a row
COMMAND_TIMEOUT = 10.0  # seconds PostgreSQL has for a statement
CLOCK_WAIT, CLOCK_TRIES = 0.2, 3  # seconds an exact answer about the clock may take, and how often it is asked for
STALL = 1.0  # seconds of silence in which owners may have missed to renew a lease
CLOCK_SET = 1000  # milliseconds that the database's clock gains or loses when somebody sets it
LOCK_WAIT = 3  # seconds a statement waits for a row that another transaction holds, on PostgreSQL
# Seconds that a worker frozen in the middle of a transaction keeps its locks in PostgreSQL. Not longer than
# COMMAND_TIMEOUT: a COMMIT that arrives after its caller was told an error has to find no transaction.
IDLE_WAIT = 10
SERVER_SETTINGS = {
    "lock_timeout": f"{LOCK_WAIT}s",
    "idle_in_transaction_session_timeout": f"{IDLE_WAIT}s",
}


class StorageUnavailable(ChatError):
    """The database cannot be reached or does not answer in time; the same request may succeed later.

    in_doubt: whether a write may be in the database all the same, because its COMMIT was not answered.
    """

    def __init__(self, in_doubt: bool = False) -> None:
        self.in_doubt = in_doubt
        super().__init__("storage_unavailable", "Storage is not reachable right now. Please try again.", retry_after=2)


Kinds = tuple[type[Exception], ...]


class Failures(NamedTuple):
    """The exceptions of a driver, by meaning."""

    unreachable: Kinds  # the database is away; the kinds below are subclasses of these and are looked at first
    taken: Kinds  # an id exists already
    our_fault: Kinds  # a statement is wrong
    restored: Kinds = ()  # among `our_fault`, but the database is away: a backup is restored, and tables are missing

    @classmethod
    def of(cls, postgres: bool) -> Failures:
        away = OSError, TimeoutError
        if not postgres:
            return cls((*away, sqlite3.Error), (sqlite3.IntegrityError,), (sqlite3.ProgrammingError,))
        import asyncpg  # 3 MB that SQLite has no use for

        return cls(
            # the last is what a connection cut inside executemany says: "cannot switch to state 15"
            (*away, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError),
            (asyncpg.IntegrityConstraintViolationError,),
            (asyncpg.SyntaxOrAccessError, asyncpg.DataError),
            (asyncpg.UndefinedTableError, asyncpg.InsufficientPrivilegeError),
        )


def new_id() -> str:
    """A UUIDv7 (RFC 9562 §5.7): 48 bits of Unix milliseconds, then random; text order is time order."""
    value = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


class Database:
    """Storage as the rest of the service sees it. All methods raise `StorageUnavailable` when it is away."""

    def __init__(self, url: str, *, pool_size: int = 5, timeout: float = 5.0, exclusive: bool = False) -> None:
        self.url = checked_url(url)
        self.postgres = self.url.startswith("postgres")
        self._failures = Failures.of(self.postgres)
        self.timeout = timeout
        # monotonic: when the database was last found away or silent, or its clock set; 0: never. Leases may be missed.
        self.disturbed_at = 0.0
        self._away_since = 0.0  # monotonic: the first of the failures since it last answered
        self._answered_at = {True: 0.0, False: 0.0}  # monotonic: the last answer to a read (True) and to a write
        self._exclusive = exclusive
        self._lock_file: int | None = None
        self._running: set[asyncio.Future[Any]] = set()
        self._lines: dict[bool, Connections] = {}  # SQLite's connections, those that read (True) and the writer
        self._clock_offset = 0.0
        self._pool_size = pool_size
        self._pooler = False  # whether a pooler stands between us and PostgreSQL
        # Writers leave one connection of the pool to readers: all of them may be waiting for one locked row.
        self._writers = asyncio.Semaphore(max(1, pool_size - 1))
        self._keyed: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # locks in use, by `line`
        self._waiting: set[asyncio.Future[Any]] = set()  # calls that were not sent to PostgreSQL yet
        options = self._postgres_options() if self.postgres else {"timeout": OPEN_WAIT}
        self._database = databases.Database(self.url, **options)

    def _postgres_options(self, **changes: Any) -> dict[str, Any]:
        options: dict[str, Any] = {
            "min_size": 1,
            "max_size": self._pool_size,
            "command_timeout": COMMAND_TIMEOUT,
            "timeout": self.timeout,
            "reset": _leave_as_is,
            "server_settings": {"application_name": "parley"} | ({} if self._pooler else SERVER_SETTINGS),
        }
        return options | ({"statement_cache_size": 0} if self._pooler else {}) | changes

    # -- opening and closing

    async def connect(self) -> None:
        """Open the connections. Raises `StartupError` with one line that carries no password."""
        failures: Kinds = (*self._failures.unreachable, ValueError)
        try:
            async with asyncio.timeout(10):
                await (self._open_postgres() if self.postgres else self._open_sqlite())
                await self.set_clock()
        except failures as problem:
            raise StartupError(f"cannot open the database {place(self.url)}: {_reason(problem)}") from None

    async def _open_postgres(self) -> None:
        """Open the pool, in a way that works through a pooler as well.

        PgBouncer refuses settings at the start of a connection, and it runs each transaction on any free connection of
        its own, which does not know our prepared statements.
        """
        probe = databases.Database(self.url, min_size=1, max_size=1, timeout=self.timeout, statement_cache_size=0)
        async with probe, probe.connection() as connection:
            raw: Any = connection.raw_connection
            # A pooler makes up the process number that it gives to its clients.
            self._pooler = await raw.fetchval("SELECT pg_backend_pid()") != raw.get_server_pid()
        self._database = databases.Database(self.url, **self._postgres_options())
        await self._database.connect()

    async def _open_sqlite(self) -> None:
        path = private_file(self.url)
        if self._exclusive:
            self._lock_file = take_lock(path.with_name(path.name + ".lock"))
        await self._database.connect()
        for reading, count in SQLITE.items():
            made: list[Any] = []
            try:
                for _ in range(count):  # a connection of `databases` belongs to the task that opens it
                    made.append(await asyncio.create_task(self._sqlite_connection()))
            finally:  # those before one that fails have to be closed as well
                self._lines[reading] = Connections(made)

    async def _sqlite_connection(self) -> Any:
        connection = self._database.connection()
        await connection.__aenter__()
        raw: Any = connection.raw_connection
        try:
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", f"busy_timeout={BUSY_WAIT}"):
                await raw.execute_fetchall(f"PRAGMA {pragma}")
            await raw.create_function("lower", 1, _folded, deterministic=True)  # SQLite's own knows ASCII alone
        except BaseException:  # no database, say: the thread of an open connection keeps the process from ending
            await connection.__aexit__()
            raise
        raw.row_factory = sqlite3.Row
        return connection

    async def disconnect(self) -> None:
        """Wait a while for running calls, then close. Never raises."""
        if self._running:
            await asyncio.wait(self._running, timeout=self.timeout)
        with contextlib.suppress(*self._failures.unreachable, AssertionError):
            # Every connection has to be closed: the thread of an open one keeps the process from ending.
            await asyncio.gather(*(line.close() for line in self._lines.values()))
            async with asyncio.timeout(5):
                await self._database.disconnect()
        if self._lock_file is not None:
            os.close(self._lock_file)

    async def set_clock(self) -> None:
        """Learn the time of the database's clock: leases compare times of many machines.

        The time is kept as a distance from the monotonic clock, which nobody sets.
        """
        sql = (
            "SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT) AS now"
            if self.postgres
            else "SELECT CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER) AS now"
        )
        for _ in range(CLOCK_TRIES):
            asked = time.monotonic()
            row = await self.fetch_one(sql)
            answered = time.monotonic()
            if answered - asked < CLOCK_WAIT:
                break
            if answered - asked > STALL:
                self.disturbed_at = answered
        # Half the wait is the error. After a stall, leases would be too short or seem to have run out: one more try.
        before, self._clock_offset = self._clock_offset, (row or {})["now"] - (asked + answered) / 2 * 1000
        if before and abs(self._clock_offset - before) > CLOCK_SET:
            self.disturbed_at = answered  # leases of live workers may seem to have run out until they are renewed
            log.warning("the clock of storage was set by %.0f s", (self._clock_offset - before) / 1000)

    def now(self) -> int:
        """Milliseconds since 1970 by the database's clock."""
        return int(time.monotonic() * 1000 + self._clock_offset)

    # -- statements

    async def fetch_all(self, sql: str, values: Values | None = None) -> list[Row]:
        return await self._shielded(lambda query: query.fetch_all(sql, values), reading=_reads(sql))

    async def fetch_one(self, sql: str, values: Values | None = None) -> Row | None:
        return await self._shielded(lambda query: query.fetch_one(sql, values), reading=_reads(sql))

    async def execute(self, sql: str, values: Values | None = None) -> None:
        await self._shielded(lambda query: query.execute(sql, values))

    async def execute_in_pieces(self, sql: str, values: Values) -> None:
        """Run a DELETE of at most `:piece` rows, with a RETURNING, until it finds no more.

        All writers would wait for one long DELETE. After `PIECES_MAX` statements the rest is left to the next call.
        """
        for _ in range(PIECES_MAX):
            if len(await self.fetch_all(sql, values | {"piece": PIECE})) < PIECE:
                return

    async def transaction(
        self,
        work: Callable[[Query], Awaitable[T]],
        *,
        patience: float | None = 0.0,
        line: str | None = None,
    ) -> T:
        """Run `work` in one transaction, whole or not at all, even when the caller is cancelled meanwhile.

        `work` may await only its statements, and on SQLite runs in a thread: no lock, no event, no task of ours.

        patience: seconds the caller waits for an answer, 0 for `self.timeout`, None until the transaction has ended
        or failed. A caller that runs out of patience gets `StorageUnavailable`, and the transaction is rolled back,
        however late storage carries its statements out. Once COMMIT was sent, the caller waits for the answer up to
        `COMMAND_TIMEOUT`: by then PostgreSQL has ended the transaction by itself. So nothing is written after the
        error was raised.
        line: the row that `work` writes to, say a session's id. Calls with the same line begin one at a time, in order:
        while somebody holds that row's lock, the others would wait for the lock in every connection.
        """
        return await self._shielded(work, patience=patience, line=line)

    def _begin(self, call: Call, line: str | None) -> asyncio.Future[Any]:
        """Schedule the call. From here on no caller can cancel it."""
        if not self.postgres:
            running = self._lines[call.reading].ask(call)
        elif call.reading:
            running = asyncio.ensure_future(self._in_pool(call))
        else:
            running = asyncio.ensure_future(self._in_line(call, line))
            self._waiting.add(running)
        self._running.add(running)
        running.add_done_callback(self._finished)
        return running

    async def _in_line(self, call: Call, line: str | None) -> Any:
        """Run work that writes, after earlier work of the same `line` and once a writer's connection is free."""
        lock = contextlib.nullcontext() if line is None else self._keyed.setdefault(line, asyncio.Lock())
        async with lock, self._writers:
            self._waiting.discard(asyncio.current_task())
            return await self._in_pool(call)

    async def _in_pool(self, call: Call) -> Any:
        async with self._database.connection() as connection:
            return await self._on(connection, call)

    async def _on(self, connection: Any, call: Call) -> Any:
        """Run a call; one that writes is a transaction.

        A statement by itself, held up on its way, would be carried out whenever it arrives.
        """
        if call.reading:
            return await call.work(PostgresQuery(connection))
        raw = connection.raw_connection
        async with raw.transaction():  # asyncpg's own: that of `databases` costs a third more, for nesting
            if self._pooler:  # a plain SET would stay behind on a connection that other clients use next
                settings = "; ".join(f"SET LOCAL {name} = '{value}'" for name, value in SERVER_SETTINGS.items())
                await raw.execute(settings)
            answer = await call.work(PostgresQuery(connection))
            if not call.decide("commit"):
                raise TimeoutError
            return answer

    async def _shielded(
        self,
        work: Callable[[Query], Awaitable[T]],
        *,
        reading: bool = False,
        patience: float | None = 0.0,
        line: str | None = None,
    ) -> T:
        """Start `work` and wait for it. The work of a caller that is cancelled goes on."""
        call = Call(work, reading)
        try:
            answer: T = await self._outcome(call, self._begin(call, line), patience)
        except self._failures.unreachable as problem:
            if isinstance(problem, self._failures.taken):
                raise ChatError("conflict", "This id is taken already.") from problem
            if isinstance(problem, self._failures.our_fault) and not isinstance(problem, self._failures.restored):
                raise
            if not is_locked(problem):
                self._note_away(problem)
            raise StorageUnavailable(in_doubt=not call.decide("give up")) from problem
        if self._away_since:
            log.warning("storage answers again after %.1f s", time.monotonic() - self._away_since)
            self._away_since = 0.0
        return answer

    async def _outcome(self, call: Call, running: asyncio.Future[Any], patience: float | None) -> Any:
        """Wait for a call, until it is given up. A COMMIT on its way cannot be given up, so it is waited for."""
        try:
            try:
                return await self.answer(running, call.reading, patience)
            except TimeoutError:
                if running.done() or call.decide("give up"):
                    raise
            return await self.answer(running, call.reading, COMMAND_TIMEOUT)
        finally:
            del running  # a cycle, as in `answer`

    def _note_away(self, problem: Exception) -> None:
        self.disturbed_at = time.monotonic()
        if not self._away_since:
            self._away_since = self.disturbed_at
            log.warning("storage %s is away: %s", place(self.url), _reason(problem))

    async def answer(self, running: asyncio.Future[T], reading: bool = False, patience: float | None = 0.0) -> T:
        """Wait for a call, or for work around one, without cancelling it.

        Raises `TimeoutError` when storage is silent for `patience` seconds.

        While storage answers other calls of the kind, a call in line goes on waiting: a burst of turns would be refused
        for nothing. A call that has not begun after that time is never begun: `StorageUnavailable`.
        """
        began = time.monotonic()
        timeout = self.timeout if patience == 0 else patience
        while not (await asyncio.wait({running}, timeout=timeout))[0]:
            now = time.monotonic()
            if now - self._answered_at[reading] > 1.0 or now - began > IN_LINE:
                if running not in self._waiting:
                    raise TimeoutError
                running.cancel()
                raise StorageUnavailable
            timeout = 1.0
        try:
            answer = running.result()
        finally:
            del running  # a cycle: the future has the error, whose traceback has this frame, which has the future
        self._answered_at[reading] = time.monotonic()
        return answer

    def _finished(self, running: asyncio.Future[Any]) -> None:
        self._running.discard(running)
        self._waiting.discard(running)
        if not running.cancelled():
            running.exception()  # asyncio would log an exception that no caller waits for as never retrieved

    # -- schema

    async def migrate(self, schema: str) -> int:
        """Apply the steps of `schema` not applied yet, each in a transaction of its own; return how many.

        The migration waits without limit for other migrations and for table locks, and logs what it waits for. Raises
        `StartupError`: the disk is full, say, or the user may not create tables.
        """
        migration = Migration(schema_steps(schema), self.postgres, self.now, self.fetch_all)
        failures: Kinds = (StorageUnavailable, *self._failures.unreachable)
        try:
            if not self.postgres:
                return await migration.run(lambda work: self.transaction(work, patience=None))
            options = self._postgres_options(max_size=1, command_timeout=None)  # an index may take an hour to build
            async with databases.Database(self.url, **options) as own, own.connection() as connection:
                return await migration.run(lambda work: self._on(connection, Call(work, reading=False)))
        except failures as problem:
            reason = _reason(problem.__cause__ or problem)
            raise StartupError(f"cannot bring the schema of {place(self.url)} up to date: {reason}") from None


def _folded(text: str | None) -> str | None:
    return None if text is None else text.casefold()


@functools.cache
def _reads(sql: str) -> bool:
    return sql.lstrip().startswith("SELECT")


def _reason(problem: BaseException) -> str:
    """The problem in a few words; the drivers' own sentences name hosts and users but no passwords."""
    return f"{type(problem).__name__} {problem}".strip().splitlines()[0]


async def _leave_as_is(connection: Any) -> None:
    """Skip the reset of a connection: our statements leave no state in it after their transaction.

    asyncpg sends `RESET ALL` and the like after every single use otherwise, and waits for the answer.
    """
