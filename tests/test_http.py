"""The wire contract over HTTP, sections 1 to 5 and 10: every route, asked well and asked badly, on every worker."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import secrets
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
from itsdangerous import URLSafeSerializer
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

import routes
from chat.errors import STATUS
from chat.settings import read_settings
from chat.state import CHECKED_FOR
from routes.operations import VERSION
from tests.conftest import CLOSED, SECRET
from tests.harness import until
from tests.harness.api import call, guest, http, messages, new_session, post_turn, stop, ticket, unescape
from tests.harness.noise import prompt
from tests.harness.proxy import Proxy
from tests.harness.servers import Postgres, Redis
from tests.harness.service import Service
from tests.harness.sse import SSEEvent, SSEParser
from tests.harness.view import put_together

T = TypeVar("T")
NOBODYS = "00000000-0000-7000-8000-000000000000"  # an id that nothing has
EVIL_HOSTS = [
    "evil.example",
    "evil.example:8001",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "127.0.0.1@evil.example",
    "evil.example@127.0.0.1",
    "127.0.0.1:80:80",
    "",
]
EVIL_ORIGINS = [
    "https://evil.example",
    "http://localhost.evil.example",
    "http://127.0.0.1.evil.example",
    "http://localhost@evil.example",
    "http://evil.example?localhost",
    "http://evil.example#localhost",
    "http://[::1",
    "null",
    "",
]

# What a session, a message and a line of the list have for their owner: nothing more may reach the wire unseen.
SESSION = {
    "id", "user", "mode", "title", "model_a", "model_b", "is_public", "share_token", "share_url", "created_at",
    "updated_at", "metadata", "expires_at", "message_count", "last_message_at", "is_pinned", "version", "voted",
}  # fmt: skip
MESSAGE = {
    "id", "session", "role", "content", "model", "parent_message_ids", "child_ids", "position", "participant",
    "status", "failure_reason", "attachments", "metadata", "feedback", "created_at", "latency_ms", "first_token_ms",
    "has_feedback",
}  # fmt: skip
SUMMARY = {
    "id", "mode", "title", "model_a_name", "model_b_name", "created_at", "updated_at", "message_count", "is_pinned",
    "session_type",
}  # fmt: skip
CARD = {
    "id", "provider", "model_code", "display_name", "capabilities", "supported_languages", "is_active",
    "release_date", "model_type", "is_thinking_model", "url", "random_only",
}  # fmt: skip
ME = {
    "id", "email", "phone_number", "display_name", "auth_provider", "is_anonymous", "created_at", "updated_at",
    "is_active", "preferences", "anonymous_expires_at",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What a route asks of its caller: the status without a token, and whether it names something of somebody's."""

    without: int = 401
    owned: bool = False
    query: str = ""
    body: dict[str, Any] | None = None


VOTE = {"feedback_type": "preference", "preference": "tie"}
SAID = {"role": "user", "content": "hello"}
UI_CHAT = {"id": "{session_id}", "messages": [SAID], "trigger": "submit-message"}
AG_UI_RUN = {"threadId": "{session_id}", "runId": "run-1", "messages": [SAID]}
CASES = {
    "GET /": Case(200),
    "GET /arena": Case(200),
    "GET /leaderboard": Case(200),
    "GET /shared/{token}": Case(200),  # the same page for any token: what it asks for then is refused
    "GET /debug": Case(200),  # on a local start only
    "GET /admin": Case(404),  # there is none without ADMIN_TOKEN
    "GET /widget.js": Case(200),
    "GET /widget/{name}": Case(404),
    "GET /api/widget": Case(200),
    "GET /api/health": Case(200),
    "GET /health": Case(200),
    "GET /livez": Case(200),
    "GET /live": Case(200),
    "GET /readyz": Case(200),
    "GET /ready": Case(200),
    "GET /metrics": Case(404),  # there is none without ADMIN_TOKEN
    "GET /api/admin/sessions": Case(404),  # nor these
    "GET /api/admin/sessions/{session_id}": Case(404),
    "PATCH /api/admin/sessions/{session_id}": Case(404),
    "POST /api/auth/anonymous": Case(200),
    "POST /api/auth/refresh": Case(400),  # its token is in the body
    "POST /api/auth/revoke": Case(),
    "POST /api/auth/ticket": Case(),
    "GET /api/users/me": Case(),
    "PATCH /api/users/me": Case(),
    "DELETE /api/users/me": Case(),
    "PATCH /api/users/update_preferences": Case(),
    "GET /api/models": Case(200),
    "GET /api/models/{model_id:path}": Case(200),
    "POST /api/sessions": Case(),
    "GET /api/sessions": Case(),
    "GET /api/sessions/{session_id}": Case(404, owned=True),  # a public one may be read: this one does not exist
    "PATCH /api/sessions/{session_id}": Case(owned=True, body={"title": "mine now"}),
    "DELETE /api/sessions/{session_id}": Case(owned=True),
    "POST /api/sessions/{session_id}/share": Case(owned=True),
    "POST /api/sessions/{session_id}/unshare": Case(owned=True),
    "POST /api/sessions/{session_id}/generate_title": Case(owned=True),
    "GET /api/sessions/{session_id}/export": Case(owned=True),
    "GET /api/shared/{token}": Case(404),  # the token in the path is what admits
    "POST /api/messages/stream": Case(owned=True, body={"session_id": "{session_id}", "content": "hello"}),
    "GET /api/messages": Case(owned=True, query="?session_id={session_id}"),
    "POST /api/messages/{message_id}/regenerate": Case(owned=True),
    "GET /api/sessions/{session_id}/stream": Case(404, owned=True),
    "POST /api/sessions/{session_id}/stop": Case(owned=True),
    "POST /api/feedback": Case(owned=True, body={"session_id": "{session_id}", "message_id": "{message_id}"} | VOTE),
    "GET /api/feedback": Case(owned=True, query="?session_id={session_id}"),
    "GET /api/leaderboard": Case(200),
    "GET /api/leaderboard/details": Case(200),
    "GET /api/arena/votes.jsonl": Case(200),
    "POST /api/chat": Case(body=UI_CHAT),
    "GET /api/chat/{session_id}/stream": Case(),
    "POST /api/chat/{session_id}/stop": Case(owned=True),
    "POST /api/ag-ui": Case(body=AG_UI_RUN),
    "GET /api/ag-ui": Case(owned=True, query="?runId={message_id}&offset=-1"),
    "GET /v1/models": Case(),
    "GET /v1/models/{model_id:path}": Case(),
    "POST /v1/chat/completions": Case(body={"model": "demo-scholar", "messages": [SAID], "max_tokens": 2}),
}
PRIVATE = [name for name, case in CASES.items() if case.without == 401 or case.owned]
OWNED = [name for name, case in CASES.items() if case.owned]
GATED = [name for name in CASES if not re.search(r"/(health|livez?|readyz?)$", name)]


def named() -> set[str]:
    """Every route of the table as `METHOD /path`."""
    return {
        f"{method} {route.path}"
        for route in routes.table
        for method in getattr(route, "methods", None) or {"GET"}
        if method != "HEAD"
    }


@dataclass(frozen=True)
class Owner:
    """Somebody with a compare session in which one turn has ended."""

    access: str
    session_id: str
    message_id: str
    reply_id: str


@pytest.fixture(scope="module")
def ann(service: Service) -> Owner:
    return now(_ann(service.url))


async def _ann(base: str) -> Owner:
    someone = await guest(base, "Ann")
    session = await compare(base, someone.access)
    await post_turn(base, someone.access, session["id"], "/echo anns own words")
    user, reply, _ = await messages(base, someone.access, session["id"])
    return Owner(someone.access, session["id"], user["id"], reply["id"])


