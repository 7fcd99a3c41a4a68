"""Every dialect says a turn whole, and what it says is what the clients of that dialect read."""

from __future__ import annotations

import json

from chat.formats.arena_lines import ArenaLines
from chat.formats.bare_text import RULE, BareText
from chat.formats.event_stream import EventStream
from chat.formats.events import event_json, resumed_json, socket_dialect
from chat.formats.json_lines import JsonLines
from chat.formats.tellings import Begun, Ended, Message, Over, Telling, Words

TEXT = 'tab\t"quoted" back\\slash\r\nnext \u2028\u2029\u0085 line 🙂'


def message(participant: str, content: str, status: str = "success", reason: str | None = None) -> Message:
    return {
        "id": f"r{participant}",
        "role": "assistant",
        "content": content,
        "participant": participant,
        "status": status,
        "failure_reason": reason,
        "latency_ms": 12,
        "first_token_ms": 3,
    }


def turn(*endings: Message) -> list[Telling]:
    """A turn told from its start: each reply in two pieces, then its ending."""
    user: Message = {"id": "u", "role": "user", "content": "hello", "participant": None, "status": "success"}
    told: list[Telling] = [Begun("t.start", user)]
    told += [Begun("t.0", each | {"content": "", "status": "pending", "failure_reason": None}) for each in endings]
    for each in endings:
        side, half, text = each["participant"], len(each["content"]) // 2, each["content"]
        told += [Words("t.1", side, each["id"], 0, text[:half]), Words("t.2", side, each["id"], half, text[half:])]
        told.append(Ended("t.e", side, each))
    return [*told, Over("t.end", endings)]


def test_events_carry_their_type_first_and_their_cursor() -> None:
    told = turn(message("a", TEXT))
    events = [json.loads(said) for said in socket_dialect("t", told)]
    assert [event["type"] for event in events] == [
        "message_update",
        "message_update",
        "message_chunk",
        "message_chunk",
        "message_complete",
        "turn_complete",
    ]
    assert [event["cursor"] for event in events] == [telling.cursor for telling in told]
    assert all(next(iter(event)) == "type" for event in events)
    assert {event["turn_id"] for event in events} == {event["requestId"] for event in events} == {"t"}
    assert [set(event) - {"type", "turn_id", "requestId", "cursor"} for event in events] == [
        {"message", "action"},
        {"message", "action"},
        {"message_id", "participant", "chunk", "offset"},
        {"message_id", "participant", "chunk", "offset"},
        {"message_id", "participant", "status", "failure_reason", "latency_ms", "first_token_ms", "message"},
        set(),
    ]
    assert "".join(event["chunk"] for event in events[2:4]) == events[4]["message"]["content"] == TEXT
    assert events[3]["offset"] == len(events[2]["chunk"])


def test_lines_hold_nothing_that_ends_a_line_elsewhere() -> None:
    """`splitlines` of Python and of httpx ends lines at U+2028, U+2029 and U+0085, which JSON may hold."""
    told = turn(message("a", TEXT))
    lines = b"".join(JsonLines.dialect("t", told)).decode().splitlines()
    assert [json.loads(line) for line in lines] == [json.loads(event_json("t", telling)) for telling in told]
    blocks = b"".join(EventStream.dialect("t", told)).decode().split("\n\n")[:-1]
    for block, telling in zip(blocks, told, strict=True):
        cursor, kind, data = block.splitlines()
        event = json.loads(data.removeprefix("data: "))
        assert cursor == f"id: {telling.cursor}"
        assert kind == f"event: {event['type']}"
        assert event == json.loads(event_json("t", telling))


def test_a_resumed_stream_says_where_it_goes_on() -> None:
    said = json.loads(resumed_json("t", "t.5.e"))
    assert said == {"type": "resumed", "requestId": "session", "turn_id": "t", "cursor": "t.5.e"}
    assert json.loads(JsonLines.resumed("t", "t.5.e")) == said
    assert EventStream.resumed("t", "t.5.e").startswith(b"id: t.5.e\nevent: resumed\ndata: {")
    assert ArenaLines.resumed("t", "t.5.e") == BareText.resumed("t", "t.5.e") == b""


def test_arena_lines_escape_three_characters_and_no_others() -> None:
    told = turn(message("a", TEXT), message("b", "", "failed", "provider_timeout"))
    lines = b"".join(ArenaLines.dialect("t", told)).decode().split("\n")
    half = len(TEXT) // 2
    escaped = [part.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "") for part in (TEXT[:half], TEXT[half:])]
    assert lines == [
        f'a0:"{escaped[0]}"',
        f'a0:"{escaped[1]}"',
        'ad:{"finishReason":"stop"}',
        'b0:""',
        'b0:""',
        'bd:{"finishReason": "error", "error": "The model took too long to answer."}',
        "",
    ]


def test_bare_text_says_side_a_a_rule_and_side_b() -> None:
    told = turn(message("a", TEXT), message("b", "other"))
    assert b"".join(BareText.dialect("t", told)).decode() == TEXT + RULE + "other"


def test_an_answer_that_broke_off_says_so_in_bare_text_and_in_lines() -> None:
    """A worker that is stopped ends its answers `interrupted`: with text, without a failure's reason."""
    told = turn(message("a", "half", "interrupted"), message("b", "well", "interrupted", "interrupted"))
    note = "The answer was interrupted by a restart."
    assert b"".join(BareText.dialect("t", told)).decode() == f"half\n[{note}]{RULE}well\n[{note}]"
    lines = b"".join(ArenaLines.dialect("t", told)).decode()
    assert f'ad:{{"finishReason": "error", "error": "{note}"}}' in lines
    assert f'bd:{{"finishReason": "error", "error": "{note}"}}' in lines


def test_what_was_stopped_is_no_failure() -> None:
    told = turn(message("a", "half", "stopped"))
    assert b"".join(BareText.dialect("t", told)) == b"half"
    assert b'ad:{"finishReason":"stop"}\n' in b"".join(ArenaLines.dialect("t", told))
