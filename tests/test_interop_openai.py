"""Clients of OpenAI's API that other people wrote, unmodified: OpenAI's package for Node.js, LangChain, `llm`."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CLOSED, absent, store
from tests.harness.api import guest
from tests.harness.node import HERE, packages
from tests.harness.service import Service

COUNTED = " ".join(f"⟨{n}⟩" for n in range(40))
UNREACHED = "The model could not be reached."
MODELS = [{"id": "demo", "provider": "demo", "personality": "scholar", "pace": 0.002}]


@pytest.fixture(scope="module")
def python() -> Path:
    """A Python of its own for them, installed once per change of the file: they bring thirty packages."""
    asked, place = HERE / "requirements.txt", HERE / ".venv"
    stamp = place / "installed.txt"
    if not stamp.exists() or stamp.read_text() != asked.read_text():
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", place], check=True)
        command = [sys.executable, "-m", "pip", "--python", place / "bin" / "python", "install", "-q", "--no-compile"]
        command += ["-r", asked]  # most of their modules are never imported: to compile them all takes ten seconds
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            absent(f"pip could not install {asked.name}: {done.stderr.strip()[-300:]}")
        stamp.write_text(asked.read_text())
    return place / "bin"


@pytest.fixture(scope="module")
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    environment = CLOSED | store("sqlite", request, tmp_path_factory.mktemp("service"))
    with Service(environment | {"PARLEY_MODELS": json.dumps(MODELS)}, server="serve") as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-6000:]


async def said(*command: str | Path, **environment: str) -> tuple[int, str, str]:
    """What a command prints: its exit code, output and errors."""
    clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean | environment
    )
    async with asyncio.timeout(60):
        out, problems = await process.communicate()
    return process.returncode or 0, out.decode(), problems.decode()


async def given(service: Service) -> str:
    someone = await guest(service.url)
    return json.dumps({"base": service.url, "key": someone.access, "content": "/count 40"})


def assert_told(seen: dict[str, Any]) -> None:
    assert seen["whole"] == seen["streamed"] == COUNTED and seen["finish"] == "stop" and seen["pieces"] > 20
    assert "There is no model 'none' here." in seen["unknown"]["message"]
    assert UNREACHED in seen["failing"]["message"]


async def test_openais_package_for_node(service: Service) -> None:
    if not shutil.which("node") or not shutil.which("npm"):
        absent("the tests of other people's clients need Node.js and npm (apt-get install nodejs npm)")
    if problem := packages():
        absent(problem)
    code, out, problems = await said("node", HERE / "openai.mjs", await given(service))
    assert code == 0, problems
    seen = json.loads(out)
    assert_told(seen)
    assert seen["models"] == ["demo"] and seen["unknown"]["status"] == 404


async def test_langchain(service: Service, python: Path) -> None:
    code, out, problems = await said(python / "python", HERE / "langchain.py", await given(service))
    assert code == 0, problems
    seen = json.loads(out)
    assert_told(seen)
    assert seen["tokens"] == 40


async def test_llm(service: Service, python: Path, tmp_path: Path) -> None:
    models = [{"model_id": "parley", "model_name": "demo", "api_base": f"{service.url}/v1", "api_key_name": "parley"}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
    key = json.loads(await given(service))["key"]
    for more in ([], ["--no-stream"]):
        command = [python / "llm", "-m", "parley", "--key", key, *more]
        code, out, problems = await said(*command, "/count 40", LLM_USER_PATH=str(tmp_path))
        assert (code, out.strip()) == (0, COUNTED), problems
    code, _, problems = await said(*command, "/fail 2", LLM_USER_PATH=str(tmp_path))
    assert code == 1 and UNREACHED in problems
