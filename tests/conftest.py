"""Fixtures: real servers started once, a real service per test module, on SQLite and on PostgreSQL with Redis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.servers import Postgres, Redis, Service

SECRET = "test-secret-key-of-more-than-32-characters"
CLOCKS = {  # shorter than in production, so that a test of a limit takes seconds
    "SECRET_KEY": SECRET,
    "PARLEY_ENV": "local",
    "PARLEY_LEASE": "2",
    "PARLEY_LEASE_RENEW": "0.5",
    "PARLEY_SWEEP_EVERY": "0.5",
    "PARLEY_SEND_TIMEOUT": "2",
    "PARLEY_DRAIN": "3",
    "PARLEY_AUTH_TIMEOUT": "1",
    "PARLEY_MESSAGES_PER_MINUTE": "10000",
    "PARLEY_SESSIONS_PER_HOUR": "10000",
    "PARLEY_DAILY_TOKENS_ACCOUNT": "0",
    "PARLEY_DAILY_TOKENS_SERVICE": "0",
}


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Redis]:
    with Redis() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture(scope="module", params=["sqlite", "postgres+redis"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A running service: one worker on SQLite with the in-process relay, or two on PostgreSQL and Redis."""
    folder: Path = tmp_path_factory.mktemp("service")
    environment = CLOCKS | {"PARLEY_OPEN_SESSIONS": "false"}
    workers = 1
    if request.param == "sqlite":
        environment |= {"DATABASE_URL": f"sqlite:///{folder / 'parley.db'}"}
    else:
        postgres: Postgres = request.getfixturevalue("postgres_server")
        redis: Redis = request.getfixturevalue("redis_server")
        environment |= {"DATABASE_URL": postgres.create_database(), "REDIS_URL": redis.url}
        workers = 2
    with Service(workers=workers, env=environment) as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-4000:]
