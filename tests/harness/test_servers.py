"""The servers the tests stand on really start, die, freeze and come back, from wherever their binaries come."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import httpx
import psutil
import pytest
from redis.asyncio import Redis as RedisClient
from redis.exceptions import AuthenticationError, ConnectionError, TimeoutError

from tests.harness import until
from tests.harness.processes import HOST, Port, Process, StartFailed, listening
from tests.harness.servers import Postgres, Redis, find_postgres
from tests.harness.service import Service

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["path", "wheel"]

APP = """
import asyncio, os, sys
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

print("tiny starts", os.environ.get("COLOUR"), file=sys.stderr)

async def ready(request):
    return PlainTextResponse("ready")

async def who(request):
    return PlainTextResponse(f"{os.getpid()} {os.environ.get('COLOUR')} {os.environ.get('OPENAI_API_KEY')}")

app = Starlette(routes=[Route("/readyz", ready), Route("/who", who)])
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "tiny.py").write_text(APP)
    return tmp_path


async def get(url: str) -> str:
    async with httpx.AsyncClient(trust_env=False, timeout=2) as client:
        return (await client.get(url)).text


def refuses(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) != 0


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# Redis


@pytest.mark.parametrize("source", SOURCES)
async def test_redis_forgets_what_it_had_when_it_is_killed(source: str) -> None:
    async with Redis(source) as redis, RedisClient.from_url(redis.url) as client:
        await client.set("a", "b")
        redis.kill()
        assert refuses(redis.port)
        with pytest.raises(ConnectionError):
            await client.get("a")
        await redis.start()
        assert await client.get("a") is None


@pytest.mark.parametrize("source", SOURCES)
async def test_a_paused_redis_accepts_and_says_nothing(source: str) -> None:
    async with Redis(source) as redis, RedisClient.from_url(redis.url, socket_timeout=0.2, retry=None) as client:
        await client.set("a", "b")
        redis.pause()
        assert not refuses(redis.port)
        with pytest.raises(TimeoutError):
            await client.get("a")
        redis.resume()
        assert await client.get("a") == b"b"


async def test_redis_keeps_its_port_and_its_appended_data_over_a_restart() -> None:
    async with Redis(appendonly=True) as redis:
        before = redis.url
        async with RedisClient.from_url(redis.url) as client:
            await client.set("a", "b")
        await redis.restart()
        async with RedisClient.from_url(redis.url) as client:
            assert await client.get("a") == b"b"
        assert redis.url == before


async def test_redis_wants_the_password_it_was_given() -> None:
    async with Redis(password="of the tests".replace(" ", "-")) as redis:
        async with RedisClient.from_url(redis.url) as client:
            assert await client.ping()
        async with RedisClient(port=redis.port, retry=None) as stranger:
            with pytest.raises(AuthenticationError):
                await stranger.ping()


async def test_redis_speaks_tls_with_a_certificate_of_its_own() -> None:
    async with Redis(tls=True) as redis:
        assert redis.url.startswith("rediss://")
        async with RedisClient.from_url(redis.url, ssl_cert_reqs="none") as client:
            assert await client.ping()
        async with RedisClient.from_url(redis.url, ssl_ca_certs=str(redis.certificate)) as client:
            assert await client.ping()
        async with RedisClient.from_url(redis.url, retry=None) as client:
            with pytest.raises(ConnectionError):
                await client.ping()


def test_a_redis_without_tls_skips_and_says_why() -> None:
    with pytest.raises(pytest.skip.Exception, match="built without TLS"):
        Redis("wheel", tls=True)


# PostgreSQL


@pytest.fixture(scope="module", params=SOURCES)
def postgres(request: pytest.FixtureRequest) -> Iterator[Postgres]:
    with Postgres(request.param) as server:
        yield server