def now(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in a thread: fixtures that outlive a test's loop have none of their own."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(work)).result()


async def compare(base: str, token: str, **body: Any) -> dict[str, Any]:
    models = {"model_a_id": "demo-scholar", "model_b_id": "demo-poet"}
    return await new_session(base, token, mode="compare", **models | body)


async def ask(base: str, name: str, owner: Owner, token: str | None, slash: str = "/", **options: Any) -> httpx.Response:
    """Ask a route by its name in `CASES`, about what is the owner's."""
    values = {
        "{session_id}": owner.session_id,
        "{message_id}": owner.message_id,
        "{model_id:path}": "demo-scholar",
        "{token}": "nobodys-share-token",
        "{name}": "nobodys-file.js",
    }
    method, path = name.split()
    case = CASES[name]
    body = None if case.body is None else json.loads(_filled(json.dumps(case.body), values))
    return await call(base, method, _filled(path + slash + case.query, values), token, json=body, **options)


def _filled(text: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(name, value)
    return text


def refused(response: httpx.Response, code: str, field: str | None = None) -> dict[str, Any]:
    """The body of an error, after a look at everything an error promises."""
    assert response.status_code == STATUS[code], (response.status_code, response.text)
    assert response.headers["x-content-type-options"] == "nosniff"
    assert ("Retry-After" in response.headers) == (response.status_code in (429, 503))
    assert (response.headers.get("WWW-Authenticate") == "Bearer") == (response.status_code == 401)
    if response.url.path.startswith("/api/chat"):
        assert response.headers["content-type"].startswith("text/plain") and response.text.endswith("."), response.text
        return {}
    assert response.headers["content-type"] == "application/json"
    body: dict[str, Any] = response.json()
    if response.url.path.startswith("/v1/"):
        assert body["error"].keys() == {"message", "type", "param", "code"} and body["error"]["code"] == code, body
        return body
    assert body["error"] == code, body
    assert body.keys() - {"fields", "retry_after"} == {"error", "message", "detail"}
    assert body["message"] == body["detail"]
    assert body["message"].endswith(".") or "fields" in body, body
    assert ("fields" in body) == (code == "invalid"), body
    if field is not None:
        assert list(body["fields"]) == [field], body
    return body


def every_worker(service: Service, count: int) -> list[str]:
    """`count` base URLs, taking turns among the workers."""
    return [service.urls[n % len(service.urls)] for n in range(count)]


async def at_once(work: list[Coroutine[Any, Any, T]]) -> list[T]:
    return list(await asyncio.gather(*work))


def rows(service: Service, statement: str) -> list[tuple[Any, ...]]:
    """Ask the service's database itself."""
    url = (service.processes[0].env or {})["DATABASE_URL"]
    if url.startswith("sqlite"):
        with sqlite3.connect(urlsplit(url).path[1:], timeout=30) as connection:
            return [tuple(row) for row in connection.execute(statement).fetchall()]
    return now(_rows(url, statement))


async def _rows(url: str, statement: str) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(statement)]
    finally:
        await connection.close()


# -- the table


def test_every_route_has_a_case() -> None:
    """A new route says here whom it answers; one that is gone is forgotten here, too."""
    assert named() - CASES.keys() == set()
    assert CASES.keys() - named() == set()


@pytest.mark.parametrize("name", CASES)
async def test_without_a_token_only_public_routes_answer(service: Service, ann: Owner, name: str) -> None:
    response = await ask(service.url, name, ann, None)
    expected = CASES[name].without
    assert response.status_code == expected, response.text
    if expected == 401:
        refused(response, "authentication_required")
    elif expected >= 400:
        refused(response, "not_found" if expected == 404 else "invalid")


@pytest.mark.parametrize("name", PRIVATE)
async def test_a_bad_token_is_refused_at_once(service: Service, ann: Owner, name: str) -> None:
    refused(await ask(service.url, name, ann, "nonsense"), "token_invalid")


@pytest.mark.parametrize("name", OWNED)
async def test_what_is_not_yours_does_not_exist(service: Service, ann: Owner, name: str) -> None:
    """404 on every route, never 403: ids cannot be probed."""
    stranger = await guest(service.urls[-1])
    foreign = refused(await ask(service.urls[-1], name, ann, stranger.access), "not_found")
    nothing = Owner(ann.access, NOBODYS, NOBODYS, NOBODYS)
    assert refused(await ask(service.url, name, nothing, stranger.access), "not_found") == foreign


@pytest.mark.parametrize("name", CASES)
async def test_a_path_answers_with_and_without_its_slash(service: Service, ann: Owner, name: str) -> None:
    bare, slashed = [
        await ask(service.url, name, ann, (await guest(service.url)).access, slash) for slash in ("", "/")
    ]
    assert bare.status_code == slashed.status_code < 500
    assert not bare.is_redirect and not slashed.is_redirect
    assert "There is nothing here" not in bare.text + slashed.text


@pytest.mark.parametrize("path", sorted({name.split()[1] for name in CASES}))
async def test_a_method_that_is_not_served_names_those_that_are(service: Service, path: str) -> None:
    served = {name.split()[0] for name in CASES if name.split()[1] == path}
    response = await call(service.url, "PUT", path.replace("{", "").replace("}", ""))
    refused(response, "method_not_allowed")
    assert set(response.headers["Allow"].split(", ")) - {"HEAD"} == served


# -- errors: one shape on everything


@pytest.mark.parametrize("path", ["/nothing", "/api/nothing/", "/api/sessions/x/nothing/", "/api/health/x", "/%2e%2e/"])
async def test_an_unknown_path_is_not_found(service: Service, path: str) -> None:
    refused(await call(service.url, "GET", path), "not_found")


async def test_a_socket_s_address_says_what_it_is(service: Service) -> None:
    """To a client whose proxy drops the Upgrade header; and to a socket, an address without a route is 404, not 403."""
    said = refused(await call(service.url, "GET", "/ws/chat/session/any/"), "bad_request")
    assert "Upgrade" in said["message"]
    with pytest.raises(InvalidStatus) as missing:
        await connect(f"{service.url.replace('http', 'ws')}/ws/chat/any/", proxy=None)
    assert (missing.value.response.status_code, json.loads(missing.value.response.body)["error"]) == (404, "not_found")


@pytest.mark.parametrize("body", [b"{", b"nonsense", b'{"title": }', b'{"title": "a" "b"}', b"\x00"])
async def test_a_body_that_is_not_json_is_a_bad_request(service: Service, ann: Owner, body: bytes) -> None:
    refused(await call(service.url, "POST", "/api/sessions/", ann.access, content=body), "bad_request")


@pytest.mark.parametrize("body", [b'{"title": "\xff"}', b'{"title": "\xc3("}', b'\xff\xfe{\x00}\x00', b'{"title": "\\ud800"}'])
async def test_a_body_that_is_not_utf8_is_a_bad_request(service: Service, ann: Owner, body: bytes) -> None:
    refused(await call(service.url, "POST", "/api/sessions/", ann.access, content=body), "bad_request")


async def test_json_nested_without_end_is_a_bad_request(service: Service, ann: Owner) -> None:
    body = b'{"metadata": {"x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}}"
    refused(await call(service.url, "POST", "/api/sessions/", ann.access, content=body), "bad_request")


WRONG = [  # method, path, body, the path of the field that is wrong
    ("POST", "/api/sessions/", [], "body"),
    ("POST", "/api/sessions/", None, "body"),
    ("POST", "/api/sessions/", {"mode": "duel"}, "mode"),
    ("POST", "/api/sessions/", {"mode": 1}, "mode"),
    ("POST", "/api/sessions/", {"title": 7}, "title"),
    ("POST", "/api/sessions/", {"title": "x" * 256}, "title"),
    ("POST", "/api/sessions/", {"metadata": "text"}, "metadata"),
    ("POST", "/api/sessions/", {"metadata": {"x": "y" * 16_384}}, "metadata"),
    ("POST", "/api/sessions/", {"metadata": {"a": [[[[[[[[["deep"]]]]]]]]]}}, "metadata"),
    ("POST", "/api/sessions/", {"session_type": "x" * 33}, "session_type"),
    ("POST", "/api/sessions/", {"id": ""}, "id"),
    ("POST", "/api/sessions/", {"id": "x" * 65}, "id"),
    ("POST", "/api/sessions/", {"id": "one two"}, "id"),
    ("POST", "/api/sessions/", {"id": "line\n"}, "id"),
    ("POST", "/api/sessions/", {"id": "../x"}, "id"),
    ("POST", "/api/sessions/", {"id": "é"}, "id"),
    ("PATCH", "/api/users/me/", {"display_name": ""}, "display_name"),
    ("PATCH", "/api/users/me/", {"display_name": "x" * 256}, "display_name"),
    ("PATCH", "/api/users/me/", {"preferences": []}, "preferences"),
    ("PATCH", "/api/users/me/", {"preferences": {"x": "y" * 16_384}}, "preferences"),
    ("POST", "/api/auth/anonymous/", {"display_name": "x" * 256}, "display_name"),
    ("POST", "/api/auth/anonymous/", {"display_name": ["x"]}, "display_name"),
    ("POST", "/api/auth/refresh/", {}, "refresh"),
    ("POST", "/api/auth/refresh/", {"refresh": 1}, "refresh"),
    ("PATCH", "/api/sessions/{session_id}/", {"is_pinned": "yes"}, "is_pinned"),
    ("PATCH", "/api/sessions/{session_id}/", {"mode": "random"}, "mode"),
    ("PATCH", "/api/sessions/{session_id}/", {"model_a": "demo-poet"}, "model_a"),
    ("PATCH", "/api/sessions/{session_id}/", {"share_token": "mine"}, "share_token"),
    ("PATCH", "/api/sessions/{session_id}/", {"voted": True}, "voted"),
    ("GET", "/api/sessions/?mode=duel", None, "mode"),
    ("GET", "/api/sessions/?limit=0", None, "limit"),
    ("GET", "/api/sessions/?limit=201", None, "limit"),
    ("GET", "/api/sessions/?limit=ten", None, "limit"),
    ("GET", "/api/sessions/?limit=--1", None, "limit"),
    ("GET", "/api/sessions/?limit=%C2%B2", None, "limit"),
    ("GET", f"/api/sessions/?limit={'9' * 99}", None, "limit"),
    ("GET", "/api/sessions/?before=yesterday", None, "before"),
    ("GET", "/api/sessions/?before=%C2%B2.x", None, "before"),
    ("GET", f"/api/sessions/?before={'9' * 40}.x", None, "before"),
    ("GET", "/api/sessions/{session_id}/?before=-1", None, "before"),
    ("GET", "/api/sessions/{session_id}/export/?format=pdf", None, "format"),
    ("GET", "/api/messages/", None, "session_id"),
    ("GET", "/api/feedback/", None, "session_id"),
    ("POST", "/api/messages/stream/", {"session_id": "{session_id}", "content": ""}, "content"),
    ("POST", "/api/messages/stream/", {"session_id": "{session_id}", "content": " \n\t"}, "content"),
    ("POST", "/api/messages/stream/", {"session_id": "{session_id}"}, "content"),
    ("POST", "/api/messages/stream/", {"session_id": "{session_id}", "content": 5}, "content"),
    ("POST", "/api/messages/stream/", {"session_id": "a b", "content": "x"}, "session_id"),
    ("POST", "/api/messages/stream/", {"session_id": "{session_id}", "content": "x", "id": "a\n"}, "id"),
    ("POST", "/api/messages/stream/", {"session_id": "{session_id}", "messages": []}, "messages"),
    ("POST", "/api/messages/stream/", {"session_id": "{session_id}", "messages": [{"role": "bot"}]}, "messages[0].role"),
    ("POST", "/api/messages/stream/", {"session_id": "{session_id}", "messages": [{}]}, "messages[0].role"),
    ("POST", "/api/messages/stream/", {"session_id": "{session_id}", "messages": [{"role": "user", "id": "é"}]},
     "messages[0].id"),
    ("POST", "/api/messages/stream/", {"session_id": "{session_id}", "messages": [{"role": "assistant"}]}, "messages"),
    ("POST", "/api/messages/stream/",
     {"session_id": "{session_id}", "messages": [{"role": "user", "id": "u", "content": "x"},
                                                 {"role": "assistant", "id": "u"}]}, "messages"),
    ("POST", "/api/messages/stream/", {"session_id": "{session_id}", "content": "x", "temperature": -0.1}, "temperature"),
    ("POST", "/api/messages/stream/", {"session_id": "{session_id}", "content": "x", "temperature": 2.1}, "temperature"),
    ("POST", "/api/messages/stream/", {"session_id": "{session_id}", "content": "x", "temperature": "1"}, "temperature"),
    ("POST", "/api/messages/stream/", {"session_id": "{session_id}", "content": "x", "max_tokens": 0}, "max_tokens"),
    ("POST", "/api/messages/stream/", {"session_id": "{session_id}", "content": "x", "max_tokens": 8001}, "max_tokens"),
    ("POST", "/api/messages/stream/", {"session_id": "{session_id}", "content": "x", "max_tokens": 1.5}, "max_tokens"),
    ("POST", "/api/messages/stream/?format=pdf", {"content": "x"}, "format"),
    ("POST", "/api/messages/stream/", {"content": "x", "mode": "compare"}, "model_a_id"),
    ("POST", "/api/messages/stream/", {"content": "x", "model_a_id": "nobody"}, "model_a_id"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body", "field"), WRONG)
async def test_what_is_wrong_is_named_by_its_path(
    service: Service, ann: Owner, method: str, path: str, body: Any, field: str
) -> None:
    text = json.dumps(body).replace("{session_id}", ann.session_id)
    sent = None if method == "GET" else text
    path = path.replace("{session_id}", ann.session_id)
    refused(await call(service.url, method, path, ann.access, content=sent), "invalid", field)


@pytest.mark.parametrize(
    ("path", "body", "field", "allowed"),
    [
        ("/api/sessions/", {"mode": "duel"}, "mode", "direct, compare, random"),
        ("/api/messages/stream/", {"messages": [{"role": "user"}, {"role": "bot"}]}, "messages[1].role", "user, assistant, system"),
        ("/api/feedback/", {"session_id": "s", "message_id": "m", "feedback_type": "vote"}, "feedback_type", "preference, rating, report"),
        ("/api/ag-ui", {"threadId": "t", "runId": "r", "messages": [], "forwardedProps": {"mode": "x"}}, "forwardedProps.mode",
         "direct, compare, random"),
    ],
)  # fmt: skip
async def test_the_words_that_a_field_may_have_are_named(
    service: Service, ann: Owner, path: str, body: Any, field: str, allowed: str
) -> None:
    answer = await call(service.url, "POST", path, ann.access, json=body)
    assert answer.json()["fields"] == {field: f"expected one of {allowed}"}


@pytest.mark.parametrize("text", ['{"title": "a\\u0000b"}', '{"title": "\\\\\\u0000"}', '{"metadata": {"\\u0000": 1}}'])
async def test_nul_characters_are_refused_in_any_text(service: Service, ann: Owner, text: str) -> None:
    """PostgreSQL stores none; a backslash before them must not hide them."""
    refused(await call(service.url, "POST", "/api/sessions/", ann.access, content=text), "invalid", "body")


async def test_the_letters_of_an_escaped_nul_are_just_letters(service: Service, ann: Owner) -> None:
    response = await call(service.url, "POST", "/api/sessions/", ann.access, content='{"title": "\\\\u0000"}')
    assert response.json()["title"] == "\\u0000"


@pytest.mark.parametrize(
    "path", ["/api/sessions/%00/", "/api/sessions/?search=%00", "/api/messages/?session_id=%00", "/api/shared/%00/"]
)
async def test_nul_characters_are_refused_in_addresses(service: Service, ann: Owner, path: str) -> None:
    refused(await call(service.url, "GET", path, ann.access), "bad_request")


@pytest.mark.parametrize("type", ["application/xml", "multipart/form-data; boundary=x", "text/html", "image/png", "json"])
async def test_a_body_of_another_type_is_refused(service: Service, ann: Owner, type: str) -> None:
    headers = {"Content-Type": type}
    response = await call(service.url, "POST", "/api/sessions/", ann.access, content=b"{}", headers=headers)
    refused(response, "unsupported_media_type")


async def test_a_compressed_body_is_refused_as_one(service: Service, ann: Owner) -> None:
    """And not as broken JSON: nothing is unpacked here."""
    coded = gzip.compress(b'{"title": "Rivers"}')
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    response = await call(service.url, "POST", "/api/sessions/", ann.access, content=coded, headers=headers)
    assert "Content-Encoding" in refused(response, "unsupported_media_type")["message"]


@pytest.mark.parametrize(
    "type",
    ["application/json", "Application/JSON; charset=utf-8", "text/plain", "application/x-www-form-urlencoded", ""],
)
async def test_json_is_read_as_clients_label_it(service: Service, ann: Owner, type: str) -> None:
    """`curl -d` says it sends a form, and a page that wants no preflight says it sends text."""
    headers = {"Content-Type": type}
    response = await call(service.url, "POST", "/api/sessions/", ann.access, content=b"{}", headers=headers)
    assert response.status_code == 201


BODY_MAX = 262_144


async def test_a_body_of_the_longest_length_is_read(service: Service, ann: Owner) -> None:
    body = b'{"title": "long"}'.ljust(BODY_MAX)
    response = await call(service.url, "POST", "/api/sessions/", ann.access, content=body)
    assert response.json()["title"] == "long"


@pytest.mark.parametrize("path", ["/api/sessions/", "/api/messages/stream/", "/api/auth/anonymous/"])
async def test_a_longer_body_is_refused_by_its_announced_length(service: Service, ann: Owner, path: str) -> None:
    refused(await call(service.url, "POST", path, ann.access, content=b"{}".ljust(BODY_MAX + 1)), "too_large")


async def test_a_longer_body_is_refused_in_chunks_as_well(service: Service, ann: Owner) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"{}"
        for _ in range(5):
            yield b" " * 65_536

    refused(await call(service.url, "POST", "/api/sessions/", ann.access, content=chunks()), "too_large")


async def test_a_body_that_breaks_off_is_nobodys_error(service: Service, ann: Owner) -> None:
    """The `service` fixture finds a traceback in the log where there is one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.ports[0])
    head = f"POST /api/sessions/ HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ann.access}\r\n"
    writer.write(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 5) in (b"", await _nothing())
    writer.close()
    assert (await call(service.url, "GET", "/livez")).status_code == 200


async def _nothing() -> bytes:
    return b""


# -- accounts


async def test_a_guest_gets_an_account_and_tokens(service: Service) -> None:
    response = await call(service.url, "POST", "/api/auth/anonymous/", json={"display_name": "  Zoë 👋 "})
    assert response.status_code == 200
    answer = response.json()
    assert answer.keys() == {"user", "tokens", "anonymous_token", "expires_at"}
    assert answer["tokens"].keys() == {"access", "refresh", "token_type", "expires_in"}
    assert (answer["tokens"]["token_type"], answer["tokens"]["expires_in"]) == ("Bearer", 3600)
    user = answer["user"]
    assert user.keys() == ME
    fixed = {"email": None, "phone_number": None, "auth_provider": "anonymous", "is_anonymous": True, "is_active": True}
    assert user | fixed | {"display_name": "Zoë 👋", "preferences": {}} == user
    assert answer["expires_at"] == user["anonymous_expires_at"]
    lived = time.mktime(time.strptime(answer["expires_at"][:19], "%Y-%m-%dT%H:%M:%S")) - time.mktime(time.gmtime())
    assert 29.9 * 86400 < lived <= 30 * 86400 + 60
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", user["created_at"])


@pytest.mark.parametrize("body", [b"", b"{}", b'{"display_name": null}', b'{"display_name": "  "}', b'{"other": 1}'])
async def test_a_guest_without_a_name_gets_one(service: Service, body: bytes) -> None:
    response = await call(service.url, "POST", "/api/auth/anonymous/", content=body)
    assert re.fullmatch(r"Anonymous_[0-9a-f]{8}", response.json()["user"]["display_name"])


async def test_who_i_am_is_the_same_on_every_worker(service: Service) -> None:
    someone = await guest(service.url, "Ann")
    for base in service.urls:
        assert (await call(base, "GET", "/api/users/me/", someone.access)).json() == someone.answer["user"]


@pytest.mark.parametrize("path", ["/api/users/me/", "/api/users/update_preferences/"])
async def test_name_and_preferences_change_and_nothing_else(service: Service, path: str) -> None:
    someone = await guest(service.url, "Ann")
    change = {"display_name": "Anna", "preferences": {"theme": "dark", "n": 1}}
    for field in ("id", "is_anonymous", "email"):
        refused(await call(service.url, "PATCH", path, someone.access, json=change | {field: "x"}), "invalid", field)
    changed = (await call(service.url, "PATCH", path, someone.access, json=change)).json()
    assert changed["display_name"] == "Anna"
    assert changed["preferences"] == {"theme": "dark", "n": 1}
    kept = (await call(service.urls[-1], "PATCH", path, someone.access, json={"display_name": None})).json()
    same = set(ME) - {"display_name", "preferences", "updated_at"}
    assert {name: kept[name] for name in same} == {name: someone.answer["user"][name] for name in same}
    assert kept["preferences"] == changed["preferences"]


def token(account_id: str, kind: str = "access", *, key: str = SECRET, age: float = 0.0, **body: Any) -> str:
    """A token as the service signs it, `age` seconds past its end (before it, when negative)."""
    payload = {"id": account_id, "tv": 1, "exp": int(time.time() - age), "jti": secrets.token_hex(8)} | body
    return str(URLSafeSerializer(key, salt=f"parley.{kind}").dumps(payload))


async def me(service: Service, text: str) -> httpx.Response:
    return await call(service.urls[-1], "GET", "/api/users/me/", text)


@pytest.mark.parametrize("age", [-30 * 86400, -3600, 0, 50])
async def test_clocks_of_workers_may_differ_by_a_minute(service: Service, age: float) -> None:
    """A token is good until its end and 60 seconds more, however far ahead the worker's clock was that signed it."""
    someone = await guest(service.url)
    assert (await me(service, token(someone.id, age=age))).json()["id"] == someone.id


@pytest.mark.parametrize("age", [70, 3600, 10**9])
async def test_an_old_token_has_expired(service: Service, age: float) -> None:
    someone = await guest(service.url)
    refused(await me(service, token(someone.id, age=age)), "token_expired")


def bad_tokens(id: str) -> dict[str, str]:
    good = token(id, age=-60)
    payload, _, signature = good.rpartition(".")
    other = token(str(uuid.uuid4()), age=-60).rpartition(".")
    return {
        "a byte of the payload flipped": payload[:9] + ("A" if payload[9] != "A" else "B") + payload[10:] + "." + signature,
        "a byte of the signature flipped": payload + "." + ("A" if signature[0] != "A" else "B") + signature[1:],
        "another's payload": f"{other[0]}.{signature}",
        "without a signature": payload,
        "with an empty signature": f"{payload}.",
        "another key": token(id, key="another-key-of-more-than-32-characters", age=-60),
        "no key at all": token(id, key="", age=-60),
        "the salt of refresh tokens": token(id, "refresh", age=-60),
        "the salt of tickets": token(id, "ticket", age=-60),
        "the salt of administrators": token(id, "admin", age=-60),
        "no salt of ours": str(URLSafeSerializer(SECRET).dumps({"id": id, "tv": 1, "exp": 2**31, "jti": "x"})),
        "without an end": str(URLSafeSerializer(SECRET, salt="parley.access").dumps({"id": id, "tv": 1, "jti": "x"})),
        "a list for a payload": str(URLSafeSerializer(SECRET, salt="parley.access").dumps([id, 1, 2**31, "x"])),
        "a version that is text": token(id, age=-60, tv="1"),
        "an account that is gone": token(NOBODYS, age=-60),
        "an older version": token(id, age=-60, tv=0),
        "a version still to come": token(id, age=-60, tv=2),
        "a JSON Web Token": "eyJhbGciOiJub25lIn0.eyJpZCI6IngifQ.",
        "nothing but dots": "...",
        "very long": "x" * 4000,
    }


@pytest.mark.parametrize("what", bad_tokens(NOBODYS))
async def test_a_token_that_is_not_ours_is_invalid(service: Service, what: str) -> None:
    someone = await guest(service.url)
    refused(await me(service, bad_tokens(someone.id)[what]), "token_invalid")


async def test_a_token_that_is_not_even_ascii_is_invalid(service: Service) -> None:
    response = await call(service.url, "GET", "/api/users/me/", headers={"Authorization": b"Bearer t\xf6k\xe9n.\xff"})
    refused(response, "token_invalid")


async def test_a_new_token_version_revokes_every_token_given_before(service: Service) -> None:
    someone = await guest(service.url)
    assert (await call(service.url, "POST", "/api/auth/revoke/", someone.access)).status_code == 204
    for base in service.urls:
        for text in (someone.access, someone.anonymous_token):
            refused(await call(base, "GET", "/api/users/me/", text), "token_invalid")
        refused(await call(base, "POST", "/api/auth/refresh/", json={"refresh": someone.refresh}), "token_invalid")
    assert (await me(service, token(someone.id, age=-60, tv=2))).status_code == 200


async def test_a_refresh_token_makes_new_pairs_until_its_end(service: Service) -> None:
    """Clients keep the one they were given, and an answer may be lost on its way: used up, it made a guest a stranger."""
    someone = await guest(service.url)

    async def refresh(text: str, base: str = service.urls[-1]) -> httpx.Response:
        return await call(base, "POST", "/api/auth/refresh/", json={"refresh": text})

    pair = (await refresh(someone.refresh)).json()
    assert pair.keys() == {"access", "refresh", "token_type", "expires_in"}
    for text in (someone.refresh, pair["refresh"], token(someone.id, "refresh", age=-29 * 86400)):
        for base in service.urls:
            assert (await me(service, (await refresh(text, base)).json()["access"])).json()["id"] == someone.id
    for other in (someone.access, someone.anonymous_token, "nonsense"):
        refused(await refresh(other), "token_invalid")
    refused(await refresh(token(someone.id, "refresh", age=70)), "token_expired")


async def test_a_ticket_opens_one_door_once(service: Service) -> None:
    """Ten at once on every worker: one gets in."""
    someone = await guest(service.url)
    answer = (await call(service.url, "POST", "/api/auth/ticket/", someone.access)).json()
    assert answer.keys() == {"ticket", "expires_in"}
    assert answer["expires_in"] == 30
    session = await new_session(service.url, someone.access)
    path = f"/api/sessions/{session['id']}/stream/?ticket={answer['ticket']}"
    answers = await at_once([call(base, "GET", path) for base in every_worker(service, 10)])
    assert sorted(response.status_code for response in answers) == [204] + [401] * 9
    refused(await call(service.url, "GET", path), "token_invalid")


async def test_a_key_is_rotated_without_logging_anyone_out(tmp_path: Path) -> None:
    """[old] → [old, new] → [new]: all keys verify, the last one signs."""
    old, new = "old-key-of-more-than-thirty-two-characters", "new-key-of-more-than-thirty-two-characters"
    environment = CLOSED | {"DATABASE_URL": f"sqlite:///{tmp_path / 'parley.db'}", "SECRET_KEY": old}
    async with Service(environment) as service:
        first = await guest(service.url)
        await _restart_with(service, SECRET_KEY=f"{old},{new}")
        second = await guest(service.url)
        assert (await me(service, first.access)).json()["id"] == first.id
        renewed = await call(service.url, "POST", "/api/auth/refresh/", json={"refresh": first.refresh})
        await _restart_with(service, SECRET_KEY=new)
        refused(await me(service, first.access), "token_invalid")
        refused(await me(service, token(first.id, key=old, age=-60)), "token_invalid")
        assert (await me(service, renewed.json()["access"])).json()["id"] == first.id
        assert (await me(service, second.anonymous_token)).json()["id"] == second.id


async def _restart_with(service: Service, **environment: str) -> None:
    process = service.processes[0]
    process.env = dict(process.env or {}) | environment
    await service.restart()


# -- models


async def test_models_are_listed_by_their_cards(service: Service) -> None:
    models = (await call(service.url, "GET", "/api/models/")).json()
    assert [model["id"] for model in models] == ["demo-scholar", "demo-poet"]
    for model in models:
        assert model.keys() == CARD
        fixed = {"capabilities": ["text"], "supported_languages": [], "is_active": True, "release_date": None}
        fixed |= {"model_type": "LLM", "is_thinking_model": False, "url": None, "random_only": False}
        assert model | fixed == model
        assert (await call(service.urls[-1], "GET", f"/api/models/{model['id']}/")).json() == model
    refused(await call(service.url, "GET", "/api/models/nobody/"), "not_found")


# -- sessions


async def test_a_direct_session_talks_to_one_model(service: Service) -> None:
    someone = await guest(service.url, "Ann")
    body = {"mode": "direct", "model_a_id": "demo-poet", "title": "Verses", "metadata": {"page": "/"}, "extra": 1}
    response = await call(service.url, "POST", "/api/sessions/", someone.access, json=body)
    assert response.status_code == 201
    session = response.json()
    assert session.keys() == SESSION
    assert session["user"] == {"id": someone.id, "display_name": "Ann"}
    assert session["model_a"]["id"] == "demo-poet" and session["model_b"] is None
    expected = {"mode": "direct", "title": "Verses", "metadata": {"page": "/"}, "is_public": False, "is_pinned": False}
    expected |= {"share_token": None, "share_url": None, "message_count": 0, "last_message_at": None, "voted": False}
    assert session | expected | {"version": 1, "expires_at": None} == session


async def test_a_session_without_a_wish_is_direct_with_the_first_model(service: Service, ann: Owner) -> None:
    session = (await call(service.url, "POST", "/api/sessions/", ann.access)).json()
    assert (session["mode"], session["model_a"]["id"]) == ("direct", "demo-scholar")


@pytest.mark.parametrize("field", ["model", "modelId", "model_id", "model_a_id"])
async def test_a_model_is_obeyed_however_it_is_named(service: Service, ann: Owner, field: str) -> None:
    """In the body or the query, of a session or of a message: nobody gets another model's answer without a word."""
    made = await call(service.url, "POST", "/api/sessions/", ann.access, json={field: "demo-poet"})
    assert made.json()["model_a"]["id"] == "demo-poet"
    said = await post(service.url, ann.access, {"content": "/echo x"}, f"?{field}=demo-poet")
    path = f"/api/sessions/{said.headers['X-Session-Id']}/"
    assert (await call(service.url, "GET", path, ann.access)).json()["session"]["model_a"]["id"] == "demo-poet"
    assert (await post(service.url, ann.access, {"content": "/echo x", field: "nobody"})).status_code == 400


@pytest.mark.parametrize(
    ("wish", "field"),
    [
        ({"mode": "direct", "model_a_id": "nobody"}, "model_a_id"),
        ({"mode": "compare"}, "model_a_id"),
        ({"mode": "compare", "model_a_id": "demo-poet"}, "model_b_id"),
        ({"mode": "compare", "model_a_id": "demo-poet", "model_b_id": "nobody"}, "model_b_id"),
        ({"mode": "compare", "model_a_id": "demo-poet", "model_b_id": "demo-poet"}, "model_b_id"),
        ({"mode": "compare", "model_a_id": "gpt-5-mini", "model_b_id": "demo-poet"}, "model_a_id"),  # no key, no offer
        ({"model_a_id": "demo-scholar", "model_b_id": "demo-poet"}, "model_b_id"),
    ],
)
async def test_a_session_needs_models_that_are_offered(service: Service, ann: Owner, wish: Any, field: str) -> None:
    refused(await call(service.url, "POST", "/api/sessions/", ann.access, json=wish), "invalid", field)


async def test_a_compare_session_has_the_two_models_asked_for(service: Service, ann: Owner) -> None:
    session = await compare(service.url, ann.access, model_a_id="demo-poet", model_b_id="demo-scholar")
    assert (session["model_a"]["id"], session["model_b"]["id"]) == ("demo-poet", "demo-scholar")


async def test_a_blind_session_is_the_servers_choice_and_hides_it(service: Service, ann: Owner) -> None:
    wish = {"mode": "random", "model_a_id": "demo-poet", "model_b_id": "demo-poet"}
    session = (await call(service.url, "POST", "/api/sessions/", ann.access, json=wish)).json()
    for side, name in (("model_a", "Model A"), ("model_b", "Model B")):
        assert session[side].keys() == {"id", "display_name", "provider", "is_thinking_model"}
        expected = {"display_name": name, "provider": "Random", "is_thinking_model": False}
        assert session[side] | expected == session[side]
    assert session["model_a"]["id"] != session["model_b"]["id"]
    refused(await call(service.url, "GET", f"/api/models/{session['model_a']['id']}/"), "not_found")


async def test_an_id_of_ones_own_makes_one_session(service: Service, ann: Owner) -> None:
    """Again it is the session as it is, whatever else is wished for."""
    id = secrets.token_hex(32)  # 64 characters
    made = await call(service.url, "POST", "/api/sessions/", ann.access, json={"id": id, "title": "first"})
    again = {"id": id, "title": "second", "mode": "compare", "model_a_id": "no longer offered"}
    found = await call(service.urls[-1], "POST", "/api/sessions/", ann.access, json=again)
    assert (made.status_code, found.status_code) == (201, 200)
    assert made.json() == found.json()
    assert made.json()["id"] == id


async def test_an_id_sent_ten_times_at_once_makes_one_session(service: Service, ann: Owner) -> None:
    body = {"id": f"once-{secrets.token_hex(8)}"}
    work = [call(base, "POST", "/api/sessions/", ann.access, json=body) for base in every_worker(service, 10)]
    answers = await at_once(work)
    assert sorted(response.status_code for response in answers) == [200] * 9 + [201]
    assert len({response.text for response in answers}) == 1


async def test_an_id_that_is_somebody_elses_reads_like_one_of_nobody(service: Service, ann: Owner) -> None:
    stranger = await guest(service.url)
    for base in service.urls:
        response = await call(base, "POST", "/api/sessions/", stranger.access, json={"id": ann.session_id})
        refused(response, "not_found")


async def listed(base: str, token: str, query: str = "") -> list[dict[str, Any]]:
    response = await call(base, "GET", f"/api/sessions/{query}", token)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()
    return found


async def test_the_list_is_ones_own_newest_change_first(service: Service) -> None:
    someone, other = await guest(service.url), await guest(service.url)
    # On one worker: two workers know the database's time to some milliseconds, and would stamp them in another order.
    made = [await new_session(service.url, someone.access, title=f"n{n}") for n in range(3)]
    await new_session(service.url, other.access, title="another's")
    await call(service.url, "PATCH", f"/api/sessions/{made[0]['id']}/", someone.access, json={"is_pinned": True})
    lines = await listed(service.urls[-1], someone.access)
    assert [line["title"] for line in lines] == ["n0", "n2", "n1"]
    assert all(line.keys() == SUMMARY for line in lines)
    assert (lines[0]["model_a_name"], lines[0]["model_b_name"], lines[0]["is_pinned"]) == ("Demo Scholar", None, True)


async def test_the_list_is_filtered_by_mode_and_by_words_of_the_title(service: Service) -> None:
    someone = await guest(service.url)
    titles = ["100% sure", "100 times", "snake_case", "snakeXcase", "Wow!", "ÉCOLE Ünicode", "\\back"]
    for title in titles:
        await new_session(service.url, someone.access, title=title)
    await new_session(service.url, someone.access, mode="random", title="Blind")
    assert [line["title"] for line in await listed(service.url, someone.access, "?mode=random")] == ["Blind"]
    assert await listed(service.url, someone.access, "?mode=compare") == []
    found = {
        "100%25": ["100% sure"],
        "_case": ["snake_case"],
        "SNAKEX": ["snakeXcase"],
        "w!": ["Wow!"],
        "ÉCOLE": ["ÉCOLE Ünicode"],
        "éCOLE ü": ["ÉCOLE Ünicode"],
        "%5Cback": ["\\back"],
        "' OR 1=1": [],
    }
    for words, expected in found.items():
        lines = await listed(service.urls[-1], someone.access, f"?search={words}")
        assert [line["title"] for line in lines] == expected, words
    assert len(await listed(service.url, someone.access, "?search=")) == len(titles) + 1


async def test_a_blind_session_in_the_list_says_nothing_of_its_models(service: Service) -> None:
    someone = await guest(service.url)
    await new_session(service.url, someone.access, mode="random")
    line = (await listed(service.url, someone.access))[0]
    assert (line["model_a_name"], line["model_b_name"]) == ("Model A", "Model B")


async def test_pages_follow_their_link_without_duplicates_while_sessions_change(service: Service) -> None:
    someone = await guest(service.url)
    made = [(await new_session(service.url, someone.access, title=f"n{n}"))["id"] for n in range(11)]
    seen: list[str] = []
    path, pages = "/api/sessions/?limit=3&search=n", 0
    while path:
        response = await call(every_worker(service, pages + 1)[-1], "GET", path, someone.access)
        seen += [line["id"] for line in response.json()]
        pages += 1
        change = made[-pages]  # moves to the front: one that was shown, or one that would have come
        await call(service.url, "PATCH", f"/api/sessions/{change}/", someone.access, json={"title": f"n-changed{pages}"})
        await new_session(service.url, someone.access, title="n-new")
        path = _next(response)
    assert pages == 4
    assert len(set(seen)) == len(seen)
    assert set(seen) == set(made)


def _next(response: httpx.Response) -> str:
    link = response.headers.get("Link", "")
    found = re.fullmatch(r'<([^>]+)>; rel="next"', link)
    assert found or not link, link
    return found[1] if found else ""


async def test_a_last_page_has_no_link(service: Service) -> None:
    someone = await guest(service.url)
    for _ in range(3):
        await new_session(service.url, someone.access)
    assert _next(await call(service.url, "GET", "/api/sessions/?limit=3", someone.access)) == ""
    first = await call(service.url, "GET", "/api/sessions/?limit=2", someone.access)
    assert len(first.json()) == 2
    second = await call(service.url, "GET", _next(first), someone.access)
    assert (len(second.json()), _next(second)) == (1, "")


async def test_a_session_is_opened_with_its_last_messages_oldest_first(service: Service) -> None:
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access)
    for n in range(3):
        await post_turn(service.url, someone.access, session["id"], f"/echo answer {n}")

    async def opened(query: str = "") -> dict[str, Any]:
        path = f"/api/sessions/{session['id']}/{query}"
        found: dict[str, Any] = (await call(service.urls[-1], "GET", path, someone.access)).json()
        return found

    whole = await opened()
    assert whole.keys() == {"session", "messages"}
    assert whole["session"].keys() == SESSION
    assert whole["session"]["message_count"] == 6
    assert [message["content"] for message in whole["messages"]] == [
        text for n in range(3) for text in (f"/echo answer {n}", f"answer {n}")
    ]
    assert all(message.keys() == MESSAGE for message in whole["messages"])
    latest = (await opened("?limit=2"))["messages"]
    assert latest == whole["messages"][4:]
    assert (await opened(f"?limit=3&before={latest[0]['position']}"))["messages"] == whole["messages"][1:4]
    assert (await opened("?before=0"))["messages"] == []


async def test_messages_know_their_parents_and_children(service: Service, ann: Owner) -> None:
    user, a, b = await messages(service.url, ann.access, ann.session_id)
    assert (user["role"], user["participant"], user["model"], user["status"]) == ("user", None, None, "success")
    assert [reply["participant"] for reply in (a, b)] == ["a", "b"]
    assert [reply["parent_message_ids"] for reply in (user, a, b)] == [[], [user["id"]], [user["id"]]]
    assert user["child_ids"] == [a["id"], b["id"]]
    assert [row["position"] for row in (user, a, b)] == [0, 1, 2]
    assert (a["model"]["id"], b["model"]["id"]) == ("demo-scholar", "demo-poet")
    assert a["latency_ms"] >= 0 and not a["has_feedback"] and a["session"] == ann.session_id


async def test_title_pin_and_openness_change_and_raise_the_version(service: Service) -> None:
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access, title="before")
    path = f"/api/sessions/{session['id']}/"
    changed = (await call(service.url, "PATCH", path, someone.access, json={"title": "after", "is_pinned": True})).json()
    assert changed.keys() == SESSION
    assert (changed["title"], changed["is_pinned"], changed["is_public"], changed["version"]) == ("after", True, False, 2)
    kept = (await call(service.urls[-1], "PATCH", path, someone.access, json={"title": None, "is_public": True})).json()
    assert (kept["title"], kept["is_pinned"], kept["is_public"], kept["version"]) == ("after", True, True, 3)


async def test_changing_a_blind_session_does_not_unmask_it(service: Service, ann: Owner) -> None:
    session = await new_session(service.url, ann.access, mode="random")
    path = f"/api/sessions/{session['id']}/"
    changed = (await call(service.url, "PATCH", path, ann.access, json={"title": "who?", "is_public": True})).json()
    assert (changed["model_a"], changed["model_b"]) == (session["model_a"], session["model_b"])
    refused(await call(service.url, "PATCH", path, ann.access, json={"mode": "direct"}), "invalid", "mode")


async def test_a_deleted_session_is_gone_with_its_messages(service: Service) -> None:
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access)
    await post_turn(service.url, someone.access, session["id"], "/echo soon gone")
    path = f"/api/sessions/{session['id']}/"
    response = await call(service.url, "DELETE", path, someone.access)
    assert (response.status_code, response.content) == (204, b"")
    for method in ("GET", "DELETE"):
        refused(await call(service.urls[-1], method, path, someone.access), "not_found")
    assert rows(service, f"SELECT COUNT(*) FROM messages WHERE session_id = '{session['id']}'") == [(0,)]
    assert await listed(service.url, someone.access) == []


