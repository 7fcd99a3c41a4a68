"""What is said on a socket, and what may be said."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from tests.conftest import store
from tests.harness.api import call, messages, stop
from tests.harness.client import SocketReader
from tests.harness.cursors import characters
from tests.harness.journal import Journal
from tests.harness.proxy import Proxy
from tests.harness.service import Service
from tests.harness.view import OF_A_TURN

from . import BATTLE, ENVIRONMENT, UVICORN, bearer, counted, fate, hear, home, plain, share


@pytest.mark.parametrize("mode", ["direct", "compare", "random"])
async def test_a_turn_is_told_in_order_on_every_worker(service: Service, journal: Journal, mode: str) -> None:
    """The user's message, empty replies, their text, their ends, the turn's end."""
    someone, session_id = await home(service.url, **(BATTLE | {"mode": mode} if mode != "direct" else {}))
    async with contextlib.AsyncExitStack() as stack:
        readers = [
            await stack.enter_async_context(SocketReader(journal, f"r{n}", base, session_id, token=someone.access))
            for n, base in enumerate([*service.urls, service.url])
        ]
        await readers[0].say("/count 12", id="question-1")
        await asyncio.gather(*[reader.turn_ended() for reader in readers])
    for reader in readers:
        events = journal.events(reader.name, *OF_A_TURN)
        kinds = [event["type"] for event in events]
        sides = 1 if mode == "direct" else 2
        assert kinds[: 1 + sides] == ["message_update"] * (1 + sides)
        assert kinds.count("message_update") == 1 + sides and kinds.count("message_complete") == sides
        assert kinds[-1] == "turn_complete"
        user, *replies = [event["message"] for event in events[: 1 + sides]]
        assert (user["id"], user["role"], user["content"], user["model"]) == ("question-1", "user", "/count 12", None)
        assert [reply["participant"] for reply in replies] == ["a", "b"][:sides]
        assert {(reply["content"], reply["status"]) for reply in replies} == {("", "pending")}
        assert all(reply["parent_message_ids"] == ["question-1"] for reply in replies)
        for end in events:
            if end["type"] == "message_complete":
                assert (end["status"], end["failure_reason"]) == ("success", None)
                assert end["message"]["content"] == counted(12)
                assert (end["latency_ms"] is None) == (mode == "random"), "a blind battle's clocks are not shown"
        assert reader.view.texts() == [counted(12)] * sides
    rows = await messages(service.url, someone.access, session_id)
    assert [row["content"] for row in rows] == ["/count 12", *[counted(12)] * sides]


async def test_ping_and_test_come_back_as_they_were(service: Service) -> None:
    """To the sender alone, whatever is in them."""
    someone, session_id = await home(service.url)
    deep = "[" * 400 + "]" * 400
    values = ["1", '"now"', "null", "1.5", "123456789012345678901234567890", '"\\u0000ü😀"', '{"a": [1, {}]}', deep]
    async with (
        plain(service.url, session_id, someone.access) as opened,
        plain(service.urls[-1], session_id, someone.access) as bystander,
    ):
        await asyncio.gather(hear(opened, "session_state"), hear(bystander, "session_state"))
        for value in values:
            await opened.send(f'{{"type": "ping", "timestamp": {value}}}')
            await opened.send(f'{{"type": "test", "message": {value}}}')
            pong, test = (await hear(opened, "pong"))[-1], (await hear(opened, "test"))[-1]
            assert pong == {"type": "pong", "requestId": "session", "timestamp": json.loads(value)}
            assert test == {"type": "test", "requestId": "session", "message": json.loads(value)}
        await opened.send('{"type": "ping"}')
        assert (await hear(opened, "pong"))[-1]["timestamp"] is None
        await bystander.send('{"type": "ping"}')
        assert [event["type"] for event in await hear(bystander, "pong")] == ["pong"]


async def test_where_it_starts_over_it_goes_on_exactly(service: Service) -> None:
    """While tokens come as fast as they can, a client that trusts every `resumed` and `session_state` and knows of no
    duplicates asks for them again and again: the text after each goes on at its cursor, not before and not behind."""
    someone, session_id = await home(service.url)
    async with (
        plain(service.url, session_id, someone.access) as writer,
        plain(service.urls[-1], session_id, someone.access) as opened,
    ):
        await asyncio.gather(hear(writer, "session_state"), hear(opened, "session_state"))
        await writer.send('{"type": "message", "content": "/count 100000"}')
        text, heard, asked, due, answered = "", 0, 0, 20, {"resumed": 0, "session_state": 0}
        texts: dict[str, str] = {}  # the text at each cursor
        while True:
            event = json.loads(await asyncio.wait_for(opened.recv(), 10))
            if event["type"] == "session_state":
                text = texts[event["turn"]["cursor"]] = event["messages"][-1]["content"]
                answered["session_state"] += 1
                continue
            if event["type"] == "resumed":
                text = texts[event["cursor"]]
                answered["resumed"] += 1
                continue
            assert event.get("offset", len(text)) == len(text), (event, text)
            text += event.get("chunk", "")
            texts[event["cursor"]] = text
            heard += 1
            if event["type"] == "turn_complete":
                break
            if heard > due and asked < 14 and asked == sum(answered.values()):
                asked, due = asked + 1, heard + 20
                ask = {"type": "resume", "cursor": list(texts)[-15]} if asked % 2 else {"type": "request_state"}
                await opened.send(json.dumps(ask))
            elif asked == 14 and sum(answered.values()) == 14:
                asked += 1
                await writer.send('{"type": "stop"}')
        assert text == (await messages(service.url, someone.access, session_id))[-1]["content"]
        assert answered == {"resumed": 7, "session_state": 7}


async def test_a_state_asked_for_in_mid_answer_has_the_text_so_far(service: Service, journal: Journal) -> None:
    someone, session_id = await home(service.url)
    for n, base in enumerate(service.urls):
        async with SocketReader(journal, f"asker{n}", base, session_id, token=someone.access) as reader:
            await reader.say("/count 100000")
            await reader.tokens(10)
            await reader.send({"type": "request_state"})
            state = await reader.event("session_state", after=1)
            assert state["messages"][-1]["status"] == "streaming"
            assert counted(100_000).startswith(state["messages"][-1]["content"].strip())
            assert characters(state["turn"]["cursor"]) == len(state["messages"][-1]["content"])
            await reader.send({"type": "stop"})
            await reader.turn_ended()
            assert reader.view.texts()[-1] == (await messages(base, someone.access, session_id))[-1]["content"]


async def test_stop_keeps_what_was_said(service: Service, journal: Journal) -> None:
    """From whichever worker, over the socket and over HTTP; with nothing to stop it does nothing."""
    someone, session_id = await home(service.url)
    base = service.urls[-1]
    async with (
        SocketReader(journal, "writer", service.url, session_id, token=someone.access) as writer,
        SocketReader(journal, "stopper", base, session_id, token=someone.access) as stopper,
    ):
        for frame in ("stop", "ping"):  # done in their order: that stop is none of the turn's that follows
            await stopper.send({"type": frame})
        await stopper.event("pong")
        for turn in (1, 2):
            told = stopper.told
            await writer.say("/count 2000")
            await stopper.tokens(told + 5)  # of this turn: a stop before it is none of its
            await (stopper.send({"type": "stop"}) if turn == 1 else stop(base, someone.access, session_id))
            await asyncio.gather(writer.turn_ended(turn), stopper.turn_ended(turn))
            end = journal.events("stopper", "message_complete")[-1]
            assert (end["status"], end["failure_reason"]) == ("stopped", None)
            assert counted(2000).startswith(end["message"]["content"].strip()) and end["message"]["content"]
        assert writer.view.texts() == stopper.view.texts()
        assert not journal.events(None, "error")


async def test_typing_is_told_to_the_others_once_a_second(service: Service, journal: Journal) -> None:
    """The first word at once, the last of each second at its end; not to the account's own sockets."""
    owner, session_id = await home(service.url)
    query = {"share_token": await share(service.url, owner, session_id)}
    base = service.urls[-1]
    async with (
        SocketReader(journal, "owner", service.url, session_id, token=owner.access) as typist,
        SocketReader(journal, "tablet", base, session_id, token=owner.access) as tablet,
        SocketReader(journal, "viewer", base, session_id, query=query) as viewer,
    ):
        started = time.monotonic()
        for n in range(9):
            await typist.send({"type": "typing_indicator", "is_typing": n % 2 == 0})
        await typist.send({"type": "typing_indicator", "is_typing": False})
        await viewer.event("typing_indicator", after=1)
        await call(base, "PATCH", f"/api/sessions/{session_id}/", owner.access, json={"title": "done"})
        for reader in (typist, tablet, viewer):
            await reader.event("session_update")
    heard = [e for e in journal.of("viewer", "event") if e.data["type"] == "typing_indicator"]
    assert [(e.data["user_id"], e.data["is_typing"]) for e in heard] == [(None, True), (None, False)], "no account ids"
    assert heard[1].at - started >= 0.9  # they are sent a second apart, and arrive a little later each
    assert not journal.events("owner", "typing_indicator") + journal.events("tablet", "typing_indicator")


