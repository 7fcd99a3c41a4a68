"""The schema's numbered steps: each is applied once, in order, even by concurrent processes, however long it takes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ..errors import ChatError
from .queries import Query, Row, Values, Work, is_locked

log = logging.getLogger("parley.schema")

SAID_EVERY = 2.0  # seconds between two lines about a step that takes its time
PAUSE = 0.5  # seconds between two attempts at a lock: those queued behind ours go first
LOCK = 7051959  # the number of PostgreSQL's advisory lock: nobody else's, we hope

Step = tuple[int, list[str]]


def schema_steps(schema: str) -> list[Step]:
    """Split `models.sql` at its `-- step N` lines; the drivers take one statement a call."""
    parts = re.split(r"^-- step (\d+)$", schema, flags=re.MULTILINE)
    return [
        (int(number), [one for each in re.split(r";\s*$", body, flags=re.MULTILINE) if (one := _bare(each))])
        for number, body in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _bare(statement: str) -> str:
    return "\n".join(line for line in statement.splitlines() if not line.startswith("--")).strip()


@dataclass
class Migration:
    """Brings one database's schema up to date. ask: runs a statement that reads, on another connection than ours."""

    steps: list[Step]
    postgres: bool
    now: Callable[[], int]
    ask: Callable[[str, Values], Awaitable[list[Row]]]
    at: str = "nothing"  # the statement under way, for the log
    pid: int = 0  # PostgreSQL's process that runs it

    async def run(self, transact: Callable[[Work], Awaitable[Any]]) -> int:
        """Apply what is not applied yet; return how many steps that were. transact: runs work in a transaction."""
        done = await self.applied()
        if not (todo := [step for step in self.steps if step[0] not in done]):
            return 0  # without a lock: workers that start together would wait for each other
        saying = asyncio.create_task(self._say())
        try:
            return sum([await self._attempt(transact, step) for step in todo])
        finally:
            saying.cancel()
            await asyncio.gather(saying, return_exceptions=True)

    async def applied(self) -> set[int]:
        if not await self.ask(POSTGRES_TABLE if self.postgres else SQLITE_TABLE, {}):
            return set()
        return {row["step"] for row in await self.ask("SELECT step FROM schema_steps", {})}

    async def _attempt(self, transact: Callable[[Work], Awaitable[Any]], step: Step) -> bool:
        """Apply a step unless another process has done so; whether it was this one.

        A lock that is not granted within seconds is given up and requested again: every other user of the table would
        queue behind our request meanwhile.
        """
        while True:
            try:
                return bool(await transact(lambda query: self._apply(query, *step)))
            except Exception as problem:
                if not is_locked(problem) and not is_locked(problem.__cause__):
                    raise
            await asyncio.sleep(PAUSE)

    async def _apply(self, query: Query, number: int, statements: list[str]) -> bool:
        self.at = f"step {number}, behind another process that changes the schema"
        if self.postgres:
            self.pid = (await query.fetch_all("SELECT pg_backend_pid() AS pid"))[0]["pid"]
            await query.execute(f"SELECT pg_advisory_xact_lock({LOCK})")
        await query.execute(
            "CREATE TABLE IF NOT EXISTS schema_steps (step INTEGER PRIMARY KEY, applied_at BIGINT NOT NULL)"
        )
        if await query.fetch_one("SELECT step FROM schema_steps WHERE step = :step", {"step": number}):
            return False
        for statement in statements:
            self.at = f"step {number}, {statement.splitlines()[0]}"
            await query.execute(statement)
        values = {"step": number, "now": self.now()}
        await query.execute("INSERT INTO schema_steps (step, applied_at) VALUES (:step, :now)", values)
        return True

    async def _say(self) -> None:
        """Log every few seconds which statement takes so long and which processes block it, until cancelled."""
        began = time.monotonic()
        while True:
            await asyncio.sleep(SAID_EVERY)
            waiting: list[Row] = []
            with contextlib.suppress(ChatError):
                waiting = await self.ask(WAITING_FOR, {"pid": self.pid}) if self.postgres else []
            whom = "".join(f"; waiting for process {row['pid']} ({row['name']}, {row['state']})" for row in waiting)
            log.warning("schema, for %.0f s now: %s%s", time.monotonic() - began, self.at, whom)


POSTGRES_TABLE = "SELECT 1 AS one WHERE to_regclass('schema_steps') IS NOT NULL"
SQLITE_TABLE = "SELECT 1 AS one FROM sqlite_master WHERE name = 'schema_steps'"
WAITING_FOR = """SELECT pid, application_name AS name, state FROM pg_stat_activity
                  WHERE pid = ANY(pg_blocking_pids(CAST(:pid AS INTEGER)))"""
