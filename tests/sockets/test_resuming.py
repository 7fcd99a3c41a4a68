"""Where a reader goes on after its connection was lost, and the same events over HTTP (contract §7)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.conftest import store
from tests.harness.api import Guest, call, http, new_session, post_turn, ticket
from tests.harness.client import SocketReader, SSEReader
from tests.harness.cursors import characters
from tests.harness.journal import Journal
from tests.harness.service import Service
from tests.harness.view import OF_A_TURN, put_together

from . import BATTLE, ENVIRONMENT, counted, hear, home, plain
from .events import odd

# -- cursors


ANSWER = counted(20)


async def _turn(base: str, someone: Guest, session_id: str) -> str:
    """A turn that has ended, whose reply is `ANSWER`."""
    return str((await post_turn(base, someone.access, session_id, "/count 20")).turn_id)


@pytest.mark.parametrize("way", ["query", "frame"])
async def test_a_good_cursor_is_continued_exactly(service: Service, way: str) -> None:
    """After the turn's end, on every worker, from its start, its middle and its end; inside a token, too."""
    someone, session_id = await home(service.url)
    turn_id = await _turn(service.url, someone, session_id)
    end = len(ANSWER)
    for base in service.urls:
        for place in ("start", 0, 7, end - 1, end, "e", "end"):
            cursor = f"{turn_id}.{place}"
            async with plain(
                base, session_id, someone.access, **({"cursor": cursor} if way == "query" else {})
            ) as opened:
                if way == "frame":
                    await hear(opened, "session_state")
                    await opened.send(json.dumps({"type": "resume", "cursor": cursor}))
                resumed = (await hear(opened, "resumed"))[-1]
                assert (resumed["turn_id"], resumed["cursor"]) == (turn_id, cursor)
                await opened.send('{"type": "ping"}')
                events = await hear(opened, "turn_complete") if place != "end" else []
                kinds = [event["type"] for event in events if event["type"] in OF_A_TURN]
                expected = ["message_update"] * 2 * (place == "start")
                expected += ["message_chunk"] * (place == "start" or (isinstance(place, int) and place < end))
                expected += ["message_complete"] * (place not in ("e", "end")) + ["turn_complete"] * (place != "end")
                assert kinds == expected, cursor
                for event in events:
                    if event["type"] == "message_chunk":
                        had = place if isinstance(place, int) else 0
                        assert (event["offset"], event["chunk"]) == (had, ANSWER[had:])
                if place == "end":
                    assert [event["type"] for event in await hear(opened, "pong")] == ["pong"]


GARBAGE = [
    "",
    ".",
    "x",
    "5",
    ".5",
    "x.",
    "x.y",
    "x.5",
    "x.-1",
    "x.--5",
    "x.1e3",
    "x.5.5",
    "x.5.5.5",
    "x.start",
    "x.end",
    "x.e",
    "x.²",
    "x\u0000.5",
    "ü.3",
    "x." + "9" * 90,
]


@pytest.mark.parametrize("way", ["query", "frame"])
async def test_any_other_cursor_gets_a_snapshot(service: Service, way: str) -> None:
    """Unknown, of as many replies as the turn has not, of another session, or no cursor at all."""
    someone, session_id = await home(service.url)
    turn_id = await _turn(service.url, someone, session_id)
    other, others_session = await home(service.url)
    others_turn = await _turn(service.url, other, others_session)
    unknown = [f"{turn_id}.{place}" for place in ("3.3", "e.e", "-1", "-2", "", "x", "3.", "E", "3e")]
    unknown += [f"{others_turn}.3", f"{others_turn}.end", f"{turn_id}x.3"]
    cursors = unknown + [text for text in GARBAGE if way == "frame" or "\0" not in text]
    for number, cursor in enumerate(cursors):
        base = service.urls[number % len(service.urls)]
        async with plain(base, session_id, someone.access, **({"cursor": cursor} if way == "query" else {})) as opened:
            if way == "frame":
                await hear(opened, "session_state")
                await opened.send(json.dumps({"type": "resume", "cursor": cursor}))
            events = await hear(opened, "session_state")
            assert [event["type"] for event in events][-2:-1] in ([], ["connection_established"]), cursor
            assert [message["content"] for message in events[-1]["messages"]] == ["/count 20", ANSWER], cursor
            assert events[-1]["turn"] is None


async def test_a_cursor_two_turns_back_gets_the_rest_of_both(service: Service, journal: Journal) -> None:
    someone, session_id = await home(service.url)
    turn_id = await _turn(service.url, someone, session_id)
    second = await _turn(service.urls[-1], someone, session_id)
    for base in service.urls:
        async with plain(base, session_id, someone.access, cursor=f"{turn_id}.9") as opened:
            first = await hear(opened, "turn_complete")
            rest = await hear(opened, "turn_complete")
        first = [event for event in first if event["type"] in OF_A_TURN]
        assert [event["type"] for event in first] == ["message_chunk", "message_complete", "turn_complete"]
        assert (first[0]["turn_id"], first[0]["offset"], first[0]["chunk"]) == (turn_id, 9, ANSWER[9:])
        view = put_together(rest)
        assert (view.cursor, view.texts()) == (f"{second}.end", [ANSWER])


