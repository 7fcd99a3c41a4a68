"""No secret in a log, an answer or an error, at any level, while everything that can fail fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import quote

import httpx

from tests.harness import until
from tests.harness.api import call, guest, http, new_session, ticket
from tests.harness.client import SocketReader
from tests.harness.journal import Journal
from tests.harness.servers import Postgres, Redis
from tests.harness.service import Service
from tests.vendors import CANARY, Vendors

LEVELS = ("debug", "info", "warning", "error")
ODD = "CANARY-{} p@ss/w#rd?:%[é"
OPERATORS = {  # what only the environment knows; the first looks like a vendor's key, the second like none
    "OPENAI_API_KEY": "sk-CANARY-openai-0123456789",
    "ANTHROPIC_API_KEY": "CANARY anthropic/key+=",
    "SECRET_KEY": "CANARY-first-key-0123456789-0123456789,CANARY-second-key-0123456789-0123456789",
    "ADMIN_TOKEN": "CANARY-admin-token",
    "API_KEYS": "CANARY-api-key-one,CANARY-api-key-two",
}
REDIS, DATABASE = ODD.format("redis"), ODD.format("database")
HIDDEN = [part for text in OPERATORS.values() for part in text.split(",")]
HIDDEN += [form for password in (REDIS, DATABASE) for form in (password, quote(password, safe=""))] + [CANARY]
PROMPT = "CANARY-PROMPT [[mode:key]]"
WAYS = ("header", "subprotocol", "query", "anonymous", "ticket", "frame")


@asynccontextmanager
async def everything() -> AsyncIterator[tuple[Service, Redis, Postgres]]:
    """A worker for each level, all with the same canaries."""
    with Redis(password=REDIS) as redis, Postgres() as postgres, Vendors() as vendors:
        models = [
            {"id": "one", "provider": "openai_chat", "base_url": f"{vendors.url}/v1", "api_key_env": "OPENAI_API_KEY"},
            {"id": "two", "provider": "anthropic_messages", "base_url": vendors.url, "api_key_env": "ANTHROPIC_API_KEY"},
        ]
        environment = OPERATORS | {
            "PARLEY_ENV": "production",
            "PARLEY_MODELS": json.dumps(models),
            "PARLEY_STORAGE_TIMEOUT": "1",
            "PARLEY_STORE_FOR": "1",
            "REDIS_URL": redis.url.replace(REDIS, quote(REDIS, safe="")),
            "DATABASE_URL": postgres.create_database().replace("postgres@", f"postgres:{quote(DATABASE, safe='')}@"),
        }
        levels = [{"PARLEY_LOG_LEVEL": level} for level in LEVELS]
        async with Service(environment, workers=len(levels), each=levels, server="serve") as service:
            yield service, redis, postgres


class Visit:
    """What is tried on one worker: the secrets it was given, and all it answered."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.said: list[str] = []
        self.journal = Journal()

    async def ask(self, client: httpx.AsyncClient, method: str, path: str, token: str = "", **options: Any) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with suppress(httpx.TransportError):
            answer = await client.request(method, path, headers=headers, **options)
            self.said.append(f"{answer.headers} {answer.text}")

    async def begin(self) -> None:
        self.someone = await guest(self.base)
        token = self.someone.access
        session = await new_session(self.base, token, mode="compare", model_a_id="one", model_b_id="two")
        self.session_id, path = session["id"], f"/api/sessions/{session['id']}"
        shared = await call(self.base, "POST", f"{path}/share/", token)
        self.share: str = shared.json()["share_token"]
        self.ticket = await ticket(self.base, token)
        self.own = [token, self.someone.refresh, self.someone.anonymous_token, self.share, self.ticket, "CANARY-PROMPT"]

    async def over_sockets(self) -> None:
        for way in WAYS:
            shown = {"anonymous": self.someone.anonymous_token}.get(way, self.someone.access)
            reader = SocketReader(self.journal, way, self.base, self.session_id, token=shown, credentials=way)
            async with reader:
                await reader.event("session_state")
                await reader.say(PROMPT)
                await reader.turn_ended()
                await reader.send({"type": "CANARY-PROMPT", "token": self.someone.access})
                await reader.event("error")
        async with SocketReader(
            self.journal, "reader", self.base, self.session_id, query={"share_token": self.share}
        ) as reader:
            await reader.event("session_state")

    async def over_http(self) -> None:
        """Wherever a secret may stand, also where it should not."""
        async with http(self.base) as client:
            for secret in [*HIDDEN, *self.own]:
                odd = quote(secret, safe="")
                path = f"/api/sessions/{self.session_id}/stream/?ticket={odd}&token={odd}&share_token={odd}"
                await self.ask(client, "GET", path)
                await self.ask(client, "GET", f"/api/shared/{odd}/")
                await self.ask(client, "GET", f"/metrics?token={odd}", secret.encode("ascii", "ignore").decode())
                await self.ask(client, "POST", "/api/auth/refresh/", json={"refresh": secret})
            body = {"session_id": self.session_id, "content": PROMPT}
            await self.ask(client, "POST", "/api/messages/stream/", self.someone.access, json=body)
            await self.ask(client, "POST", "/api/messages/stream/", self.someone.access, json=body | {"id": 7})
            said = {"messages": [{"role": "user", "content": PROMPT}]}
            for key in (self.someone.access, OPERATORS["API_KEYS"].partition(",")[0]):
                for model in ("one", "two"):
                    await self.ask(client, "POST", "/v1/chat/completions", key, json=said | {"model": model})
            for path in ("/metrics", "/api/health/", "/readyz", "/api/models/", "/api/users/me/"):
                await self.ask(client, "GET", path, OPERATORS["ADMIN_TOKEN"])


async def test_no_level_prints_a_secret_or_a_prompt_whatever_fails() -> None:
    async with everything() as (service, redis, postgres):
        visits = [Visit(base) for base in service.urls]
        for each in visits:
            await each.begin()
        await asyncio.gather(*[each.over_sockets() for each in visits])
        await asyncio.gather(*[each.over_http() for each in visits])
        redis.kill()
        await asyncio.gather(*[each.over_http() for each in visits[:1]])
        postgres.kill()
        await asyncio.gather(*[each.over_http() for each in visits])
        await until(lambda: service.log(LEVELS.index("error")), 10, "a word of the failures")
        await service.stop()
        logs = [service.log(n) for n in range(len(LEVELS))]
    for level, log, each in zip(LEVELS, logs, visits, strict=True):
        assert [secret for secret in [*HIDDEN, *each.own] if secret in log] == [], (level, log[-3000:])
        assert "Traceback" not in log, (level, log[-3000:])
        answers = "\n".join([*each.said, json.dumps([event.data for event in each.journal.entries], default=str)])
        assert [secret for secret in HIDDEN if secret in answers] == [], level
    assert "was not accepted" in logs[LEVELS.index("error")], "the vendors' refusals have been logged"