async def test_each_database_is_new_or_a_copy(postgres: Postgres) -> None:
    first = postgres.create_database()
    await postgres.sql("CREATE TABLE notes (text TEXT)", url=first)
    await postgres.sql("INSERT INTO notes VALUES ($1)", "kept", url=first)
    copy = postgres.create_database(template=first.rpartition("/")[2])
    assert await postgres.sql("SELECT text FROM notes", url=copy) == [{"text": "kept"}]
    with pytest.raises(asyncpg.UndefinedTableError):
        await postgres.sql("SELECT text FROM notes", url=postgres.create_database())


@pytest.mark.parametrize("mode", ["fast", "immediate", "smart"])
async def test_postgres_keeps_its_rows_over_a_restart(postgres: Postgres, mode: str) -> None:
    url = postgres.create_database()
    await postgres.sql("CREATE TABLE notes (text TEXT)", url=url)
    connection = None if mode == "smart" else await asyncpg.connect(url)
    await postgres.restart(mode)
    if connection is not None:
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await connection.execute("SELECT 1")
        connection.terminate()
    assert await postgres.sql("SELECT count(*) AS n FROM notes", url=url) == [{"n": 0}]


async def test_killing_postgres_leaves_no_process_and_it_recovers(postgres: Postgres) -> None:
    url = postgres.create_database()
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE notes (text TEXT)")
    connection.terminate()
    family = postgres.process.members()
    assert len(family) > 3
    postgres.kill()
    assert not any(runs(process.pid) for process in family)
    assert refuses(postgres.port)
    await postgres.start()
    assert await postgres.sql("SELECT count(*) AS n FROM notes", url=url) == [{"n": 0}]


async def test_a_paused_postgres_stops_answering_open_connections_too(postgres: Postgres) -> None:
    connection = await asyncpg.connect(postgres.url)
    try:
        postgres.pause()
        states = {process.status() for process in postgres.process.members()}
        assert states == {psutil.STATUS_STOPPED}
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(0.2):
                await asyncio.shield(asking := asyncio.ensure_future(connection.fetchval("SELECT 1")))
    finally:
        postgres.resume()
    assert await asking == 1
    await connection.close()


async def test_postgres_can_be_made_read_only(postgres: Postgres) -> None:
    url = postgres.create_database()
    name = url.rpartition("/")[2]
    await postgres.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        await postgres.sql("CREATE TABLE notes (text TEXT)", url=url)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to become somebody else")
def test_postgres_is_copied_where_nobody_may_not_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = find_postgres("wheel").parents[1]
    for name in (package.name, f"{package.name}.libs"):
        (tmp_path / name).symlink_to(package.with_name(name))
    tmp_path.chmod(0o700)
    hidden = tmp_path / package.name / "pginstall" / "bin"
    monkeypatch.setattr("tests.harness.servers.find_postgres", lambda source: hidden)
    with Postgres() as server:
        assert server.directory in server.binaries.parents
        assert server.sql_now("SELECT 1 AS one") == [{"one": 1}]


# The service


