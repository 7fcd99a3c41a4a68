"""The one door to storage: SQL with named values in, dictionaries out, on SQLite and PostgreSQL alike.

`databases` opens the connections, the pool and the transactions. Statements go to the driver underneath it with our
own `:name` translation: its text path %-formats the statement, compiles it anew for every call and hands out records
whose values depend on how they are read.

No caller's cancellation reaches a call that has begun: inside a transaction (a tab that closes) it would leak the
pool's connection for ever. It knows nothing of what is stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import logging
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import databases

from ..errors import ChatError, StartupError
from .queries import Line, PostgresQuery, Query, Row, Values

log = logging.getLogger("parley.database")
logging.getLogger("databases").setLevel(logging.WARNING)  # its DEBUG lines print every value, prompts included
logging.getLogger("asyncpg.pool").setLevel(logging.ERROR)  # it prints a traceback a second while the server is away

T = TypeVar("T")
SQLITE = {False: (1, 16), True: (2, 4)}  # whether they read → connections, and calls done in one visit to one
IN_LINE = 20.0  # seconds a call waits behind others that are answered


class StorageUnavailable(ChatError):
    """The database cannot be reached or does not answer in time; the same request may succeed later."""

    def __init__(self) -> None:
        super().__init__("storage_unavailable", "Storage is not reachable right now. Please try again.", retry_after=2)


Kinds = tuple[type[Exception], ...]


class Failures(NamedTuple):
    """What a driver raises, by what it means."""

    unreachable: Kinds
    taken: Kinds  # … though it can be reached: an id
    our_fault: Kinds

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
        self.url = _checked_url(url)
        self.postgres = self.url.startswith("postgres")
        self._failures = Failures.of(self.postgres)
        self.timeout = timeout
        self.failed_at = 0.0  # monotonic: when a call last found the database away
        self._away_since = 0.0  # monotonic: the first of the failures since it last answered
        self._answered_at = {True: 0.0, False: 0.0}  # monotonic, of reads and of writes
        self._exclusive = exclusive
        self._lock_file: int | None = None
        self._running: set[asyncio.Future[Any]] = set()
        self._lines: dict[bool, Line] = {}  # SQLite's connections: whether they read → those that do
        self._clock_offset = 0.0
        if self.postgres:
            options: dict[str, Any] = {
                "min_size": 1,
                "max_size": pool_size,
                "command_timeout": 10,
                "timeout": timeout,
                "reset": _leave_as_is,
                # what a worker that is frozen in the middle of a transaction may hold
                "server_settings": {"idle_in_transaction_session_timeout": "10000", "application_name": "parley"},
            }
        else:
            options = {"timeout": 30}  # seconds: SQLite's busy timeout
        self._database = databases.Database(self.url, **options)

    # -- opening and closing

    async def connect(self) -> None:
        """Open the connections. Raises `StartupError` with one line that carries no password."""
        failures: Kinds = (*self._failures.unreachable, ValueError)
        try:
            async with asyncio.timeout(10):
                if not self.postgres:
                    await self._open_sqlite()
                else:
                    await self._database.connect()
                await self.set_clock()
        except failures as problem:
            raise StartupError(f"cannot open the database {self._place()}: {_reason(problem)}") from None

    async def _open_sqlite(self) -> None:
        path = Path(urlsplit(self.url).path[1:])
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._exclusive:
            self._lock_file = _take_lock(path.with_name(path.name + ".lock"))
        await self._database.connect()
        for reading, (count, at_once) in SQLITE.items():
            # A connection of `databases` belongs to the task that asks for it: each is made in one of its own and kept.
            made = [await asyncio.create_task(self._sqlite_connection()) for _ in range(count)]
            self._lines[reading] = Line(made, at_once)

    async def _sqlite_connection(self) -> Any:
        connection = self._database.connection()
        await connection.__aenter__()
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=30000"):
            await connection.raw_connection.execute_fetchall(f"PRAGMA {pragma}")
        connection.raw_connection.row_factory = sqlite3.Row
        return connection

    async def disconnect(self) -> None:
        """Wait a while for running calls, then close. Never raises."""
        if self._running:
            await asyncio.wait(self._running, timeout=self.timeout)
        with contextlib.suppress(*self._failures.unreachable, AssertionError):
            # All of them, and to the end: the thread of one that is left open keeps the process from ending.
            await asyncio.gather(*(line.close() for line in self._lines.values()))
            async with asyncio.timeout(5):
                await self._database.disconnect()
        if self._lock_file is not None:
            os.close(self._lock_file)

    async def set_clock(self) -> None:
        """Learn how far this machine's clock is from the database's: leases compare times of many machines."""
        sql = (
            "SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT) AS now"
            if self.postgres
            else "SELECT CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER) AS now"
        )
        row = await self.fetch_one(sql)
        self._clock_offset = (row or {})["now"] - time.time() * 1000

    def now(self) -> int:
        """Milliseconds since 1970 by the database's clock."""
        return int(time.time() * 1000 + self._clock_offset)

    # -- statements

    async def fetch_all(self, sql: str, values: Values | None = None) -> list[Row]:
        return await self._shielded(lambda query: query.fetch_all(sql, values), reading=_reads(sql))

    async def fetch_one(self, sql: str, values: Values | None = None) -> Row | None:
        return await self._shielded(lambda query: query.fetch_one(sql, values), reading=_reads(sql))

    async def execute(self, sql: str, values: Values | None = None) -> None:
        await self._shielded(lambda query: query.execute(sql, values))

    async def transaction(self, work: Callable[[Query], Awaitable[T]], *, timeout: float | None = None) -> T:
        """Run `work` in one transaction, whole or not at all, even when the caller is cancelled meanwhile.

        It may wait for nothing but its statements, and on SQLite runs in a thread: no lock, no event, no task of ours.
        """
        return await self._shielded(work, whole=True, timeout=timeout)

    def _begin(self, work: Callable[[Query], Awaitable[T]], reading: bool, whole: bool) -> asyncio.Future[T]:
        """Have it done. Nobody's cancellation reaches it from here on."""
        if self.postgres:
            running: asyncio.Future[T] = asyncio.ensure_future(self._in_pool(work, whole))
        else:
            running = self._lines[reading].ask(work, whole)
        self._running.add(running)
        running.add_done_callback(self._finished)
        return running

    async def _in_pool(self, work: Callable[[Query], Awaitable[T]], whole: bool) -> T:
        async with self._database.connection() as connection:
            if not whole:
                return await work(PostgresQuery(connection))
            async with connection.transaction():
                return await work(PostgresQuery(connection))

    async def _shielded(
        self,
        work: Callable[[Query], Awaitable[T]],
        *,
        reading: bool = False,
        whole: bool = False,
        timeout: float | None = None,
    ) -> T:
        """Have `work` done and wait. A caller that is cancelled or tired of waiting leaves; the work goes on."""
        try:
            answer = await self._answer(self._begin(work, reading, whole), reading, timeout or self.timeout)
        except self._failures.unreachable as problem:
            if isinstance(problem, self._failures.taken):
                raise ChatError("conflict", "This id is taken already.") from problem
            if isinstance(problem, self._failures.our_fault):
                raise
            self.failed_at = time.monotonic()
            if not self._away_since:
                self._away_since = self.failed_at
                log.warning("storage %s is away: %s", self._place(), _reason(problem))
            raise StorageUnavailable from problem
        if self._away_since:
            log.warning("storage answers again after %.1f s", time.monotonic() - self._away_since)
            self._away_since = 0.0
        return answer

    async def _answer(self, running: asyncio.Future[T], reading: bool, timeout: float) -> T:
        """Wait for a call, and leave it alone. Raises `TimeoutError` where storage is silent for so long.

        While it answers others of its kind, who stands in line is not told that it is away: a burst of turns would be
        refused for nothing.
        """
        began = time.monotonic()
        while not (await asyncio.wait({running}, timeout=timeout))[0]:
            now = time.monotonic()
            if now - self._answered_at[reading] > 1.0 or now - began > IN_LINE:
                raise TimeoutError
            timeout = 1.0
        try:
            answer = running.result()
        finally:
            del running  # it has the error, which has this frame and all above it: a request would keep itself
        self._answered_at[reading] = time.monotonic()
        return answer

    def _finished(self, running: asyncio.Future[Any]) -> None:
        self._running.discard(running)
        if not running.cancelled():
            running.exception()  # read it: a call nobody waits for any more would be reported as never retrieved

    # -- schema

    async def migrate(self, schema: str) -> int:
        """Apply the steps of `schema` not applied yet, once, under a lock; return how many."""

        async def apply(query: Query) -> int:
            if self.postgres:
                await query.execute("SELECT pg_advisory_xact_lock(7051959)")
            await query.execute(
                "CREATE TABLE IF NOT EXISTS schema_steps (step INTEGER PRIMARY KEY, applied_at BIGINT NOT NULL)"
            )
            done = {row["step"] for row in await query.fetch_all("SELECT step FROM schema_steps")}
            todo = [(number, steps) for number, steps in schema_steps(schema) if number not in done]
            for number, statements in todo:
                for statement in statements:
                    await query.execute(statement)
                values = {"step": number, "now": self.now()}
                await query.execute("INSERT INTO schema_steps (step, applied_at) VALUES (:step, :now)", values)
            return len(todo)

        if not self.postgres and await self._is_current(schema):
            return 0  # two workers starting together would otherwise wait for each other's write lock
        return await self.transaction(apply, timeout=60)

    async def _is_current(self, schema: str) -> bool:
        if not await self.fetch_all("SELECT name FROM sqlite_master WHERE name = 'schema_steps'"):
            return False
        rows = await self.fetch_all("SELECT step FROM schema_steps")
        return {row["step"] for row in rows} >= {number for number, _ in schema_steps(schema)}

    def _place(self) -> str:
        parts = urlsplit(self.url)
        return f"at {parts.hostname}:{parts.port or 5432}{parts.path}" if self.postgres else parts.path[1:]


