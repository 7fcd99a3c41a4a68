"""What the service says: the numbered events of a turn, the log that keeps them, and their JSON. Pure.

The turn log (README, "How a token travels"): a turn has one writer, who numbers its events 0, 1, 2, …; every reader
holds a cursor `<turn_id>.<seq>`, the last event it applied. An event at or below the cursor is a duplicate; one that
starts beyond cursor + 1 is a gap. Nothing else writes JSON for sockets.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from ..errors import RETRYABLE, ChatError

encode = msgspec.json.encode

TYPES = {"created": "message_update", "chunk": "message_chunk", "complete": "message_complete", "end": "turn_complete"}

ENDED = ("success", "stopped", "interrupted", "failed")  # how a message can end
CURSOR = re.compile(r"([A-Za-z0-9_-]{1,64})\.(-1|[0-9]{1,12})")  # of a NUL, say, PostgreSQL makes an error

Part = tuple[str, dict[str, Any], str]  # kind, Message, text: of an event made from what storage has
Dialect = Callable[["TurnLog", list["Entry"]], list[bytes]]


class Entry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One event of a turn's log, or a run of merged ones: it covers `from_seq` … `seq`.

    kind: `created` and `complete` carry `body`, the JSON of their fields; `chunk` carries `text`; `end` nothing.
    """

    seq: int
    from_seq: int
    kind: str
    participant: str = ""
    message_id: str = ""
    text: str = ""
    body: msgspec.Raw = msgspec.Raw(b"null")


class Said(msgspec.Struct, array_like=True, tag="turn", frozen=True):
    """On the bus: events of a turn."""

    turn_id: str
    entries: list[Entry]


class Notice(msgspec.Struct, array_like=True, tag="notice", frozen=True):
    """On the bus: an event of the session itself, JSON as readers get it. `account_id` is not sent it."""

    json: str
    account_id: str = ""


class Stop(msgspec.Struct, array_like=True, tag="stop", frozen=True):
    """On the bus: the owner of this turn is to end it."""

    turn_id: str


_decode = msgspec.json.Decoder(Said | Notice | Stop).decode


def decode_bus(payload: str | bytes) -> Said | Notice | Stop:
    """A message from the bus. Raises `msgspec.DecodeError` for what no worker says: others may reach Redis, too."""
    try:
        message: Said | Notice | Stop = _decode(payload)
    except RecursionError:
        raise msgspec.DecodeError("nested too deeply") from None
    if isinstance(message, Said) and not all(map(_sound, message.entries)):
        raise msgspec.ValidationError("events that cannot be shown")
    return message


def _sound(entry: Entry) -> bool:
    if entry.kind not in TYPES or entry.from_seq > entry.seq:
        return False
    if entry.kind in ("chunk", "end"):
        return True
    body = msgspec.json.decode(entry.body)
    return isinstance(body, dict) and isinstance(body.get("message"), dict) and "content" in body["message"]


