"""The service's HTTP as a client's few lines: be a guest, make a session, post a turn and follow it in any dialect."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from .sse import SSEParser

TIMEOUT = httpx.Timeout(30.0, connect=5.0)  # seconds; a stream of tests is never silent for longer
ACCEPT = {
    "sse": "text/event-stream",
    "ndjson": "application/x-ndjson",
    "text": "text/plain;format=text",
    "lines": "text/plain",
    "any": "*/*",
}
LINE = re.compile(r"([ab])([0d]):(.*)")


@dataclass(frozen=True)
class Guest:
    """Somebody who may have sessions: their id, their tokens, and the whole answer they came with."""

    id: str
    access: str
    refresh: str
    anonymous_token: str
    answer: dict[str, Any] = field(repr=False, default_factory=dict)


@dataclass
class Answer:
    """The answer to a posted turn. `items` are (monotonic time, event dict or line) in the order they came.

    `error` is the decoded body of an answer that was not 200; `ended` says whether the stream came to its own end.
    """

    status: int
    headers: httpx.Headers
    items: list[tuple[float, Any]] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    error: Any = None
    ended: bool = False

    @property
    def turn_id(self) -> str | None:
        return self.headers.get("X-Turn-Id")

    @property
    def events(self) -> list[dict[str, Any]]:
        return [item for _, item in self.items if isinstance(item, dict)]

    @property
    def lines(self) -> list[str]:
        return [item for _, item in self.items if isinstance(item, str)]

    @property
    def text(self) -> str:
        """Bare text, as `curl -N` shows it."""
        return "".join(self.lines)

    def sides(self) -> dict[str, str]:
        """The text of each side, put together from events or from arena lines; direct mode has only `a`."""
        sides: dict[str, str] = {}
        for event in self.events:
            if event.get("type") == "message_chunk":
                side = event.get("participant") or "a"
                sides[side] = sides.get(side, "") + event["chunk"]
        for side, kind, value in map(arena_line, self.lines):
            if kind == "0":
                sides[side] = sides.get(side, "") + value
        return sides

    def finishes(self) -> dict[str, dict[str, Any]]:
        """What the `ad:` and `bd:` lines say, by side."""
        return {side: json.loads(value) for side, kind, value in map(arena_line, self.lines) if kind == "d"}


def arena_line(line: str) -> tuple[str, str, str]:
    """One arena line as side, kind (`0` text, `d` the end) and value; ("", "", "") for anything else."""
    found = LINE.fullmatch(line)
    if found is None:
        return "", "", ""
    side, kind, value = found.groups()
    return side, kind, unescape(value[1:-1]) if kind == "0" else value


def unescape(text: str) -> str:
    r"""Undo the arena's escaping: `\\` and `\n`, nothing else."""
    return re.sub(r"\\(\\|n)", lambda found: "\n" if found[1] == "n" else "\\", text)


@asynccontextmanager
async def http(base: str, token: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client for one base URL that ignores the environment's proxies and verifies nothing: all is on the loopback."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx.AsyncClient(
        base_url=base, headers=headers, timeout=TIMEOUT, trust_env=False, verify=False, follow_redirects=False
    ) as client:
        yield client


async def call(base: str, method: str, path: str, token: str | None = None, **options: Any) -> httpx.Response:
    """One request, whatever comes back. Options as httpx has them: `json`, `params`, `headers`, `content`."""
    async with http(base, token) as client:
        return await client.request(method, path, **options)


async def guest(base: str, name: str | None = None) -> Guest:
    body = {"display_name": name} if name else {}
    answer = _good(await call(base, "POST", "/api/auth/anonymous/", json=body))
    tokens = answer["tokens"]
    return Guest(answer["user"]["id"], tokens["access"], tokens["refresh"], answer["anonymous_token"], answer)


async def ticket(base: str, token: str) -> str:
    """A ticket that opens one socket or EventSource."""
    return _good(await call(base, "POST", "/api/auth/ticket/", token))["ticket"]


async def new_session(base: str, token: str, **body: Any) -> dict[str, Any]:
    """Make a session, in direct mode with the first model offered unless `body` says otherwise."""
    body.setdefault("mode", "direct")
    if body["mode"] == "direct" and "model_a_id" not in body:
        body["model_a_id"] = _good(await call(base, "GET", "/api/models/", token))[0]["id"]
    return _good(await call(base, "POST", "/api/sessions/", token, json=body))


async def messages(base: str, token: str, session_id: str) -> list[dict[str, Any]]:
    return _good(await call(base, "GET", "/api/messages/", token, params={"session_id": session_id}))


async def stop(base: str, token: str, session_id: str) -> bool:
    return _good(await call(base, "POST", f"/api/sessions/{session_id}/stop/", token))["stopped"]


async def post_turn(
    base: str,
    token: str,
    session_id: str | None,
    content: str,
    *,
    id: str | None = None,
    accept: str = "sse",
    path: str = "/api/messages/stream/",
    body: Mapping[str, Any] | None = None,
) -> Answer:
    """Post one turn and follow it to its end in one dialect (a key of `ACCEPT`), without resuming.

    `body` replaces the short request shape.
    """
    asked = dict(body) if body is not None else short_body(session_id, content, id)
    async with (
        http(base, token) as client,
        client.stream("POST", path, json=asked, headers={"Accept": ACCEPT[accept]}) as response,
    ):
        answer = Answer(response.status_code, response.headers)
        if response.status_code == 200:
            await _follow(response, accept, answer)
        else:
            await response.aread()
            answer.error = decoded(response)
    return answer


def short_body(session_id: str | None, content: str, id: str | None = None) -> dict[str, Any]:
    """The short request shape, with an id of its own so that it may be sent again."""
    body = {"content": content, "id": id or str(uuid.uuid4())}
    return body if session_id is None else {"session_id": session_id, **body}


def decoded(response: httpx.Response) -> Any:
    """The JSON of a body that has been read, or its text."""
    try:
        return response.json()
    except ValueError:
        return response.text


async def _follow(response: httpx.Response, accept: str, answer: Answer) -> None:
    """Fill in what comes until it ends; a connection that breaks leaves `ended` False."""
    try:
        if accept == "sse":
            await _follow_sse(response, answer)
        elif accept == "text":
            async for text in response.aiter_text():
                answer.items.append((time.monotonic(), text))
            answer.ended = True
        else:
            async for line in response.aiter_lines():
                item = json.loads(line) if accept == "ndjson" else line
                answer.items.append((time.monotonic(), item))
            answer.ended = True
    except httpx.TransportError:
        answer.ended = False


async def _follow_sse(response: httpx.Response, answer: Answer) -> None:
    parser = SSEParser()
    async for data in response.aiter_bytes():
        for event in parser.feed(data):
            if event.event == "done":
                answer.ended = True
            else:
                answer.items.append((time.monotonic(), json.loads(event.data)))
        answer.comments = parser.comments


def _good(response: httpx.Response) -> Any:
    if response.status_code >= 300:
        raise AssertionError(f"expected success, got {response.status_code} {response.text[:500]}")
    return response.json()
