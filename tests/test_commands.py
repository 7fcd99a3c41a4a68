"""What an operator can ask of the command line, against real servers and a real service."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import CLOSED
from tests.harness.processes import Port
from tests.harness.servers import Postgres, Redis
from tests.harness.service import ROOT, Service
from tests.test_startup import CANARY, start

DEMO = {"id": "demo-poet", "provider": "demo", "pace": 0.0, "personality": "poet"}
SCHOLAR = DEMO | {"id": "demo-scholar", "personality": "scholar"}


def test_help_names_every_command(tmp_path: Path) -> None:
    code, said = start(tmp_path, "service.py", "--help")
    assert code == 0
    for name in ("serve", "release", "check", "settings", "chat"):
        assert f"\n    {name} " in said
        code, more = start(tmp_path, "service.py", name, "--help")
        assert code == 0 and len(more.splitlines()) > 5


def test_settings_says_where_each_value_is_from_and_no_secret(tmp_path: Path) -> None:
    secrets = {"ADMIN_TOKEN": CANARY * 2, "API_KEYS": f"{CANARY},{CANARY}2", "REDIS_URL": f"redis://:{CANARY}@localhost"}
    code, said = start(tmp_path, "service.py", "settings", PARLEY_PROMPT_MAX="77", WEB_CONCURRENCY="2", **secrets)
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert code == 0 and CANARY not in said
    assert lines["prompt_max"].split() == ["prompt_max", "77", "PARLEY_PROMPT_MAX"]
    assert lines["workers"].split() == ["workers", "2", "WEB_CONCURRENCY"]
    assert lines["admin_token"].split() == ["admin_token", "'***'", "ADMIN_TOKEN"]
    assert lines["lease"].split() == ["lease", "10.0", "settings.toml"]
    assert lines["env"].endswith("implied by other settings") and "'production'" in lines["env"]


def test_check_is_content_with_what_works(tmp_path: Path, postgres_server: Postgres, redis_server: Redis) -> None:
    environment = {"DATABASE_URL": postgres_server.create_database(), "REDIS_URL": redis_server.url}
    environment["PARLEY_MODELS"] = json.dumps([DEMO])
    code, said = start(tmp_path, "service.py", "check", **environment)
    assert code == 1 and "FAILED  database: the schema lacks" in said
    assert start(tmp_path, "service.py", "release", **environment)[0] == 0
    code, said = start(tmp_path, "service.py", "check", **environment)
    assert (code, said.splitlines()) == (0, ["ok      database", "ok      Redis", "ok      model demo-poet"])


def test_check_names_what_fails_and_how_to_mend_it(tmp_path: Path) -> None:
    away = f"127.0.0.1:{int(Port())}"
    remote = {"id": "remote", "provider": "openai_chat", "base_url": f"http://{away}/v1", "model_code": "x"}
    keyless = {"id": "keyless", "provider": "openai_chat", "model_code": "x", "api_key_env": "NO_SUCH_KEY"}
    code, said = start(
        tmp_path,
        "service.py",
        "check",
        DATABASE_URL=f"postgresql://u:{CANARY}@{away}/x",
        REDIS_URL=f"redis://:{CANARY}@{away}",
        PARLEY_MODELS=json.dumps([remote, keyless]),
    )
    lines = {line.split(":")[0]: line for line in said.splitlines()}
    assert code == 1 and CANARY not in said and "Traceback" not in said
    assert "Is DATABASE_URL right" in lines["FAILED  database"]
    assert "Is REDIS_URL right" in lines["FAILED  Redis"]
    assert "base_url" in lines["FAILED  model remote"]
    assert lines["-       model keyless"].endswith("set NO_SUCH_KEY to offer it")


def test_check_reads_what_redis_refuses(tmp_path: Path) -> None:
    with Redis(options=["--maxmemory", "1"]) as full:
        code, said = start(tmp_path, "service.py", "check", REDIS_URL=full.url, PARLEY_MODELS=json.dumps([DEMO]))
    assert code == 1 and "FAILED  Redis: OOM" in said


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("commands")
    environment = CLOSED | {"DATABASE_URL": f"sqlite:///{folder / 'parley.db'}"}
    with Service(environment | {"PARLEY_MODELS": json.dumps([DEMO, SCHOLAR])}, server="serve") as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-6000:]


async def chatted(url: str, *lines: str, options: tuple[str, ...] = ()) -> tuple[int | None, str]:
    """The exit code and all that `chat` printed to somebody who typed these lines."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "service.py", "chat", url, *options),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(30):
        said, _ = await process.communicate("".join(f"{line}\n" for line in lines).encode())
    return process.returncode, said.decode()


async def test_chat_talks_to_a_running_service(service: Service) -> None:
    """Whose address may be typed as it is in a browser, without http://."""
    bare = service.url.removeprefix("http://")
    code, said = await chatted(bare, "/count 5", "", "/count 2", options=("--model", "demo-scholar"))
    assert code == 0
    assert "⟨0⟩ ⟨1⟩ ⟨2⟩ ⟨3⟩ ⟨4⟩\n" in said and said.rstrip("> \n").endswith("⟨0⟩ ⟨1⟩")


async def test_chat_votes_in_an_arena(service: Service) -> None:
    code, said = await chatted(service.url, "/count 3", "/vote nobody", "/vote tie", options=("--arena",))
    assert code == 0 and said.count("⟨0⟩ ⟨1⟩ ⟨2⟩") == 2
    assert "Vote a, b, tie or bad." in said, "what cannot be voted is refused in words"
    pairs = [("demo-poet", "demo-scholar"), ("demo-scholar", "demo-poet")]
    assert [f"a: {one}  b: {other}" in said for one, other in pairs].count(True) == 1, "the vote reveals the names"


async def test_chat_says_when_nothing_answers() -> None:
    for url in (f"http://127.0.0.1:{int(Port())}", "http://localhost:port", "http://[localhost"):
        code, said = await chatted(url)
        assert code == 1 and "nothing answers at" in said and "Traceback" not in said
