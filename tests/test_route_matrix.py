"""Every route of the tables, asked with every kind of credential: nothing of another's comes back, nothing breaks.

Routes come from the tables themselves, what they ask for from `CASES` of test_http: a new route without a row fails.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

import consumers
from tests.conftest import CLOSED
from tests.harness.api import Guest, call, guest, new_session, post_turn, ticket
from tests.harness.service import Service
from tests.sockets import fate
from tests.test_http import CASES, PRIVATE, Owner, ann, ask, named, now, token

__all__ = ["ann"]  # the fixture

SOCKETS = {"/ws/chat/session/{session_id}"}
ADMIN = "the-operators-token-of-these-tests"


@dataclass(frozen=True)
class Caller:
    """What somebody shows instead of a good credential for what is Ann's."""

    token: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    query: str = ""
    refused: str = "token_invalid"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    database = f"sqlite:///{tmp_path_factory.mktemp('matrix') / 'parley.db'}"
    with Service(CLOSED | {"DATABASE_URL": database, "ADMIN_TOKEN": ADMIN, "API_KEYS": "an-api-key"}) as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-6000:]


async def _callers(base: str) -> dict[str, Caller]:
    someone, revoked, deleted = [await guest(base) for _ in range(3)]
    session = await new_session(base, someone.access)
    await post_turn(base, someone.access, session["id"], "/echo hello")
    share = (await call(base, "POST", f"/api/sessions/{session['id']}/share/", someone.access)).json()
    await call(base, "POST", "/api/auth/revoke/", revoked.access)
    await call(base, "DELETE", "/api/users/me/", deleted.access)
    return {
        "nobody": Caller(refused="authentication_required"),
        "nonsense": Caller("nonsense"),
        "an expired token": Caller(token(someone.id, age=3600), refused="token_expired"),
        "a refresh token": Caller(someone.refresh),
        "a ticket as a token": Caller(await ticket(base, someone.access)),
        "a ticket in the address": Caller(query=f"ticket={await ticket(base, someone.access)}", refused="authentication_required"),
        "a token in the address": Caller(query=f"token={someone.access}", refused="authentication_required"),
        "a revoked token": Caller(revoked.access),
        "a deleted account's": Caller(deleted.access),
        "a share of something else": Caller(share["share_token"]),
        "another key's": Caller(token(someone.id, key="another-key-of-more-than-32-characters", age=-60)),
        "the operator's": Caller(ADMIN),
        "an access token as an anonymous one": Caller(headers=(("X-Anonymous-Token", someone.access),)),
        "a cookie": Caller(headers=(("Cookie", f"token={someone.access}; access={someone.access}"),), refused="authentication_required"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def callers(service: Service) -> dict[str, Caller]:
    return now(_callers(service.url))


def test_every_route_and_socket_has_a_row() -> None:
    assert named() == CASES.keys()
    assert {route.path for route in consumers.table} == SOCKETS


@pytest.mark.parametrize("name", CASES)
async def test_no_credential_but_anns_brings_what_is_anns(
    service: Service, ann: Owner, callers: dict[str, Caller], name: str
) -> None:
    """Private routes refuse each bad one by its name; public ones answer, refuse, or do not know; none breaks."""
    for who, caller in callers.items():
        params = dict(part.split("=", 1) for part in (CASES[name].query.lstrip("?") + "&" + caller.query).split("&") if part)
        params = {key: _of(ann, value) for key, value in params.items()}
        answer = await ask(service.url, name, ann, caller.token, headers=dict(caller.headers), params=params)
        assert answer.status_code < 500, (who, answer.text)
        if "/api/admin/" in name:  # the operator's own
            assert (answer.status_code == 401) == (who != "the operator's"), (who, answer.text)
            continue
        assert ann.access not in answer.text and "anns own words" not in answer.text, who
        if name in PRIVATE and CASES[name].without == 401:
            assert answer.status_code == 401, (who, answer.text)
            foreign = name.split()[1].startswith(("/v1/", "/api/chat", "/api/ag-ui"))  # whose errors have other shapes
            assert foreign or answer.json()["error"] == caller.refused, (who, answer.text)


def _of(ann: Owner, value: str) -> str:
    return value.replace("{session_id}", ann.session_id).replace("{message_id}", ann.message_id)


async def test_nothing_of_anns_was_changed_by_all_that(service: Service, ann: Owner) -> None:
    found = (await call(service.url, "GET", f"/api/sessions/{ann.session_id}/", ann.access)).json()
    assert (found["session"]["title"], found["session"]["share_token"]) == ("/echo anns own words", None)
    assert [message["feedback"] for message in found["messages"]] == [None] * 3


@pytest.mark.parametrize("path", sorted(SOCKETS))
async def test_no_socket_opens_anns_session(service: Service, ann: Owner, callers: dict[str, Caller], path: str) -> None:
    """4401 for what proves nothing, 4404 for somebody else's good credential; never a state, never 1011."""
    assert re.fullmatch(r"/ws/chat/session/\{session_id\}", path)
    stranger: Guest = await guest(service.url)
    bad = [who for who, caller in callers.items() if caller.token]
    ends = await asyncio.gather(
        *[fate(service.url, ann.session_id, additional_headers=_bearer(callers[who].token)) for who in bad]
    )
    assert {code for code, _ in ends} == {4401}, dict(zip(bad, ends, strict=True))
    code, _ = await fate(service.url, ann.session_id, additional_headers=_bearer(stranger.access))
    assert code == 4404


def _bearer(text: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}