async def test_each_worker_is_a_process_on_its_own_port_with_its_own_environment(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-who-runs-the-tests")
    each = [{"COLOUR": "red"}, {"COLOUR": "blue"}]
    async with Service({"COLOUR": "none"}, workers=2, root=root, app="tiny:app", each=each) as service:
        answers = [await get(f"{url}/who") for url in service.urls]
        assert [answer.split()[1:] for answer in answers] == [["red", "None"], ["blue", "None"]]
        assert [int(answer.split()[0]) for answer in answers] == [service.worker(0).pid, service.worker(1).pid]
        assert "tiny starts red" in service.log(0)
        assert "tiny starts red" not in service.log(1)
        assert service.resources(0).keys() == {"fds", "threads", "rss"}


async def test_one_worker_dies_while_the_other_serves(root: Path) -> None:
    async with Service(workers=2, root=root, app="tiny:app") as service:
        service.kill(0)
        assert refuses(service.ports[0])
        assert await get(f"{service.urls[1]}/readyz") == "ready"
        await service.launch(0)
        assert await get(f"{service.urls[0]}/readyz") == "ready"
        service.terminate(1)
        assert await service.ended(1, within=5) in (0, -signal.SIGTERM)
        await service.restart(1)
        assert await get(f"{service.urls[1]}/readyz") == "ready"


async def test_a_paused_worker_answers_when_it_is_resumed(root: Path) -> None:
    async with Service(root=root, app="tiny:app") as service:
        service.pause()
        asking = asyncio.create_task(get(f"{service.url}/readyz"))
        done, _ = await asyncio.wait([asking], timeout=0.2)
        assert not done
        service.resume()
        assert await asking == "ready"


async def test_workers_that_share_a_port_are_killed_one_by_one(root: Path) -> None:
    async with Service(workers=2, shared_port=True, root=root, app="tiny:app") as service:
        before = {service.worker(0).pid, service.worker(1).pid}
        assert int((await get(f"{service.url}/who")).split()[0]) in before
        service.kill(0)

        def replaced() -> bool:
            now = {process.pid for process in service._shared_workers()}
            return len(now) == 2 and now != before

        await until(replaced, 10, "a new worker")


async def test_a_service_that_does_not_start_says_why(root: Path) -> None:
    (root / "tiny.py").write_text("raise SystemExit('no such setting')")
    with pytest.raises(StartFailed, match="no such setting"):
        await Service(root=root, app="tiny:app").start()


async def test_a_service_that_is_never_ready_is_given_up(root: Path) -> None:
    with pytest.raises(StartFailed, match="not ready within"):
        await Service(root=root, app="tiny:app", ready_path="/nowhere", ready_within=0.5).start()


@pytest.mark.parametrize("server", ["hypercorn", "granian", "daphne"])
async def test_other_servers_run_it_where_they_are_installed(root: Path, server: str) -> None:
    python = os.environ.get("PARLEY_TEST_SERVERS_PYTHON", sys.executable)
    async with Service(root=root, app="tiny:app", server=server, python=python) as service:
        assert await get(f"{service.url}/readyz") == "ready"


# Ports and ends


def test_a_port_is_nobody_elses_until_it_is_released() -> None:
    ports = [Port() for _ in range(50)]
    assert len({int(port) for port in ports}) == 50
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from tests.harness.processes import _lock
print([_lock(n) for n in {[int(port) for port in ports[:3]]}])
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert answer.stdout.strip() == "[False, False, False]", answer.stderr
    for port in ports:
        port.release()
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert answer.stdout.strip() == "[True, True, True]", answer.stderr


def test_a_family_is_killed_even_when_its_parent_died_first(tmp_path: Path) -> None:
    script = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    process = Process([sys.executable, "-c", script], tmp_path / "log")
    process.start()
    process.wait_until(lambda: process.output().strip().isdigit(), 5)
    child = psutil.Process(int(process.output()))
    os.kill(process.pid, signal.SIGKILL)
    process.wait(5)
    assert child.is_running()
    process.kill()
    assert not runs(child.pid)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(1)", "sys.exit(0)"])
def test_nothing_outlives_the_test_run(end: str) -> None:
    """However it ends: killed from outside, without goodbye, or in good order with servers forgotten."""
    script = f"""
import os, sys; sys.path.insert(0, {str(ROOT)!r})
from tests.harness.servers import Postgres, Redis
redis, postgres = Redis(), Postgres()
redis._start(); postgres._start()
print(redis.process.pid, *[p.pid for p in postgres.process.members()], redis.directory, postgres.directory, flush=True)
{end}
"""
    words = [sys.executable, "-c", script]
    answer = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=60).stdout.split()
    pids, directories = [int(word) for word in answer[:-2]], [Path(word) for word in answer[-2:]]
    assert len(pids) > 4

    deadline = time.monotonic() + 10
    while any(map(runs, pids)) or any(directory.exists() for directory in directories):
        assert time.monotonic() < deadline, (pids, directories)
        time.sleep(0.01)


def test_the_port_of_a_server_that_is_down_stays_its_own() -> None:
    with Redis() as redis:
        redis.kill()
        assert not listening(redis.port)
        others = [Port() for _ in range(20)]
        assert redis.port not in {int(port) for port in others}
        for port in others:
            port.release()