async def test_changes_over_http_reach_sockets_on_every_worker(service: Service, journal: Journal) -> None:
    """Renamed, pinned, deleted; and after that there is no session to read or speak in."""
    someone, session_id = await home(service.url)
    path = f"/api/sessions/{session_id}/"
    async with contextlib.AsyncExitStack() as stack:
        readers = [
            await stack.enter_async_context(SocketReader(journal, f"r{n}", base, session_id, token=someone.access))
            for n, base in enumerate(service.urls)
        ]
        for n, (base, change) in enumerate(
            [(service.urls[0], {"title": "New"}), (service.urls[-1], {"is_pinned": True})]
        ):
            answer = await call(base, "PATCH", path, someone.access, json=change)
            for reader in readers:
                update = await reader.event("session_update", after=n)
                assert update["action"] == "updated" and update["session"] == answer.json()
                assert update["version"] == update["session"]["version"] == 2 + n
        await call(service.url, "DELETE", path, someone.access)
        for reader in readers:
            assert (await reader.event("session_update", after=2))["action"] == "deleted"
            await reader.ended()
            assert reader.codes == [4404]
    assert await fate(service.url, session_id, **bearer(someone.access)) == (4404, "no such session")


async def test_a_vote_reveals_the_names_on_every_worker(service: Service, journal: Journal) -> None:
    someone, session_id = await home(service.url, mode="random")
    async with SocketReader(journal, "voter", service.urls[-1], session_id, token=someone.access) as reader:
        for n, action in enumerate(["revealed", "voted"]):
            await reader.say("/count 2", id=f"q{n}")
            await reader.turn_ended(n + 1)
            vote = {"session_id": session_id, "message_id": f"q{n}", "feedback_type": "preference", "preference": "tie"}
            answer = await call(service.url, "POST", "/api/feedback/", someone.access, json=vote)
            assert answer.status_code == 201, answer.text
            update = await reader.event("session_update", after=n)
            assert (update["action"], update["session"]["voted"]) == (action, True)
            assert {update["session"][f"model_{side}"]["id"] for side in "ab"} == {"demo-scholar", "demo-poet"}


