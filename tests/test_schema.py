"""`release`: beside workers and other releases, behind locks, for as long as an index takes to build."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from pathlib import Path

import asyncpg
import pytest

from chat.settings import HERE
from chat.store import database as door
from chat.store.database import Database
from chat.store.schema import schema_steps
from tests.conftest import CLOSED, STORES, store
from tests.harness import until
from tests.harness.api import call
from tests.harness.servers import Postgres
from tests.harness.service import Service, environment

STEPS = len(schema_steps((HERE / "models.sql").read_text()))


async def release(settings: dict[str, str]) -> tuple[int | None, str]:
    """Run `service.py release`; its exit code and all it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "service.py", "release", cwd=HERE, env=environment(CLOSED | settings),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    printed, _ = await process.communicate()
    return process.returncode, printed.decode()


@pytest.mark.parametrize("name", STORES)
async def test_releases_at_once_apply_each_step_once(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    settings = store(name, request, tmp_path)
    ended = await asyncio.gather(*(release(settings) for _ in range(5)))
    assert [code for code, _ in ended] == [0] * 5, ended
    assert sum(int(printed.split("up to date, ")[1].split()[0]) for _, printed in ended) == STEPS, ended


@pytest.mark.parametrize("name", STORES)
async def test_a_release_beside_a_running_worker(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    settings = store(name, request, tmp_path)
    async with Service(CLOSED | settings):
        assert await release(settings) == (0, "parley: schema up to date, 0 steps applied\n")


BASE = "-- step 1\nCREATE TABLE words (word TEXT PRIMARY KEY);\n"
NEXT = BASE + "-- step 2\nALTER TABLE words ADD COLUMN tone TEXT;\n"


async def test_a_table_in_use_is_waited_for_and_others_go_on(
    postgres_server: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody reads a table for long, as a backup does. The log names them, and nobody waits in line behind us."""
    database = Database(postgres_server.create_database(), timeout=5)
    await database.connect()
    assert await database.migrate(BASE) == 1
    other = await asyncpg.connect(database.url, server_settings={"application_name": "backup"})
    try:
        await other.execute("BEGIN")
        await other.execute("SELECT * FROM words")
        waiting = asyncio.create_task(database.migrate(NEXT))
        await until(lambda: "(backup, idle in transaction)" in caplog.text, 10, "who is waited for")
        assert "step 2, ALTER TABLE words ADD COLUMN tone TEXT" in caplog.text
        assert await database.fetch_all("SELECT word FROM words") == []
        assert not waiting.done()
        await other.execute("COMMIT")
        assert await waiting == 1
    finally:
        await other.close()
        await database.disconnect()


async def test_another_release_is_waited_for(postgres_server: Postgres, caplog: pytest.LogCaptureFixture) -> None:
    database = Database(postgres_server.create_database(), timeout=5)
    await database.connect()
    other = await asyncpg.connect(database.url)
    try:
        await other.execute("SELECT pg_advisory_lock(7051959)")
        waiting = asyncio.create_task(database.migrate(BASE))
        await until(lambda: "behind another process that changes the schema" in caplog.text, 10, "a line")
        await other.execute("SELECT pg_advisory_unlock(7051959)")
        assert await waiting == 1
    finally:
        await other.close()
        await database.disconnect()


async def test_the_file_of_another_writer_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database = Database(f"sqlite:///{tmp_path / 'a.db'}", timeout=0.1)
    await database.connect()
    with sqlite3.connect(tmp_path / "a.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        waiting = asyncio.create_task(database.migrate(BASE))
        await until(lambda: "schema, for" in caplog.text, 10, "a line")
        other.execute("ROLLBACK")
    assert await waiting == 1
    await database.disconnect()


async def test_a_step_may_take_longer_than_a_statement(
    postgres_server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index over a large table is built to its end."""
    monkeypatch.setattr(door, "COMMAND_TIMEOUT", 0.3)
    database = Database(postgres_server.create_database(), timeout=0.3)
    await database.connect()
    assert await database.migrate("-- step 1\nSELECT pg_sleep(0.9);\n") == 1
    await database.disconnect()


async def test_a_database_of_the_first_release_goes_on_working(tmp_path: Path) -> None:
    """Its turns are there; its cursors, which counted events, are answered by the whole and not by a wrong rest."""
    path = tmp_path / "parley.db"
    settings = CLOSED | {"DATABASE_URL": f"sqlite:///{path}"}
    with sqlite3.connect(path) as old:
        for _, statements in schema_steps((HERE / "models.sql").read_text())[:2]:
            for statement in statements:
                old.execute(statement)
        old.execute("CREATE TABLE schema_steps (step INTEGER PRIMARY KEY, applied_at BIGINT NOT NULL)")
        old.executemany("INSERT INTO schema_steps VALUES (?, 0)", [(1,), (2,)])
        old.execute("INSERT INTO accounts VALUES ('ann', 'Ann', '{}', 1, 0, 0, ?)", (2**62,))
        old.execute(
            "INSERT INTO sessions (id, account_id, mode, model_a, is_public, is_open, is_pinned, metadata, next_position,"
            " version, created_at, updated_at) VALUES ('s', 'ann', 'direct', 'demo-scholar', 1, 0, 0, '{}', 2, 1, 0, 0)"
        )
        old.execute("INSERT INTO turns VALUES ('t', 's', 'ann', 'q', 0, 'ended', 'w', 0, 0, 9, 0, 0)")
        blank = "NULL, NULL, NULL, 0, 0)"
        old.execute(f"INSERT INTO messages VALUES ('s', 'q', 't', 'user', NULL, NULL, 'hi', 'success', NULL, 0, '[]', -1, {blank}")
        old.execute(
            "INSERT INTO messages VALUES ('s', 'r', 't', 'assistant', 'a', 'demo-scholar', 'once upon a time', 'success',"
            f" NULL, 1, '[\"q\"]', 8, {blank}"
        )
    async with Service(settings) as service:
        for cursor in ("t.5", "t.9", "t.-1"):
            answer = await call(service.url, "GET", "/api/sessions/s/stream/", params={"after": cursor})
            assert answer.status_code == 200 and '"chunk":"once upon a time"' in answer.text, (cursor, answer.text)