async def test_deleting_a_session_ends_its_running_turn_first(service: Service) -> None:
    """Whoever reads it, on whichever worker, is told its end."""
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access)
    async with running(service.url, someone.access, session["id"]) as following:
        path = f"/api/sessions/{session['id']}/"
        assert (await call(service.urls[-1], "DELETE", path, someone.access)).status_code == 204
        assert (await asyncio.wait_for(following.rest(), 5)).endswith(b'ad:{"finishReason":"stop"}\n')


async def test_a_public_session_is_read_by_anyone_and_written_by_its_owner(service: Service) -> None:
    owner, stranger = await guest(service.url), await guest(service.url)
    session = await compare(service.url, owner.access)
    await post_turn(service.url, owner.access, session["id"], "/echo for all")
    path = f"/api/sessions/{session['id']}/"
    await call(service.url, "PATCH", path, owner.access, json={"is_public": True})
    user = (await messages(service.url, owner.access, session["id"]))[0]
    for reader in (None, stranger.access):
        assert len((await call(service.urls[-1], "GET", path, reader)).json()["messages"]) == 3
        assert b"for all" in (await call(service.urls[-1], "GET", f"{path}stream/", reader)).content
    refused(await call(service.url, "GET", path, "nonsense"), "token_invalid")
    theirs = Owner(owner.access, session["id"], user["id"], user["id"])
    for name in OWNED:
        if name not in ("GET /api/sessions/{session_id}", "GET /api/sessions/{session_id}/stream"):
            refused(await ask(service.url, name, theirs, stranger.access), "not_found")
    await call(service.url, "PATCH", path, owner.access, json={"is_public": False})
    refused(await call(service.urls[-1], "GET", path, stranger.access), "not_found")


