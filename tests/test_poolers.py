"""Behind PgBouncer as it is installed, with its connections shared by transactions, the service is the same."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from chat.store.database import Database
from chat.store.queries import Query
from tests.conftest import CLOSED, absent
from tests.harness.api import guest, messages, new_session, post_turn
from tests.harness.servers import PgBouncer, Postgres, Redis, find_pgbouncer
from tests.harness.service import Service

if find_pgbouncer() is None:
    absent("pgbouncer is not installed")


@pytest.fixture(scope="module")
def pooler(postgres_server: Postgres) -> Iterator[PgBouncer]:
    with PgBouncer(postgres_server) as running:
        yield running


def behind(pooler: PgBouncer) -> str:
    """The address of a fresh database."""
    return pooler.url_of(pooler.postgres.create_database().rpartition("/")[2])


async def test_the_service_starts_and_answers(pooler: PgBouncer, redis_server: Redis) -> None:
    environment = CLOSED | {"DATABASE_URL": behind(pooler), "REDIS_URL": redis_server.url}
    async with Service(environment, workers=2) as service:
        someone = await guest(service.url)
        sessions = [(await new_session(service.url, someone.access))["id"] for _ in range(6)]
        for _ in range(2):
            posts = [post_turn(service.urls[n % 2], someone.access, id, "/count 5") for n, id in enumerate(sessions)]
            assert [answer.status for answer in await asyncio.gather(*posts)] == [200] * 6
        rows = await messages(service.urls[1], someone.access, sessions[0])
        assert [row["status"] for row in rows] == ["success"] * 4
    assert "Traceback" not in service.log(), service.log()[-6000:]


async def test_what_a_frozen_worker_may_hold_is_bounded_here_too(pooler: PgBouncer) -> None:
    """PgBouncer refuses settings at the start of a connection: each transaction brings its own, and leaves nothing."""
    database = Database(behind(pooler))
    await database.connect()
    names = ("lock_timeout", "idle_in_transaction_session_timeout")

    async def settings(query: Query) -> list[str]:
        return [(await query.fetch_all(f"SHOW {name}"))[0][name] for name in names]

    try:
        assert await asyncio.gather(*(database.transaction(settings) for _ in range(8))) == [["3s", "10s"]] * 8
        for name in names:
            assert await database.fetch_all(f"SELECT current_setting('{name}') AS it") == [{"it": "0"}]
    finally:
        await database.disconnect()
