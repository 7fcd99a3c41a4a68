"""What users of other projects complained of, each asked of this service: the name says whose public issue it was.

On two workers, with both storages. Where a reader comes back, it comes back to the other worker.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import CLOSED, store
from tests.harness import until
from tests.harness.api import Guest, call, guest, http, messages, new_session, post_turn, stop
from tests.harness.chaos import KEY, models
from tests.harness.client import Journal, SocketReader
from tests.harness.servers import Redis
from tests.harness.service import Service
from tests.harness.sse import SSEParser
from tests.harness.view import put_together
from tests.vendors import Vendors

ENDLESS = "[[tokens:100000 pace:0.01 id:e]]"
Event = dict[str, Any]


@pytest.fixture(scope="module")
def vendors() -> Iterator[Vendors]:
    with Vendors() as running:
        yield running


@pytest.fixture(scope="module", params=["sqlite", "postgres+redis"])
def service(
    request: pytest.FixtureRequest, vendors: Vendors, redis_server: Redis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    environment = CLOSED | {"REDIS_URL": redis_server.url, "VENDOR_KEY": KEY}
    environment |= {"PARLEY_FIRST_TOKEN_TIMEOUT": "2", "PARLEY_IDLE_TIMEOUT": "20"}  # the vendor is in the tests' process
    environment |= store(request.param, request, tmp_path_factory.mktemp("service"))
    demo = {"id": "demo", "provider": "demo", "personality": "scholar", "pace": 0.0001}
    environment |= {"PARLEY_MODELS": json.dumps([models(vendors)[0], demo])}  # one SDK: the other takes a second to import
    with Service(environment, workers=2) as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-6000:]


@pytest.fixture
async def home(service: Service) -> tuple[Guest, str]:
    """Somebody, and a session of theirs with a model that says what it is told to."""
    someone = await guest(service.url)
    return someone, (await new_session(service.url, someone.access, model_a_id="alpha"))["id"]


async def demo_home(service: Service) -> tuple[Guest, str]:
    someone = await guest(service.url)
    return someone, (await new_session(service.url, someone.access, model_a_id="demo"))["id"]


async def listen(
    base: str, session_id: str, token: str, after: str | None = None, leave: Callable[[Event], Any] = lambda _: False
) -> list[Event]:
    """The events of a session's stream, to its end or to the one at which the reader leaves."""
    headers = {"Last-Event-ID": after} if after else {}
    events: list[Event] = []
    async with (
        http(base, token) as client,
        client.stream("GET", f"/api/sessions/{session_id}/stream/", headers=headers) as response,
    ):
        assert response.status_code == 200, response.status_code
        parser = SSEParser()
        async for data in response.aiter_bytes():
            for event in parser.feed(data):
                if event.event == "done":
                    return events
                events.append(json.loads(event.data))
                if leave(events[-1]):
                    return events
    return events


def kind(name: str, count: int = 1) -> Callable[[Event], bool]:
    """Whether this event is the number `count` of its kind."""
    left = count

    def last(event: Event) -> bool:
        nonlocal left
        left -= event["type"] == name
        return left <= 0

    return last


async def begin(service: Service, someone: Guest, session_id: str, content: str = ENDLESS) -> asyncio.Task[Any]:
    """Post a turn and read it in the background; returns when it has said something."""
    posting = asyncio.create_task(post_turn(service.url, someone.access, session_id, content))

    async def said() -> bool:
        last = (await messages(service.url, someone.access, session_id))[-1:]
        return bool(last) and last[0]["role"] == "assistant"

    await until(said, what="the turn")
    return posting


async def test_the_end_frame_is_lost__resumable_stream_47(service: Service, home: tuple[Guest, str]) -> None:
    """A reader that lost the connection right before the end is told the end, and nothing else."""
    someone, session = home
    await post_turn(service.url, someone.access, session, "[[tokens:8]]")
    events = await listen(service.url, session, someone.access, leave=kind("message_complete"))
    for missing in (1, 2):
        cursor = events[-missing]["cursor"]
        rest = await listen(service.urls[1], session, someone.access, cursor)
        told = ["resumed", "message_complete", "turn_complete"]
        assert [event["type"] for event in rest] == [told[0], *told[3 - missing :]]


async def test_reload_between_accept_and_first_token__cloudflare_agents_1784(service: Service) -> None:
    """A page loaded while the model is still thinking finds the turn, and hears it to its end."""
    someone, session = await demo_home(service)
    posting = await begin(service, someone, session, "/silent")
    assert (await messages(service.urls[1], someone.access, session))[-1]["status"] == "pending"
    events = await listen(service.urls[1], session, someone.access)
    assert [event["type"] for event in events] == [
        "message_update",
        "message_update",
        "message_complete",
        "turn_complete",
    ]
    assert events[2]["failure_reason"] == "provider_timeout"
    await posting


async def test_a_tab_opened_idle_follows_the_next_turn__assistant_ui_5328(
    service: Service, home: tuple[Guest, str]
) -> None:
    someone, session = home
    async with SocketReader(Journal(), "idle", service.urls[1], session, token=someone.access) as idle:
        for number in range(2):
            answer = await post_turn(service.url, someone.access, session, f"[[tokens:6 id:n{number}]]")
            await idle.turn_ended(number + 1)
            assert idle.view.texts()[-1] == answer.sides()["a"]