async def test_a_shared_session_is_read_by_its_link_until_it_is_unshared(service: Service, ann: Owner) -> None:
    base, path = f"/api/sessions/{ann.session_id}", "/api/shared/{}/"
    given = (await call(service.url, "POST", f"{base}/share/", ann.access)).json()
    assert given.keys() == {"share_token", "share_url"}
    assert re.fullmatch(r"[A-Za-z0-9_-]{22}", given["share_token"])
    assert given["share_url"] == f"/shared/{given['share_token']}"
    assert (await call(service.urls[-1], "POST", f"{base}/share/", ann.access)).json() == given
    shared = (await call(service.urls[-1], "GET", path.format(given["share_token"]))).json()
    assert shared.keys() == {"session", "messages"}
    assert [message["content"] for message in shared["messages"]][1] == "anns own words"
    refused(await call(service.url, "GET", f"/api/sessions/{ann.session_id}/"), "not_found")
    refused(await call(service.url, "GET", "/api/shared/"), "not_found")
    taken = await call(service.url, "POST", f"{base}/unshare/", ann.access)
    assert taken.json() == {"status": "unshared"}
    refused(await call(service.urls[-1], "GET", path.format(given["share_token"])), "not_found")
    anew = (await call(service.url, "POST", f"{base}/share/", ann.access)).json()
    assert anew["share_token"] != given["share_token"]
    await call(service.url, "POST", f"{base}/unshare/", ann.access)


