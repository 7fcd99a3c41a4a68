"""Whatever was read before a cut, plus what resuming gives, is the whole turn: in every dialect, cut at every byte.

An answer grows and is told in random steps; the stream of bytes is cut after k of them; the reader, written as the
dialect's clients read, comes back with what it has (a cursor, or nothing where the dialect replays) and reads on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat.formats import Format
from chat.formats.ag_ui import AgUi
from chat.formats.arena_lines import ArenaLines
from chat.formats.bare_text import RULE, BareText
from chat.formats.event_stream import EventStream
from chat.formats.json_lines import JsonLines
from chat.formats.tellings import Message
from chat.formats.ui_messages import UIMessages
from chat.live.answers import Answer, Cursor, parse_cursor, start_of

USER: Message = {
    "id": "u",
    "session": "s",
    "role": "user",
    "content": "hello",
    "participant": None,
    "status": "success",
}


def reply(side: str, content: str = "", status: str = "pending") -> Message:
    return {
        "id": f"reply-{side}",
        "session": "s",
        "role": "assistant",
        "content": content,
        "participant": side,
        "status": status,
        "failure_reason": None,
    }


class Growing:
    """An answer that learns a few more characters of one side at each step, and at last both endings."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts
        self.answer = Answer("turn", 1, "", [USER, *(reply(side) for side in texts)])

    def grow(self, side: str, count: int) -> None:
        side = side if side in self.texts else "a"
        said = len(self.answer.replies[side].text)
        self.answer.learn_words(side, said, self.texts[side][said : said + count])
        if self.answer.replies[side].text == self.texts[side]:
            self.answer.learn_ending(side, reply(side, self.texts[side], "success"))

    def finish(self) -> None:
        for side in self.texts:
            self.grow(side, 10**6)

    def told(self, cursor: Cursor, spoken: type[Format], steps: list[tuple[str, int]]) -> bytes:
        """What a follower at `cursor` is sent while the answer grows by `steps`, and then to its end."""
        said, start = [spoken.opening], cursor
        if cursor != start_of("turn"):
            said.append(spoken.resumed("turn", str(start)))
        for step in [*steps, None]:
            tellings, cursor = self.answer.owed(cursor)
            said += spoken.dialect("turn", tellings)
            self.grow(*step) if step else self.finish()
        tellings, cursor = self.answer.owed(cursor)
        return b"".join([*said, *spoken.dialect("turn", tellings), spoken.closing])


class Reader:
    """What a client has: the text of each reply, how it was told to go on, and whether the turn is over."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.cursor = ""
        self.over = False
        self.seen: set[str] = set()

    def ours(self, event: dict[str, Any]) -> None:
        self.cursor = event.get("cursor", self.cursor)
        match event.get("type"):
            case "message_update" if event["message"]["role"] == "assistant":
                self.texts.setdefault(event["message"]["participant"], "")
            case "message_chunk":
                assert event["offset"] == len(self.texts[event["participant"]])
                self.texts[event["participant"]] += event["chunk"]
            case "message_complete":
                assert self.texts[event["participant"]] == event["message"]["content"]
            case "turn_complete":
                self.over = True

    def sse(self, said: bytes) -> Iterator[tuple[str, str]]:
        """Whole events alone: what a cut left of the last one is dropped, as every client does."""
        for block in said.split(b"\n\n")[:-1]:
            fields = [line.partition(": ")[::2] for line in block.decode().split("\n") if not line.startswith(":")]
            values = dict(fields)
            if "data" in values:
                yield values.get("id", ""), values["data"]

    def event_stream(self, said: bytes) -> None:
        for id, data in self.sse(said):
            event = json.loads(data)
            assert id == event.get("cursor", "")
            self.ours(event)

    def json_lines(self, said: bytes) -> None:
        for line in said.split(b"\n")[:-1]:
            self.ours(json.loads(line))

    def ag_ui(self, said: bytes) -> None:
        """As TanStack AI: an id seen before is dropped, with its event."""
        for id, data in self.sse(said):
            if id and id in self.seen:
                continue
            self.seen.add(id)
            self.cursor = id or self.cursor
            event = json.loads(data)
            match event["type"]:
                case "TEXT_MESSAGE_START":
                    self.texts.setdefault(event["messageId"][-1], "")
                case "TEXT_MESSAGE_CONTENT":
                    self.texts[event["messageId"][-1]] += event["delta"]
                case "RUN_FINISHED":
                    assert (event["threadId"], event["runId"]) == ("s", "reply-a")
                    self.over = True

    def ui_messages(self, said: bytes) -> None:
        """As the AI SDK: `start` begins the message of this id anew."""
        for _, data in self.sse(said):
            if data == "[DONE]":
                continue
            chunk = json.loads(data)
            match chunk["type"]:
                case "start":
                    assert chunk["messageId"] == "reply-a"
                    self.texts = {}
                case "text-start":
                    assert chunk["id"] not in self.texts
                    self.texts[chunk["id"]] = ""
                case "text-delta":
                    self.texts[chunk["id"]] += chunk["delta"]
                case "finish":
                    self.over = True

    def arena_lines(self, said: bytes) -> None:
        self.texts = {}
        for line in said.decode(errors="ignore").split("\n")[:-1]:
            side, kind, rest = line[0], line[1], line[3:]
            if kind == "0":
                self.texts[side] = self.texts.get(side, "") + rest[1:-1].replace("\\n", "\n").replace("\0", "\\")
            self.over = self.over or kind == "d"

    def bare_text(self, said: bytes) -> None:
        first, rule, second = said.removesuffix(b"\n").decode(errors="ignore").partition(RULE)
        self.texts = {"a": first} | ({"b": second} if rule else {})
        self.over = said.endswith(b"\n")


READERS: list[tuple[type[Format], Callable[[Reader, bytes], None]]] = [
    (EventStream, Reader.event_stream),
    (JsonLines, Reader.json_lines),
    (AgUi, Reader.ag_ui),
    (UIMessages, Reader.ui_messages),
    (ArenaLines, Reader.arena_lines),
    (BareText, Reader.bare_text),
]
# No line ends, backslashes or rules: two dialects escape or drop them, which test_formats.py looks at.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\\\0─"), max_size=12)
STEPS = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 4)), max_size=8)


@pytest.mark.parametrize(("spoken", "read"), READERS, ids=[each[0].__name__ for each in READERS])
@settings(max_examples=60)
@given(st.data(), TEXT, st.none() | TEXT, STEPS, STEPS)
def test_a_cut_anywhere_loses_and_repeats_nothing(
    spoken: type[Format],
    read: Callable[[Reader, bytes], None],
    data: st.DataObject,
    one: str,
    other: str | None,
    before: list[tuple[str, int]],
    after: list[tuple[str, int]],
) -> None:
    texts = {"a": one} | ({"b": other} if other is not None else {})
    said = Growing(texts).told(start_of("turn"), spoken, before)
    for cut in [0, len(said), *data.draw(st.lists(st.integers(0, len(said)), min_size=2, max_size=4))]:
        reader, growing = Reader(), Growing(texts)
        read(reader, said[:cut])
        for step in before:
            growing.grow(*step)
        if reader.over:
            growing.finish()
        cursor = parse_cursor(reader.cursor) or start_of("turn")
        read(reader, growing.told(cursor, spoken, after))
        assert reader.over
        assert {side: text for side, text in reader.texts.items() if text} == {s: t for s, t in texts.items() if t}