def schema_steps(schema: str) -> list[tuple[int, list[str]]]:
    """Split `models.sql` at its `-- step N` lines; the drivers take one statement a call."""
    parts = re.split(r"^-- step (\d+)$", schema, flags=re.MULTILINE)
    return [
        (int(number), [one for each in re.split(r";\s*$", body, flags=re.MULTILINE) if (one := _bare(each))])
        for number, body in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _bare(statement: str) -> str:
    return "\n".join(line for line in statement.splitlines() if not line.startswith("--")).strip()


@functools.cache
def _reads(sql: str) -> bool:
    return sql.lstrip().startswith("SELECT")


def _reason(problem: BaseException) -> str:
    """What happened in a few words; the drivers' own sentences name hosts and users but no passwords."""
    return f"{type(problem).__name__} {problem}".strip().splitlines()[0]


def _take_lock(path: Path) -> int:
    """Keep a second process from serving this SQLite file without Redis: its readers would hear nothing of ours."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StartupError(
            f"another process is serving {path.stem} already; more than one worker needs REDIS_URL"
        ) from None
    return descriptor


async def _leave_as_is(connection: Any) -> None:
    """What we say on a connection leaves nothing behind in it, once its transaction is over.

    asyncpg sends `RESET ALL` and the like after every single use otherwise, and waits for the answer.
    """


SSL_MODES = {"disable", "allow", "prefer", "require", "verify-ca", "verify-full"}


def _checked_url(url: str) -> str:
    """The URL as `databases` wants it. It ignores `sslmode` without a word and would connect unencrypted."""
    try:
        parts = urlsplit(url)
    except ValueError:  # "[" without "]", as in a password that is not percent-encoded
        raise StartupError("DATABASE_URL is not a URL: percent-encode what is special in its password") from None
    if parts.scheme not in ("sqlite", "postgres", "postgresql"):
        raise StartupError("DATABASE_URL must start with sqlite:/// or postgresql://")
    if parts.scheme == "sqlite":
        if parts.query or len(parts.path) < 2:
            raise StartupError("DATABASE_URL of SQLite must be sqlite:///<file>, without options")
        return url
    options = dict(parse_qsl(parts.query))
    mode = options.pop("sslmode", None) or ("require" if os.environ.get("DYNO") else None)
    if mode is not None and mode not in SSL_MODES:
        raise StartupError(f"DATABASE_URL has an unknown sslmode: {mode}")
    if mode is not None:
        options["ssl"] = mode
    try:
        _ = parts.port  # a bad one raises here; later its text would carry the password
    except ValueError:
        raise StartupError("DATABASE_URL has a port that is not a number") from None
    return urlunsplit(parts._replace(query=urlencode(options)))