async def test_a_shared_blind_session_stays_blind(service: Service, ann: Owner) -> None:
    session = await new_session(service.url, ann.access, mode="random")
    await post_turn(service.url, ann.access, session["id"], "/echo same from both")
    given = (await call(service.url, "POST", f"/api/sessions/{session['id']}/share/", ann.access)).json()
    response = await call(service.urls[-1], "GET", f"/api/shared/{given['share_token']}/")
    assert response.json()["session"]["model_a"]["provider"] == "Random"
    assert "demo-" not in response.text and "Demo" not in response.text
    assert not any("latency_ms" in message for message in response.json()["messages"])


@pytest.mark.parametrize(
    ("content", "title"),
    [
        ("/echo  what\n is   this?", "/echo what is this?"),
        ("x" * 50, "x" * 50),
        ("/echo " + "words " * 20, "/echo words words words words words words words…"),
    ],
)
async def test_a_title_is_the_first_words_of_the_first_message(service: Service, content: str, title: str) -> None:
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access, title="to be replaced")
    await post_turn(service.url, someone.access, session["id"], content)
    await post_turn(service.url, someone.access, session["id"], "/echo later")
    path = f"/api/sessions/{session['id']}/"
    assert (await call(service.urls[-1], "POST", f"{path}generate_title/", someone.access)).json() == {"title": title}
    assert (await call(service.url, "GET", path, someone.access)).json()["session"]["title"] == title
    assert len(title) <= 50


async def test_a_title_may_be_asked_for_while_a_turn_runs_and_before_any(service: Service, ann: Owner) -> None:
    session = await new_session(service.url, ann.access)
    path = f"/api/sessions/{session['id']}/generate_title/"
    assert (await call(service.url, "POST", path, ann.access)).json()["title"]
    async with running(service.url, ann.access, session["id"]) as following:
        answer = await call(service.urls[-1], "POST", path, ann.access)
        assert answer.json()["title"].startswith("/slow")
        assert await following.stopped(service.url)


@pytest.mark.parametrize(
    ("format", "extension", "type"),
    [("", "json", "application/json"), ("?format=json", "json", "application/json"),
     ("?format=markdown", "md", "text/markdown; charset=utf-8"), ("?format=txt", "txt", "text/plain; charset=utf-8")],
)  # fmt: skip
async def test_a_session_is_exported_as_a_file(
    service: Service, ann: Owner, format: str, extension: str, type: str
) -> None:
    path = f"/api/sessions/{ann.session_id}/export/{format}"
    response = await call(service.urls[-1], "GET", path, ann.access)
    assert response.headers["content-type"] == type
    name = f'attachment; filename="chat_session_{ann.session_id}.{extension}"'
    assert response.headers["content-disposition"] == name
    assert "anns own words" in response.text
    if extension == "json":
        whole = response.json()
        assert whole["messages"] == await messages(service.url, ann.access, ann.session_id)
        assert whole["session"].keys() == SESSION
    else:
        heading = "## " if extension == "md" else ""
        assert f"{heading}Demo Poet" in response.text and f"{heading}You" in response.text


@pytest.mark.parametrize("format", ["json", "markdown", "txt"])
async def test_an_export_of_a_blind_session_names_no_model(service: Service, ann: Owner, format: str) -> None:
    session = await new_session(service.url, ann.access, mode="random")
    await post_turn(service.url, ann.access, session["id"], "/echo who are you")
    path = f"/api/sessions/{session['id']}/export/?format={format}"
    text = (await call(service.url, "GET", path, ann.access)).text
    assert "Model A" in text and "demo" not in text.lower()


# -- a turn over HTTP


class Following:
    """A turn that is being said, slowly, to a client that has the first of its bytes."""

    def __init__(self, response: httpx.Response, first: bytes, bytes_: AsyncIterator[bytes]) -> None:
        self.response, self.first, self._bytes = response, first, bytes_
        self.session_id = response.headers["X-Session-Id"]
        self.token = response.request.headers["Authorization"].partition(" ")[2]

    async def rest(self) -> bytes:
        """Everything from here to the stream's end."""
        return b"".join([piece async for piece in self._bytes])

    async def stopped(self, base: str) -> bool:
        return await stop(base, self.token, self.session_id)


SLOW = "/slow 0.3 a question that takes a while"


@asynccontextmanager
async def running(base: str, token: str, session_id: str, accept: str = "*/*", **body: Any) -> AsyncIterator[Following]:
    """Post a turn that goes on for seconds unless it is stopped; inside, its first bytes have come."""
    asked = {"session_id": session_id, "content": SLOW} | body
    async with (
        http(base, token) as client,
        client.stream("POST", "/api/messages/stream/", json=asked, headers={"Accept": accept}) as response,
    ):
        assert response.status_code == 200, await response.aread()
        bytes_ = response.aiter_bytes()
        yield Following(response, await asyncio.wait_for(anext(bytes_), 5), bytes_)


async def post(base: str, token: str | None, body: dict[str, Any], query: str = "", **headers: str) -> httpx.Response:
    """Post a turn and read the whole answer."""
    return await call(base, "POST", f"/api/messages/stream/{query}", token, json=body, headers=headers)


def events(content: bytes) -> list[SSEEvent]:
    return SSEParser().feed(content)


def text_of(found: list[dict[str, Any]], side: str = "a") -> str:
    chunks = [each for each in found if each["type"] == "message_chunk" and each["participant"] == side]
    return "".join(each["chunk"] for each in chunks)


async def test_the_head_of_a_stream_ends_at_once(service: Service) -> None:
    """The connection is free for the next request while the turn goes on."""
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access)
    async with running(service.url, someone.access, session["id"]) as following:
        async with http(service.url, someone.access) as client:
            head = await client.head(f"/api/sessions/{session['id']}/stream/")
            assert head.headers["X-Turn-Id"] == following.response.headers["X-Turn-Id"]
            assert "Content-Length" not in head.headers and head.headers["content-type"].startswith("text/event-stream")
            assert (await client.get("/livez", timeout=2)).status_code == 200
        assert await following.stopped(service.url)


TEXTS = [
    "plain words, one after another",
    "back\\slash, two \\\\ and \\n that is no line end",
    "lines\nand\n\nlines\n",
    "carriage\r\nreturns\rare not said",
    "\"quotes\" 'and' <b>&amp;</b> {\"json\": true}",
    "ünï cödé नमस्ते 👋🏽 \u2028 \u2029 \ufeff \u200d end",
    "tab\tand\x0bother\x1f\x7f control",
    "ad:{\"finishReason\":\"stop\"}",
    "x" * 5000,
]


@pytest.mark.parametrize("text", TEXTS)
async def test_arena_lines_are_exact_to_the_byte(service: Service, ann: Owner, text: str) -> None:
    r"""Backslash doubled, LF as `\n`, CR left out, nothing else."""
    session = await compare(service.url, ann.access)
    response = await post(service.url, ann.access, {"session_id": session["id"], "content": f"/echo {text}"})
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    expected = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "").encode()
    for side in (b"a", b"b"):
        lines = [line for line in response.content.split(b"\n") if line.startswith(side)]
        assert lines.pop() == side + b'd:{"finishReason":"stop"}'
        assert all(line.startswith(side + b'0:"') and line.endswith(b'"') for line in lines)
        assert b"".join(line[4:-1] for line in lines) == expected
    assert response.content.endswith(b"\n") and b"\r" not in response.content
    assert unescape(expected.decode()) == text.replace("\r", "")


async def test_an_empty_answer_is_one_line(service: Service, ann: Owner) -> None:
    session = await new_session(service.url, ann.access)
    response = await post(service.url, ann.access, {"session_id": session["id"], "content": "/echo "})
    assert response.content == b'ad:{"finishReason":"stop"}\n'
    assert [row["status"] for row in await messages(service.url, ann.access, session["id"])] == ["success"] * 2


@pytest.mark.parametrize(
    ("command", "sentence"),
    [("/fail 2 poet", "The model could not be reached."), ("/truncate 2 poet", "The model's answer broke off before its end.")],
)
async def test_a_side_that_fails_says_so_in_a_sentence(
    service: Service, ann: Owner, command: str, sentence: str
) -> None:
    """The other side finishes as if nothing had happened."""
    session = await compare(service.url, ann.access)
    response = await post(service.url, ann.access, {"session_id": session["id"], "content": command})
    ends = {line for line in response.content.split(b"\n") if line[1:3] == b"d:"}
    assert ends == {
        b'ad:{"finishReason":"stop"}',
        b'bd:{"finishReason": "error", "error": "%b"}' % sentence.encode(),
    }
    status = {row["participant"]: row["status"] for row in await messages(service.url, ann.access, session["id"])}
    assert status == {None: "success", "a": "success", "b": "failed"}


async def test_server_sent_events_are_exact(service: Service, ann: Owner) -> None:
    session = await new_session(service.url, ann.access)
    body = {"session_id": session["id"], "content": "/echo one\ntwo"}
    response = await post(service.url, ann.access, body, Accept="text/event-stream")
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    event = rb"id: [0-9a-f-]{36}\.\w+\nevent: \w+\ndata: \{[^\n]*\}\n\n"
    assert re.fullmatch(
        rb": ok\nretry: 1000\n\n(" + event + rb")+event: done\ndata: \{\}\n\n", response.content
    ), response.content
    *sent, _ = events(response.content)
    said = [json.loads(each.data) for each in sent]
    assert [(each["type"], each["cursor"]) for each in said] == [(each.event, each.id) for each in sent]
    assert {each["turn_id"] for each in said} == {each["requestId"] for each in said} == {response.headers["X-Turn-Id"]}
    kinds = [each["type"] for each in said]
    assert kinds[:2] == ["message_update"] * 2 and kinds[-2:] == ["message_complete", "turn_complete"]
    assert set(kinds[2:-2]) == {"message_chunk"}
    assert put_together(said).texts() == ["one\ntwo"]
    complete = said[-2]
    assert complete["message"].keys() == MESSAGE
    assert (complete["status"], complete["message"]["content"]) == ("success", "one\ntwo")


async def test_json_lines_are_the_same_events(service: Service, ann: Owner) -> None:
    session = await compare(service.url, ann.access)
    body = {"session_id": session["id"], "content": "/echo one two", "id": "m1"}
    lines = await post(service.url, ann.access, body, Accept="application/x-ndjson")
    assert lines.headers["content-type"] == "application/x-ndjson"
    assert lines.content.endswith(b"}\n")
    found = [json.loads(line) for line in lines.content.splitlines()]
    assert [text_of(found, side) for side in "ab"] == ["one two"] * 2
    again = await post(service.urls[-1], ann.access, body, Accept="application/x-ndjson")
    replay = [json.loads(line) for line in again.content.splitlines()]
    sse = await post(service.urls[-1], ann.access, body, Accept="text/event-stream")
    assert [json.loads(each.data) for each in events(sse.content)][:-1] == replay
    assert [replay[0]["message"], replay[-2]] == [found[0]["message"], found[-2]]


