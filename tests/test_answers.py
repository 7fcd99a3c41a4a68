"""The one idea of the core as a model: an owner, rooms, a Redis, a database and readers, none of them reliable.

Whatever the bus drops, repeats and reorders, whatever Redis forgets, whenever the database was last written: a reader
that keeps one cursor and goes from room to room is told everything exactly once, and everyone is whole at the end.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat.formats.tellings import Begun, Ended, Over, Words
from chat.live.answers import NOTHING, TOLD, Answer, Cursor, parse_cursor, start_of

USER = {"id": "u", "role": "user", "participant": None, "content": "hi", "status": "success", "failure_reason": None}
LETTERS = "xyz😀é\n"


def reply(side: str, content: str = "", status: str = "pending") -> dict[str, Any]:
    named = {"id": f"reply-{side}", "role": "assistant", "participant": side}
    return named | {"content": content, "status": status, "failure_reason": None}


def answer(sides: str, texts: dict[str, tuple[str, bool]] | None = None) -> Answer:
    """An answer as it is made from rows: side → text and whether it has ended."""
    known = texts or {}
    rows = [reply(side, known.get(side, ("",))[0], "success" if known.get(side, ("", False))[1] else "pending") for side in sides]
    return Answer("turn", 1, "before", [USER, *rows])


@dataclass
class Reader:
    """A client that applies what it is told and complains about everything else."""

    room: int
    cursor: Cursor = field(default_factory=lambda: start_of("turn"))
    texts: dict[str, str] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    over: bool = False

    def read(self, answer: Answer, cut: int | None) -> None:
        """Apply what is owed, up to `cut` tellings: the connection breaks there, and the cursor is that of the last."""
        tellings, after = answer.owed(self.cursor)
        for telling in tellings[:cut]:
            self.apply(telling)
            again = parse_cursor(telling.cursor)
            assert again is not None and not goes_back(self.cursor, again)
            self.cursor = again
        if cut is None or cut >= len(tellings):
            assert str(self.cursor) == str(after) or not tellings
            self.cursor = after

    def apply(self, telling: Begun | Words | Ended | Over) -> None:
        match telling:
            case Begun(_, message) if message["role"] == "assistant":
                assert not self.texts.get(message["participant"]), "a beginning after text"
                self.texts[message["participant"]] = ""
            case Words(_, side, _, offset, text):
                assert offset == len(self.texts[side]) and text, "a gap, a repeat or nothing"
                assert side not in self.ended
                self.texts[side] += text
            case Ended(_, side, message):
                assert side not in self.ended, "ended twice"
                assert self.texts[side] == message["content"]
                self.ended[side] = message["content"]
            case Over(_, endings):
                assert not self.over and self.ended.keys() == self.texts.keys()
                assert [message["status"] for message in endings] == ["success"] * len(self.ended)
                self.over = True


def goes_back(before: Cursor, after: Cursor) -> bool:
    def rank(part: int) -> float:
        return float("inf") if part == TOLD else part

    if before.over or not after.begun:
        return not after.over and before.begun
    return not after.over and any(rank(a) < rank(b) for b, a in zip(before.parts, after.parts, strict=False))


@dataclass
class World:
    """An owner that says `final`, and everything that carries it."""

    chance: random.Random
    final: dict[str, str]
    rooms: list[Answer]
    wires: list[list[tuple[Any, ...]]]
    redis: dict[str, str]
    rows: dict[str, tuple[str, bool]]
    said: dict[str, int]
    ended: set[str] = field(default_factory=set)

    @property
    def sides(self) -> str:
        return "".join(self.final)

    def speak(self) -> None:
        side = self.chance.choice(self.sides)
        if side in self.ended:
            return
        start, whole = self.said[side], self.final[side]
        if start == len(whole):
            self.ended.add(side)
            self.rows[side] = (whole, True)
            news: tuple[Any, ...] = ("ended", side)
        else:
            self.said[side] = min(len(whole), start + self.chance.randint(1, 4))
            news = ("words", side, start, whole[start : self.said[side]])
            if self.chance.random() < 0.8:  # else Redis is away
                self.redis[side] = whole[: self.said[side]]
        for wire in self.wires:
            wire.append(news)

    def write_checkpoint(self) -> None:
        side = self.chance.choice(self.sides)
        if not self.rows[side][1]:
            self.rows[side] = (self.final[side][: self.said[side]], False)

    def disturb(self) -> None:
        wire = self.chance.choice(self.wires)
        if wire and self.chance.random() < 0.3:
            self.chance.shuffle(wire)
        if wire and self.chance.random() < 0.3:
            wire.pop()
        if wire and self.chance.random() < 0.3:
            wire.append(self.chance.choice(wire))
        if self.chance.random() < 0.05:
            self.redis = dict.fromkeys(self.sides, "")
        if self.chance.random() < 0.05:
            self.rooms[self.chance.randrange(len(self.rooms))] = answer(self.sides)

    def hear(self) -> None:
        place = self.chance.randrange(len(self.rooms))
        room = self.rooms[place]
        for news in self.wires[place]:
            if news[0] == "ended":
                room.learn_ending(news[1], reply(news[1], self.final[news[1]], "success"))
            elif not room.learn_words(*news[1:]):
                self.repair(room)
        self.wires[place].clear()

    def repair(self, room: Answer) -> None:
        for side in self.sides:
            room.learn_text(side, self.redis[side])
        room.learn(answer(self.sides, self.rows))


@pytest.mark.parametrize("seed", range(400))
def test_readers_are_told_everything_once(seed: int) -> None:
    chance = random.Random(seed)
    sides = chance.choice(["a", "ab"])
    final = {side: "".join(chance.choice(LETTERS) for _ in range(chance.randrange(40))) for side in sides}
    rooms = [answer(sides) for _ in range(3)]
    world = World(chance, final, rooms, [[] for _ in rooms], dict.fromkeys(sides, ""), dict.fromkeys(sides, ("", False)), dict.fromkeys(sides, 0))
    readers = [Reader(chance.randrange(3)) for _ in range(6)]
    for _ in range(300):
        act = chance.choice([world.speak, world.speak, world.write_checkpoint, world.disturb, world.hear, None, None])
        if act is not None:
            act()
            continue
        reader = chance.choice(readers)
        if chance.random() < 0.3:
            reader.room = chance.randrange(3)  # comes back elsewhere with its cursor
        reader.read(rooms[reader.room], chance.choice([None, 0, 1, 2]))
    while len(world.ended) < len(sides):
        world.speak()
    for room in rooms:
        world.repair(room)
        assert room.over
    for reader in readers:
        reader.read(rooms[reader.room], None)
        assert reader.over and reader.texts == final == reader.ended


facts = st.lists(
    st.one_of(
        st.tuples(st.just("text"), st.sampled_from("ab"), st.integers(0, 20)),
        st.tuples(st.just("words"), st.sampled_from("ab"), st.integers(0, 20), st.integers(0, 20)),
        st.tuples(st.just("ending"), st.sampled_from("ab")),
    ),
    max_size=12,
)
WHOLE = {"a": "The quick brown fox.", "b": "😀 jumps over a dog!!"}


def learn(known: Answer, fact: tuple[Any, ...]) -> None:
    match fact:
        case ("text", side, length):
            known.learn_text(side, WHOLE[side][:length])
        case ("words", side, start, end):
            known.learn_words(side, start, WHOLE[side][start:end])
        case ("ending", side):
            known.learn_ending(side, reply(side, WHOLE[side], "success"))


def state(known: Answer) -> dict[str, Any]:
    return {side: (each.text, each.ending is not None) for side, each in known.replies.items()}


@given(facts, st.randoms())
def test_learning_is_a_merge(given_facts: list[tuple[Any, ...]], chance: random.Random) -> None:
    """Idempotent, and in any order: words that wait for what lies before them are only learned later."""
    once, shuffled = answer("ab"), answer("ab")
    order = [*given_facts, *given_facts]
    chance.shuffle(order)
    for known, news in ((once, given_facts), (shuffled, order)):
        for _ in range(len(news) + 1):
            for fact in news:
                learn(known, fact)
    assert state(once) == state(shuffled)


@given(st.text(max_size=60))
def test_a_cursor_survives_the_wire_and_nothing_else_does(text: str) -> None:
    cursor = parse_cursor(text)
    assert cursor is None or str(cursor) == text or text.split(".")[1:] != str(cursor).split(".")[1:]
    for known in (Cursor("t", (3, TOLD)), start_of("t"), Cursor("t", over=True), Cursor("t", (0,))):
        assert str(parse_cursor(str(known))) == str(known)


@settings(max_examples=60)
@given(st.integers(0, 30), st.integers(0, 30))
def test_words_for_a_reply_that_has_ended_are_ignored(start: int, end: int) -> None:
    known = answer("a", {"a": ("short", True)})
    assert known.learn_words("a", start, "x" * end) and known.replies["a"].text == "short"
    known.learn_text("a", "x" * 50)
    known.learn_ending("a", reply("a", "another", "interrupted"))
    assert state(known) == {"a": ("short", True)}


def test_a_cursor_beyond_the_text_is_told_the_end_alone() -> None:
    """A reader was shown more than its worker could leave behind: the end's content decides."""
    tellings, after = answer("a", {"a": ("short", True)}).owed(Cursor("turn", (99,)))
    assert [type(telling) for telling in tellings] == [Ended, Over] and after.over
    assert answer("ab").fits(start_of("turn")) and not answer("ab").fits(Cursor("turn", (3,)))
    assert answer("a").owed(NOTHING) == ([], NOTHING)


def test_a_reply_that_a_reader_has_is_not_begun_again() -> None:
    """One side is made anew: its reader knows how the other one ended, and would wait for a second ending of it."""
    known = answer("ab", {"b": ("kept", True)})
    tellings, after = known.owed(Cursor("turn", (0, TOLD), begun=False))
    assert [telling.message["id"] for telling in tellings if isinstance(telling, Begun)] == ["u", "reply-a"]
    assert str(after) == "turn.0.e"
