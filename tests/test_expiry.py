"""What is over is deleted, in small pieces and by an index: guests who have not come back, and used tokens.

A turn begins and ends by an index as well: while thousands run, each new one would read all of them otherwise.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from chat.errors import ChatError
from chat.settings import HERE
from chat.store import accounts, budgets, turns
from chat.store import database as door
from chat.store.accounts import Account
from chat.store.budgets import Budget
from chat.store.database import Database
from chat.store.sessions import insert_session, select_unchecked
from chat.store.turns import INSERT_MESSAGE, NAMES, Ask, Terms
from tests.conftest import STORES, store
from tests.harness import until

DAY = 86_400_000  # milliseconds
TURN = """INSERT INTO turns (id, session_id, account_id, user_message_id, position, status, owner, lease_until,
                             stop_requested, created_at)
          VALUES (:id, :session_id, :account_id, :id, :position, 'ended', '', 0, 0, 0)"""
VOTE = """INSERT INTO votes (id, turn_id, session_id, account_id, mode, model_a, model_b, preference, counted, created_at)
          VALUES (:id, :id, :id, :account_id, 'random', 'a', 'b', 'tie', 1, 0)"""


@pytest.fixture(params=STORES)
async def database(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Database]:
    monkeypatch.setattr(door, "PIECE", 3)
    database = Database(store(request.param, request, tmp_path)["DATABASE_URL"])
    await database.connect()
    await database.migrate((HERE / "models.sql").read_text())
    yield database
    await database.disconnect()


async def guest(database: Database, days: float, *, active: float | None = None) -> Account:
    """A guest whose time ends in so many days, and who has a session that was last changed `active` days ago."""
    account = await accounts.insert_guest(database, None)
    now = database.now()
    await database.execute(
        "UPDATE accounts SET expires_at = :at WHERE id = :id", {"id": account.id, "at": now + int(days * DAY)}
    )
    if active is not None:
        await insert_session(database, account.id, "direct", ("a", None), id=f"of-{account.id}")
        await database.execute(
            "UPDATE sessions SET updated_at = :at WHERE id = :id",
            {"id": f"of-{account.id}", "at": now - int(active * DAY)},
        )
    return account


async def talk(database: Database, account: Account, turns: int) -> None:
    """Put turns with a message each into the guest's session, and a vote."""
    id = f"of-{account.id}"
    for n in range(turns):
        await database.execute(TURN, {"id": f"{id}-{n}", "session_id": id, "account_id": account.id, "position": n})
        message: dict[str, Any] = dict.fromkeys(NAMES) | {"session_id": id, "id": f"{n}", "turn_id": f"{id}-{n}"}
        message |= {"role": "user", "content": "", "status": "success", "position": n, "parent_ids": "[]"}
        await database.execute(INSERT_MESSAGE, message | {"created_at": 0, "updated_at": 0})
    await database.execute(VOTE, {"id": f"vote of {account.id}", "account_id": account.id})
    await database.execute(
        "INSERT INTO budgets (name, day, tokens, messages) VALUES (:name, '2999-01-01', 1, 1)",
        {"name": f"account:{account.id}"},
    )


async def rows_of(database: Database, table: str) -> int:
    return int((await database.fetch_all(f"SELECT COUNT(*) AS n FROM {table}"))[0]["n"])


async def test_a_guest_who_has_not_come_back_is_deleted_with_all_that_was_said(database: Database) -> None:
    """More than one statement deletes. The vote stays, nobody's any more, and so does everybody else."""
    gone, here = await guest(database, -1, active=31), await guest(database, 1, active=31)
    for account in (gone, here):
        await talk(database, account, 10)
    await accounts.delete_expired(database)
    counts = {table: await rows_of(database, table) for table in ("accounts", "sessions", "turns", "messages", "budgets")}
    assert counts == {"accounts": 1, "sessions": 1, "turns": 10, "messages": 10, "budgets": 1}
    votes = await database.fetch_all("SELECT account_id FROM votes ORDER BY account_id")
    assert [row["account_id"] for row in votes] == ["", here.id]