async def test_bare_text_is_the_answer_and_nothing_else(service: Service, ann: Owner) -> None:
    direct = await new_session(service.url, ann.access)
    arena = await compare(service.url, ann.access)
    words = "/echo a\\b \"c\"\r\nd"
    alone = await post(service.url, ann.access, {"session_id": direct["id"], "content": words}, "?format=text")
    both = await post(service.url, ann.access, {"session_id": arena["id"], "content": words}, "?format=text")
    assert alone.content == b'a\\b "c"\r\nd\n'
    assert both.text == 'a\\b "c"\r\nd' + "\n\n────────\n\n" + 'a\\b "c"\r\nd' + "\n"
    assert alone.headers["content-type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize(
    ("accept", "query", "start"),
    [
        (None, "", b"a0:"),
        ("*/*", "", b"a0:"),
        ("text/plain", "", b"a0:"),
        ("application/json", "", b"a0:"),
        ("text/event-stream", "", b": ok\n"),
        ("Text/Event-Stream; q=0.9, */*", "", b": ok\n"),
        ("application/x-ndjson", "", b"{"),
        ("text/plain;format=text", "", b"one\n"),
        ("text/plain; format=text", "", b"one\n"),
        ("*/*", "?format=text", b"one\n"),
        ("text/event-stream", "?format=text", b"one\n"),
        ("*/*", "?format=sse", b": ok\n"),
        ("*/*", "?format=ndjson", b"{"),
    ],
)
async def test_the_format_is_chosen_by_accept(
    service: Service, ann: Owner, accept: str | None, query: str, start: bytes
) -> None:
    body = {"session_id": ann.session_id, "content": "/echo one", "id": f"f-{secrets.token_hex(4)}"}
    async with http(service.url, ann.access) as client:
        request = client.build_request("POST", f"/api/messages/stream/{query}", json=body)
        del request.headers["Accept"]
        if accept is not None:
            request.headers["Accept"] = accept
        response = await client.send(request)
    assert response.content.startswith(start), response.content


@pytest.mark.parametrize("accept", ["*/*", "text/event-stream", "application/x-ndjson", "text/plain;format=text"])
async def test_every_format_comes_with_the_headers_of_a_stream(service: Service, ann: Owner, accept: str) -> None:
    body = {"session_id": ann.session_id, "content": "/echo one"}
    response = await post(service.url, ann.access, body, Accept=accept)
    assert response.headers["cache-control"] == "no-store, no-transform"
    assert response.headers["x-accel-buffering"] == "no"
    assert re.fullmatch(r"[0-9a-f-]{36}", response.headers["x-turn-id"])
    assert response.headers["x-session-id"] == ann.session_id
    assert "content-length" not in response.headers and "content-encoding" not in response.headers


async def test_an_event_stream_opens_before_there_is_anything_to_say(service: Service, ann: Owner) -> None:
    session = await new_session(service.url, ann.access)
    async with running(service.url, ann.access, session["id"], "text/event-stream", content="/silent") as following:
        assert following.first.startswith(b": ok\nretry: 1000\n\n")
        assert await following.stopped(service.url)


@pytest.mark.parametrize("accept", ["*/*", "text/event-stream", "application/x-ndjson", "text/plain;format=text"])
async def test_the_first_words_come_before_the_last(service: Service, ann: Owner, accept: str) -> None:
    """The turn still runs when they are here: there is something to stop."""
    session = await new_session(service.url, ann.access)
    async with running(service.url, ann.access, session["id"], accept) as following:
        assert following.first
        assert await following.stopped(service.urls[-1])


async def test_the_short_shape_makes_a_session_where_none_is_named(service: Service) -> None:
    someone = await guest(service.url)
    wish = {"content": "/echo one", "mode": "compare", "model_a_id": "demo-poet", "model_b_id": "demo-scholar"}
    response = await post(service.url, someone.access, wish)
    made = await listed(service.urls[-1], someone.access)
    assert [line["id"] for line in made] == [response.headers["X-Session-Id"]]
    assert (made[0]["mode"], made[0]["model_a_name"], made[0]["title"]) == ("compare", "Demo Poet", "/echo one")
    plain = await post(service.url, someone.access, {"content": "/echo two"})
    assert plain.content == b'a0:"two"\nad:{"finishReason":"stop"}\n'


async def test_a_refused_message_leaves_no_session_behind(service: Service) -> None:
    someone = await guest(service.url)
    refused(await post(service.url, someone.access, {"content": ""}), "invalid", "content")
    refused(await post(service.url, someone.access, {"content": "x" * 32_001}), "too_large")
    assert await listed(service.url, someone.access) == []


def arena_body(session_id: str, content: str, *sides: str, **user: Any) -> dict[str, Any]:
    """The request as the arena's own clients send it."""
    ids = [str(uuid.uuid4()) for _ in range(1 + len(sides))]
    told: dict[str, Any] = {"id": ids[0], "role": "user", "content": content, "status": "pending"}
    told |= {"parent_message_ids": [], "temp_id": 5, **user}
    replies = [
        {"id": id, "role": "assistant", "participant": side, "content": "", "status": "pending",
         "parent_message_ids": [ids[0]]}
        for id, side in zip(ids[1:], sides, strict=True)
    ]  # fmt: skip
    return {"session_id": session_id, "messages": [told, *replies]}


async def test_the_arenas_shape_gives_the_messages_their_ids(service: Service, ann: Owner) -> None:
    session = await compare(service.url, ann.access)
    body = arena_body(session["id"], "/echo hello", "b", "a")  # its clients do not promise an order
    response = await post(service.url, ann.access, body)
    assert response.status_code == 200
    stored = await messages(service.urls[-1], ann.access, session["id"])
    given = {line.get("participant"): line["id"] for line in body["messages"]}
    assert {row["participant"]: row["id"] for row in stored} == given
    assert [row["role"] for row in stored] == ["user", "assistant", "assistant"]


async def test_earlier_messages_in_the_arenas_shape_are_not_sent_again(service: Service, ann: Owner) -> None:
    session = await new_session(service.url, ann.access)
    first = arena_body(session["id"], "/echo first", "a")
    await post(service.url, ann.access, first)
    second = arena_body(session["id"], "/echo second", "a")
    second["messages"] = first["messages"] + second["messages"]
    response = await post(service.url, ann.access, second)
    assert response.content == b'a0:"second"\nad:{"finishReason":"stop"}\n'
    stored = await messages(service.url, ann.access, session["id"])
    assert [row["id"] for row in stored] == [line["id"] for line in second["messages"]]


async def test_replies_a_direct_session_does_not_have_are_left_out(service: Service, ann: Owner) -> None:
    session = await new_session(service.url, ann.access)
    response = await post(service.url, ann.access, arena_body(session["id"], "/echo one", "a", "b"))
    assert response.content == b'a0:"one"\nad:{"finishReason":"stop"}\n'
    assert len(await messages(service.url, ann.access, session["id"])) == 2


async def test_an_id_another_message_has_is_a_conflict(service: Service, ann: Owner) -> None:
    """A client that gives a reply the id of an old one is told so; nothing is overwritten."""
    session = await new_session(service.url, ann.access)
    first = arena_body(session["id"], "/echo first", "a")
    await post(service.url, ann.access, first)
    second = arena_body(session["id"], "/echo second", "a")
    second["messages"][1]["id"] = first["messages"][1]["id"]
    refused(await post(service.url, ann.access, second), "conflict")
    assert [row["content"] for row in await messages(service.url, ann.access, session["id"])] == ["/echo first", "first"]


async def test_a_compare_session_answers_with_its_own_models_only(service: Service, ann: Owner) -> None:
    session = await compare(service.url, ann.access)
    body = arena_body(session["id"], "/echo one", "a", "b")
    body["messages"][1]["modelId"], body["messages"][2]["modelId"] = "demo-scholar", "demo-poet"
    assert (await post(service.url, ann.access, body)).status_code == 200
    wrong = arena_body(session["id"], "/echo two", "a", "b")
    wrong["messages"][2]["modelId"] = "gpt-5-mini"
    refused(await post(service.url, ann.access, wrong), "invalid", "messages[2].modelId")


async def test_a_direct_session_does_not_change_its_model(service: Service, ann: Owner) -> None:
    session = await new_session(service.url, ann.access, model_a_id="demo-scholar")
    wrong = arena_body(session["id"], "/echo one", "a")
    wrong["messages"][1]["modelId"] = "demo-poet"
    refused(await post(service.url, ann.access, wrong), "invalid", "messages[1].modelId")


async def test_a_blind_session_does_not_listen_to_model_ids(service: Service, ann: Owner) -> None:
    """Whatever is named, the server's choice stands; a refusal would tell which name was right."""
    session = await new_session(service.url, ann.access, mode="random")
    before = rows(service, f"SELECT model_a, model_b FROM sessions WHERE id = '{session['id']}'")
    for name in ("demo-poet", "demo-scholar", "nobody"):
        body = arena_body(session["id"], "/echo one", "a", "b")
        body["messages"][1]["modelId"] = body["messages"][2]["modelId"] = name
        assert (await post(service.url, ann.access, body)).status_code == 200
    used = rows(service, f"SELECT DISTINCT participant, model FROM messages WHERE session_id = '{session['id']}'")
    chosen = {("a", before[0][0]), ("b", before[0][1])}
    assert {row for row in used if row[0]} == chosen


@pytest.mark.parametrize("bounds", [{"temperature": 0}, {"temperature": 2}, {"max_tokens": 1}, {"max_tokens": 8000}])
async def test_temperature_and_length_are_taken_to_their_bounds(service: Service, ann: Owner, bounds: Any) -> None:
    body = {"session_id": ann.session_id, "content": "/echo one"} | bounds
    assert (await post(service.url, ann.access, body)).status_code == 200


async def test_no_more_tokens_than_asked_for_are_said(service: Service, ann: Owner) -> None:
    session = await new_session(service.url, ann.access)
    body = {"session_id": session["id"], "content": "/count 50", "max_tokens": 3}
    response = await post(service.url, ann.access, body, "?format=text")
    assert response.text.split() == ["⟨0⟩", "⟨1⟩", "⟨2⟩"]


async def test_a_prompt_may_have_so_many_characters_and_not_one_more(service: Service, ann: Owner) -> None:
    session = await new_session(service.url, ann.access)
    body = {"session_id": session["id"], "content": "/echo " + "é" * 31_994}
    assert (await post(service.url, ann.access, body)).status_code == 200
    error = refused(await post(service.url, ann.access, body | {"content": body["content"] + "é"}), "too_large")
    assert "32000" in error["message"] and "32001" in error["message"]
    assert len(await messages(service.url, ann.access, session["id"])) == 2


async def test_a_nul_character_is_no_message(service: Service, ann: Owner) -> None:
    refused(await post(service.url, ann.access, {"session_id": ann.session_id, "content": "a\0b"}), "invalid")


async def test_the_same_message_again_is_the_same_turn(service: Service, ann: Owner) -> None:
    """For ever: later, on another worker, with other words, with another shape."""
    session = await new_session(service.url, ann.access)
    body = {"session_id": session["id"], "content": "/echo once", "id": "m-1"}
    first = await post(service.url, ann.access, body)
    await post(service.url, ann.access, {"session_id": session["id"], "content": "/echo between"})
    for again in (body, body | {"content": "/echo other words"}, arena_body(session["id"], "/echo x", "a", id="m-1")):
        response = await post(service.urls[-1], ann.access, again)
        assert response.content == first.content == b'a0:"once"\nad:{"finishReason":"stop"}\n'
        assert response.headers["X-Turn-Id"] == first.headers["X-Turn-Id"]
    assert len(await messages(service.url, ann.access, session["id"])) == 4


async def test_the_same_message_ten_times_at_once_is_one_turn(service: Service) -> None:
    """One stored message, one answer, one thing paid for; every client reads all of it."""
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access)
    work = [
        post_turn(base, someone.access, session["id"], "/count 30", id="only-one", accept="sse" if n % 3 else "lines")
        for n, base in enumerate(every_worker(service, 10))
    ]
    answers = await at_once(work)
    assert [answer.status for answer in answers] == [200] * 10
    assert len({answer.turn_id for answer in answers}) == 1
    expected = " ".join(f"⟨{n}⟩" for n in range(30))
    assert [answer.sides() for answer in answers] == [{"a": expected}] * 10
    stored = await messages(service.url, someone.access, session["id"])
    assert [(row["id"] == "only-one", row["content"]) for row in stored] == [(True, "/count 30"), (False, expected)]
    assert rows(service, f"SELECT messages FROM budgets WHERE name = 'account:{someone.id}'") == [(1,)]


async def test_an_id_is_a_sessions_own(service: Service, ann: Owner) -> None:
    """The same id in another session, or of another account, is another message."""
    stranger = await guest(service.url)
    for access in (ann.access, ann.access, stranger.access):
        session = await new_session(service.url, access)
        body = {"session_id": session["id"], "content": f"/echo {session['id']}", "id": "everybodys"}
        assert (await post(service.url, access, body, "?format=text")).text == session["id"] + "\n"


async def test_a_second_message_while_one_is_answered_finds_the_session_busy(service: Service, ann: Owner) -> None:
    session = await new_session(service.url, ann.access)
    async with running(service.url, ann.access, session["id"]) as following:
        for base in service.urls:
            busy = await post(base, ann.access, {"session_id": session["id"], "content": "/echo me too"})
            assert refused(busy, "busy")["retry_after"] == 1
        assert await following.stopped(service.url)
        await following.rest()
    assert len(await messages(service.url, ann.access, session["id"])) == 2
    free = await post(service.url, ann.access, {"session_id": session["id"], "content": "/echo now"}, "?format=text")
    assert free.text == "now\n"