async def test_a_reader_that_keeps_losing_its_connection_misses_nothing(service: Service, journal: Journal) -> None:
    """Direct and arena; it comes back with its cursor, to any worker."""
    someone, session_id = await home(service.url)
    battle = (await new_session(service.url, someone.access, **BATTLE))["id"]
    urls = [service.urls[0], service.urls[-1]]

    async def lose(name: str, session_id: str, sides: int) -> None:
        async with SocketReader(journal, name, urls, session_id, token=someone.access) as reader:
            await reader.say("/count 400")
            for n in range(1, 6):
                await reader.until(lambda n=n: characters(reader.cursor) > 100 * n, what="more text")
                reader.drop()
                await reader.until(lambda n=n: reader.view.resumptions == n, what="a connection that resumes")
            await reader.turn_ended()
            assert reader.view.texts() == [counted(400)] * sides

    await asyncio.gather(lose("direct", session_id, 1), lose("arena", battle, 2))


# -- restarts


async def test_a_deploy_closes_with_1012_and_the_reader_goes_on(
    request: pytest.FixtureRequest, tmp_path: Path, journal: Journal
) -> None:
    """The answer is finished while the process drains; the reader comes back to the next one and has all of it."""
    environment = ENVIRONMENT | store("sqlite", request, tmp_path)
    async with Service(environment, server="serve") as restarted:
        someone, session_id = await home(restarted.url)
        async with SocketReader(journal, "reader", restarted.url, session_id, token=someone.access) as reader:
            await reader.say("/count 200")
            await reader.tokens(20)
            journal.fault("SIGTERM")
            await restarted.restart()
            await reader.until(lambda: reader.connections == 2, what="a new connection")
            await reader.until(lambda: reader.view.texts() == [counted(200)], what="the whole answer")
            assert reader.codes == [1012]
            assert {message.status for message in reader.view.messages.values()} == {"success"}


# -- §7: the same events over HTTP


async def test_sse_says_a_turns_events_and_nothing_else(service: Service, journal: Journal) -> None:
    someone, session_id = await home(service.url, **BATTLE)
    async with (
        SocketReader(journal, "socket", service.url, session_id, token=someone.access) as reader,
        SSEReader(journal, "sse", service.urls[-1], session_id, token=someone.access, content="/count 30") as sse,
    ):
        await asyncio.gather(reader.turn_ended(), sse.turn_ended())
        await sse.ended()
        assert sse.view.texts() == reader.view.texts() == [counted(30)] * 2
        assert sse.comments[0] == "ok"
    kinds = {event["type"] for event in journal.events("sse")}
    assert kinds == {"message_update", "message_chunk", "message_complete", "turn_complete"}
    kinds.remove("message_chunk")
    for kind in kinds:  # how much of the other side was told before a side's end may differ: not what was told
        over_sse, over_socket = [
            [{name: value for name, value in event.items() if name != "cursor"} for event in journal.events(name, kind)]
            for name in ("sse", "socket")
        ]
        assert over_sse == over_socket


async def test_an_event_source_resumes_by_its_last_id(service: Service, journal: Journal) -> None:
    """By header or by `?after=`; admitted by a ticket or a token in the URL, as it can send no header."""
    someone, session_id = await home(service.url)
    path = f"/api/sessions/{session_id}/stream/"
    async with http(service.url, someone.access) as client:
        assert (await client.get(path)).status_code == 204, "there is nothing to read yet"
    turn_id = await _turn(service.url, someone, session_id)
    for base in service.urls:
        for way in ("header", "after"):
            cursor = f"{turn_id}.{len(ANSWER) - 5}"
            headers = {"Last-Event-ID": cursor} if way == "header" else {}
            query = {"after": cursor} if way == "after" else {}
            query |= {"ticket": await ticket(base, someone.access)} if way == "header" else {"token": someone.access}
            async with http(base) as client:
                answer = await client.get(path, headers=headers, params=query)
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            blocks = answer.text.split("\n\n")
            assert blocks[0] == ": ok\nretry: 1000" and blocks[-2] == "event: done\ndata: {}"
            for block in blocks[1:-2]:
                lines = dict(line.split(": ", 1) for line in block.splitlines())
                event = json.loads(lines["data"])
                assert lines.keys() == {"id", "event", "data"} and not odd(event)
                assert (lines["id"], lines["event"]) == (event["cursor"], event["type"])
            resumed, first = [json.loads(block.split("data: ", 1)[1]) for block in blocks[1:3]]
            assert (resumed["type"], resumed["cursor"]) == ("resumed", cursor), "a stream says where it goes on"
            assert answer.headers["x-cursor"] == cursor
            assert (first["offset"], first["chunk"]) == (len(ANSWER) - 5, ANSWER[-5:])
        ended = await call(base, "GET", path, someone.access, headers={"Last-Event-ID": f"{turn_id}.end"})
        assert ended.status_code == 204, "an EventSource that has everything is told to stop"
