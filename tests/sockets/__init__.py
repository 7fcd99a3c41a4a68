"""Sockets as contract §6 promises them: who gets in, what is said, what is refused, who cannot disturb whom.

This module has the ways to open one, `raw.py` one spoken byte by byte, `events.py` what every event looks like.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote, urlencode

import psutil
from websockets.asyncio.client import ClientConnection, connect

from tests.conftest import CLOSED
from tests.harness.api import Guest, call, guest, new_session
from tests.harness.service import Service

from .events import odd


def offer(pace: float) -> str:
    """Both demo models with this many seconds between tokens, for PARLEY_MODELS."""
    return json.dumps([{"id": f"demo-{who}", "provider": "demo", "personality": who, "pace": pace} for who in PEOPLE])


PEOPLE = ("scholar", "poet")
BATTLE = {"mode": "compare", "model_a_id": "demo-scholar", "model_b_id": "demo-poet"}
TYPING = {"type": "typing_indicator", "is_typing": True}
PATIENT = {  # clocks that no test here is about: a busy machine stands still for a second now and then
    "PARLEY_PING_TIMEOUT": "20",
    "PARLEY_SEND_TIMEOUT": "10",
    "PARLEY_FIRST_TOKEN_TIMEOUT": "20",
    "PARLEY_IDLE_TIMEOUT": "20",
    "PARLEY_LEASE": "10",
    "PARLEY_DRAIN": "15",
}
UVICORN = ["--ws-ping-timeout", "20"]  # the same for a server that is not started by us
ENVIRONMENT = (
    CLOSED
    | PATIENT
    | {
        "PARLEY_MODELS": offer(0.005),
        "ALLOWED_ORIGINS": "https://good.example,https://site.example:8443",
        "PARLEY_MAX_TOKENS": "100000",
    }
)


def address(base: str, session_id: str, **query: str) -> str:
    path = f"/ws/chat/session/{quote(session_id)}/" + (f"?{urlencode(query)}" if query else "")
    return f"ws{base.removeprefix('http')}{path}"


@asynccontextmanager
async def plain(base: str, session_id: str, token: str | None, **query: str) -> AsyncIterator[ClientConnection]:
    """A socket that knows nothing of cursors."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with connect(
        address(base, session_id, **query), additional_headers=headers, compression=None, proxy=None, close_timeout=1
    ) as opened:
        yield opened


async def hear(opened: ClientConnection, last: str) -> list[dict[str, Any]]:
    """The next events, up to one of type `last`."""
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(10):
        while not events or events[-1]["type"] != last:
            events.append(json.loads(await opened.recv()))
            assert not odd(events[-1]), (odd(events[-1]), events[-1])
    return events


async def fate(base: str, session_id: str, say: str | bytes | None = None, **options: Any) -> tuple[int | None, str]:
    """How a socket ends that was accepted: the code and the reason its client is told."""
    query = options.pop("query", {})
    async with connect(address(base, session_id, **query), compression=None, proxy=None, **options) as opened:
        if say is not None:
            await opened.send(say)
        async with asyncio.timeout(10):
            await opened.wait_closed()
        return opened.close_code, opened.close_reason or ""


def bearer(token: str) -> dict[str, Any]:
    return {"additional_headers": {"Authorization": f"Bearer {token}"}}


async def share(base: str, someone: Guest, session_id: str) -> str:
    return (await call(base, "POST", f"/api/sessions/{session_id}/share/", someone.access)).json()["share_token"]


async def home(base: str, **body: Any) -> tuple[Guest, str]:
    """A guest and a session of theirs."""
    someone = await guest(base)
    return someone, (await new_session(base, someone.access, **body))["id"]


def counted(number: int) -> str:
    return " ".join(f"⟨{n}⟩" for n in range(number))


def callers(service: Service) -> int:
    """Connections the first worker holds that the other side has not ended, as the kernel knows them."""
    held = service.worker().net_connections("tcp")
    return sum(each.status == psutil.CONN_ESTABLISHED and each.laddr.port == service.ports[0] for each in held)