# -- messages that start nothing


async def test_a_message_while_one_is_answered_is_busy(service: Service, journal: Journal) -> None:
    """Five of them: each refused by its id, and the socket lives on through its pings, one a second here."""
    someone, session_id = await home(service.url)
    async with SocketReader(journal, "eager", service.url, session_id, token=someone.access, resume=False) as reader:
        await reader.say("/count 500", id="first")
        await reader.tokens(3)
        for n in range(5):
            await reader.say("and?", id=f"more-{n}")
        refusals = [await reader.event("error", after=n) for n in range(5)]
        assert [(each["code"], each["message_id"], each["retryable"]) for each in refusals] == [
            ("busy", f"more-{n}", True) for n in range(5)
        ]
        assert all(each["retry_after"] > 0 for each in refusals)
        await reader.turn_ended()
        assert reader.view.texts() == [counted(500)] and reader.codes == []
    assert len(await messages(service.url, someone.access, session_id)) == 2


async def test_one_message_id_is_one_turn(service: Service, journal: Journal) -> None:
    """Sent ten times at once from all workers, again while it is answered, and again later."""
    someone, session_id = await home(service.url)
    async with contextlib.AsyncExitStack() as stack:
        readers = [
            await stack.enter_async_context(
                SocketReader(journal, f"r{n}", service.urls[n % len(service.urls)], session_id, token=someone.access)
            )
            for n in range(4)
        ]
        await asyncio.gather(*[readers[n % 4].say("/count 30", id="once") for n in range(10)])
        await readers[0].tokens(3)
        await readers[1].say("/count 30", id="once")
        await asyncio.gather(*[reader.turn_ended() for reader in readers])
        await readers[2].say("/count 30", id="once")
        await readers[2].send({"type": "request_state"})
        state = await readers[2].event("session_state", after=1)
        assert (len(state["messages"]), state["turn"]) == (2, None)
    assert not journal.events(None, "error"), journal.story()