async def test_who_was_active_or_renewed_lives_on(database: Database) -> None:
    active = await guest(database, -1, active=10)
    renewed = await guest(database, -1)
    await accounts.renew_account(database, renewed.id, renewed.token_version)
    for _ in range(2):
        await accounts.delete_expired(database)
    left = await database.fetch_all("SELECT id, expires_at FROM accounts")
    assert {row["id"]: round((row["expires_at"] - database.now()) / DAY) for row in left} == {
        active.id: 20,
        renewed.id: 30,
    }


@pytest.mark.parametrize("database", ["postgres+redis"], indirect=True)
async def test_who_comes_back_while_the_sweep_runs_lives_on(database: Database) -> None:
    """The sweep has found the account and waits for its row, which a refresh renews."""
    import asyncpg

    account = await guest(database, -1)
    other = await asyncpg.connect(database.url)
    try:
        await other.execute("BEGIN")
        then = database.now() + DAY
        await other.execute("UPDATE accounts SET expires_at = $2 WHERE id = $1", account.id, then)
        sweeping = asyncio.create_task(accounts.delete_expired(database))
        waiting = "SELECT COUNT(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid) "
        waiting += "WHERE NOT l.granted AND a.datname = current_database()"
        await until(lambda: other.fetchval(waiting), what="the sweep to wait")
        await other.execute("COMMIT")
        await sweeping
    finally:
        await other.close()
    assert await database.fetch_all("SELECT id, expires_at FROM accounts") == [{"id": account.id, "expires_at": then}]


async def test_an_account_half_deleted_lets_nobody_in_and_is_deleted_later(database: Database) -> None:
    """The worker that was at it has died. Sessions changed a moment ago do not bring it back."""
    account = await guest(database, 20, active=0)
    await database.execute("UPDATE accounts SET expires_at = 0 WHERE id = :id", {"id": account.id})
    for enter in (accounts.select_account, accounts.renew_account):
        with pytest.raises(ChatError, match="not valid any more"):
            await enter(database, account.id, account.token_version)
    await accounts.delete_expired(database)
    assert await rows_of(database, "accounts") == await rows_of(database, "sessions") == 0


async def test_used_tokens_and_old_budgets_go_in_pieces(database: Database) -> None:
    now = database.now() // 1000
    for n in range(8):
        await accounts.insert_used_token(database, f"old {n}", now - 7200)
        await database.execute(
            "INSERT INTO budgets (name, day, tokens, messages) VALUES (:name, '2020-01-01', 1, 1)", {"name": f"{n}"}
        )
    await accounts.insert_used_token(database, "new", now)
    await accounts.delete_expired(database)
    await budgets.delete_old_budgets(database)
    assert (await rows_of(database, "used_tokens"), await rows_of(database, "budgets")) == (1, 0)


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_what_is_over_is_found_by_an_index(database: Database) -> None:
    """A sweep comes every few seconds on every worker: none of its statements may read a table through."""
    gone = await guest(database, -1, active=31)
    await talk(database, gone, 2)
    said = await statements(database)
    await accounts.delete_expired(database)
    await budgets.delete_old_budgets(database)
    assert check_indexed(database, said) > 9


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_a_turn_begins_and_ends_by_an_index(database: Database) -> None:
    account = await guest(database, 1, active=0)
    session = await select_unchecked(database, f"of-{account.id}")
    terms = Terms("me", 10_000, 1, (Budget("service", 0),), 0, 1, "")
    said = await statements(database)
    turn = await turns.insert_turn(database, session, account.id, Ask("asked", "hello", {}), terms, "turn")
    assert await turns.update_endings(database, "me", list(turn.rows[1:]), last=True)
    assert check_indexed(database, said) > 3


async def statements(database: Database) -> list[str]:
    """A list to which every later statement is added."""
    said: list[str] = []
    for line in database._lines.values():
        for connection in line._connections:
            await connection.raw_connection.set_trace_callback(said.append)
    return said


def check_indexed(database: Database, said: list[str]) -> int:
    """None of these statements may read a table or an index through. Returns how many look for rows."""
    looking = [each for each in said if each.lstrip().startswith(("SELECT", "UPDATE", "DELETE"))]
    with sqlite3.connect(urlsplit(database.url).path[1:]) as other:
        for each in looking:
            plan = [row[3] for row in other.execute(f"EXPLAIN QUERY PLAN {each}")]
            scans = [step for step in plan if step.startswith("SCAN") and step != "SCAN CONSTANT ROW"]
            assert not scans, (each, plan)
    return len(looking)
