"""What a good client knows of a session after each event, and what it finds wrong with them. Never awaits.

It holds a cursor, `<turn_id>.<seq>` of the last numbered event it applied; drops what it has, writing down that it
came; and goes on after a gap, writing down that there was one. The rules it may find broken:

    gap        an event was skipped                      greeting   a numbered event before session_state or resumed
    repeat     one came twice in one connection          unknown    a chunk or an end of a message never announced
    overlap    a merged chunk has parts already applied  differs    the end's content is not the text put together
    disorder   one came after a later one                second     a message ended twice, or began again
    late       text after a message's end, or anything   changed    a terminal status or text became another
               after its turn's                          early      a turn ended before its messages
    resumed    `resumed` does not continue the cursor    shape      not an event of the contract
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from .journal import Journal

TERMINAL = frozenset({"success", "stopped", "interrupted", "failed"})
STATUSES = TERMINAL | {"pending", "streaming"}
NUMBERED = frozenset({"message_update", "message_chunk", "message_complete", "turn_complete"})
UNNUMBERED = frozenset(
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


class Broken(Exception):
    """An event that cannot be applied, and the rule that says why."""

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(rule, text)
        self.rule, self.text = rule, text


@dataclass
class MessageView:
    """A message as this reader has it. `terminals` counts the ends that were applied: one, when all is well."""

    id: str
    role: str
    participant: str | None = None
    turn_id: str | None = None
    text: str = ""
    status: str = "pending"
    failure_reason: str | None = None
    terminals: int = 0
    created: float = field(default_factory=time.monotonic)
    ended: float | None = None
    chunks: list[float] = field(default_factory=list)  # when each piece of text came

    @property
    def over(self) -> bool:
        return self.status in TERMINAL


@dataclass
class TurnView:
    """Where this reader is in a turn's log.

    `base` came with a snapshot or a cursor; `last` is the last event applied; `applied` the numbers each message was
    told under (a merged chunk covers the numbers of the other side between its own); `fresh` the last number this
    connection brought.
    """

    id: str
    base: int = -1
    last: int = -1
    fresh: int = -1
    ended: bool = False
    covered: bool = False  # an end stood for events before it: the ends after it have text that was not told
    applied: dict[str, set[int]] = field(default_factory=dict)

    def has(self, message_id: str, seq: int) -> bool:
        return seq <= self.base or seq in self.applied.get(message_id, ())

    def overlaps(self, message_id: str, first: int, seq: int) -> bool:
        return first <= self.base or not self.applied.get(message_id, set()).isdisjoint(range(first, seq + 1))

    def take(self, message_id: str, first: int, seq: int) -> None:
        self.applied.setdefault(message_id, set()).update(range(first, seq + 1))
        self.last = self.fresh = seq


class View:
    """`greeted` is whether numbered events may come without a snapshot first: true for SSE, not for sockets."""

    def __init__(self, journal: Journal, name: str, greeted: bool) -> None:
        self.journal, self.name, self._always_greeted = journal, name, greeted
        self.messages: dict[str, MessageView] = {}
        self.turns: dict[str, TurnView] = {}
        self.cursor: str | None = None
        self.turn: TurnView | None = None  # the one the cursor is in
        self.snapshots = 0
        self.resumptions = 0
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
        """A new connection begins; what came in the last one may come again without being anybody's mistake."""
        self._greeted = self._always_greeted
        for turn in self.turns.values():
            turn.fresh = -1
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
        if kind in NUMBERED:
            self._numbered(event)
        elif kind == "session_state":
            self._snapshot(event)
        elif kind == "resumed":
            self._resumed(event)
        elif kind not in UNNUMBERED and kind not in AI_SDK:
            raise Broken("shape", f"no event of the contract has type {kind!r}")

    def violation(self, rule: str, text: str) -> None:
        self.journal.add(self.name, "violation", {"rule": rule, "text": text})

    # numbered events

    def _numbered(self, event: dict[str, Any]) -> None:
        turn_id, seq = event.get("turn_id"), event.get("seq")
        first = event.get("from_seq", seq)
        if not isinstance(turn_id, str) or not isinstance(seq, int) or not isinstance(first, int) or first > seq:
            raise Broken("shape", f"{event.get('type')} without a good turn_id, seq, from_seq: {event!r:.200}")
        if not self._greeted:
            self.violation("greeting", f"{event['type']} {turn_id}.{seq} before session_state or resumed")
        turn = self.turns.setdefault(turn_id, TurnView(turn_id))
        message_id = _message_id(event)
        if self._is_new(turn, message_id, first, seq, event["type"]):
            turn.take(message_id, first, seq)
            self.turn, self.cursor = turn, f"{turn_id}.{seq}"
            self._change(turn, event)

    def _is_new(self, turn: TurnView, message_id: str, first: int, seq: int, kind: str) -> bool:
        """Whether to apply it; whatever is odd about it is written down."""
        where = f"{turn.id}.{seq}" if first == seq else f"{turn.id}.{first}–{seq}"
        if seq <= turn.last:
            if not turn.has(message_id, seq):
                self.violation("disorder", f"{where} after {turn.id}.{turn.last}")
            else:
                self.journal.add(self.name, "duplicate", {"turn_id": turn.id, "seq": seq})
                if seq <= turn.fresh:
                    self.violation("repeat", f"{where} came twice in one connection")
            return False
        if turn.ended:
            self.violation("late", f"{where} after the end of its turn at {turn.last}")
            return False
        if first > turn.last + 1:
            self.violation("gap", f"expected {turn.id}.{turn.last + 1}, got {where}")
        elif kind == "message_chunk" and turn.overlaps(message_id, first, seq):
            self.violation("overlap", f"{where} has parts that had been applied, up to {turn.last}")
        return True

    def _change(self, turn: TurnView, event: dict[str, Any]) -> None:
        match event["type"]:
            case "message_update":
                self._created(turn, event.get("message") or {})
            case "message_chunk":
                self._chunk(event)
            case "message_complete":
                self._complete(turn, event)
            case "turn_complete":
                self._turn_complete(turn)

    def _created(self, turn: TurnView, message: dict[str, Any]) -> None:
        if not isinstance(message.get("id"), str) or message.get("role") not in ("user", "assistant"):
            raise Broken("shape", f"message_update without a message: {message!r:.200}")
        before = self.messages.get(message["id"])
        if before is not None and before.role == "assistant" and before.over:
            self.violation("second", f"message {before.id} was {before.status} and begins again")
        self.messages[message["id"]] = view = _message(message)
        view.turn_id = turn.id

    def _chunk(self, event: dict[str, Any]) -> None:
        message = self.messages.get(event.get("message_id") or "")
        text = event.get("chunk")
        if message is None:
            raise Broken("unknown", f"a chunk of message {event.get('message_id')}, never announced")
        if not isinstance(text, str):
            raise Broken("shape", f"message_chunk without text: {event!r:.200}")
        if message.over:
            raise Broken("late", f"text after the end of message {message.id}: {text!r:.60}")
        message.text += text
        message.status = "streaming"
        message.chunks.append(time.monotonic())

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
        turn.covered = turn.covered or event.get("from_seq", event["seq"]) < event["seq"]
        self._compare(message, content, turn.covered)
        message.text = content

    def _compare(self, message: MessageView, content: str, covers: bool) -> None:
        """Whoever finishes for a dead worker may know more than was shown, or, where nothing was kept, less.

        An end that covers events before it stands for their text, too.
        """
        seen = {"message_id": message.id, "seen": message.text, "stored": content}
        related = content.startswith(message.text) or message.text.startswith(content)
        if content == message.text or (covers and content.startswith(message.text)):
            pass
        elif message.status not in ("interrupted", "stopped") or not related:
            self.violation("differs", f"message {message.id}: {difference(message.text, content)}")
        else:
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

    # where a connection starts

    def _resumed(self, event: dict[str, Any]) -> None:
        self._greeted = True
        self.resumptions += 1
        turn_id, first = event.get("turn_id"), event.get("from_seq")
        expected = (self.turn.id, self.turn.last + 1) if self.turn else (None, None)
        if (turn_id, first) != expected and (self.turn is None or turn_id == self.turn.id or first != 0):
            self.violation("resumed", f"expected to resume at {expected[0]}.{expected[1]}, got {turn_id}.{first}")

    def _snapshot(self, event: dict[str, Any]) -> None:
        self._greeted = True
        self.snapshots += 1
        if not isinstance(event.get("messages"), list) or "turn" not in event:
            raise Broken("shape", f"session_state without messages or turn: {event!r:.200}")
        turn = event["turn"]
        for message in event["messages"]:
            self._replace(message, turn and turn["id"])
        for known in self.turns.values():
            known.ended = known.ended or turn is None or known.id != turn["id"]
        if turn is None:
            self.turn = self.cursor = None
        else:
            self._jump(f"{turn['id']}.{turn['seq']}")

    def _replace(self, message: dict[str, Any], turn_id: str | None) -> None:
        if not isinstance(message, dict) or message.get("status") not in STATUSES:
            raise Broken("shape", f"session_state with a bad message: {message!r:.200}")
        before, after = self.messages.get(message.get("id") or ""), _message(message)
        if before is not None:
            after.terminals, after.chunks, after.turn_id = before.terminals, before.chunks, before.turn_id
            after.created, after.ended = before.created, before.ended
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

    def _jump(self, cursor: str) -> None:
        """Stand at `cursor`, having everything up to it; nowhere, when it is not one."""
        turn_id, _, seq = cursor.rpartition(".")
        if not seq.removeprefix("-").isdecimal():
            return
        ended = turn_id in self.turns and self.turns[turn_id].ended
        turn = self.turns[turn_id] = TurnView(turn_id, base=int(seq), last=int(seq), ended=ended)
        self.turn, self.cursor = turn, cursor


def _message_id(event: dict[str, Any]) -> str:
    return str(event.get("message_id") or (event.get("message") or {}).get("id") or "")


def _message(message: dict[str, Any]) -> MessageView:
    return MessageView(
        id=str(message.get("id")),
        role=str(message.get("role")),
        participant=message.get("participant"),
        text=message.get("content") or "",
        status=str(message.get("status", "pending")),
        failure_reason=message.get("failure_reason"),
    )


def difference(a: str, b: str) -> str:
    """Where two texts part, said shortly."""
    if a == b:
        return f"both have the same {len(a)} characters"
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return (
        f"{len(a)} and {len(b)} characters, different from {same}: {a[same : same + 30]!r} and {b[same : same + 30]!r}"
    )
