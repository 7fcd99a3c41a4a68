"""What the invariants are checked against: journals, what readers know, rows, vendor calls, logs. It judges nothing."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import unquote

from .journal import Journal
from .reader import Reader
from .view import MessageView, View


class VendorCall(Protocol):
    """One request a model vendor got: who asked what, and the pieces of text it sent. `tests.vendors.Call` is one."""

    @property
    def prompt(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def sent(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class MessageRow:
    session_id: str
    id: str
    turn_id: str
    role: str
    participant: str | None
    content: str
    status: str
    failure_reason: str | None
    position: int


@dataclass(frozen=True)
class TurnRow:
    """`lease_until` in milliseconds of the database's clock."""

    id: str
    session_id: str
    status: str
    owner: str
    lease_until: int


@dataclass(frozen=True)
class Rows:
    """What the database held at `now`, its own time in milliseconds. `None` in evidence: nobody looked."""

    messages: list[MessageRow]
    turns: list[TurnRow]
    now: int

    def message(self, id: str) -> MessageRow | None:
        return next((row for row in self.messages if row.id == id), None)


@dataclass(frozen=True)
class Allowed:
    """What one scenario may do that others may not.

    `running`: turns may still run at the end. `lost`: text that was shown may be gone after a crash. `codes`: close
    codes beside the usual. `log`: a pattern of log lines that are no violation, traceback included. `forgotten`: ids
    of messages that were seen and need not be stored. `within`: seconds a reply has from its announcement to its end.
    `calls`: most provider calls for one prompt and model, 2 of which only where the first said nothing.
    """

    running: bool = False
    lost: bool = False
    codes: Collection[int] = ()
    log: str | None = None
    forgotten: Collection[str] = ()
    within: float | None = None
    calls: int = 2


@dataclass
class Evidence:
    """`readers`: every client that watched, at the end. `calls`, `rows`: None when there is nothing to compare with."""

    journal: Journal
    readers: Sequence[Reader | View] = ()
    rows: Rows | None = None
    calls: Sequence[VendorCall] | None = None
    logs: str = ""
    canaries: Collection[str] = ()
    allowed: Allowed = field(default_factory=Allowed)

    @property
    def views(self) -> list[View]:
        return [reader.view if isinstance(reader, Reader) else reader for reader in self.readers]

    def seen(self) -> Iterator[tuple[View, MessageView]]:
        """Every message of every reader."""
        return ((view, message) for view in self.views for message in view.messages.values())


async def gather(
    journal: Journal, readers: Sequence[Reader | View] = (), database_url: str | None = None, **rest: Any
) -> Evidence:
    """Evidence with the rows as they are now; the rest by the names of `Evidence`."""
    rows = await read_rows(database_url) if database_url else None
    return Evidence(journal, readers, rows, **rest)


# What is open in Redis and PostgreSQL, and what the database holds: read past the service


async def counts(redis_url: str | None = None, postgres_url: str | None = None) -> dict[str, float]:
    """For `i9_no_leak`: `channels` somebody is subscribed to, connections `idle_in_transaction`."""
    found: dict[str, float] = {}
    if redis_url is not None:
        found["channels"] = await _channels(redis_url)
    if postgres_url is not None:
        sql = "SELECT count(*) AS n FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
        found["idle_in_transaction"] = (await _fetch(postgres_url, sql))[0][0]["n"]
    return found


async def _channels(url: str) -> int:
    from redis.asyncio import Redis

    options = {"ssl_cert_reqs": "none"} if url.startswith("rediss:") else {}
    async with Redis.from_url(url, **options) as redis:
        return len(await redis.pubsub_channels())


async def read_rows(url: str, session_id: str | None = None) -> Rows:
    """Messages and turns as they are at one moment, of one session or of all, read past the service."""
    where = " WHERE session_id = '" + session_id.replace("'", "''") + "'" if session_id is not None else ""
    columns = "session_id, id, turn_id, role, participant, content, status, failure_reason, position"
    messages, turns, clock = await _fetch(
        url,
        f"SELECT {columns} FROM messages{where} ORDER BY session_id, position",
        f"SELECT id, session_id, status, owner, lease_until FROM turns{where} ORDER BY id",
        SQLITE_NOW if url.startswith("sqlite") else POSTGRES_NOW,
    )
    return Rows([MessageRow(**row) for row in messages], [TurnRow(**row) for row in turns], clock[0]["now"])


# Milliseconds since 1970, by the clock that leases are counted with.
SQLITE_NOW = "SELECT CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER) AS now"
POSTGRES_NOW = "SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint) AS now"


async def _fetch(url: str, *statements: str) -> list[list[dict[str, Any]]]:
    """The rows of each statement, all of one snapshot: a turn that ends between two readings would look torn."""
    if url.startswith("sqlite"):
        return await asyncio.to_thread(_fetch_sqlite, url, statements)
    import asyncpg

    connection = await asyncpg.connect(url.replace("postgres://", "postgresql://", 1), timeout=5, command_timeout=20)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            return [[dict(row) for row in await connection.fetch(sql)] for sql in statements]
    finally:
        await connection.close(timeout=5)


def _fetch_sqlite(url: str, statements: Sequence[str]) -> list[list[dict[str, Any]]]:
    path = unquote(url.partition(":///")[2])
    with closing(sqlite3.connect(path, timeout=10, isolation_level=None)) as connection:
        connection.row_factory = sqlite3.Row
        connection.execute("BEGIN")
        return [[dict(row) for row in connection.execute(sql)] for sql in statements]
