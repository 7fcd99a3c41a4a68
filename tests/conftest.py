"""Fixtures: real servers started once, and a real service per module on every storage it supports."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from tests.harness.scene import ENVIRONMENT, Scene, Stage
from tests.harness.servers import Postgres, Redis
from tests.harness.service import Service

SECRET = "test-secret-key-of-more-than-32-characters"
CLOSED = {"SECRET_KEY": SECRET, "PARLEY_ENV": "local", "PARLEY_OPEN_SESSIONS": "false"}
STORES = ("sqlite", "postgres+redis")

# The files that take longest, the longest first. Most of their time they wait, so others compute beside them.
LONGEST = (
    *("test_faults_relay", "test_faults_workers", "test_widget", "test_faults_providers", "test_servers"),
    *("test_faults_storage", "test_interop_chats", "test_faults_bus", "test_slow_readers", "test_floods"),
    *("test_moments", "test_arena", "test_doors", "test_database", "test_conform", "test_interop_openai"),
)

SEED = int(os.environ.get("PARLEY_TEST_SEED", "0"))

# Hypothesis holds an example of 200 ms, or slow drawing, for a failure: on a busy machine either is chance. So is what
# it draws: the same examples each time, others with a seed.
settings.register_profile("parley", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=SEED == 0)
settings.load_profile("parley")


def pytest_report_header() -> str:
    return f"PARLEY_TEST_SEED={SEED}  # another draws other moments"


def seeded(scenario: int) -> random.Random:
    """What a scenario draws its moments from."""
    return random.Random(f"{SEED} {scenario}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files and the others take turns, as two processors would stand idle among the longest alone."""
    others = [name for name in dict.fromkeys(item.path.stem for item in items) if name not in LONGEST]
    places = {name: 2 * place for place, name in enumerate(LONGEST)}
    places |= {name: 2 * place + 1 for place, name in enumerate(others)}
    items.sort(key=lambda item: places[item.path.stem])


class Schedule(LoadScopeScheduling):
    """Gives each process a file's tests on one kind of storage: they share their services, other storages none."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        return file + next((f" on {name}" for name in STORES if name in test.partition("[")[2]), "")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Schedule:
    config.option.loadscopereorder = False  # xdist would begin with the files of many tests
    return Schedule(config, log)


def absent(what: str) -> NoReturn:
    """Skip a module this machine has no tool for."""
    pytest.skip(what, allow_module_level=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With PARLEY_TEST_NO_SKIP=1, as in `.ci/run`, a run that skipped anything has failed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("PARLEY_TEST_NO_SKIP") == "1" and reporter is not None and reporter.stats.get("skipped"):
        reporter.ensure_newline()
        reporter.write_line("!!! nothing may be skipped here", red=True, bold=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One loud line at the very end: a skip among a thousand dots looks like a pass."""
    skipped = {str(each.longrepr[2]).removeprefix("Skipped: ") for each in terminalreporter.stats.get("skipped", [])}
    if skipped:
        terminalreporter.write_line(f"!!! NOT TESTED HERE: {'; '.join(sorted(skipped))}", red=True, bold=True)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Redis]:
    with Redis() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


def store(name: str, request: pytest.FixtureRequest, folder: Path) -> dict[str, str]:
    """The environment of a service on this kind of storage, fresh: no service before it counts in its limits."""
    if name == "sqlite":
        return {"DATABASE_URL": f"sqlite:///{folder / 'parley.db'}"}
    postgres: Postgres = request.getfixturevalue("postgres_server")
    redis: Redis = request.getfixturevalue("redis_server")
    url = postgres.create_database()
    return {"DATABASE_URL": url, "REDIS_URL": redis.url, "PARLEY_RELAY_PREFIX": urlsplit(url).path[1:]}


@pytest.fixture(scope="module", params=STORES)
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One worker on SQLite with the in-process relay, or two on PostgreSQL and Redis; no traceback in their logs."""
    environment = CLOSED | store(request.param, request, tmp_path_factory.mktemp("service"))
    with Service(environment, workers=1 if request.param == "sqlite" else 2) as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-6000:]


@pytest.fixture(scope="module")
def stage(postgres_server: Postgres) -> Iterator[Stage]:
    """Two workers on a Redis of their own, which the tests of the module may kill."""
    with Redis() as redis:
        url = postgres_server.create_database()
        with Service(ENVIRONMENT | {"DATABASE_URL": url, "REDIS_URL": redis.url}, workers=2) as service:
            yield Stage(service, url, redis, postgres_server)


@pytest.fixture
async def scene(stage: Stage) -> AsyncIterator[Scene]:
    async with await stage.scene() as scene:
        yield scene
