"""Where a reader goes on after its connection was lost, and the same events over HTTP (contract §7)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.conftest import store
from tests.harness.api import Guest, call, http, new_session, post_turn, ticket
from tests.harness.client import SocketReader, SSEReader
from tests.harness.journal import Journal
from tests.harness.service import Service

from . import BATTLE, ENVIRONMENT, counted, hear, home, plain
from .events import odd

# -- cursors


async def _cursors(base: str, someone: Guest, session_id: str) -> tuple[str, int]:
    """A turn that has ended, and its last number."""
    answer = await post_turn(base, someone.access, session_id, "/count 20")
    return answer.events[-1]["turn_id"], answer.events[-1]["seq"]


@pytest.mark.parametrize("way", ["query", "frame"])
async def test_a_good_cursor_is_continued_exactly(service: Service, way: str) -> None:
    """After the turn's end, on every worker, from its start, its middle and its end."""
    someone, session_id = await home(service.url)
    turn_id, last = await _cursors(service.url, someone, session_id)
    for base in service.urls:
        for seq in (-1, 0, 7, last - 1, last):
            cursor = f"{turn_id}.{seq}"
            async with plain(
                base, session_id, someone.access, **({"cursor": cursor} if way == "query" else {})
            ) as opened:
                if way == "frame":
                    await hear(opened, "session_state")
                    await opened.send(json.dumps({"type": "resume", "cursor": cursor}))
                resumed = (await hear(opened, "resumed"))[-1]
                assert (resumed["turn_id"], resumed["from_seq"]) == (turn_id, seq + 1)
                await opened.send('{"type": "ping"}')
                events = (await hear(opened, "turn_complete"))[:] if seq < last else []
                events = [event for event in events if "seq" in event]
                firsts = [event.get("from_seq", event["seq"]) for event in events]
                assert firsts == [seq + 1, *[event["seq"] + 1 for event in events[:-1]]][: len(events)]
                if seq == last:
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
    "x.²",
    "x\u0000.5",
    "ü.3",
    "x." + "9" * 90,
]


@pytest.mark.parametrize("way", ["query", "frame"])
async def test_any_other_cursor_gets_a_snapshot(service: Service, way: str) -> None:
    """Unknown, far beyond the end, of another session, or no cursor at all; then the next turn follows."""
    someone, session_id = await home(service.url)
    turn_id, last = await _cursors(service.url, someone, session_id)
    other, others_session = await home(service.url)
    others_turn, _ = await _cursors(service.url, other, others_session)
    unknown = [f"{turn_id}.{last + 1}", f"{turn_id}.999999999", f"{turn_id}.-2", f"{others_turn}.3", f"{turn_id}x.3"]
    cursors = unknown + [text for text in GARBAGE if way == "frame" or "\0" not in text]
    for number, cursor in enumerate(cursors):
        base = service.urls[number % len(service.urls)]
        async with plain(base, session_id, someone.access, **({"cursor": cursor} if way == "query" else {})) as opened:
            if way == "frame":
                await hear(opened, "session_state")
                await opened.send(json.dumps({"type": "resume", "cursor": cursor}))
            events = await hear(opened, "session_state")
            assert [event["type"] for event in events][-2:-1] in ([], ["connection_established"]), cursor
            assert [message["content"] for message in events[-1]["messages"]] == ["/count 20", counted(20)], cursor
            assert events[-1]["turn"] is None


async def test_a_cursor_two_turns_back_gets_the_rest_of_both(service: Service, journal: Journal) -> None:
    someone, session_id = await home(service.url)
    turn_id, last = await _cursors(service.url, someone, session_id)
    second, end = await _cursors(service.urls[-1], someone, session_id)
    for n, base in enumerate(service.urls):
        async with plain(base, session_id, someone.access, cursor=f"{turn_id}.9") as opened:
            first = await hear(opened, "turn_complete")
            rest = await hear(opened, "turn_complete")
        numbered = [event for event in first + rest if "seq" in event]
        assert numbered[0]["turn_id"] == turn_id and numbered[0].get("from_seq", numbered[0]["seq"]) == 10
        covered = [
            (event["turn_id"], seq)
            for event in numbered
            for seq in range(event.get("from_seq", event["seq"]), event["seq"] + 1)
        ]
        assert covered == [(turn_id, seq) for seq in range(10, last + 1)] + [(second, seq) for seq in range(end + 1)], n
        assert "".join(event.get("chunk", "") for event in rest) == counted(20)


async def test_a_reader_that_keeps_losing_its_connection_misses_nothing(service: Service, journal: Journal) -> None:
    """Direct and arena; it comes back with its cursor, to any worker."""
    someone, session_id = await home(service.url)
    battle = (await new_session(service.url, someone.access, **BATTLE))["id"]
    urls = [service.urls[0], service.urls[-1]]

    async def lose(name: str, session_id: str, sides: int) -> None:
        async with SocketReader(journal, name, urls, session_id, token=someone.access) as reader:
            await reader.say("/count 400")
            for n in range(1, 6):
                await reader.until(lambda n=n: _seq(reader) > 25 * n, what="more text")
                reader.drop()
                await reader.until(lambda n=n: reader.connections > n, what="a new connection")
            await reader.turn_ended()
            assert reader.view.texts() == [counted(400)] * sides
            assert len(journal.events(name, "resumed")) == 5, journal.story()

    await asyncio.gather(lose("direct", session_id, 1), lose("arena", battle, 2))


def _seq(reader: SocketReader) -> int:
    """The number of the last event it applied."""
    return int((reader.cursor or ".-1").rpartition(".")[2])


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
            await reader.chunks(20)
            journal.fault("SIGTERM")
            await restarted.restart()
            await reader.until(lambda: reader.connections == 2, what="a new connection")
            await reader.until(lambda: reader.view.texts() == [counted(200)], what="the whole answer")
            assert reader.codes == [1012]
            assert {message.status for message in reader.view.messages.values()} == {"success"}


# -- §7: the same events over HTTP


async def test_sse_says_the_sockets_numbered_events_and_nothing_else(service: Service, journal: Journal) -> None:
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
    whole = {event["seq"]: event for event in journal.events("socket") if "seq" in event}
    for event in journal.events("sse"):
        if event["type"] != "message_chunk":
            assert event == whole[event["seq"]]


async def test_an_event_source_resumes_by_its_last_id(service: Service, journal: Journal) -> None:
    """By header or by `?after=`; admitted by a ticket or a token in the URL, as it can send no header."""
    someone, session_id = await home(service.url)
    path = f"/api/sessions/{session_id}/stream/"
    async with http(service.url, someone.access) as client:
        assert (await client.get(path)).status_code == 204, "there is nothing to read yet"
    turn_id, last = await _cursors(service.url, someone, session_id)
    for base in service.urls:
        for way in ("header", "after"):
            cursor = f"{turn_id}.{last - 5}"
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
                assert (lines["id"], lines["event"]) == (f"{turn_id}.{event['seq']}", event["type"])
            first = json.loads(blocks[1].split("data: ", 1)[1])
            assert first.get("from_seq", first["seq"]) == last - 4
        ended = await call(base, "GET", path, someone.access, headers={"Last-Event-ID": f"{turn_id}.{last}"})
        assert ended.status_code == 204, "an EventSource that has everything is told to stop"