class TurnLog:
    """The events of one turn, in order and without gaps; readers see those up to `shown`.

    An owner appends first and shows when Redis has it too; on every other worker the two are one. Logs of a room
    form a list: `next` is the turn after this one.
    """

    def __init__(self, turn_id: str) -> None:
        self.id = turn_id
        self.next: TurnLog | None = None
        self.entries: list[Entry] = []
        self.last = -1  # the last event taken; not all are kept: what comes of a message that had ended here is not
        self.closed = False  # the end is written; nothing can be appended behind it
        self._ends: list[int] = []  # entries[i].seq, for bisection
        self._over: set[str] = set()  # messages whose end is written
        self._whole: set[str] = set()  # … all of whose text is
        self._inexact: set[int] = set()  # numbers at which this log, made from storage, is not what the writer's was
        self.shown = -1
        self._visible = 0  # how many entries are shown
        self._texts: dict[str, list[str]] = {}
        self.bodies: dict[str, dict[str, Any]] = {}  # message id → Message as last said, without running text
        self.ended_at = 0.0  # monotonic, when `end` was shown
        self.heard_at = time.monotonic()
        self._frames: dict[tuple[int, int, Dialect], list[bytes]] = {}  # what followers in step share

    @property
    def ended(self) -> bool:
        """Whether the end is shown: a reader that has everything may leave."""
        return self.ended_at > 0

    def append(self, entries: Iterable[Entry]) -> bool:
        """Take what is new of `entries`. False at a gap: what comes after it is not taken."""
        for entry in entries:
            if entry.seq <= self.last or self.closed:
                continue
            if entry.from_seq > self.last + 1 or (entry.from_seq <= self.last and entry.kind == "chunk"):
                return False
            self.last = entry.seq
            if entry.message_id in self._over or (entry.kind == "chunk" and entry.message_id in self._whole):
                continue  # its end was read from storage before the bus told all of it
            # It may begin before our end: a new owner knew less than we do, or what was between is covered.
            start = self._ends[-1] + 1 if self._ends else 0
            if entry.from_seq != start:
                entry = msgspec.structs.replace(entry, from_seq=start)
            self._keep(entry)
        return True

    def _keep(self, entry: Entry) -> None:
        self.entries.append(entry)
        self._ends.append(entry.seq)
        if entry.kind == "complete":
            self._over.add(entry.message_id)
        elif entry.kind == "end":
            self.closed = True

    def catch_up(
        self, messages: list[dict[str, Any]], seqs: dict[str, int], end: int | None, *, anyway: bool = False
    ) -> bool:
        """Go on from the turn's stored messages, where the events themselves are lost: what they have beyond this log.

        seqs: the last event each message's stored text covers, by its id, or in a turn that is over each reply's end;
        end: the number of the turn's end, None while it runs. What is made here takes no number of an event that
        storage does not know: the numbers meet the real ones where the stored text ends; before that no cursor can be
        served.

        False, and nothing is taken, where storage has a reply's end from a later moment than the other side's text: at
        no number of the log all of that had been said. `anyway`: where the next moment will not be written down.
        """
        replies = sorted((each for each in messages if each["role"] == "assistant"), key=lambda each: seqs[each["id"]])
        running = [seqs[each["id"]] for each in replies if each["status"] not in ENDED]
        most = end if end is not None else min(running) if running else max(seqs.values())
        if self.closed or most < 0:
            return True  # nothing was said yet: whoever owns the turn begins it
        exact = end is not None or most == max(seqs.values())
        if not exact and not anyway:
            return False
        known = {(entry.kind, entry.message_id) for entry in self.entries}
        parts: list[Part] = [("created", each, "") for each in messages if ("created", each["id"]) not in known]
        over = {each["id"] for each in replies if each["status"] in ENDED}
        told: dict[str, list[Part]] = {each["id"]: [] for each in replies}
        chunks: list[Part] = [("chunk", each, more) for each in replies if (more := self._more(each))]
        endings: list[Part] = [("complete", each, "") for each in replies if ("complete", each["id"]) not in known]
        for part in [each for each in chunks if each[1]["id"] not in over]:
            told[part[1]["id"]].append(part)
        # An ending is stored before it is told, perhaps after `most`: here it gets what numbers the others leave.
        spare = most - self.last - len(parts) - sum(map(len, told.values()))
        for part in [each for each in chunks + endings if each[1]["id"] in over]:
            if spare > 0 or end is not None:
                told[part[1]["id"]].append(part)
                spare -= 1
        parts += [part for each in replies for part in told[each["id"]]]
        if end is not None:  # the ends at their own numbers; a text before its end, and before one that is right before
            parts.sort(key=lambda part: part[0] != "created" and seqs[part[1]["id"]] - 1.5 * (part[0] == "chunk"))
            parts.append(("end", {"id": "", "participant": ""}, ""))
        numbers = [-1 if kind == "created" else seqs.get(each["id"], most) for kind, each, _ in parts]
        numbers[-1:] = [most] if parts else []
        if end is not None and len(parts) > 1:
            numbers[-2] = end - 1  # the last reply's end and the turn's are told together
        for place in range(len(parts) - 2, -1, -1):
            numbers[place] = min(numbers[place], numbers[place + 1] - 1)
        for (kind, message, text), number in zip(parts, numbers, strict=True):
            start = self.last + 1
            self.append([_made(start, max(start, number), kind, message, text)])
            self._inexact.add(self.last)
        if exact:
            self._inexact.discard(self.last)
        self._whole |= {each["id"] for each in replies if each["id"] in over and not self._more(each)}
        return True

    def _more(self, message: dict[str, Any]) -> str:
        """What a stored reply has beyond its text in this log."""
        said = self._said(message["id"])
        return message["content"].removeprefix(said) if message["content"].startswith(said) else ""

    def _said(self, message_id: str) -> str:
        """All text of a reply in this log, shown or not."""
        return "".join(entry.text for entry in self.entries if entry.kind == "chunk" and entry.message_id == message_id)

    def show(self) -> bool:
        """Let readers see everything appended; whether that is more than before."""
        fresh = self.entries[self._visible :]
        for entry in fresh:
            if entry.kind == "chunk":
                self._texts.setdefault(entry.message_id, []).append(entry.text)
            elif entry.kind in ("created", "complete"):
                body = msgspec.json.decode(entry.body)
                self.bodies[entry.message_id] = body["message"]
                if entry.kind == "complete":
                    self._texts[entry.message_id] = [body["message"]["content"]]
            elif entry.kind == "end":
                self.ended_at = time.monotonic()
        self._visible = len(self.entries)
        self.shown = self._ends[-1] if self._ends else -1
        self.heard_at = time.monotonic()
        return bool(fresh)

    def forget_unshown(self) -> None:
        """Drop what was appended and not shown: another worker has gone on with these numbers."""
        del self.entries[self._visible :], self._ends[self._visible :]
        self.last, self.closed = self.shown, self.ended
        self._over = {entry.message_id for entry in self.entries if entry.kind == "complete"}

    def text(self, message_id: str) -> str:
        """The text of a reply as far as `shown`."""
        pieces = self._texts.get(message_id, [])
        if len(pieces) > 1:
            pieces[:] = ["".join(pieces)]
        return pieces[0] if pieces else ""

    def ending(self, message_id: str) -> dict[str, Any] | None:
        """The reply's Message as readers were told that it ended; None before."""
        body = self.bodies.get(message_id)
        return body if body is not None and body["status"] != "pending" else None

    def serves(self, seq: int) -> bool:
        """Whether a reader that has applied `seq` can go on from here: not beyond the end, nor inside a merged run."""
        if seq == -1:
            return True
        place = bisect_right(self._ends, seq)
        return place > 0 and self._ends[place - 1] == seq and seq not in self._inexact

    def messages(self) -> list[dict[str, Any]]:
        """The turn's messages as they stand at `shown`."""
        return [
            body | ({"content": self.text(id), "status": "streaming"} if body["status"] == "pending" else {})
            for id, body in self.bodies.items()
        ]

    def after(self, seq: int) -> list[Entry]:
        """The shown events after `seq`, runs of one side's chunks merged into one each.

        Only neighbours are merged. Reordering `a b a b` to `a b` would leave a reader that is cut between the two
        with a cursor that claims text of the other side which it never got.
        """
        start = bisect_right(self._ends, seq)
        if start == self._visible - 1:
            return self.entries[start : self._visible]
        merged: list[Entry] = []
        run: list[Entry] = []
        for entry in self.entries[start : self._visible]:
            if run and (entry.kind != "chunk" or entry.message_id != run[0].message_id):
                merged.append(_joined(run))
                run = []
            if entry.kind == "chunk":
                run.append(entry)
            else:
                merged.append(entry)
        if run:
            merged.append(_joined(run))
        return merged

    def endings(self, seq: int) -> list[Entry]:
        """The shown events after `seq` without their text, which an end repeats: for a cursor inside a run."""
        found = []
        for entry in self.after(seq):
            if entry.kind != "chunk":
                found.append(msgspec.structs.replace(entry, from_seq=seq + 1))
                seq = entry.seq
        return found

    def frames(self, seq: int, dialect: Dialect) -> list[bytes]:
        """What is shown after `seq`, in a dialect: encoded once for all who ask for the same span."""
        key = (seq, self.shown, dialect)
        if key not in self._frames:
            if len(self._frames) > 8:  # spans move on: only the newest are asked for again
                self._frames.clear()
            self._frames[key] = dialect(self, self.after(seq))
        return self._frames[key]


