"""The recording readers do as good clients do, and the checker catches what a bad service does.

Against a tiny application that speaks the contract's events, and breaks one rule when its session's name says so.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvicorn

from tests.harness import POLL, until
from tests.harness.api import arena_line, call, guest, messages, new_session, post_turn, stop, ticket
from tests.harness.checker import (
    Allowed,
    Evidence,
    check,
    counts,
    gather,
    i1_no_token_lost,
    i2_none_twice,
    i3_none_out_of_order,
    i4_one_end,
    i5_errors_are_typed,
    i6_one_call,
    i7_leases_live,
    i8_bystander,
    i9_no_leak,
    i10_no_canary,
    tempo,
)
from tests.harness.client import SocketReader, SSEReader
from tests.harness.evidence import MessageRow, Rows, TurnRow
from tests.harness.journal import Journal
from tests.harness.noise import Noise
from tests.harness.processes import HOST, Port, Process
from tests.harness.servers import Postgres, Redis
from tests.harness.sse import SSEParser
from tests.harness.tiny import TEXT, TOKENS, TURN, as_sent, tiny_app, turn_log
from tests.harness.view import View


@dataclass
class Tiny:
    """Where the tiny service is, and how often each session was connected to."""

    url: str
    seen: dict[str, int]


@pytest.fixture(scope="module")
def tiny() -> Iterator[Tiny]:
    """Served from a thread, so that its clients and it do not share a loop."""
    seen: dict[str, int] = {}
    listener = socket.create_server((HOST, 0))
    server = uvicorn.Server(uvicorn.Config(tiny_app(seen), log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield Tiny(f"http://{HOST}:{listener.getsockname()[1]}", seen)
    server.should_exit = True
    thread.join(5)


@pytest.fixture
def journal(tiny: Tiny) -> Journal:
    tiny.seen.clear()
    return Journal()


async def watched(tiny: Tiny, journal: Journal, name: str, reader: str = "ann") -> SocketReader:
    """A socket reader that has seen a whole turn of the session with this fault, and has left."""
    async with SocketReader(journal, reader, tiny.url, name, token="t0k") as ann:
        await ann.say("hello")
        await ann.turn_ended(within=5)
    return ann


AT_THE_CUT = f"{TURN}.54"  # after nine tokens of six characters


def rules(journal: Journal) -> set[str]:
    return {entry.data["rule"] for entry in journal.violations()}


# The parser of server-sent events


STREAM = (
    '\ufeff: ok\n\nid: t.1\nevent: message_chunk\ndata: {"a": "ü⟨1⟩"}\n\n'
    "data: one\r\ndata:two\rdata\r\n\r\nretry: 90\nid: 5\n\n"
)
PARSED = [("message_chunk", "t.1", '{"a": "ü⟨1⟩"}'), ("message", None, "one\ntwo\n")]


def test_sse_is_parsed_the_same_wherever_it_is_cut() -> None:
    data = STREAM.encode()
    chance = random.Random(1)
    cuts = [[n] for n in range(len(data))] + [sorted(chance.sample(range(len(data)), 8)) for _ in range(200)]
    for cut in [*cuts, list(range(len(data)))]:
        parser = SSEParser()
        edges = [0, *cut, len(data)]
        events = [event for a, b in pairwise(edges) for event in parser.feed(data[a:b])]
        assert [(event.event, event.id, event.data) for event in events] == PARSED, cut
        assert (parser.comments, parser.retry, parser.last_id) == (["ok"], 90, "5")


def test_an_sse_event_without_its_empty_line_is_not_one() -> None:
    parser = SSEParser()
    assert parser.feed(b"data: half") == []
    assert parser.feed(b"\nid: a\0b\nevent: x") == []
    assert [(e.data, e.event, e.id) for e in parser.feed(b"\n\n")] == [("half", "x", None)]


def test_a_large_sse_event_in_small_pieces_is_parsed_in_a_blink() -> None:
    parser = SSEParser()
    data = b"data: " + b"x" * 2_000_000 + b"\n\n"
    events = [event for n in range(0, len(data), 65_536) for event in parser.feed(data[n : n + 65_536])]
    assert len(events[0].data) == 2_000_000


# Readers


async def test_a_socket_reader_puts_a_turn_together(tiny: Tiny, journal: Journal) -> None:
    ann = await watched(tiny, journal, "good")
    reply = ann.view.messages["r1"]
    assert (reply.text, reply.status, reply.terminals, len(reply.chunks)) == (TEXT, "success", 1, TOKENS)
    assert ann.view.texts("user") == ["hello"]
    assert (ann.cursor, ann.view.snapshots, ann.connections) == (f"{TURN}.end", 1, 1)
    assert ann.finished
    check(Evidence(journal, [ann]))


async def test_merged_chunks_are_as_good_as_single_ones(tiny: Tiny, journal: Journal) -> None:
    ann = await watched(tiny, journal, "merge")
    assert ann.view.texts() == [TEXT]
    check(Evidence(journal, [ann]))


def battle(journal: Journal, sides: str = "ab") -> View:
    """A reader that was told the beginning of an arena turn `t`."""
    view = View(journal, "ann", greeted=True)
    for side in sides:
        reply = {"id": side, "role": "assistant", "content": "", "status": "pending", "participant": side}
        cursor = "t.start" if side != sides[-1] else "t.0.0"
        view.apply({"type": "message_update", "turn_id": "t", "cursor": cursor, "message": reply, "requestId": "t"})
    return view


def chunk(side: str, offset: int, text: str, cursor: str) -> dict[str, Any]:
    """A piece of the text of a reply of that turn."""
    event = {"type": "message_chunk", "turn_id": "t", "message_id": side, "participant": side, "requestId": "t"}
    return event | {"offset": offset, "chunk": text, "cursor": f"t.{cursor}"}


def test_each_side_of_a_battle_has_a_count_of_its_own() -> None:
    """Characters are counted, not bytes nor halves of surrogate pairs."""
    journal = Journal()
    view = battle(journal)
    view.apply(chunk("b", 0, "😀ü", "0.2"))
    view.apply(chunk("a", 0, "aaa", "3.2"))
    view.apply(chunk("b", 2, "!", "3.3"))
    assert view.texts() == ["aaa", "😀ü!"]
    assert not journal.violations()
    view.apply(chunk("b", 3, "?", "4.3"))  # the sides confused
    assert rules(journal) == {"cursor"}


def test_one_gap_is_found_once() -> None:
    journal = Journal()
    view = battle(journal)
    view.apply(chunk("a", 3, "aa", "5.0"))
    view.apply(chunk("a", 5, "aa", "7.0"))
    view.apply(chunk("b", 0, "b", "7.1"))
    assert [entry.data["rule"] for entry in journal.violations()] == ["gap"]


def test_a_snapshot_says_where_it_stands() -> None:
    """One reply has ended and the other runs, or one of two is made again: the cursor is about those that run."""
    user = {"id": "u", "role": "user", "content": "hello", "status": "success"}
    ended = {"id": "a", "role": "assistant", "participant": "a", "content": "aaa", "status": "success"}
    running = {"id": "b", "role": "assistant", "participant": "b", "content": "bb", "status": "streaming"}
    for cursor, wrong in [("t.e.2", set()), ("t.2", set()), ("t.3.2", {"cursor"}), ("t.e.3", {"cursor"}), ("t.12", {"cursor"})]:
        journal = Journal()
        view = View(journal, "ann", greeted=False)
        view.apply({"type": "session_state", "messages": [user, ended, running], "turn": {"id": "t", "cursor": cursor}})
        assert rules(journal) == wrong, cursor
        if not wrong:
            view.apply(chunk("b", 2, "b", "e.3" if "e" in cursor else "3"))
            assert not journal.violations()


def test_a_message_said_again_is_answered_by_its_turn_from_the_start() -> None:
    """And nobody else is told a turn again."""
    resumed = {"type": "resumed", "turn_id": TURN, "cursor": f"{TURN}.start", "requestId": "session"}
    for says_ids in (True, False):
        journal = Journal()
        view = View(journal, "ann", greeted=True)
        view.says_ids = says_ids
        for event in [*turn_log(), resumed, *turn_log()]:
            view.apply(event)
        assert rules(journal) == (set() if says_ids else {"resumed", "late"})
        assert view.texts() == [TEXT]


async def test_a_beginning_that_was_cut_may_be_told_again(tiny: Tiny, journal: Journal) -> None:
    ann = await watched(tiny, journal, "cut")
    assert [entry.data["cursor"] for entry in journal.of("ann", "connect")] == [None, f"{TURN}.start"]
    assert [event["message"]["id"] for event in journal.events("ann", "message_update")] == ["u1", "u1", "r1"]
    check(Evidence(journal, [ann]))
    tiny.seen.clear()
    async with SSEReader(journal, "sue", tiny.url, "cut", token="t0k") as sue:
        await sue.turn_ended()
    assert [entry.data["cursor"] for entry in journal.of("sue", "connect")] == [None, f"{TURN}.start"]
    check(Evidence(journal, [ann, sue]))


async def test_a_socket_reader_resumes_after_1012_where_it_was(tiny: Tiny, journal: Journal) -> None:
    ann = await watched(tiny, journal, "break")
    assert ann.view.texts() == [TEXT]
    assert (ann.codes, ann.connections, ann.view.resumptions) == ([1012], 2, 1)
    assert [entry.data["cursor"] for entry in journal.of("ann", "connect")] == [None, AT_THE_CUT]
    assert journal.events("ann", "resumed")[0]["cursor"] == AT_THE_CUT
    check(Evidence(journal, [ann]))


async def test_a_socket_reader_takes_a_snapshot_when_its_cursor_is_unknown(tiny: Tiny, journal: Journal) -> None:
    ann = await watched(tiny, journal, "forget")
    assert ann.view.texts() == [TEXT]
    assert (ann.view.snapshots, ann.view.resumptions) == (2, 0)
    check(Evidence(journal, [ann]))


async def test_a_dropped_reader_comes_back_to_the_next_base(tiny: Tiny, journal: Journal) -> None:
    nobody = Port()
    bases = [tiny.url, f"http://{HOST}:{nobody.number}"]
    async with SocketReader(journal, "ann", bases, "good", token="t0k") as ann:
        await ann.say("hello")
        await ann.tokens(5)
        journal.fault("ann's network")
        ann.drop()
        await ann.turn_ended()
    nobody.release()
    assert ann.view.texts() == [TEXT]
    assert ann.codes == [1006]
    assert [entry.data["url"] for entry in journal.of("ann", "connect")] == [*bases, tiny.url]
    assert len(journal.of("ann", "unreachable")) == 1
    check(Evidence(journal, [ann], allowed=Allowed(codes={1006})))
    with pytest.raises(AssertionError, match="closed with 1006"):
        check(Evidence(journal, [ann]))


@pytest.mark.parametrize("code", [4401, 4404, 4429])
async def test_a_reader_stops_when_it_is_told_to(tiny: Tiny, journal: Journal, code: int) -> None:
    async with SocketReader(journal, "ann", tiny.url, str(code), token="t0k") as ann:
        await ann.ended()
    assert (ann.codes, ann.connections) == ([code], 1)


@pytest.mark.parametrize("credentials", ["header", "subprotocol", "query", "anonymous", "ticket", "frame", "none"])
async def test_a_reader_shows_its_token_in_every_way_there_is(tiny: Tiny, journal: Journal, credentials: str) -> None:
    async with SocketReader(journal, "ann", tiny.url, "good", token="t0k", credentials=credentials) as ann:
        if credentials != "frame":  # to the tiny service the first frame is what starts the turn
            await ann.say("hello")
        await ann.turn_ended()
    check(Evidence(journal, [ann]))


async def test_a_reader_on_hold_reads_nothing_and_catches_up(tiny: Tiny, journal: Journal) -> None:
    async with SocketReader(journal, "ann", tiny.url, "good", token="t0k", receive_buffer=4096) as ann:
        await ann.say("hello")
        await ann.tokens(3)
        ann.hold()
        await asyncio.sleep(0.1)
        held = len(journal.events("ann"))
        await asyncio.sleep(0.1)
        assert len(journal.events("ann")) == held < TOKENS
        ann.release()
        await ann.turn_ended()
    check(Evidence(journal, [ann]))


async def test_an_sse_reader_starts_a_turn_and_follows_it(tiny: Tiny, journal: Journal) -> None:
    async with SSEReader(journal, "sue", tiny.url, "good", token="t0k", content="hello") as sue:
        await sue.ended()
    assert sue.view.texts() == [TEXT]
    assert sue.comments == ["ok"]
    assert sue.statuses == [200]
    check(Evidence(journal, [sue]))


async def test_an_sse_reader_resumes_by_last_event_id(tiny: Tiny, journal: Journal) -> None:
    async with SSEReader(journal, "sue", tiny.url, "break", token="t0k", content="hello") as sue:
        await sue.turn_ended()
        await sue.ended()
    assert sue.view.texts() == [TEXT]
    assert [entry.data["cursor"] for entry in journal.of("sue", "connect")] == [None, AT_THE_CUT]
    assert not journal.of("sue", "duplicate")
    check(Evidence(journal, [sue]))


async def test_a_dropped_sse_reader_comes_back(tiny: Tiny, journal: Journal) -> None:
    async with SSEReader(journal, "sue", tiny.url, "good", token="t0k") as sue:
        await sue.tokens(5)
        sue.drop()
        await sue.turn_ended()
    assert (sue.view.texts(), sue.connections) == ([TEXT], 2)
    check(Evidence(journal, [sue]))


async def test_an_sse_reader_leaves_in_the_middle(tiny: Tiny, journal: Journal) -> None:
    async with SSEReader(journal, "sue", tiny.url, "good", token="t0k") as sue:
        await sue.tokens(2)
    assert sue.finished
    assert sue.connections == 1
    check(Evidence(journal, [sue], allowed=Allowed(running=True)))


async def test_an_sse_reader_ends_on_204_and_on_a_refusal(tiny: Tiny, journal: Journal) -> None:
    async with SSEReader(journal, "sue", tiny.url, "nothing", token="t0k") as sue:
        await sue.ended()
    assert sue.statuses == [204]
    async with SSEReader(journal, "ben", tiny.url, "busy", token="t0k", content="hello") as ben:
        await ben.ended()
    assert ben.statuses == [409]
    assert journal.of("ben", "refused")[0].data["body"]["error"] == "busy"
    check(Evidence(journal, [sue, ben]))


async def test_a_reader_gives_up_when_nobody_answers(journal: Journal) -> None:
    nobody = Port()
    url = f"http://{HOST}:{nobody.number}"
    for reader in (
        SocketReader(journal, "ann", url, "good", token="t0k", give_up=0.2),
        SSEReader(journal, "sue", url, "good", token="t0k", give_up=0.2),
    ):
        await reader.start()
        assert reader.finished
        await reader.leave()
    nobody.release()


async def test_the_story_folds_runs_and_shows_faults(tiny: Tiny, journal: Journal) -> None:
    await asyncio.gather(watched(tiny, journal, "good", "ann"), watched(tiny, journal, "break", "ben"))
    journal.fault("redis killed")
    story = journal.story()
    assert f"ann  ← 20 × chunk a, {len(TEXT)} characters, to turn-1.{len(TEXT)}" in story
    assert "ben  closed 1012 restart" in story
    assert f"ben  ← resumed from {AT_THE_CUT}" in story
    assert "── redis killed ──" in story
    assert len(story.splitlines()) < 35
    assert len(journal.story(lines=10).splitlines()) == 11


# HTTP


async def test_the_http_helpers_speak_the_contract(tiny: Tiny) -> None:
    ann = await guest(tiny.url, "Ann")
    assert (ann.id, ann.access, ann.anonymous_token, ann.answer["user"]["display_name"]) == ("g1", "t0k", "at", "Ann")
    session = await new_session(tiny.url, ann.access, title="x")
    assert session == {"id": "good", "mode": "direct", "model_a_id": "demo", "title": "x"}
    assert await messages(tiny.url, ann.access, "good") == [{"id": "good"}]
    assert await stop(tiny.url, ann.access, "good")
    assert await ticket(tiny.url, ann.access) == "tick"
    with pytest.raises(AssertionError, match="got 401"):
        await new_session(tiny.url, "wrong")
    assert (await call(tiny.url, "POST", "/api/sessions/", json={})).status_code == 401


@pytest.mark.parametrize("accept", ["sse", "ndjson"])
async def test_a_posted_turn_is_followed_as_events(tiny: Tiny, accept: str) -> None:
    answer = await post_turn(tiny.url, "t0k", "good", "hello", accept=accept)
    assert answer.ended
    assert answer.sides() == {"a": TEXT}
    assert answer.events == turn_log()


async def test_a_posted_turn_is_followed_as_arena_lines_and_as_text(tiny: Tiny) -> None:
    answer = await post_turn(tiny.url, "t0k", "good", "hello", accept="lines")
    assert answer.sides() == {"a": "one \\ two\nend", "b": 'say "hi"'}
    assert answer.finishes() == {"a": {"finishReason": "stop"}}
    assert answer.turn_id == TURN
    assert (await post_turn(tiny.url, "t0k", "good", "hello", accept="text")).text == TEXT
    assert (await post_turn(tiny.url, "t0k", "busy", "hello")).error["error"] == "busy"
    assert arena_line("a line of something else") == ("", "", "")


# The checker


@pytest.mark.parametrize(
    ("name", "rule", "invariant"),
    [
        ("gap", "gap", i1_no_token_lost),
        ("overlap", "overlap", i1_no_token_lost),
        ("claims", "cursor", i1_no_token_lost),
        ("differs", "differs", i1_no_token_lost),
        ("duplicate", "repeat", i2_none_twice),
        ("inside", "repeat", i2_none_twice),
        ("retold", "repeat", i2_none_twice),
        ("swap", "disorder", i3_none_out_of_order),
        ("back", "disorder", i3_none_out_of_order),
        ("late", "late", i3_none_out_of_order),
        ("after-end", "late", i3_none_out_of_order),
        ("second", "second", i4_one_end),
        ("early", "early", i4_one_end),
        ("unknown", "shape", i5_errors_are_typed),
        ("begun", "shape", i5_errors_are_typed),
        ("badresume", "resumed", i1_no_token_lost),
        ("hello-first", "", None),
    ],
)
async def test_a_broken_rule_is_seen_by_reader_and_checker(
    tiny: Tiny, journal: Journal, name: str, rule: str, invariant: Any
) -> None:
    async with SocketReader(journal, "ann", tiny.url, name, token="t0k") as ann:
        if name != "hello-first":
            await ann.say("hello")
        await ann.turn_ended()
        starts = ("connection_established", "session_state", "resumed")
        await ann.until(lambda: sum(each["type"] not in starts for each in journal.events("ann")) >= len(as_sent(name)))
    evidence = Evidence(journal, [ann])
    if invariant is None:
        check(evidence)
        return
    assert rule in rules(journal), journal.story()
    assert any(rule in violation for violation in invariant(evidence)), invariant(evidence)
    with pytest.raises(AssertionError, match="The story:"):
        check(evidence)


async def test_a_duplicate_is_dropped_and_written_down(tiny: Tiny, journal: Journal) -> None:
    ann = await watched(tiny, journal, "duplicate")
    assert ann.view.texts() == [TEXT]
    dropped = {"message_id": "r1", "offset": 18, "chunk": "⟨m:3⟩ "}
    assert [entry.data for entry in journal.of("ann", "duplicate")] == [dropped]


async def test_an_event_of_a_turn_before_a_greeting_is_seen(journal: Journal) -> None:
    view = View(journal, "ann", greeted=False)
    view.apply(turn_log()[0])
    assert rules(journal) == {"greeting"}


@pytest.mark.parametrize("name", ["untyped", "reason"])
async def test_an_untyped_error_is_seen(tiny: Tiny, journal: Journal, name: str) -> None:
    ann = await watched(tiny, journal, name)
    found = i5_errors_are_typed(Evidence(journal, [ann]))
    assert any("'oops'" in f or "the vendor said" in f for f in found), found


async def test_an_sse_id_that_is_not_its_events_is_seen(tiny: Tiny, journal: Journal) -> None:
    async with SSEReader(journal, "sue", tiny.url, "misnamed", token="t0k") as sue:
        await sue.ended()
    assert any("expected SSE id turn-1.start" in f for f in i5_errors_are_typed(Evidence(journal, [sue])))


async def test_an_unexpected_close_is_seen(tiny: Tiny, journal: Journal) -> None:
    async with SocketReader(journal, "ann", tiny.url, "abandon", token="t0k", resume=False) as ann:
        await ann.say("hello")
        await ann.ended()
    assert i5_errors_are_typed(Evidence(journal, [ann])) == ["I5 ann: closed with 1011 'internal error'"]


async def test_an_end_by_another_worker_may_know_more_but_not_less(tiny: Tiny, journal: Journal) -> None:
    ann = await watched(tiny, journal, "crash")
    assert ann.view.messages["r1"].status == "interrupted"
    assert len(journal.of("ann", "takeover")) == 1
    check(Evidence(journal, [ann]))
    ben = await watched(tiny, journal, "crash-lost", "ben")
    assert any("ben: shown and gone" in found for found in i1_no_token_lost(Evidence(journal, [ann, ben])))
    check(Evidence(journal, [ann, ben], allowed=Allowed(lost=True)))


async def test_readers_that_disagree_about_the_end_are_seen(tiny: Tiny, journal: Journal) -> None:
    ann, ben = await watched(tiny, journal, "good"), await watched(tiny, journal, "reason", "ben")
    found = i4_one_end(Evidence(journal, [ann, ben]))
    assert found == ["I4 message r1 ended differently: ann success/None, ben failed/the vendor said: no"]


def row(**changes: Any) -> MessageRow:
    values = {"session_id": "good", "id": "r1", "turn_id": TURN, "role": "assistant", "participant": "a"}
    values |= {"content": TEXT, "status": "success", "failure_reason": None, "position": 1}
    return MessageRow(**(values | changes))


USER = row(id="u1", role="user", participant=None, content="hello", position=0)
ENDED = TurnRow(TURN, "good", "ended", "w1", 0)


@pytest.mark.parametrize(
    ("changes", "invariant", "said"),
    [
        ({"content": TEXT[:-1]}, i1_no_token_lost, "seen and stored"),
        ({"id": "r2"}, i1_no_token_lost, "was seen and is not stored"),
        ({"content": TEXT + "⟨m:3⟩ "}, i2_none_twice, "⟨m:3⟩ came again after 19"),
        ({"content": TEXT.replace("⟨m:3⟩ ", "")}, i3_none_out_of_order, "⟨m:4⟩ came after 2"),
        ({"status": "failed", "failure_reason": "provider_timeout"}, i4_one_end, "ended differently"),
        ({"status": "streaming"}, i4_one_end, "is still streaming"),
        ({"status": "done"}, i4_one_end, "has status 'done'"),
        ({"status": "failed", "failure_reason": "Boom!"}, i5_errors_are_typed, "reason 'Boom!'"),
        ({"status": "streaming"}, i7_leases_live, "nobody holds turn"),
    ],
)
async def test_what_is_stored_is_compared(
    tiny: Tiny, journal: Journal, changes: dict[str, Any], invariant: Any, said: str
) -> None:
    ann = await watched(tiny, journal, "good")
    check(Evidence(journal, [ann], Rows([USER, row()], [ENDED], now=1000)))
    found = invariant(Evidence(journal, [ann], Rows([USER, row(**changes)], [ENDED], now=1000)))
    assert any(said in violation for violation in found), found


def test_a_lease_that_ran_out_is_seen(journal: Journal) -> None:
    running = [row(status="streaming", content="")]
    held, lost = (TurnRow(TURN, "good", "running", "w1", until) for until in (2000, 900))
    assert i7_leases_live(Evidence(journal, rows=Rows(running, [held], now=1000))) == []
    found = i7_leases_live(Evidence(journal, rows=Rows(running, [lost], now=1000)))
    assert found[1] == "I7 turn turn-1 runs, its lease ran out 100 ms ago"


@dataclass
class Call:
    prompt: str
    model: str
    sent: list[str]


TOLD = [f"⟨m:{n}⟩ " for n in range(TOKENS)]


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ([Call("hello", "m", TOLD)], None),
        ([Call("hello", "m", []), Call("hello", "m", TOLD)], None),
        ([Call("hello", "m", TOLD), Call("hello", "n", TOLD)], None),
        (
            [Call("hello", "m", TOLD), Call("hello", "m", TOLD)],
            "I6 m was called again for 'hello' after it had said 20",
        ),
        ([Call("hello", "m", []), Call("hello", "m", []), Call("hello", "m", TOLD)], "I6 3 calls of m"),
        ([Call("hello", "m", [*TOLD, "⟨m:20⟩ "])], "I1 r1 (success) stored and said"),
    ],
)
async def test_provider_calls_are_compared(tiny: Tiny, journal: Journal, calls: list[Call], said: str | None) -> None:
    ann = await watched(tiny, journal, "good")
    evidence = Evidence(journal, [ann], Rows([USER, row()], [ENDED], now=1000), calls)
    if said is None:
        check(evidence)
    found = i6_one_call(evidence) + i1_no_token_lost(evidence)
    assert [said in violation for violation in found] == [True] * (said is not None), found


async def test_a_truncated_reply_is_the_beginning_of_what_was_said(tiny: Tiny, journal: Journal) -> None:
    kept = row(status="stopped", content=TEXT[:30])
    evidence = Evidence(journal, rows=Rows([USER, kept], [ENDED], now=1000), calls=[Call("hello", "m", TOLD)])
    check(evidence)


async def test_a_slow_end_is_seen(tiny: Tiny, journal: Journal) -> None:
    ann = await watched(tiny, journal, "good")
    assert any("took" in found for found in i4_one_end(Evidence(journal, [ann], allowed=Allowed(within=0.001))))
    check(Evidence(journal, [ann], allowed=Allowed(within=5)))


def test_tracebacks_in_logs_are_seen_and_may_be_allowed(journal: Journal) -> None:
    log = "INFO fine\nTraceback (most recent call last):\n  File x\n    y()\nValueError: nonsense\nINFO fine\n"
    found = i5_errors_are_typed(Evidence(journal, logs=log))
    assert found == ["I5 log line 2: Traceback (most recent call last): … ValueError: nonsense"]
    assert not i5_errors_are_typed(Evidence(journal, logs=log, allowed=Allowed(log="ValueError: non")))


async def test_a_planted_secret_is_found(tiny: Tiny, journal: Journal) -> None:
    ann = await watched(tiny, journal, "canary")
    found = i10_no_canary(Evidence(journal, [ann], logs="key sk-CANARY", canaries=["sk-CANARY"]))
    assert found == ["I10 sk-CANARY… is in the log, 1 times", "I10 sk-CANARY… is in what ann got, 1 times"]


async def test_waiting_for_a_processor_is_noise_and_a_stall_is_none(tmp_path: Path) -> None:
    """Another process wants the one processor this thread may have; then the thread sleeps, and its loop with it."""
    own, burner = os.sched_getaffinity(0), Process([sys.executable, "-c", "while True: pass"], tmp_path / "log.txt")
    burner.start()
    try:
        os.sched_setaffinity(burner.pid, {min(own)})
        os.sched_setaffinity(0, {min(own)})
        burnt = psutil.Process(burner.pid)
        await until(lambda: burnt.cpu_times().user > 0.05, what="a burner that burns")
        async with Noise() as noise:
            computed, waited = await _spent(noise, lambda: sum(range(20_000_000)))
            os.sched_setaffinity(0, own)
            stalled, idled = await _spent(noise, lambda: time.sleep(0.3))
    finally:
        os.sched_setaffinity(0, own)
        burner.kill()
    assert waited > computed / 5, "half of it was the other's"
    assert stalled - idled > 0.2


async def _spent(noise: Noise, do: Callable[[], object]) -> tuple[float, float]:
    """The seconds a call took, and how many of them were noise."""
    await asyncio.sleep(3 * POLL)
    started = time.monotonic()
    do()
    ended = time.monotonic()
    await asyncio.sleep(3 * POLL)
    return ended - started, noise.between(started, ended)


async def test_bystanders_and_leaks_are_measured(tiny: Tiny, journal: Journal) -> None:
    ann = await watched(tiny, journal, "good")
    assert len(tempo(ann, Noise())) == TOKENS - 1
    assert i8_bystander([0.1] * 100, [0.15] * 100) == []
    assert i8_bystander([0.001] * 100, [0.04] * 100) == []
    assert i8_bystander([0.1] * 100, [0.1] * 90 + [0.3] * 10) == [
        "I8 bystander: p99 between tokens 300 ms, baseline 100 ms"
    ]
    assert i9_no_leak({"fds": 20, "rss": 50e6}, {"fds": 20, "rss": 79e6}) == []
    assert i9_no_leak({"fds": 20, "rss": 50e6}, {"fds": 21, "rss": 81e6}) == [
        "I9 fds: 20 before, 21 after",
        "I9 rss: 5e+07 before, 8.1e+07 after",
    ]
    assert i9_no_leak({"fds": 20}, {"fds": 21}, {"fds": 1}) == []


# Evidence from real databases


SCHEMA = (Path(__file__).resolve().parents[2] / "models.sql").read_text()
ROWS = (
    "INSERT INTO accounts VALUES ('g1', 'Ann', '{}', 0, 0, 0, 0)",
    "INSERT INTO sessions (id, account_id, mode, is_public, is_open, is_pinned, metadata, next_position, version, "
    "created_at, updated_at) VALUES ('s1', 'g1', 'direct', 0, 0, 0, '{}', 2, 1, 0, 0)",
    "INSERT INTO turns (id, session_id, account_id, user_message_id, position, status, owner, lease_until, "
    "stop_requested, created_at) VALUES ('t1', 's1', 'g1', 'm1', 0, 'running', 'w1', 99999999999999, 0, 0)",
    "INSERT INTO messages (session_id, id, turn_id, role, content, status, position, parent_ids, created_at, "
    "updated_at) VALUES ('s1', 'm1', 't1', 'user', 'hello', 'success', 0, '[]', 0, 0)",
)


def statements() -> list[str]:
    uncommented = "\n".join(line.partition("--")[0] for line in SCHEMA.splitlines())
    return [statement for statement in uncommented.split(";") if statement.strip()] + list(ROWS)


async def test_rows_are_read_from_sqlite(tmp_path: Path, journal: Journal) -> None:
    connection = sqlite3.connect(tmp_path / "a b.db")
    for statement in statements():
        connection.execute(statement)
    connection.commit()
    connection.close()
    evidence = await gather(journal, database_url=f"sqlite:///{tmp_path / 'a b.db'}", allowed=Allowed(running=True))
    assert evidence.rows is not None
    assert [message.content for message in evidence.rows.messages] == ["hello"]
    assert [turn.owner for turn in evidence.rows.turns] == ["w1"]
    check(evidence)


async def test_rows_are_read_from_postgres_by_its_own_clock(journal: Journal) -> None:
    async with Postgres() as postgres:
        url = postgres.create_database()
        for statement in statements():
            await postgres.sql(statement, url=url)
        evidence = await gather(journal, database_url=url, allowed=Allowed(running=True))
        assert evidence.rows is not None
        assert evidence.rows.message("m1") == MessageRow("s1", "m1", "t1", "user", None, "hello", "success", None, 0)
        check(evidence)
        assert await counts(postgres_url=url) == {"idle_in_transaction": 0}


async def test_open_channels_are_counted() -> None:
    from redis.asyncio import Redis as Client

    async with Redis() as redis, Client.from_url(redis.url) as client, client.pubsub() as pubsub:
        assert await counts(redis.url) == {"channels": 0}
        await pubsub.subscribe("session:1")
        await until(lambda: counted(redis.url, 1))


async def counted(url: str, channels: int) -> bool:
    return (await counts(url))["channels"] == channels
