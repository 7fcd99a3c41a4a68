"""The way of a running turn's text from its owner to the readers: first to Redis, then to this worker's room.

Text gathers while one piece is on its way to Redis and leaves with the next, in one write with the pieces of other
turns: an idle system forwards each token at once, a loaded one sends larger pieces. With Redis a piece is shown here
when Redis has it, so that text a reader saw outlives this process; a Redis that does not answer within `relay_ack`
seconds costs the readers of other workers time, not ours.

In Redis a reply is one string of pieces, each with its offset: readers know where a hole begins that a refused `APPEND`
or a lost value left. `APPEND` answers the length: a hole is noticed with the next piece and repaired by one `SET`. A
Redis that refuses writes is never sent the same text again.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from functools import partial

from ..formats.tellings import Message
from .answers import Answer, Piece
from .bus import Gather, RedisBus
from .events import BusMessage, ReplyEnded, TurnBegun, TurnWords, encode

KEEP = 900  # seconds that Redis keeps the text of a running turn: longer than any reply may take (`reply_timeout`)
KEEP_ENDED = 60  # seconds after the end, for rooms that still read; the database has the whole text by then
PIECE = re.compile(r"\0([0-9]{1,9})\0([^\0]*)")  # a piece in Redis: its offset and its text, which holds no NUL
REPAIR_EVERY = 1.0  # seconds between two SETs of a reply, which send its whole text: Redis may evict all the time


class Voice:
    """The output of a turn. `say` never waits; `settled` waits until readers have been shown all of its text."""

    def __init__(
        self,
        answer: Answer,
        notify: Callable[[], None],
        publish: Callable[[BusMessage], None],
        owned: Callable[[], bool],
        gather: Gather,
        *,
        bus: RedisBus | None,
        channel: str,
    ) -> None:
        """notify: has the room tell its followers; publish: sends a message to the rooms of other workers.

        owned: whether text may leave now, or only after the database has confirmed the ownership.
        """
        self.answer = answer
        self._owned = owned
        self._notify = notify
        self._publish = publish
        self._gather = gather
        self._bus = bus
        self.channel = channel
        self._keys = {} if bus is None else {side: text_key(bus, answer.turn_id, side) for side in answer.replies}
        self._sent = {side: len(reply.text) for side, reply in answer.replies.items()}  # characters
        self._bytes = dict.fromkeys(answer.replies, 0)  # of the same in Redis
        self._confirmed = dict.fromkeys(answer.replies, 0)  # characters that Redis has said it has
        self._unsent = dict.fromkeys(answer.replies, "")
        self._flying: list[Piece] = []  # sent to Redis, not shown yet
        self._unanswered = 0  # texts that Redis has not answered
        self._asked_at = 0.0  # monotonic: when they were sent
        self._forgotten: set[str] = set()  # sides of which Redis has less than it was sent
        self._silent = False
        self._kept = False  # an EXPIRE has told Redis how long to keep the texts
        self._repaired_at = dict.fromkeys(answer.replies, 0.0)  # monotonic
        self._moved = asyncio.Event()  # set when text was shown or dropped

    # -- what generation calls

    def begin(self) -> None:
        """Tell the readers on other workers that the turn has begun; the room here knows."""
        answer = self.answer
        self._publish(TurnBegun(answer.turn_id, answer.position, answer.previous, answer.messages))

    def say(self, side: str, text: str) -> None:
        self._unsent[side] += text
        self.hurry()

    def end(self, side: str, message: Message) -> None:
        """Publish a reply's ending. The text must be settled, and the database must hold the ending."""
        self.answer.learn_ending(side, message)
        self._publish(ReplyEnded(self.answer.turn_id, side, message))
        if self.answer.over and self._bus is not None:
            for side in self.answer.replies:
                self._bus.command("EXPIRE", self._keys[side], KEEP_ENDED)
        self._notify()

    def cut(self, side: str) -> None:
        """Drop the text of a stopped reply that no reader has seen and that is not on its way.

        Text that was shown while Redis was late stays: Redis is still to get it.
        """
        self._unsent[side] = self.answer.replies[side].text[self._sent[side] :]
        self._moved.set()

    def fall_silent(self) -> None:
        """Another worker owns the turn: nothing more leaves here, and nobody waits for it."""
        self._silent = True
        self._moved.set()

    async def settled(self, side: str) -> None:
        """Wait until all text of a reply is shown."""
        reply = self.answer.replies[side]
        while not self._silent and len(reply.text) < self._sent[side] + len(self._unsent[side]):
            self._moved.clear()
            await self._moved.wait()

    @property
    def safe(self) -> bool:
        """Whether Redis has all text that was shown, so that the text outlives this process."""
        if self._bus is None or not self._bus.connected:
            return False
        return all(len(reply.text) <= self._confirmed[side] for side, reply in self.answer.replies.items())

    def restore(self) -> None:
        """Send Redis the whole texts once: Redis is back, perhaps empty."""
        if not self._silent:
            for side in self._sent:
                self._set(side)

    # -- how text leaves

    def hurry(self) -> None:
        """Have pending text leave as soon as it may."""
        if self._unanswered and not self._flying:  # `show_late` has shown what Redis has not answered
            self._show()  # readers of this worker do not wait for Redis any more
        elif not self._unanswered:
            self._gather.soon(self._leave)

    def _leave(self) -> None:
        if self._unanswered or self._silent or not self._owned():
            return
        pieces = [(side, self._sent[side], text) for side, text in self._unsent.items() if text]
        if not pieces:
            return
        for side, _, text in pieces:
            self._sent[side] += len(text)
            self._unsent[side] = ""
        self._flying = pieces
        if self._bus is None:
            self._show()
        else:
            self._send(self._bus, pieces)

    def _send(self, bus: RedisBus, pieces: list[Piece]) -> None:
        self._unanswered = len(pieces)
        self._asked_at = time.monotonic()
        for side, offset, text in pieces:
            data = piece(offset, text)
            self._bytes[side] += len(data)
            bus.ask(partial(self._answered, side), "APPEND", self._keys[side], data)
        bus.tell(self.channel, encode(TurnWords(self.answer.turn_id, pieces)))
        if not self._kept:
            self._kept = True
            for side in self._sent:
                bus.command("EXPIRE", self._keys[side], KEEP)

    def _answered(self, side: str, length: int | Exception) -> None:
        self._unanswered -= 1
        if length == self._bytes[side]:
            self._confirmed[side] = self._sent[side]
        elif not isinstance(length, Exception):
            self._forgotten.add(side)
        if self._unanswered:
            return
        self._show()
        while self._forgotten:
            self._repair(self._forgotten.pop())
        if any(self._unsent.values()):
            self.hurry()

    def show_late(self, seconds: float) -> None:
        """Show all pending text if Redis has kept it waiting for so long."""
        if self._flying and time.monotonic() - self._asked_at >= seconds:
            self._show()

    def _show(self) -> None:
        flying, self._flying = self._flying, []
        if not self._silent:
            for side, offset, text in flying:
                self.answer.learn_words(side, offset, text)
            if self._unanswered and self._owned():
                for side, text in self._unsent.items():
                    self.answer.learn_words(side, self._sent[side], text)
            self._notify()
        self._moved.set()

    # -- a Redis that forgot

    def _repair(self, side: str) -> None:
        """Send Redis a reply's whole text, at most once a second: the answer to a later piece asks for it again."""
        now = time.monotonic()
        if now - self._repaired_at[side] > REPAIR_EVERY:
            self._repaired_at[side] = now
            self._set(side)

    def _set(self, side: str) -> None:
        data = piece(0, self.answer.replies[side].text[: self._sent[side]])
        self._bytes[side], self._confirmed[side] = len(data), 0
        if self._bus is not None:
            self._bus.command("SET", self._keys[side], data, "EX", KEEP)


def text_key(bus: RedisBus, turn_id: str, side: str) -> str:
    """Return the Redis key of a reply's text so far."""
    return bus.name("pieces", turn_id, side)


def piece(offset: int, text: str) -> bytes:
    """Return text as it is appended to a reply's value in Redis. offset: characters of the reply before it."""
    return f"\0{offset}\0{text}".encode()


def joined(known: str, value: bytes) -> str:
    """Return the known text of a reply, prolonged by the pieces of its value in Redis up to the first hole."""
    for offset, text in PIECE.findall(value.decode(errors="replace")):
        if int(offset) > len(known):
            break
        known += text[len(known) - int(offset) :]
    return known