def _made(start: int, number: int, kind: str, message: dict[str, Any], text: str) -> Entry:
    body = msgspec.Raw(b"null")
    if kind == "created":
        body = created(message)
    elif kind == "complete":
        body = completed(message)
    return Entry(number, start, kind, message["participant"] or "", message["id"], text, body)


def _joined(run: list[Entry]) -> Entry:
    if len(run) == 1:
        return run[0]
    first, last = run[0], run[-1]
    text = "".join(entry.text for entry in run)
    return Entry(last.seq, first.from_seq, "chunk", first.participant, first.message_id, text)


class Chunk(msgspec.Struct, tag_field="type", tag="message_chunk", gc=False):
    """A chunk of text as every JSON reader gets it: the one event that is said all the time."""

    requestId: str
    turn_id: str
    seq: int
    from_seq: int | msgspec.UnsetType
    message_id: str
    participant: str
    chunk: str


def entry_json(turn_id: str, entry: Entry) -> bytes:
    """A numbered event as every JSON reader gets it. Ids are ours or match `[A-Za-z0-9_-]`: they need no escaping."""
    if entry.kind == "chunk":
        start = entry.from_seq if entry.from_seq != entry.seq else msgspec.UNSET
        return encode(Chunk(turn_id, turn_id, entry.seq, start, entry.message_id, entry.participant, entry.text))
    head = (
        f'{{"type":"{TYPES[entry.kind]}","requestId":"{turn_id}","turn_id":"{turn_id}","seq":{entry.seq}'
        + (f',"from_seq":{entry.from_seq}' if entry.from_seq != entry.seq else "")
    ).encode()
    if entry.kind == "end":
        return head + b"}"
    return b"%b,%b" % (head, bytes(entry.body)[1:])  # the body is an object: its fields follow ours