async def test_ten_messages_at_once_in_one_session_start_one_turn(service: Service) -> None:
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access)
    work = [_status(base, someone.access, session["id"]) for base in every_worker(service, 10)]
    assert sorted(await at_once(work)) == [200] + [409] * 9
    stored = await messages(service.url, someone.access, session["id"])
    assert [row["position"] for row in stored] == [0, 1]
    assert await stop(service.urls[-1], someone.access, session["id"])


async def _status(base: str, token: str, session_id: str) -> int:
    """Post a slow turn, leave as soon as it is accepted or refused."""
    body = {"session_id": session_id, "content": SLOW}
    async with http(base, token) as client, client.stream("POST", "/api/messages/stream/", json=body) as response:
        return response.status_code


async def test_stop_ends_the_turn_from_any_worker_within_a_second(service: Service, ann: Owner) -> None:
    """What was said is kept, and only that."""
    session = await compare(service.url, ann.access)
    async with running(service.url, ann.access, session["id"]) as following:
        async with prompt(1.0, *service.pids):
            assert await following.stopped(service.urls[-1])
            rest = await following.rest()
    lines = (following.first + rest).decode().splitlines()
    assert {line for line in lines if line[1:2] == "d"} == {f'{side}d:{{"finishReason":"stop"}}' for side in "ab"}
    _, *replies = await messages(service.urls[-1], ann.access, session["id"])
    for reply in replies:
        said = "".join(unescape(line[4:-1]) for line in lines if line.startswith(f"{reply['participant']}0:"))
        assert (reply["status"], reply["content"]) == ("stopped", said)
    assert not await stop(service.url, ann.access, session["id"])


async def test_there_is_nothing_to_stop_in_a_quiet_session(service: Service, ann: Owner) -> None:
    session = await new_session(service.url, ann.access)
    response = await call(service.url, "POST", f"/api/sessions/{session['id']}/stop/", ann.access)
    assert (response.status_code, response.json()) == (200, {"stopped": False})


# -- asking again


async def regenerate(base: str, token: str, message_id: str, query: str = "") -> httpx.Response:
    return await call(base, "POST", f"/api/messages/{message_id}/regenerate/{query}", token)


@pytest.mark.parametrize("place", [0, 1], ids=["by the message", "by its answer"])
async def test_the_last_answer_is_made_anew(service: Service, ann: Owner, place: int) -> None:
    session = await new_session(service.url, ann.access)
    first = await post(service.url, ann.access, {"session_id": session["id"], "content": "/echo again", "id": "m"})
    before = await messages(service.url, ann.access, session["id"])
    response = await regenerate(service.urls[-1], ann.access, before[place]["id"])
    assert response.content == first.content
    assert response.headers["X-Turn-Id"] != first.headers["X-Turn-Id"]
    user, reply = await messages(service.url, ann.access, session["id"])
    assert user == before[0] | {"child_ids": [reply["id"]]}
    assert reply["id"] == before[1]["id"] and reply["content"] == "again", "clients go on with the ids they hold"
    same = await post(service.url, ann.access, {"session_id": session["id"], "content": "x", "id": "m"})
    assert same.headers["X-Turn-Id"] == response.headers["X-Turn-Id"]


async def test_an_earlier_answer_stays_as_it_is(service: Service, ann: Owner) -> None:
    session = await new_session(service.url, ann.access)
    for n in range(2):
        await post(service.url, ann.access, {"session_id": session["id"], "content": f"/echo {n}"})
    before = await messages(service.url, ann.access, session["id"])
    for message in before[:2]:
        refused(await regenerate(service.urls[-1], ann.access, message["id"]), "conflict")
    assert await messages(service.url, ann.access, session["id"]) == before


async def test_an_answer_is_not_made_anew_while_it_is_being_made(service: Service, ann: Owner) -> None:
    session = await new_session(service.url, ann.access)
    async with running(service.url, ann.access, session["id"], id="slow-one") as following:
        refused(await regenerate(service.urls[-1], ann.access, "slow-one"), "busy")
        assert await following.stopped(service.url)


async def test_an_answer_that_was_voted_on_stays(service: Service, ann: Owner) -> None:
    session = await new_session(service.url, ann.access, mode="random")
    await post(service.url, ann.access, {"session_id": session["id"], "content": "/echo choose", "id": "v"})
    vote = {"session_id": session["id"], "message_id": "v"} | VOTE
    assert (await call(service.url, "POST", "/api/feedback/", ann.access, json=vote)).status_code == 201
    refused(await regenerate(service.urls[-1], ann.access, "v"), "already_voted")


async def ask_ui(base: str, token: str, id: str, text: str, **more: Any) -> httpx.Response:
    """Post a message "m" of the AI SDK."""
    said = {"id": "m", "role": "user", "parts": [{"type": "text", "text": text}]}
    return await call(base, "POST", "/api/chat", token, json={"id": id, "messages": [said]} | more)


async def test_a_message_is_replaced_on_purpose_alone_and_once(service: Service, ann: Owner) -> None:
    id, again = f"chat-{uuid.uuid4()}", {"trigger": "regenerate-message"}
    first = await ask_ui(service.url, ann.access, id, "/echo one", **again)  # one that was refused before is tried again
    assert first.status_code == 200 and '"delta":"one"' in first.text
    for more in ({}, {"messageId": "m"}):
        same = await ask_ui(service.urls[-1], ann.access, id, "/echo one", **more)
        assert same.content == first.content and same.headers["X-Turn-Id"] == first.headers["X-Turn-Id"]
    other = await ask_ui(service.url, ann.access, id, "/echo two")
    assert other.text == "This message was sent before with another text. Give the new one a new id."
    edited = await ask_ui(service.url, ann.access, id, "/echo two", messageId="m")
    repeated = await ask_ui(service.urls[-1], ann.access, id, "/echo two", messageId="m")
    assert '"delta":"two"' in edited.text and repeated.headers["X-Turn-Id"] == edited.headers["X-Turn-Id"]
    gone = await call(service.url, "GET", f"/api/sessions/{id}/stream/?after={first.headers['X-Turn-Id']}.1", ann.access)
    assert gone.headers["X-Turn-Id"] == edited.headers["X-Turn-Id"] and gone.headers["X-Cursor"] == "earliest"


async def test_a_message_is_not_replaced_while_answered_or_once_voted_on(service: Service, ann: Owner) -> None:
    session_id = (await new_session(service.url, ann.access, mode="random"))["id"]
    async with running(service.url, ann.access, session_id, id="m") as following:
        busy = await ask_ui(service.urls[-1], ann.access, session_id, "/echo no", messageId="m")
        assert (busy.status_code, busy.text) == (409, "An answer is still being written in this session.")
        assert await following.stopped(service.url)
        await following.rest()
    assert (await ask_ui(service.url, ann.access, session_id, "/echo choose", messageId="m")).status_code == 200
    vote = {"session_id": session_id, "message_id": "m"} | VOTE
    assert (await call(service.url, "POST", "/api/feedback/", ann.access, json=vote)).status_code == 201
    stored = await messages(service.url, ann.access, session_id)
    for more in ({"messageId": "m"}, {"trigger": "regenerate-message"}):
        voted = await ask_ui(service.urls[-1], ann.access, session_id, "/echo no", **more)
        assert (voted.status_code, voted.text) == (409, "This answer has been voted on and stays as it is.")
    assert await messages(service.url, ann.access, session_id) == stored


@pytest.mark.parametrize(("query", "start"), [("", b"a0:"), ("?format=text", b"x\n"), ("?format=sse", b": ok\n")])
async def test_an_answer_made_anew_speaks_the_same_formats(
    service: Service, ann: Owner, query: str, start: bytes
) -> None:
    session = await new_session(service.url, ann.access)
    await post(service.url, ann.access, {"session_id": session["id"], "content": "/echo x", "id": f"r{query[-3:]}"})
    assert (await regenerate(service.url, ann.access, f"r{query[-3:]}", query)).content.startswith(start)


# -- following again


async def follow(base: str, token: str | None, session_id: str, query: str = "", **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return await call(base, "GET", f"/api/sessions/{session_id}/stream/{query}", token, headers=names)


async def test_a_session_without_turns_has_nothing_to_follow(service: Service, ann: Owner) -> None:
    session = await new_session(service.url, ann.access)
    response = await follow(service.url, ann.access, session["id"])
    assert (response.status_code, response.content) == (204, b"")


async def test_the_latest_turn_is_said_again_and_from_any_cursor(service: Service, ann: Owner) -> None:
    """`Last-Event-ID` or `?after=`, on every worker: what came before and what comes after is the whole."""
    session = await compare(service.url, ann.access)
    await post(service.url, ann.access, {"session_id": session["id"], "content": "/echo an older turn"})
    first = await post(service.url, ann.access, {"session_id": session["id"], "content": "/count 12"}, "?format=sse")
    *live, _ = events(first.content)
    whole = [json.loads(each.data) for each in live]
    for base in service.urls:
        replay = await follow(base, ann.access, session["id"])
        assert replay.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert replay.headers["X-Turn-Id"] == first.headers["X-Turn-Id"]
        assert [_texts(each) for each in (_said(replay), whole)] == [_texts(whole)] * 2
    for place, each in enumerate(live[:-1]):
        base = every_worker(service, place + 1)[-1]
        assert each.id is not None
        for response in (
            await follow(base, ann.access, session["id"], Last_Event_ID=each.id),
            await follow(base, ann.access, session["id"], f"?after={each.id}"),
        ):
            assert put_together(whole[: place + 1], _said(response)).texts() == list(_texts(whole))


def _said(response: httpx.Response) -> list[dict[str, Any]]:
    *said, done = events(response.content)
    assert (done.event, done.data) == ("done", "{}")
    return [json.loads(each.data) for each in said]


def _texts(said: list[dict[str, Any]]) -> tuple[str, str]:
    return text_of(said, "a"), text_of(said, "b")


async def test_a_reader_that_has_everything_is_told_so(service: Service, ann: Owner) -> None:
    session = await new_session(service.url, ann.access)
    response = await post(service.url, ann.access, {"session_id": session["id"], "content": "/echo x"}, "?format=sse")
    last = events(response.content)[-2].id
    assert last is not None
    for base in service.urls:
        assert (await follow(base, ann.access, session["id"], Last_Event_ID=last)).status_code == 204


CURSORS = ["nonsense", ".", "x.", ".5", "x.-5", f"{NOBODYS}.3", "{turn}.99999", "{turn}.-7", "{turn}.1e3", "{turn}", "x" * 500]


@pytest.mark.parametrize("cursor", [*CURSORS, "{turn}.²"])
async def test_a_cursor_nobody_knows_gets_everything(service: Service, ann: Owner, cursor: str) -> None:
    """Unless it claims more of this turn than there is: then only the end is left to tell."""
    session = await new_session(service.url, ann.access)
    turn = (await post(service.url, ann.access, {"session_id": session["id"], "content": "/echo all"})).headers["X-Turn-Id"]
    response = await call(
        service.urls[-1], "GET", f"/api/sessions/{session['id']}/stream/", ann.access,
        params={"after": cursor.replace("{turn}", turn)},
    )  # fmt: skip
    if cursor == "{turn}.99999":
        assert [each["type"] for each in _said(response)] == ["resumed", "message_complete", "turn_complete"]
    else:
        assert text_of(_said(response)) == "all"


async def test_a_running_turn_is_followed_from_its_start_on_every_worker(service: Service, ann: Owner) -> None:
    session = await new_session(service.url, ann.access)
    async with running(service.url, ann.access, session["id"], content="/slow 0.02 hello") as following:
        replays = await at_once([follow(base, ann.access, session["id"]) for base in service.urls])
        lines = (following.first + await following.rest()).decode().splitlines()
    said = "".join(unescape(line[4:-1]) for line in lines if line.startswith("a0:"))
    assert [text_of(_said(replay)) for replay in replays] == [said] * len(service.urls)


async def test_an_event_source_shows_its_token_in_the_address(service: Service) -> None:
    """It can send no headers; a header that is there counts first."""
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access)
    await post(service.url, someone.access, {"session_id": session["id"], "content": "/echo seen"})
    queries = [f"?token={someone.access}", f"?anonymous_token={someone.anonymous_token}"]
    queries += [f"?token={someone.anonymous_token}", f"?ticket={await ticket(service.url, someone.access)}"]
    for query in queries:
        assert text_of(_said(await follow(service.urls[-1], None, session["id"], query))) == "seen", query
    refused(await follow(service.url, None, session["id"], "?token=nonsense"), "token_invalid")
    refused(await follow(service.url, None, session["id"], f"?anonymous_token={someone.access}"), "token_invalid")
    refused(await follow(service.url, "nonsense", session["id"], queries[0]), "token_invalid")


