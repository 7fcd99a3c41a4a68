"""The one writer of a running turn: numbers its events, sends them to Redis, shows them to readers here.

Text gathers while one publish is in flight and leaves with the next, in one write with what other turns have to say:
an idle system forwards each token at once, a loaded one larger pieces, and no task is woken for it. With Redis a piece
is shown when Redis has it, so that text a reader saw outlives this process; a Redis that does not answer within `ack`
seconds costs the other workers' readers time, not ours.
In a blind battle both sides start together and leave in pieces of one size at one pace, whatever the models do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from .bus import Gather, RedisBus
from .events import Entry, Said, TurnLog, completed, created, encode

Ends = dict[str, int]  # message id → the number of the event that told its end
SKIP = 1000  # more events than a writer that is thought dead can have sent after it was last heard of


@dataclass(frozen=True)
class Pace:
    """How a turn's events leave. Seconds: ack, tick (0: unpaced), kept; `chars` per side and tick."""

    ack: float
    tick: float
    chars: int
    kept: float


class Patience:
    """Tells writers that Redis has kept them waiting for `ack` seconds: one timer for all, not one a token."""

    def __init__(self, ack: float) -> None:
        self._ack = ack
        self._since: dict[Writer, float] = {}  # who waits, the longest first
        self._timed = False

    def begin(self, writer: Writer, now: float) -> None:
        """now: monotonic, as all times here."""
        self._since[writer] = now
        if not self._timed:
            self._timed = True
            asyncio.get_running_loop().call_later(self._ack, self._look)

    def end(self, writer: Writer) -> None:
        self._since.pop(writer, None)

    def _look(self) -> None:
        now = time.monotonic()
        late = now - self._ack + 0.001
        for writer in [each for each, since in self._since.items() if since <= late]:
            self.end(writer)
            writer.late()
        self._timed = bool(self._since)
        if self._timed:
            asyncio.get_running_loop().call_later(next(iter(self._since.values())) + self._ack - now, self._look)