async def test_a_message_has_to_be_some_text_of_bearable_length(service: Service, journal: Journal) -> None:
    someone, session_id = await home(service.url)
    cases = [("", "invalid"), (" \n\t", "invalid"), ("x" * 32_001, "too_large"), ("a\0b", "invalid")]
    async with SocketReader(journal, "r", service.url, session_id, token=someone.access) as reader:
        for n, (content, code) in enumerate(cases):
            await reader.say(content, id=f"m{n}")
            refusal = await reader.event("error", after=n)
            assert (refusal["code"], refusal["message_id"], refusal["retryable"]) == (code, f"m{n}", False)
        await reader.say("/echo " + "x" * 31_994)
        await reader.turn_ended()
        assert reader.view.texts() == ["x" * 31_994]


async def test_who_heard_a_turn_s_end_may_begin_the_next(
    request: pytest.FixtureRequest, tmp_path: Path, journal: Journal
) -> None:
    """At once and on any worker, also where storage is far from the one that told it: what is told to be over is."""
    environment = ENVIRONMENT | store("postgres+redis", request, tmp_path)
    async with Proxy.before(environment["DATABASE_URL"]) as proxy:
        far = {"DATABASE_URL": proxy.through(environment["DATABASE_URL"])}
        async with Service(environment, workers=2, each=[far], options=UVICORN) as service:
            someone, session_id = await home(service.urls[1])
            async with (
                SocketReader(journal, "far", service.urls[0], session_id, token=someone.access) as first,
                SocketReader(journal, "near", service.urls[1], session_id, token=someone.access) as second,
            ):
                proxy.delay(0.05)
                await first.say("/count 2")
                await second.turn_ended()
                await second.say("/count 2")
                await second.turn_ended(2)
    assert not journal.events(None, "error"), journal.story()


async def test_an_abort_stops_the_answer_whatever_is_asked_next(service: Service) -> None:
    """A client of the AI SDK stops and says something else at once: the old answer would run to its end otherwise."""
    someone, session_id = await home(service.url)

    def frame(kind: str, request_id: str, **fields: object) -> str:
        return json.dumps({"type": kind, "requestId": request_id, "id": session_id, **fields})

    def said(text: str) -> list[dict[str, object]]:
        return [{"id": f"m{len(text)}", "role": "user", "parts": [{"type": "text", "text": text}]}]

    async with plain(service.url, session_id, someone.access) as opened, asyncio.timeout(10):
        await opened.send(frame("send", "first", messages=said("/count 100000")))
        while json.loads(await opened.recv())["type"] != "message_chunk":
            pass
        await opened.send(frame("abort", "first"))
        await opened.send(frame("send", "second", messages=said("/help")))
        while (event := json.loads(await opened.recv()))["type"] != "message_complete":
            pass
        assert event["status"] == "stopped"


async def test_a_snapshot_asked_for_during_another_comes_after_it(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Storage is slow: the second frame is heard while the first is being answered, and nothing else happens."""
    environment = ENVIRONMENT | store("postgres+redis", request, tmp_path)
    async with Service(environment) as service, _storage(environment) as storage:
        someone, session_id = await home(service.url)
        async with plain(service.url, session_id, someone.access) as opened:
            await hear(opened, "session_state")
            async with storage.transaction():
                await storage.execute("LOCK TABLE messages IN ACCESS EXCLUSIVE MODE")
                for _ in range(2):
                    await opened.send('{"type": "request_state"}')
                    await opened.send('{"type": "ping"}')
                    assert [event["type"] for event in await hear(opened, "pong")] == ["pong"]
            for _ in range(2):
                assert [event["type"] for event in await hear(opened, "session_state")] == ["session_state"]


@contextlib.asynccontextmanager
async def _storage(environment: dict[str, str]) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(environment["DATABASE_URL"])
    try:
        yield connection
    finally:
        await connection.close()