async def test_messages_are_listed_for_their_owner(service: Service, ann: Owner) -> None:
    found = await messages(service.urls[-1], ann.access, ann.session_id)
    assert all(message.keys() == MESSAGE for message in found)
    path = f"/api/messages/?session_id={ann.session_id}&limit=1"
    assert (await call(service.url, "GET", path, ann.access)).json() == found[-1:]


# -- who may knock: hosts and origins


@pytest.mark.parametrize("host", EVIL_HOSTS)
async def test_a_host_that_is_not_served_is_a_bad_request(service: Service, host: str) -> None:
    refused(await call(service.url, "GET", "/api/models/", headers={"Host": host}), "bad_request")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8001", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:9"])
async def test_the_loopback_names_are_served_on_a_local_start(service: Service, host: str) -> None:
    assert (await call(service.url, "GET", "/api/models/", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize("origin", EVIL_ORIGINS)
async def test_a_page_from_elsewhere_may_not_call(service: Service, ann: Owner, origin: str) -> None:
    response = await call(service.url, "GET", "/api/users/me/", ann.access, headers={"Origin": origin})
    refused(response, "origin_not_allowed")
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("name", GATED)
async def test_every_route_looks_at_host_and_origin(service: Service, ann: Owner, name: str) -> None:
    evil = await ask(service.url, name, ann, ann.access, headers={"Origin": EVIL_ORIGINS[0]})
    refused(evil, "origin_not_allowed")
    refused(await ask(service.url, name, ann, ann.access, headers={"Host": EVIL_HOSTS[0]}), "bad_request")


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1:5173", "https://localhost", "http://[::1]:80"])
async def test_pages_on_this_machine_may_call_a_local_start(service: Service, ann: Owner, origin: str) -> None:
    response = await call(service.url, "GET", "/api/users/me/", ann.access, headers={"Origin": origin})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == origin
    assert "Origin" in response.headers["vary"]
    assert response.headers["access-control-allow-credentials"] == "true"
    exposed = set(response.headers["access-control-expose-headers"].split(", "))
    assert exposed == {"X-Turn-Id", "X-Session-Id", "X-Cursor", "X-Anonymous-Token", "Link", "Retry-After"}


async def test_a_client_that_is_no_page_sends_no_origin(service: Service, ann: Owner) -> None:
    response = await call(service.url, "GET", "/api/users/me/", ann.access)
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers
    assert response.headers["vary"] == "Origin"  # a cache between may not give it to a page


async def test_a_page_that_may_call_is_told_its_errors(service: Service, ann: Owner) -> None:
    """Else a browser keeps them from it, and it sees a network that failed."""
    page = {"Origin": "http://localhost:3000"}
    large = await call(service.url, "POST", "/api/sessions/", ann.access, headers=page, content=b"{}".ljust(BODY_MAX + 1))
    missing = await call(service.url, "GET", "/api/nothing/", ann.access, headers=page)
    for response, code in ((large, "too_large"), (missing, "not_found")):
        refused(response, code)
        assert response.headers["access-control-allow-origin"] == page["Origin"]
        assert response.headers["vary"] == "Origin"


SDK = "authorization,content-type,idempotency-key,cache-control,x-stainless-lang,x-stainless-retry-count,user-agent"
PREFLIGHTS = [  # origin, method, headers, whether the browser lets the page go on
    ("http://localhost:3000", "POST", "authorization,content-type", True),
    ("http://localhost:3000", "POST", SDK, True),
    ("http://localhost:3000", "PATCH", "X-Anonymous-Token", True),
    ("http://localhost:3000", "DELETE", "authorization", True),
    ("http://localhost:3000", "GET", "last-event-id", True),
    ("http://[::1]:3000", "GET", "", True),
    ("http://localhost:3000", "PUT", "", False),
    ("https://evil.example", "GET", "", False),
    ("null", "GET", "", False),
]


@pytest.mark.parametrize(("origin", "method", "names", "goes_on"), PREFLIGHTS)
async def test_a_preflight_is_answered_by_the_table(
    service: Service, origin: str, method: str, names: str, goes_on: bool
) -> None:
    """As a browser reads it: the origin itself, credentials, the method and each header by name."""
    headers = {"Origin": origin, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": names}
    if not names:
        del headers["Access-Control-Request-Headers"]
    response = await call(service.url, "OPTIONS", "/api/sessions/", headers=headers)
    if response.status_code == 403:
        refused(response, "origin_not_allowed")
        assert "access-control-allow-origin" not in response.headers and not goes_on
        return
    assert response.status_code == 204, response.text
    assert response.headers["access-control-allow-origin"] == origin
    assert response.headers["access-control-allow-credentials"] == "true"
    assert response.headers["access-control-max-age"] == "600"
    assert "Origin" in response.headers["vary"]
    allowed = set(response.headers["access-control-allow-methods"].split(", "))
    assert allowed == {"GET", "POST", "PATCH", "DELETE"}
    assert set(filter(None, names.split(","))) <= set(response.headers.get("access-control-allow-headers", "").split(","))
    assert (method in allowed) == goes_on


async def test_health_looks_at_neither(service: Service) -> None:
    for path in ("/api/health/", "/health", "/livez/", "/readyz"):
        for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
            assert (await call(service.url, "GET", path, headers=headers)).status_code == 200


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A production start with lists of its own; `serve` is what a platform runs."""
    environment = {
        "DATABASE_URL": f"sqlite:///{tmp_path_factory.mktemp('production') / 'parley.db'}",
        "SECRET_KEY": SECRET,
        "PARLEY_ENV": "production",
        "PARLEY_TOKEN_IN_QUERY": "false",
        "ALLOWED_HOSTS": "chat.example.org, *.Example.NET",
        "ALLOWED_ORIGINS": "https://site.example, https://other.example:8443",
    }
    with Service(environment, server="serve", ready_path="/livez") as running:
        yield running


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("chat.example.org", 200),
        ("CHAT.example.org:443", 200),
        ("a.example.net", 200),
        ("a.b.EXAMPLE.net", 200),
        ("example.net", 400),
        ("evilexample.net", 400),
        ("chat.example.org.evil.example", 400),
        ("chat.example.org@evil.example", 400),
        ("localhost", 400),
        ("127.0.0.1", 400),
    ],
)
async def test_production_serves_the_hosts_it_is_told(production: Service, host: str, status: int) -> None:
    response = await call(production.url, "GET", "/api/models/", headers={"Host": host})
    assert response.status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://site.example", 200),
        ("https://other.example:8443", 200),
        ("https://chat.example.org", 200),  # the service's own pages
        ("https://other.example", 403),
        ("http://site.example", 403),
        ("https://site.example.evil.example", 403),
        ("https://evil.example/https://site.example", 403),
        ("https://site.example@evil.example", 403),
        ("http://localhost:3000", 403),
        ("http://127.0.0.1", 403),
        ("null", 403),
    ],
)
async def test_production_answers_the_pages_it_is_told(production: Service, origin: str, status: int) -> None:
    headers = {"Host": "chat.example.org", "Origin": origin}
    response = await call(production.url, "GET", "/api/models/", headers=headers)
    assert response.status_code == status


async def test_nothing_between_keeps_an_answer_or_speaks_plainly(production: Service, service: Service) -> None:
    answer = await call(production.url, "GET", "/api/models/", headers={"Host": "chat.example.org"})
    assert answer.headers["strict-transport-security"] == "max-age=31536000"
    assert answer.headers["cache-control"] == "no-store"
    assert "strict-transport-security" not in (await call(service.url, "GET", "/api/models/")).headers


async def test_production_gives_nobody_a_guest_for_posting(production: Service) -> None:
    headers = {"Host": "chat.example.org"}
    for body in ({"content": "hello"}, {"session_id": "test123", "content": "hello"}):
        response = await call(production.url, "POST", "/api/messages/stream/", json=body, headers=headers)
        refused(response, "authentication_required")


async def test_tokens_in_addresses_can_be_turned_off(production: Service) -> None:
    """A ticket is still taken there: it is worth nothing the second time."""
    host = {"Host": "chat.example.org"}
    answer = (await call(production.url, "POST", "/api/auth/anonymous/", headers=host)).json()
    access = {"Authorization": f"Bearer {answer['tokens']['access']}"} | host
    session = (await call(production.url, "POST", "/api/sessions/", headers=access)).json()
    path = f"/api/sessions/{session['id']}/stream/"
    for query in (f"?token={answer['tokens']['access']}", f"?anonymous_token={answer['anonymous_token']}"):
        refused(await call(production.url, "GET", path + query, headers=host), "not_found")
    given = (await call(production.url, "POST", "/api/auth/ticket/", headers=access)).json()["ticket"]
    assert (await call(production.url, "GET", f"{path}?ticket={given}", headers=host)).status_code == 204


def test_production_defaults_are_closed() -> None:
    settings = read_settings(environ={"PARLEY_ENV": "production", "SECRET_KEY": SECRET})
    assert not settings.open_sessions
    environ = {"PARLEY_ENV": "production", "SECRET_KEY": SECRET, "PARLEY_OPEN_SESSIONS": "true"}
    assert not read_settings(environ=environ).open_sessions
    assert settings.allowed_origins == ()
    assert settings.allowed_hosts == ("*",)
    local = read_settings(environ={"SECRET_KEY": SECRET})
    assert local.open_sessions
    assert local.allowed_hosts == ("localhost", "127.0.0.1", "[::1]", "testserver")


def test_postgres_or_several_workers_mean_production() -> None:
    """Unless PARLEY_ENV says otherwise: nobody runs those on a laptop by accident."""
    environ = {"SECRET_KEY": SECRET, "REDIS_URL": "redis://localhost"}
    assert read_settings(environ=environ | {"WEB_CONCURRENCY": "2"}).production
    assert read_settings(environ=environ | {"DATABASE_URL": "postgresql://localhost/x"}).production
    assert not read_settings(environ=environ | {"WEB_CONCURRENCY": "2", "PARLEY_ENV": "local"}).production


# -- health

HEALTHY = {
    "status": "healthy",
    "container_type": "asgi",
    "async_enabled": True,
    "checks": {"database": "ok", "cache": "ok", "channels": "configured"},
    "version": VERSION,
}


@pytest.mark.parametrize("path", ["/api/health/", "/api/health", "/health/", "/health"])
async def test_health_is_exactly_this(service: Service, path: str) -> None:
    for base in service.urls:
        response = await call(base, "GET", path)
        assert (response.status_code, response.json()) == (200, HEALTHY)
        assert response.headers["content-type"] == "application/json"
        assert response.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", ["/api/health/", "/livez", "/readyz"])
async def test_health_needs_no_host_and_says_nothing_of_any(service: Service, path: str) -> None:
    answer = await _raw(service.ports[0], f"GET {path} HTTP/1.0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    for secret in (b"127.0.0.1", b"localhost", b"://", str(service.ports[0]).encode(), b"location:", b"postgres"):
        assert secret not in answer.lower()


async def test_health_over_http_1_1_needs_no_host_either(production: Service) -> None:
    """Where the server lets it pass: a load balancer's check that names nobody."""
    answer = await _raw(production.ports[0], "GET /api/health/ HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")


async def _raw(port: int, request: str) -> bytes:
    """Send a request as it stands and read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request.encode())
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.close()


@pytest.mark.parametrize("path", ["/livez", "/live/", "/readyz/", "/ready"])
async def test_probes_answer_ok(service: Service, path: str) -> None:
    for base in service.urls:
        response = await call(base, "GET", path)
        assert (response.status_code, response.text) == (200, "ok")


Checks = Callable[[], Coroutine[Any, Any, httpx.Response]]


async def test_a_failed_check_is_named_and_ready_means_able_to_take_a_turn(postgres_server: Postgres, redis_server: Redis) -> None:
    """Redis hangs, then PostgreSQL: each is named, each passes, and the process stays alive throughout."""
    url = postgres_server.create_database()
    async with Proxy.before(url) as database, Proxy.before(redis_server.url) as redis:
        environment = CLOSED | {"DATABASE_URL": database.through(url), "REDIS_URL": redis.through(redis_server.url)}
        async with Service(environment) as service:
            for proxy, check in ((redis, "cache"), (database, "database")):
                await asyncio.sleep(CHECKED_FOR)  # so long an answer stands, for however many ask
                proxy.stall()
                response = await call(service.url, "GET", "/api/health/")
                assert response.status_code == 503
                assert response.json() == HEALTHY | {
                    "status": "unhealthy", "checks": HEALTHY["checks"] | {check: "failed"},  # type: ignore[operator]
                }  # fmt: skip
                ready = await call(service.url, "GET", "/readyz")
                if check == "database":
                    assert (ready.status_code, ready.headers["Retry-After"]) == (503, "2")
                else:
                    assert ready.status_code == 200, "a worker without Redis can still take a turn"
                assert (await call(service.url, "GET", "/livez")).status_code == 200
                proxy.ok()
                await until(lambda: _healthy(service.url), 10, "health")


async def _healthy(base: str) -> bool:
    return (await call(base, "GET", "/api/health/")).json() == HEALTHY