class Writer:
    """Writes one turn's log. `run` ends when the last event is shown; only its owner's tasks may call it."""

    def __init__(
        self,
        log: TurnLog,
        channel: str,
        bus: RedisBus | None,
        pace: Pace,
        notify: Callable[[], None],
        gather: Gather,
        patience: Patience,
    ) -> None:
        self.log = log
        self.sure: Callable[[], bool] = lambda: True  # False: ask `fence` before saying more
        self.fence: Callable[[], Awaitable[bool]] | None = None  # False: the turn was taken from us, say nothing more
        self.ending: Callable[[Ends, int], Awaitable[bool]] | None = None  # asked before the turn's end; likewise
        self._channel = channel
        self._bus = bus
        self._pace = pace
        self._gather = gather
        self._patience = patience
        self.notify = notify
        self._wake = asyncio.Event()
        self._shown = asyncio.Event()
        self._texts: dict[tuple[str, str], str] = {}  # (participant, message id) → said, not numbered yet
        self._bodies: list[tuple[str, str, str, msgspec.Raw]] = []  # kind, participant, message id, body
        self._over: set[str] = set()  # replies whose text is complete
        self._blind: dict[str, str] = {}  # the replies of a paced turn: message id → participant
        self._failed = False
        self._gone = False  # the turn was taken over
        self._ended: set[str] = set()  # replies of a paced turn whose ending is said
        self._ticks = 0
        self._first_tick = self._last_tick = 0.0  # monotonic: when both sides moved together
        self._skip = 0
        self._done = False
        self.stored = False  # whether storage has the end; until then this log alone knows how the turn ended
        self._acked = -1  # the last event Redis is known to have
        self._sent = -1  # the last one that is on its way
        self._key = log_key(log.id)
        self._gathered = False  # we are called soon to say what there is
        self._flying = False  # a batch is on its way to Redis and back
        self._waiting = False  # … and is to be shown when it is back
        self._renewed = 0.0  # monotonic: when Redis was told how long to keep the log
        self._sent_at = 0.0

    # -- what generation says

    def create(self, message: dict[str, Any]) -> None:
        self._add("created", message, created(message))

    def say(self, participant: str, message_id: str, text: str) -> None:
        key = (participant, message_id)
        self._texts[key] = self._texts.get(key, "") + text
        self._hurry()

    def complete(self, message: dict[str, Any]) -> None:
        """The reply has ended so; said after all of its text."""
        self._add("complete", message, completed(message))

    def end(self) -> None:
        self._done = True
        self._wake.set()

    def over(self, message_id: str, status: str = "success") -> None:
        """No more text of this reply comes. Of one that was stopped what is not shown yet never will be."""
        self._over.add(message_id)
        self._failed = self._failed or status == "failed"
        if status in ("stopped", "interrupted"):
            self._texts = {key: text for key, text in self._texts.items() if key[1] != message_id}
        self._wake.set()

    def skip_ahead(self) -> None:
        """Leave a hole of numbers behind a dead writer's last event, which it may have sent a little beyond."""
        self._skip = SKIP

    def abandon(self) -> None:
        """Somebody else writes this turn now: what is not shown yet never will be, and nobody waits for it."""
        self.log.forget_unshown()
        self._gone = True
        self._shown.set()
        self._wake.set()

    def retire(self) -> None:
        """All is said: let go of the owner. It holds this log, and the two would stay until the collector comes."""
        self.sure, self.fence, self.ending = lambda: True, None, None

    @property
    def safe(self) -> bool:
        """Whether all that was shown would outlive this process: Redis is there and has it."""
        return self._bus is not None and self._bus.connected and self._acked >= self.log.shown

    async def spoken(self, message_id: str) -> None:
        """Wait until all text of a reply is shown."""
        while not self._gone and (
            any(id == message_id for _, id in self._texts) or self.log.shown < self.log.last
        ):
            self._shown.clear()
            await self._shown.wait()

    def _add(self, kind: str, message: dict[str, Any], body: msgspec.Raw) -> None:
        self._bodies.append((kind, message["participant"] or "", message["id"], body))
        self._wake.set()

    # -- how it leaves

    def _hurry(self) -> None:
        """Have what was said leave: with what gathers, or in a blind battle at the next tick."""
        if self._pace.tick:
            self._wake.set()
        elif not (self._gathered or self._waiting):
            self._gathered = True
            self._gather.soon(self._speak)

    def _speak(self) -> None:
        """Say the text there is; all that is not only text is `run`'s."""
        self._gathered = False
        if self._waiting or self._gone:
            return
        if self._bodies or self._done or self._skip or not self.sure():
            self._wake.set()
        elif self._texts:
            number, entries = self.log.last, []
            for (side, message_id), text in self._texts.items():
                number += 1
                entries.append(Entry(number, number, "chunk", side, message_id, text))
            self._texts = {}
            self._leave(entries)

    async def run(self) -> None:
        """Say beginnings, endings and what a blind battle says, until the end is shown."""
        while not (self.log.ended or self._gone):
            await self._wake.wait()
            self._wake.clear()
            await self._wait_for_tick()
            if self.fence is not None and not await self.fence():
                return
            await self._landed()
            entries = self._take()
            ends = bool(entries) and entries[-1].kind == "end"
            if ends and self.ending is not None and not await self.ending(self.ends(entries), entries[-1].seq):
                return
            if entries:
                self._leave(entries)
                await self._landed()
            if self._texts or self._bodies:
                self._wake.set()

    def ends(self, entries: Iterable[Entry] = ()) -> Ends:
        """The numbers of the replies' ends, told or about to be."""
        return {each.message_id: each.seq for each in (*self.log.entries, *entries) if each.kind == "complete"}

    def _leave(self, entries: list[Entry]) -> None:
        """Send numbered events, or show them where nothing waits for Redis."""
        self.log.append(entries)
        if not self.send():
            self.show()

    async def _landed(self) -> None:
        """Wait until what is on its way is shown."""
        while self._waiting and not self._gone:
            self._shown.clear()
            await self._shown.wait()

    def show(self) -> None:
        if self.log.show():
            self.notify()
        self._shown.set()

    async def _wait_for_tick(self) -> None:
        """In a blind battle wait until both sides may move again."""
        if not self._pace.tick:
            return
        # Alone, the longer answer goes on as slowly as both went together: a sudden hurry would name the faster.
        together = (self._last_tick - self._first_tick) / max(1, self._ticks - 1)
        every = max(self._pace.tick, together if self._ended else 0.0)
        wait = self._sent_at + every - time.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)
        self._sent_at = time.monotonic()

    def _take(self) -> list[Entry]:
        """Number what may leave now: beginnings, or else one chunk a side and each ending whose text is out."""
        created = [body for body in self._bodies if body[0] == "created"]
        pieces = {} if created else self._pieces()
        for key, piece in pieces.items():
            self._texts[key] = self._texts[key][len(piece) :]
        self._texts = {key: text for key, text in self._texts.items() if text}
        bodies = created or self._endings(bool(pieces))
        self._bodies = [body for body in self._bodies if body not in bodies]
        for _, participant, message_id, _ in created if self._pace.tick else ():
            if participant:
                self._blind[message_id] = participant
        number = self.log.last + 1
        entries = [
            Entry(number + place, number + place, "chunk", side, message_id, piece)
            for place, ((side, message_id), piece) in enumerate(pieces.items())
        ]
        for kind, side, message_id, body in bodies:
            place = number + len(entries)
            entries.append(Entry(place, place, kind, side, message_id, "", body))
        if self._done and not self._texts and not self._bodies:
            place = number + len(entries)
            entries.append(Entry(place, place, "end"))
        if entries and self._skip:
            entries = _moved(entries, self._skip)
            self._skip = 0
        return entries

    def _pieces(self) -> dict[tuple[str, str], str]:
        """The text that leaves now, by side. A blind battle moves both sides in step or not at all."""
        if not self._pace.tick:
            return dict(sorted(self._texts.items()))
        chars, said = self._pace.chars, {id: text for (_, id), text in self._texts.items()}
        # one character is kept back until the reply is over: the last piece and the ending must leave together
        if not all(id in self._over or len(said.get(id, "")) > chars for id in self._blind):
            return {}
        if said and not self._ended and not self._failed:
            # the silence before a failure is no pace: the other side would take minutes for what it has
            self._last_tick = self._sent_at
            self._first_tick = self._first_tick or self._last_tick
            self._ticks += 1
        return {key: text[:chars] for key, text in sorted(self._texts.items())}

    def _endings(self, moved: bool) -> list[tuple[str, str, str, msgspec.Raw]]:
        """Each reply's ending, once its text is out; in a blind battle in the order of the sides, in step."""
        unsaid = {id for _, id in self._texts}
        endings = [body for body in self._bodies if body[2] not in unsaid]
        if not self._blind:
            return endings
        ended = {id for id in self._blind if id in self._over and id not in unsaid} - self._ended
        still = self._blind.keys() - self._ended - ended
        ready = {body[2] for body in endings} >= ended and (moved or all(self._moves(id) for id in still))
        if not ready:
            return []
        self._ended |= ended
        return sorted(endings, key=lambda body: body[1])

    def _moves(self, message_id: str) -> bool:
        text = self._texts.get((self._blind[message_id], message_id), "")
        return message_id in self._over or len(text) > self._pace.chars

    # -- Redis

    def send(self) -> bool:
        """Send everything Redis may lack, unless a batch is under way. Whether showing waits for the answer."""
        if self._bus is None or self._flying:
            return False
        missing = self.log.entries[self._first_missing() :]
        if not missing:
            return False
        lifetime, now = 0, time.monotonic()
        if self.log.closed or now - self._renewed > self._pace.kept / 2:
            lifetime, self._renewed = int(self._pace.kept * 2), now
        self._flying = self._waiting = True
        self._patience.begin(self, now)
        self._sent = missing[-1].seq
        self._bus.append(self._key, self._channel, encode(Said(self.log.id, missing)), lifetime, self._answered)
        return self._waiting

    def _first_missing(self) -> int:
        place = len(self.log.entries)
        while place and self.log.entries[place - 1].seq > self._acked:
            place -= 1
        return place

    def _answered(self, answer: Any) -> None:
        self._patience.end(self)
        self._flying = False
        if isinstance(answer, Exception):
            self.late()
            return
        self._acked = max(self._acked, self._sent)
        self.late()
        if self._acked < self.log.last and self.log.shown == self.log.last:
            self.send()  # what was said while Redis hung; nothing else may come to carry it

    def late(self) -> None:
        """Show what is on its way: Redis has it, or takes too long."""
        if not self._waiting:
            return
        self._waiting = False
        if self._gone:
            self._shown.set()
            return
        self.show()
        if self._texts:
            self._hurry()

    def resend(self) -> None:
        """Redis is back, perhaps empty: say everything again, readers drop what they know."""
        self._acked, self._renewed = -1, 0.0
        self.send()


def _moved(entries: list[Entry], by: int) -> list[Entry]:
    """The entries renumbered so many higher; the first covers the hole."""
    moved = [msgspec.structs.replace(each, seq=each.seq + by, from_seq=each.from_seq + by) for each in entries]
    return [msgspec.structs.replace(moved[0], from_seq=entries[0].from_seq), *moved[1:]]


def log_key(turn_id: str) -> str:
    return f"parley:turn:{turn_id}"
