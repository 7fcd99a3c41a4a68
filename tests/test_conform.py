"""`scripts/conform` on every server we support: each check passes, and a service that is none fails."""

from __future__ import annotations

import json

import pytest

from tests import conform
from tests.conftest import CLOSED, store
from tests.harness.processes import HOST, Port
from tests.harness.service import COMMANDS, Service

PACED = [
    {"id": name, "provider": "demo", "personality": personality, "display_name": name.title(), "pace": 0.005}
    for name, personality in (("first", "scholar"), ("second", "poet"))
]


@pytest.mark.parametrize("server", COMMANDS)
async def test_the_protocol_is_kept(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    server: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    environment = CLOSED | store("sqlite", request, tmp_path_factory.mktemp(server))
    async with Service(environment | {"PARLEY_MODELS": json.dumps(PACED)}, server=server) as service:
        failed = await conform.run(service.url)
        assert "Traceback" not in service.log(), service.log()[-4000:]
    said = capsys.readouterr().out
    assert not failed, "\n".join(line for line in said.splitlines() if not line.startswith("ok"))
    assert len(said.splitlines()) == len(conform.CHECKS) + 1 > 40


async def test_what_is_no_such_service_fails() -> None:
    port = Port()
    assert await conform.run(f"http://{HOST}:{int(port)}") == 1