async def test_stop_from_a_resumed_or_second_tab__vercel_ai_6502(
    service: Service, home: tuple[Guest, str], vendors: Vendors
) -> None:
    """Any tab ends the answer, also one that only resumed it; the model is left at once, and every tab hears."""
    someone, session = home
    vendors.reset()
    posting = await begin(service, someone, session)
    first = await listen(service.url, session, someone.access, leave=kind("message_chunk"))
    resumed = asyncio.create_task(listen(service.urls[1], session, someone.access, first[-1]["cursor"]))
    await until(lambda: vendors.calls and len(vendors.calls[0].sent) > 20, what="some tokens")
    assert await stop(service.urls[1], someone.access, session)
    await until(lambda: vendors.calls[0].hung_up, what="the model to be left")
    view = put_together(first, await resumed)
    stored = (await messages(service.url, someone.access, session))[-1]
    assert stored["status"] == "stopped" and view.texts() == [stored["content"]]
    assert (await posting).sides()["a"] == stored["content"]


async def test_an_event_between_replay_and_live__librechat_11710(service: Service, home: tuple[Guest, str]) -> None:
    """Readers that join at any moment of a running answer miss nothing between what they are replayed and what comes."""
    someone, session = home
    posting = await begin(service, someone, session, "[[tokens:300 pace:0.002]]")
    joined = []
    for number in range(20):
        joined.append(asyncio.create_task(listen(service.urls[number % 2], session, someone.access)))
        await messages(service.urls[1 - number % 2], someone.access, session)  # a moment passes
    whole = (await posting).sides()["a"]
    for events in await asyncio.gather(*joined):
        assert put_together(events).texts() == [whole]


async def test_numbers_that_start_again_under_an_old_id__librechat_13117(
    service: Service, home: tuple[Guest, str], vendors: Vendors
) -> None:
    """An answer made again keeps its id; a cursor of the old one gets the new one whole, never a tail of it."""
    someone, session = home
    vendors.reset()
    await post_turn(service.url, someone.access, session, "[[tokens:40 id:same]]")
    old = await listen(service.url, session, someone.access, leave=kind("message_chunk"))
    reply = (await messages(service.url, someone.access, session))[-1]
    again = await call(service.url, "POST", f"/api/messages/{reply['id']}/regenerate/", someone.access)
    assert again.status_code == 200 and len(vendors.calls) == 2
    events = await listen(service.urls[1], session, someone.access, old[-1]["cursor"])
    assert events[0]["type"] == "message_update" and events[0]["turn_id"] != old[0]["turn_id"]
    assert put_together(events).texts() == ["".join(vendors.calls[1].sent)]
    assert [each["id"] for each in await messages(service.url, someone.access, session)][-1] == reply["id"]


async def test_the_tail_of_a_fast_answer_is_stored__convex_agent_323(service: Service) -> None:
    """What was streamed is stored to its last character by the time its end is told."""
    someone, session = await demo_home(service)
    for _ in range(3):
        answer = await post_turn(service.url, someone.access, session, "/count 2000")
        stored = (await messages(service.urls[1], someone.access, session))[-1]
        assert stored["content"] == answer.sides()["a"] and stored["content"].endswith("⟨1999⟩")
        assert stored["status"] == "success"


async def test_refresh_shows_the_whole__open_webui_29596(service: Service, home: tuple[Guest, str]) -> None:
    """A page loaded in the middle of an answer shows what was said and goes on from exactly there."""
    someone, session = home
    posting = await begin(service, someone, session)
    for number in range(4):
        base = service.urls[number % 2]
        async with SocketReader(Journal(), f"page {number}", base, session, token=someone.access) as page:
            state = await page.event("session_state")
            assert state["messages"][-1]["status"] in ("pending", "streaming") and state["turn"]
            shown = state["messages"][-1]["content"]
            chunk = await page.event("message_chunk")
            assert chunk["offset"] == len(shown)
    async with SocketReader(Journal(), "last page", service.urls[1], session, token=someone.access) as page:
        await page.event("message_chunk")
        assert await stop(service.url, someone.access, session)
        await page.turn_ended()
        assert page.view.texts() == [(await posting).sides()["a"]]


async def test_nothing_twice_after_resume__agents_starter_157(
    service: Service, home: tuple[Guest, str], vendors: Vendors
) -> None:
    """Cut off after every few events and resumed on the other worker, a reader has each word once, for one call."""
    someone, session = home
    vendors.reset()
    posting = await begin(service, someone, session)
    heard = [await listen(service.url, session, someone.access, leave=kind("message_chunk", 2))]
    for number in range(8):
        after = heard[-1][-1]["cursor"]
        base = service.urls[(number + 1) % 2]
        heard.append(await listen(base, session, someone.access, after, kind("message_chunk", 1 + number % 3)))
    assert await stop(service.url, someone.access, session)
    heard.append(await listen(service.url, session, someone.access, heard[-1][-1]["cursor"]))
    assert put_together(*heard).texts() == [(await posting).sides()["a"]]
    assert len(vendors.calls) == 1


async def test_the_cursor_survives_a_second_drop_before_any_event__mcp_typescript_sdk_2509(
    service: Service, home: tuple[Guest, str]
) -> None:
    """A resumed stream says at once where it goes on: cut off again before it said anything new, nothing is lost."""
    someone, session = home
    posting = await begin(service, someone, session)
    first = await listen(service.url, session, someone.access, leave=kind("message_chunk", 3))
    again, third = [], first
    for number in range(3):
        third = await listen(service.urls[number % 2], session, someone.access, third[-1]["cursor"], lambda _: True)
        assert [event["type"] for event in third] == ["resumed"]
        assert third[0]["cursor"] == first[-1]["cursor"]
        again.append(third)
    assert await stop(service.url, someone.access, session)
    rest = await listen(service.urls[1], session, someone.access, third[-1]["cursor"])
    assert put_together(first, *again, rest).texts() == [(await posting).sides()["a"]]