def socket_json(log: TurnLog, entries: list[Entry]) -> list[bytes]:
    """The dialect of sockets: one JSON object a frame."""
    return [entry_json(log.id, entry) for entry in entries]


def created(message: dict[str, Any]) -> msgspec.Raw:
    blank = {"content": "", "status": "pending"} if message["role"] == "assistant" else {}
    return msgspec.Raw(encode({"action": "created", "message": message | blank}))


def completed(message: dict[str, Any]) -> msgspec.Raw:
    fields = ("participant", "status", "failure_reason", "latency_ms", "first_token_ms")
    body = {"message_id": message["id"]} | {name: message.get(name) for name in fields}
    return msgspec.Raw(encode(body | {"message": message}))


def session_event(kind: str, **fields: Any) -> bytes:
    """An event that is not part of any turn's log."""
    return encode({"type": kind, "requestId": "session", **fields})


def error_event(problem: ChatError, message_id: str | None = None) -> bytes:
    fields: dict[str, Any] = {
        "code": problem.code,
        "message": problem.message,
        "retryable": problem.code in RETRYABLE,
    }
    if problem.retry_after is not None:
        fields["retry_after"] = problem.retry_after
    if message_id is not None:
        fields["message_id"] = message_id
    return session_event("error", **fields)


def parse_cursor(text: str) -> tuple[str, int] | None:
    """`<turn_id>.<seq>` → its parts, or None for what is no cursor."""
    found = CURSOR.fullmatch(text)
    return None if found is None else (found[1], int(found[2]))
