"""What a good client knows of a session after each event, and what it finds wrong with them. Never awaits.

It puts together a text for each reply: a chunk has to begin where that text ends. It holds the cursor of the last
event of a turn that it applied, drops what it has, writing down that it came, and fills what it lacks with `HOLE`s,
writing down that there was a gap. The rules it may find broken:

    gap        a chunk begins beyond the text     greeting   an event of a turn before session_state or resumed
    repeat     something came twice in one        unknown    a chunk or an end of a message never announced
               connection, or a beginning after   differs    the end's content, or what came again, is not the text
               its turn had begun                 cursor     an event's cursor is not what the reader has by then
    overlap    a chunk begins inside the text     second     a message ended twice
               of an earlier connection           changed    a terminal status or text became another
    disorder   a cursor that goes back            early      a turn ended before its messages
    late       text after a message's end, or     resumed    `resumed` does not continue the cursor
               anything after its turn's          shape      not an event of the contract
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .cursors import Place, read_cursor
from .journal import Journal

TERMINAL = frozenset({"success", "stopped", "interrupted", "failed"})
STATUSES = TERMINAL | {"pending", "streaming"}
OF_A_TURN = frozenset({"message_update", "message_chunk", "message_complete", "turn_complete"})
OF_THE_SESSION = frozenset(
    {
        "connection_established",
        "session_state",
        "resumed",
        "session_update",
        "typing_indicator",
        "pong",
        "test",
        "error",
    }
)
AI_SDK = frozenset({"chunk", "start", "no-active", "end"})  # frames of the contract's §9 on the same socket
HOLE = "\N{REPLACEMENT CHARACTER}"  # one for each character a gap skipped: so that one gap is found once


class Broken(Exception):
    """An event that cannot be applied, and the rule that says why."""

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(rule, text)
        self.rule, self.text = rule, text


@dataclass
class MessageView:
    """A message as this reader has it. `terminals` counts the ends that were applied: one, when all is well.

    `before`: how many characters of the text an earlier connection or a snapshot brought.
    `tokens`: how many of them chunks brought, in however many chunks: a reader that was busy gets several in one.
    """

    id: str
    role: str
    participant: str | None = None
    turn_id: str | None = None
    text: str = ""
    status: str = "pending"
    failure_reason: str | None = None
    terminals: int = 0
    before: int = 0
    tokens: int = 0
    created: float = field(default_factory=time.monotonic)
    ended: float | None = None
    chunks: list[float] = field(default_factory=list)  # when each piece of text came

    @property
    def over(self) -> bool:
        return self.status in TERMINAL


@dataclass
class TurnView:
    """How much of a turn this reader has.

    `replies`: ids, side a first. `begun`: the last announcement has come, after which there is none.
    `announced`: ids of the messages this connection announced.
    """

    id: str
    place: Place
    begun: bool = False
    ended: bool = False
    replies: list[str] = field(default_factory=list)
    announced: set[str] = field(default_factory=set)


class View:
    """`greeted` is whether events of a turn may come without a snapshot first: true for SSE, not for sockets."""

    def __init__(self, journal: Journal, name: str, greeted: bool) -> None:
        self.journal, self.name, self._always_greeted = journal, name, greeted
        self.messages: dict[str, MessageView] = {}
        self.turns: dict[str, TurnView] = {}
        self.cursor: str | None = None
        self.turn: TurnView | None = None  # the one the cursor is in
        self.snapshots = 0
        self.resumptions = 0
        self.says_ids = False  # a message it says again is answered by its turn from the start
        self.left = False  # before the end: what it has heard is right, and not all
        self._greeted = greeted

    @property
    def turns_ended(self) -> int:
        return sum(turn.ended for turn in self.turns.values())

    @property
    def greeted(self) -> bool:
        """Whether this connection has told where it starts."""
        return self._greeted

    def texts(self, role: str = "assistant") -> list[str]:
        return [message.text for message in self.messages.values() if message.role == role]

    def connected(self, cursor: str | None = None) -> None:
        """A new connection begins; what the last one brought is then text of an earlier connection."""
        self._greeted = self._always_greeted
        for turn in self.turns.values():
            turn.announced.clear()
        for message in self.messages.values():
            message.before = len(message.text)
        if cursor is not None and cursor != self.cursor:
            self._jump(cursor)

    def apply(self, event: dict[str, Any]) -> None:
        """Take one event as it came."""
        self.journal.add(self.name, "event", event)
        try:
            self._apply(event)
        except Broken as broken:
            self.violation(broken.rule, broken.text)

    def _apply(self, event: dict[str, Any]) -> None:
        kind = event.get("type")
        if kind in OF_A_TURN:
            self._of_a_turn(event)
        elif kind == "session_state":
            self._snapshot(event)
        elif kind == "resumed":
            self._resumed(event)
        elif kind not in OF_THE_SESSION and kind not in AI_SDK:
            raise Broken("shape", f"no event of the contract has type {kind!r}")

    def violation(self, rule: str, text: str) -> None:
        self.journal.add(self.name, "violation", {"rule": rule, "text": text})

    # events of a turn

    def _of_a_turn(self, event: dict[str, Any]) -> None:
        kind, cursor = event["type"], event.get("cursor")
        place = read_cursor(cursor)
        if place is None or place.turn_id != event.get("turn_id"):
            raise Broken("shape", f"{kind} without a good turn_id and cursor: {event!r:.200}")
        if (place.stage == "end") != (kind == "turn_complete") or (place.stage == "start" and kind != "message_update"):
            self.violation("shape", f"{kind} with the cursor {cursor}")
        if not self._greeted:
            self.violation("greeting", f"{kind} {cursor} before session_state or resumed")
        turn = self.turns.setdefault(place.turn_id, TurnView(place.turn_id, place))
        if turn.ended:
            raise Broken("late", f"{kind} {cursor} after the end of its turn")
        if place.is_before(turn.place):
            raise Broken("disorder", f"{kind} {cursor} after {turn.place}")
        begun, turn.place, turn.begun = turn.begun, place, turn.begun or place.stage != "start"
        self.turn, self.cursor = turn, str(cursor)
        self._change(turn, event, begun)
        self._compare_cursor(turn)

    def _change(self, turn: TurnView, event: dict[str, Any], begun: bool) -> None:
        match event["type"]:
            case "message_update":
                self._created(turn, event.get("message") or {}, begun)
            case "message_chunk":
                self._chunk(event)
            case "message_complete":
                self._complete(turn, event)
            case "turn_complete":
                self._turn_complete(turn)

    def _created(self, turn: TurnView, message: dict[str, Any], begun: bool) -> None:
        """A beginning may be told again to a reader that was cut inside of it, and to no other."""
        if not isinstance(message.get("id"), str) or message.get("role") not in ("user", "assistant"):
            raise Broken("shape", f"message_update without a message: {message!r:.200}")
        if message["id"] in turn.announced or begun:
            raise Broken("repeat", f"message {message['id']} begins again in turn {turn.id}")
        turn.announced.add(message["id"])
        self.messages[message["id"]] = view = _message(message)
        view.turn_id = turn.id
        if view.role == "assistant":
            if view.text or view.status != "pending":
                self.violation("shape", f"reply {view.id} begins as {view.status} with {view.text!r:.60}")
            turn.replies = self._in_order({*turn.replies, view.id})

    def _in_order(self, replies: set[str]) -> list[str]:
        return sorted(replies, key=lambda id: self.messages[id].participant or "")

    def _chunk(self, event: dict[str, Any]) -> None:
        message = self.messages.get(event.get("message_id") or "")
        text, offset = event.get("chunk"), event.get("offset")
        if message is None:
            raise Broken("unknown", f"a chunk of message {event.get('message_id')}, never announced")
        if not isinstance(text, str) or not isinstance(offset, int) or offset < 0:
            raise Broken("shape", f"message_chunk without text and offset: {event!r:.200}")
        if message.over:
            raise Broken("late", f"text after the end of message {message.id}: {text!r:.60}")
        if offset > len(message.text):
            self.violation("gap", f"expected {message.id} from {len(message.text)}, got it from {offset}")
            message.text += HOLE * (offset - len(message.text))
        new = text[len(message.text) - offset :]
        if offset < len(message.text):
            self._known(message, offset, text)
        message.text += new
        message.status = "streaming"
        if new:
            message.chunks.append(time.monotonic())
            message.tokens += len(new.split())

    def _known(self, message: MessageView, offset: int, text: str) -> None:
        """A chunk that begins before the end of the text: dropped as far as it goes, and never right."""
        had = message.text[offset : offset + len(text)]
        self.journal.add(self.name, "duplicate", {"message_id": message.id, "offset": offset, "chunk": text})
        rule = "repeat" if offset >= message.before else "overlap"
        self.violation(rule, f"{message.id} from {offset}, {len(message.text)} characters had come")
        if not text.startswith(had):
            self.violation("differs", f"message {message.id} from {offset}: {difference(had, text)}")

    def _complete(self, turn: TurnView, event: dict[str, Any]) -> None:
        message = self.messages.get(event.get("message_id") or "")
        if message is None:
            raise Broken("unknown", f"the end of message {event.get('message_id')}, never announced")
        if event.get("status") not in TERMINAL:
            self.violation("shape", f"message_complete with status {event.get('status')!r}")
        message.terminals += 1
        if message.over:
            self.violation("second", f"message {message.id} was {message.status}, ends again {event.get('status')}")
        message.status, message.failure_reason = str(event.get("status")), event.get("failure_reason")
        message.ended, message.turn_id = time.monotonic(), turn.id
        content = (event.get("message") or {}).get("content")
        if not isinstance(content, str):
            raise Broken("shape", f"message_complete without its message: {event!r:.200}")
        self._compare(message, content)
        message.text = content

    def _compare(self, message: MessageView, content: str) -> None:
        """Whoever finishes for a dead worker may know more than was shown, or, where nothing was stored, less."""
        if content == message.text:
            return
        related = content.startswith(message.text) or message.text.startswith(content)
        if message.status not in ("interrupted", "stopped") or not related:
            self.violation("differs", f"message {message.id}: {difference(message.text, content)}")
            return
        seen = {"message_id": message.id, "seen": message.text, "stored": content}
        self.journal.add(self.name, "takeover", seen)
        if len(content) < len(message.text):
            self.journal.add(self.name, "shrunk", seen)

    def _turn_complete(self, turn: TurnView) -> None:
        turn.ended = True
        waiting = [
            m.id for m in self.messages.values() if m.turn_id == turn.id and m.role == "assistant" and not m.over
        ]
        if waiting:
            self.violation("early", f"turn {turn.id} ended before {', '.join(waiting)}")

    def _compare_cursor(self, turn: TurnView) -> None:
        """A cursor that claims more than its reader has makes a gap later; one that claims less, a repeat."""
        if turn.place.stage != "text" or not turn.replies:
            return
        replies = [self.messages[id] for id in turn.replies]
        have = tuple(math.inf if reply.over else len(reply.text) for reply in replies)
        if have != turn.place.parts:
            self.violation("cursor", f"{self.cursor}, where the reader has {have}")

    # where a connection starts

    def _resumed(self, event: dict[str, Any]) -> None:
        self._greeted = True
        self.resumptions += 1
        told = (event.get("turn_id"), event.get("cursor"))
        expected = (self.turn.id, self.cursor) if self.turn else (None, None)
        if told == expected:
            return
        place = read_cursor(told[1])
        if self.says_ids and place is not None and (place.turn_id, place.stage) == (told[0], "start"):
            self.turn = self.turns[place.turn_id] = TurnView(place.turn_id, place)
            self.cursor = told[1]
        else:
            self.violation("resumed", f"expected to resume at {expected[1]}, got {told[1]} of turn {told[0]}")

    def _snapshot(self, event: dict[str, Any]) -> None:
        self._greeted = True
        self.snapshots += 1
        if not isinstance(event.get("messages"), list) or "turn" not in event:
            raise Broken("shape", f"session_state without messages or turn: {event!r:.200}")
        turn = event["turn"]
        place = read_cursor(turn["cursor"]) if turn is not None else None
        if turn is not None and (place is None or place.turn_id != turn["id"]):
            raise Broken("shape", f"session_state with a bad turn: {turn}")
        for message in event["messages"]:
            self._replace(message, turn and turn["id"])
        for known in self.turns.values():
            known.ended = known.ended or turn is None or known.id != turn["id"]
        if turn is None:
            self.turn = self.cursor = None
        else:
            self._jump(turn["cursor"], self._last_replies(event["messages"]))

    def _last_replies(self, messages: list[dict[str, Any]]) -> list[str]:
        """The replies after the last message of a user's: those of the running turn, all or the one made again."""
        after = max((n for n, each in enumerate(messages) if each["role"] == "user"), default=-1) + 1
        return self._in_order({each["id"] for each in messages[after:]})

    def _replace(self, message: dict[str, Any], turn_id: str | None) -> None:
        if not isinstance(message, dict) or message.get("status") not in STATUSES:
            raise Broken("shape", f"session_state with a bad message: {message!r:.200}")
        before, after = self.messages.get(message.get("id") or ""), _message(message)
        after.before = len(after.text)
        if before is not None:
            after.terminals, after.chunks, after.turn_id = before.terminals, before.chunks, before.turn_id
            after.created, after.ended, after.tokens = before.created, before.ended, before.tokens
            self._compare_snapshots(before, after)
        if not after.over:
            after.turn_id = turn_id
        elif after.ended is None:
            after.ended = time.monotonic()
        self.messages[after.id] = after

    def _compare_snapshots(self, before: MessageView, after: MessageView) -> None:
        if before.over and (before.status, before.text) != (after.status, after.text):
            rest = difference(before.text, after.text)
            self.violation("changed", f"message {before.id} was {before.status}, is {after.status}; {rest}")
        elif not after.text.startswith(before.text):
            seen = {"message_id": before.id, "seen": before.text, "stored": after.text}
            self.journal.add(self.name, "shrunk", seen)

    def _jump(self, cursor: str, replies: list[str] | None = None) -> None:
        """Stand at `cursor`, having everything up to it; nowhere, when it is not one."""
        place = read_cursor(cursor)
        if place is None:
            return
        ended = place.stage == "end" or (place.turn_id in self.turns and self.turns[place.turn_id].ended)
        turn = TurnView(place.turn_id, place, place.stage != "start", ended)
        if replies and len(replies) != len(place.parts):  # one of two is made again: the other is not in the cursor
            replies = [id for id in replies if not self.messages[id].over]
        turn.replies = replies if replies and len(replies) == len(place.parts) else []
        self.turns[place.turn_id] = self.turn = turn
        self.cursor = cursor
        self._compare_cursor(turn)


def _message(message: dict[str, Any]) -> MessageView:
    return MessageView(
        id=str(message.get("id")),
        role=str(message.get("role")),
        participant=message.get("participant"),
        text=message.get("content") or "",
        status=str(message.get("status", "pending")),
        failure_reason=message.get("failure_reason"),
    )


def put_together(*connections: Iterable[dict[str, Any]]) -> View:
    """What a reader has that was told these events, one connection after the other. Raises where a rule is broken."""
    view = View(Journal(), "reader", greeted=True)
    for events in connections:
        view.connected(view.cursor)
        for event in events:
            view.apply(event)
    assert not view.journal.violations(), view.journal.story()
    return view


def difference(a: str, b: str) -> str:
    """Where two texts part, said shortly."""
    if a == b:
        return f"both have the same {len(a)} characters"
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return (
        f"{len(a)} and {len(b)} characters, different from {same}: {a[same : same + 30]!r} and {b[same : same + 30]!r}"
    )
