"""Whether a service keeps the protocol, asked from outside: `scripts/conform URL`, one line a check, exit code 1 if any fails.

It needs nothing but the address: it makes two guests and a few sessions there, and asks about ten questions of whatever
model answers. A check is a function; what it is called after is the promise of the README it belongs to.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.harness.api import Guest, call, guest, http, unescape
from tests.harness.sse import SSEParser

PATIENCE = 120.0  # seconds for one check: a model of somebody else's may be slow
STORY = "Tell me a long story about a river, in at least two hundred words."
NOBODYS = "00000000-0000-7000-8000-000000000000"
Event = dict[str, Any]


@dataclass
class Told:
    """One turn as one reader was told it."""

    response: httpx.Response
    events: list[Event]
    done: bool

    @property
    def text(self) -> str:
        return "".join(event["chunk"] for event in self.events if event["type"] == "message_chunk")


@dataclass
class World:
    """The service asked, and what the first checks leave for the later ones."""

    base: str
    ann: Guest
    bob: Guest
    session: str = ""
    turn: Told | None = None
    asked: dict[str, Any] = field(default_factory=dict)

    async def call(self, method: str, path: str, token: str | None = "", **options: Any) -> httpx.Response:
        """Ask as Ann, unless another token, or none, is given."""
        return await call(self.base, method, path, self.ann.access if token == "" else token, **options)

    async def new_session(self, **wish: Any) -> dict[str, Any]:
        made = await self.call("POST", "/api/sessions/", json={"mode": "direct"} | wish)
        assert made.status_code == 201, made.text
        answer: dict[str, Any] = made.json()
        return answer

    async def post(self, body: dict[str, Any], leave: Callable[[Event], Any] = lambda _: False) -> Told:
        return await self._read("POST", "/api/messages/stream/", leave, json=body)

    async def read(self, after: str, leave: Callable[[Event], Any] = lambda _: False, *, query: bool = False) -> Told:
        path = f"/api/sessions/{self.session}/stream/"
        given: dict[str, Any] = {"params": {"after": after}} if query else {"headers": {"Last-Event-ID": after}}
        return await self._read("GET", path, leave, **given)

    async def _read(self, method: str, path: str, leave: Callable[[Event], Any], **options: Any) -> Told:
        headers = {"Accept": "text/event-stream"} | options.pop("headers", {})
        events: list[Event] = []
        async with (
            http(self.base, self.ann.access) as client,
            client.stream(method, path, headers=headers, **options) as response,
        ):
            assert response.status_code == 200, (response.status_code, (await response.aread())[:300])
            parser = SSEParser()
            async for data in response.aiter_bytes():
                for event in parser.feed(data):
                    if event.event == "done":
                        return Told(response, events, True)
                    events.append(json.loads(event.data))
                    assert event.id == events[-1]["cursor"] and event.event == events[-1]["type"]
                    if leave(events[-1]):
                        return Told(response, events, False)
        return Told(response, events, False)

    def socket(self, session: str = "", token: str | None = "", query: str = "", **options: Any) -> connect:
        token = self.ann.access if token == "" else token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        url = f"ws{self.base.removeprefix('http')}/ws/chat/session/{session or self.session}/{query}"
        return connect(url, additional_headers=headers, proxy=None, max_size=None, **options)

    @property
    def told(self) -> Told:
        assert self.turn is not None, "the first turn failed"
        return self.turn


async def hear(socket: ClientConnection, *kinds: str) -> list[Event]:
    """All events up to the first one of these kinds."""
    events: list[Event] = []
    while not events or events[-1]["type"] not in kinds:
        events.append(json.loads(await socket.recv()))
    return events


async def closed(socket: ClientConnection) -> int:
    """The code a socket is closed with, whatever it says before."""
    try:
        while True:
            await socket.recv()
    except ConnectionClosed:
        return socket.close_code or 1006


def chunk(event: Event) -> bool:
    return bool(event["type"] == "message_chunk")


def text_of(events: Iterable[Event]) -> str:
    return "".join(event["chunk"] for event in events if chunk(event))


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, (response.status_code, response.text[:300])
    body: dict[str, Any] = response.json()
    assert body["error"] == code and body["message"] == body["detail"], body
    return body


CHECKS: list[tuple[str, Callable[[World], Awaitable[None]]]] = []


def check(promise: str) -> Callable[[Callable[[World], Awaitable[None]]], Callable[[World], Awaitable[None]]]:
    def register(function: Callable[[World], Awaitable[None]]) -> Callable[[World], Awaitable[None]]:
        CHECKS.append((f"{promise:4}{function.__name__.replace('_', ' ')}", function))
        return function

    return register


# -- P10: errors


@check("P10")
async def health_is_the_exact_body(world: World) -> None:
    body = (await world.call("GET", "/api/health/", None)).json()
    assert set(body) == {"status", "container_type", "async_enabled", "checks", "version"}
    assert body["status"] == "healthy" and body["container_type"] == "asgi" and body["async_enabled"] is True


@check("P10")
async def what_is_not_there_is_404(world: World) -> None:
    refused(await world.call("GET", "/api/nothing/"), 404, "not_found")


@check("P10")
async def a_wrong_method_names_the_right_ones(world: World) -> None:
    response = await world.call("PUT", "/api/sessions/")
    refused(response, 405, "method_not_allowed")
    assert {"GET", "POST"} <= set(response.headers["Allow"].split(", "))


@check("P10")
async def a_broken_body_is_a_bad_request(world: World) -> None:
    refused(await world.call("POST", "/api/sessions/", content=b'{"mode":'), 400, "bad_request")


@check("P10")
async def a_wrong_field_is_named(world: World) -> None:
    body = refused(await world.call("POST", "/api/sessions/", json={"mode": "sideways"}), 400, "invalid")
    assert list(body["fields"]) == ["mode"]


@check("P10")
async def paths_answer_with_and_without_their_slash(world: World) -> None:
    assert (await world.call("GET", "/api/models")).json() == (await world.call("GET", "/api/models/")).json()


# -- P13: who may


@check("P13")
async def without_a_token_it_is_401(world: World) -> None:
    response = await world.call("GET", "/api/users/me/", None)
    refused(response, 401, "authentication_required")
    assert response.headers["WWW-Authenticate"] == "Bearer"


@check("P13")
async def a_bad_token_is_401(world: World) -> None:
    refused(await world.call("GET", "/api/models/nothing/", "nonsense"), 404, "not_found")
    refused(await world.call("GET", "/api/users/me/", "nonsense"), 401, "token_invalid")


@check("P13")
async def a_strange_web_page_is_not_let_in(world: World) -> None:
    response = await world.call("GET", "/api/models/", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in response.headers


# -- P1, P2, P9: one turn, told again and again


@check("P1")
async def a_turn_is_told_from_its_messages_to_its_end(world: World) -> None:
    world.session = (await world.new_session())["id"]
    world.asked = {"session_id": world.session, "id": str(uuid.uuid4()), "content": STORY}
    world.turn = await world.post(world.asked)
    kinds = [event["type"] for event in world.told.events]
    assert kinds[:3] == ["message_update", "message_update", "message_chunk"], kinds[:4]
    assert kinds[-2:] == ["message_complete", "turn_complete"] and world.told.done
    assert all(event["turn_id"] == event["requestId"] for event in world.told.events)


@check("P1")
async def chunks_begin_where_the_last_one_ended(world: World) -> None:
    length = 0
    for event in filter(chunk, world.told.events):
        assert event["offset"] == length
        length += len(event["chunk"])
    assert world.told.text == world.told.events[-2]["message"]["content"] != ""


@check("P1")
async def a_stream_is_not_kept_and_says_where_it_begins(world: World) -> None:
    headers = world.told.response.headers
    assert headers["content-type"].startswith("text/event-stream") and "no-store" in headers["cache-control"]
    assert headers["x-turn-id"] == world.told.events[0]["turn_id"] and headers["x-cursor"] == "earliest"


@check("P9")
async def the_same_message_again_is_the_same_turn(world: World) -> None:
    again = await world.post(world.asked)
    assert again.text == world.told.text and again.events[0]["turn_id"] == world.told.events[0]["turn_id"]


@check("P9")
async def the_same_message_on_a_socket_is_the_same_turn(world: World) -> None:
    async with world.socket() as socket:
        await hear(socket, "session_state")
        await socket.send(json.dumps({"type": "message", "content": STORY, "id": world.asked["id"]}))
        assert text_of(await hear(socket, "turn_complete")) == world.told.text


@check("P1")
async def what_was_told_is_stored(world: World) -> None:
    stored = (await world.call("GET", "/api/messages/", params={"session_id": world.session})).json()
    assert [each["role"] for each in stored] == ["user", "assistant"]
    assert stored[1]["content"] == world.told.text and stored[1]["status"] == "success"


@check("P1")
async def lines_of_json_say_the_same(world: World) -> None:
    told = await world.call("POST", "/api/messages/stream/?format=ndjson", json=world.asked)
    events = [json.loads(line) for line in told.text.split("\n") if line]
    assert text_of(events) == world.told.text and events[-1]["type"] == "turn_complete"


@check("P1")
async def the_arenas_lines_say_the_same(world: World) -> None:
    told = await world.call("POST", "/api/messages/stream/", json=world.asked)
    *lines, end, rest = told.text.split("\n")
    assert (end, rest) == ('ad:{"finishReason":"stop"}', "")
    assert unescape("".join(line[4:-1] for line in lines)) == world.told.text.replace("\r", "")


@check("P1")
async def bare_text_says_the_same(world: World) -> None:
    told = await world.call("POST", "/api/messages/stream/?format=text", json=world.asked)
    assert told.text == world.told.text + "\n"


@check("P2")
async def every_cursor_is_told_exactly_the_rest(world: World) -> None:
    events = world.told.events
    for place in {0, 1, 2, len(events) // 3, len(events) // 2, len(events) - 2}:
        rest = await world.read(events[place]["cursor"])
        assert text_of(events[: place + 1]) + rest.text == world.told.text, place
        assert rest.events[-1]["type"] == "turn_complete"


@check("P2")
async def a_resumed_stream_says_so_first(world: World) -> None:
    cursor = world.told.events[3]["cursor"]
    rest = await world.read(cursor)
    assert rest.events[0]["type"] == "resumed" and rest.events[0]["cursor"] == cursor
    assert rest.response.headers["x-cursor"] == cursor


@check("P2")
async def a_cursor_may_stand_in_the_query(world: World) -> None:
    cursor = world.told.events[3]["cursor"]
    assert (await world.read(cursor, query=True)).text == (await world.read(cursor)).text


@check("P2")
async def who_has_everything_is_told_nothing(world: World) -> None:
    path = f"/api/sessions/{world.session}/stream/"
    response = await world.call("GET", path, headers={"Last-Event-ID": world.told.events[-1]["cursor"]})
    assert response.status_code == 204


@check("P2")
async def a_made_up_cursor_gets_the_whole_turn(world: World) -> None:
    assert (await world.read(f"{NOBODYS}.7")).text == world.told.text


# -- P1, P2: sockets


@check("P1")
async def a_socket_is_greeted_with_what_there_is(world: World) -> None:
    async with world.socket() as socket:
        hello, state = await hear(socket, "session_state")
    assert hello["type"] == "connection_established" and hello["session_id"] == world.session
    assert [message["content"] for message in state["messages"]][-1] == world.told.text
    assert hello["requestId"] == state["requestId"] == "session"


@check("P1")
async def every_socket_hears_the_same_and_so_does_who_comes_late(world: World) -> None:
    async with world.socket() as one, world.socket() as two:
        for socket in (one, two):
            await hear(socket, "session_state")
        posting = asyncio.create_task(world.post({"session_id": world.session, "content": STORY}))
        first = await hear(one, "message_chunk")
        async with world.socket() as late:
            state = (await hear(late, "session_state"))[-1]
            shown, rest = state["messages"][-1]["content"], await hear(late, "turn_complete")
        heard = text_of(first + await hear(one, "turn_complete"))
        assert heard == text_of(await hear(two, "turn_complete")) == (await posting).text == shown + text_of(rest)


@check("P2")
async def a_socket_goes_on_from_a_cursor_at_its_opening(world: World) -> None:
    events = world.told.events
    async with world.socket(query=f"?cursor={events[4]['cursor']}") as socket:
        _, resumed = [json.loads(await socket.recv()) for _ in range(2)]
        assert resumed["type"] == "resumed" and resumed["cursor"] == events[4]["cursor"]
        assert text_of(events[:5] + await hear(socket, "turn_complete")) == world.told.text


@check("P2")
async def a_socket_goes_on_from_a_cursor_by_a_frame(world: World) -> None:
    events = world.told.events
    async with world.socket() as socket:
        await hear(socket, "session_state")
        await socket.send(json.dumps({"type": "resume", "cursor": events[4]["cursor"]}))
        await hear(socket, "resumed")
        assert text_of(events[:5] + await hear(socket, "turn_complete")) == world.told.text


@check("P1")
async def ping_and_test_are_echoed(world: World) -> None:
    async with world.socket() as socket:
        await socket.send(json.dumps({"type": "ping", "timestamp": 1.5}))
        await socket.send(json.dumps({"type": "test", "message": {"a": ["b"]}}))
        assert (await hear(socket, "pong"))[-1]["timestamp"] == 1.5
        assert (await hear(socket, "test"))[-1]["message"] == {"a": ["b"]}


@check("P10")
async def bad_frames_get_errors_and_the_third_the_close(world: World) -> None:
    async with world.socket() as socket:
        await hear(socket, "session_state")
        for number in range(3):
            await socket.send(json.dumps({"type": "nonsense"}))
            if number < 2:
                error = (await hear(socket, "error"))[-1]
                assert error["code"] == "bad_request" and error["retryable"] is False
        assert await closed(socket) == 4400


@check("P10")
async def frames_are_text(world: World) -> None:
    async with world.socket() as socket:
        await socket.send(b"\x00")
        assert await closed(socket) in (1003, 4400)


@check("P10")
async def a_frame_may_be_too_big(world: World) -> None:
    async with world.socket() as socket:
        await socket.send(json.dumps({"type": "test", "message": "x" * 70_000}))
        assert await closed(socket) in (1009, 4400, 1006)


@check("P13")
async def a_bad_token_closes_a_socket(world: World) -> None:
    async with world.socket(token="nonsense") as socket:
        assert await closed(socket) == 4401


@check("P13")
async def somebody_elses_session_is_none(world: World) -> None:
    async with world.socket(token=world.bob.access) as socket:
        assert await closed(socket) == 4404


@check("P13")
async def a_strange_web_page_gets_no_socket(world: World) -> None:
    try:
        async with world.socket(origin="https://evil.example") as socket:
            assert await closed(socket) in (4403, 1008)
    except InvalidStatus as refusal:
        assert refusal.response.status_code == 403


@check("P13")
async def what_is_not_yours_does_not_exist(world: World) -> None:
    session = f"/api/sessions/{world.session}/"
    bobs = world.bob.access
    for method, path in (("GET", session), ("PATCH", session), ("DELETE", session), ("POST", f"{session}stop/")):
        answer = await world.call(method, path, bobs, json={} if method == "PATCH" else None)
        refused(answer, 404, "not_found")
    asked = await world.call("POST", "/api/messages/stream/", bobs, json=world.asked)
    refused(asked, 404, "not_found")


# -- P3: an answer belongs to nobody's connection


@check("P3")
async def leaving_stops_nothing_and_a_second_message_waits(world: World) -> None:
    left = await world.post({"session_id": world.session, "content": STORY}, leave=chunk)
    busy = await world.call("POST", "/api/messages/stream/", json={"session_id": world.session, "content": "And?"})
    refused(busy, 409, "busy")
    rest = await world.read(left.events[-1]["cursor"])
    assert rest.events[-2]["status"] == "success"
    assert left.text + rest.text == rest.events[-2]["message"]["content"]


@check("P3")
async def stop_ends_the_answer_for_everyone(world: World) -> None:
    async with world.socket() as socket:
        await hear(socket, "session_state")
        await socket.send(json.dumps({"type": "message", "content": STORY}))
        await hear(socket, "message_chunk")
        assert (await world.call("POST", f"/api/sessions/{world.session}/stop/")).json() == {"stopped": True}
        assert (await hear(socket, "message_complete"))[-1]["status"] == "stopped"
    assert (await world.call("POST", f"/api/sessions/{world.session}/stop/")).json() == {"stopped": False}


# -- P11, P12: a blind battle and its vote


@check("P11")
async def a_blind_battle_hides_its_models(world: World) -> None:
    offered = (await world.call("GET", "/api/models/")).json()
    session = await world.new_session(mode="random")
    world.session = session["id"]
    world.asked = {"session_id": world.session, "id": str(uuid.uuid4()), "content": "Say one short sentence."}
    world.turn = await world.post(world.asked)
    seen = [session, *world.told.events]
    for path in (f"/api/sessions/{world.session}/", f"/api/messages/?session_id={world.session}"):
        seen.append((await world.call("GET", path)).json())
    listed = (await world.call("GET", "/api/sessions/")).json()
    seen += [each for each in listed if each["id"] == world.session]
    told = json.dumps([without_texts(each) for each in seen])
    assert [session[side]["display_name"] for side in ("model_a", "model_b")] == ["Model A", "Model B"]
    for model in offered:
        assert json.dumps(model["id"]) not in told and json.dumps(model["display_name"]) not in told, model["id"]


def without_texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_texts(each) for name, each in value.items() if name not in ("content", "chunk", "title")}
    return [without_texts(each) for each in value] if isinstance(value, list) else value


@check("P11")
async def both_sides_have_an_ending(world: World) -> None:
    ended = [event for event in world.told.events if event["type"] == "message_complete"]
    assert sorted(event["participant"] for event in ended) == ["a", "b"]


@check("P12")
async def only_the_owner_votes(world: World) -> None:
    refused(await vote(world, world.bob.access), 404, "not_found")


@check("P12")
async def a_vote_reveals_and_is_cast_once(world: World) -> None:
    first = await vote(world, world.ann.access)
    assert first.status_code == 201, first.text
    revealed = first.json()["session_update"]
    assert revealed["voted"] and revealed["model_a"]["display_name"] != "Model A"
    refused(await vote(world, world.ann.access), 409, "already_voted")


async def vote(world: World, token: str) -> httpx.Response:
    body = {"session_id": world.session, "message_id": world.asked["id"], "feedback_type": "preference"}
    return await world.call("POST", "/api/feedback/", token, json=body | {"preference": "tie"})


# -- other people's clients


@check("§9")
async def the_ai_sdk_is_answered_in_its_chunks(world: World) -> None:
    message = {"id": str(uuid.uuid4()), "role": "user", "parts": [{"type": "text", "text": "Say one short sentence."}]}
    asked = {"id": f"conform-{uuid.uuid4()}", "messages": [message], "trigger": "submit-message"}
    told = await world.call("POST", "/api/chat", json=asked)
    assert told.headers["x-vercel-ai-ui-message-stream"] == "v1" and told.text.endswith("data: [DONE]\n\n")
    chunks = [json.loads(line[6:]) for line in told.text.split("\n") if line.startswith("data: {")]
    kinds = [each["type"] for each in chunks]
    assert kinds[:2] == ["start", "text-start"] and kinds[-2:] == ["text-end", "finish"]
    assert (await world.call("GET", f"/api/chat/{asked['id']}/stream")).status_code == 204


@check("§9")
async def openais_clients_are_answered_in_their_objects(world: World) -> None:
    offered = (await world.call("GET", "/v1/models")).json()["data"]
    asked = {"model": offered[0]["id"], "messages": [{"role": "user", "content": "Say one short sentence."}]}
    whole = (await world.call("POST", "/v1/chat/completions", json=asked | {"max_tokens": 20})).json()
    assert whole["choices"][0]["message"]["content"] and whole["usage"]["total_tokens"] > 0
    problem = (await world.call("POST", "/v1/chat/completions", json=asked | {"model": "nothing"})).json()["error"]
    assert problem["message"] and problem["code"] == "not_found"


async def run(base: str) -> int:
    """Print a line for each check; return how many failed."""
    try:
        world = World(base, await guest(base), await guest(base))
    except (AssertionError, httpx.HTTPError) as problem:
        print(f"FAIL    {base} does not hand out guest accounts: {problem}")
        return 1
    failed = 0
    for name, function in CHECKS:
        try:
            async with asyncio.timeout(PATIENCE):
                await function(world)
            print(f"ok      {name}")
        except Exception as problem:  # whatever a strange service makes of a check, the others are made as well
            failed += 1
            print(f"FAIL    {name}: {type(problem).__name__}: {str(problem)[:300]}")
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} checks passed")
    return failed


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].startswith("http"):
        sys.exit("usage: scripts/conform http://localhost:8001")
    sys.exit(1 if asyncio.run(run(sys.argv[1].rstrip("/"))) else 0)
