"""What operators see of a worker, and nobody else."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.conftest import CLOSED
from tests.harness.api import call, guest, new_session, post_turn
from tests.harness.service import Service


async def test_metrics_are_for_the_operator(tmp_path: Path) -> None:
    """With ADMIN_TOKEN a turn shows up in the histograms; a guest's token opens nothing."""
    environment = CLOSED | {"DATABASE_URL": f"sqlite:///{tmp_path / 'parley.db'}", "ADMIN_TOKEN": "the-operator"}
    async with Service(environment) as service:
        someone = await guest(service.url)
        session = await new_session(service.url, someone.access)
        await post_turn(service.url, someone.access, session["id"], "/count 5")
        await post_turn(service.url, someone.access, session["id"], "/fail")
        assert (await call(service.url, "GET", "/metrics", someone.access)).status_code == 401
        async with asyncio.timeout(5.0):  # a reader hears the end of a turn before its task is over
            while "chat_turns_running 0.0" not in (text := await _metrics(service)):
                await asyncio.sleep(0.02)
    model = 'gen_ai_request_model="demo-scholar"'
    assert f'gen_ai_client_operation_duration_seconds_count{{error_type="",{model}}} 1.0' in text
    assert f'gen_ai_client_operation_duration_seconds_count{{error_type="provider_unavailable",{model}}} 1.0' in text
    assert f'gen_ai_client_token_usage_total{{{model},gen_ai_token_type="output"}} 5.0' in text
    assert "event_loop_lag_seconds" in text and "asyncio_tasks" in text


async def test_without_a_token_there_are_no_metrics(tmp_path: Path) -> None:
    async with Service(CLOSED | {"DATABASE_URL": f"sqlite:///{tmp_path / 'parley.db'}"}) as service:
        assert (await call(service.url, "GET", "/metrics", "anything")).status_code == 404


async def _metrics(service: Service) -> str:
    return (await call(service.url, "GET", "/metrics/", "the-operator")).text
