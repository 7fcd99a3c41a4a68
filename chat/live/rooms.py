"""One process's copy of what a session is saying, and those who read it here.

A room keeps turn logs; a follower keeps a cursor into them, not a queue, so that a slow reader costs nothing and gets
fewer, larger events. What a room may have missed (a gap in the numbers, a bus that was away, a running turn gone
silent) its relay reads again from Redis, or else from storage.
Knows nothing of sockets: a follower is asked for frames and gives bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from itertools import dropwhile
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ..errors import ChatError
from ..store import turns
from ..store.database import StorageUnavailable
from ..store.queries import Row
from .bus import GAP
from .events import ENDED, Dialect, Notice, Said, Stop, TurnLog, decode_bus

if TYPE_CHECKING:
    from .relay import Relay  # who opens a room is asked by it for what it missed

NOTICES_KEPT = 32  # session events waiting for one reader; an older typing indicator is worth nothing


class Direct(Protocol):
    """A socket, or an answer's body, that can be written to without a task."""

    @property
    def blocked(self) -> bool: ...

    def write(self, frames: bytes) -> None: ...


class Sleeper:
    """One that waits for news. Not by an `asyncio.Event`: that is 0.8 KB for each of whom there is nothing to say."""

    _asleep: asyncio.Future[None] | None = None

    async def sleep(self) -> None:
        """Wait until roused; whoever looks for news first and sleeps then misses none."""
        self._asleep = asyncio.get_running_loop().create_future()
        await self._asleep

    def rouse(self) -> None:
        if self._asleep is not None and not self._asleep.done():
            self._asleep.set_result(None)


class Follower(Sleeper):
    """One reader of a room: a cursor (`log`, `seq`) and the session events it has not taken yet."""

    def __init__(self, room: Room, dialect: Dialect, account_id: str = "") -> None:
        self.room = room
        self.dialect = dialect
        self.account_id = account_id
        self.log: TurnLog | None = None
        self.seq = -1
        self.lost = False  # it needs a snapshot before anything else
        self.inexact = False  # its cursor lies inside a run: text from there would come twice
        self.of_turn = False  # it reads one turn and nothing else
        self.over = False  # this worker ends: its reader is to come back to another
        self.direct: Direct | None = None  # written to at once while it keeps up
        self.wrap: Callable[[bytes], bytes] = bytes  # what the dialect does to a session event
        self.sign_of_life = b""  # what a reader of one turn is to be told next, whatever else there is
        self._busy = True  # its own coroutine is speaking: nobody else may
        self.notices: list[bytes] = []

    def wake(self) -> None:
        """There is something new. A reader in step that can be written to is, here; others are told."""
        direct = self.direct
        if direct is None or direct.blocked or self.of_turn or not self.idle:
            self.rouse()
            return
        for frames in self.take():
            direct.write(frames)

    def note(self, notice: bytes) -> None:
        """Have a session event said."""
        self.notices = [*self.notices, notice][-NOTICES_KEPT:]
        self.wake()

    def nudge(self, said: bytes) -> None:
        """Have a reader of one turn say this between two events."""
        self.sign_of_life = said
        self.rouse()

    def hang_up(self) -> None:
        """Have its coroutine say what there is and then raise `draining`."""
        self.over = True
        self.rouse()

    @property
    def idle(self) -> bool:
        """Whether its coroutine waits for news and has nothing of its own to say first."""
        return not (self._busy or self.lost or self.inexact or self.notices)

    async def next(self) -> list[bytes]:
        """Wait until there is something to say and return all of it, merged; nothing when the reader is `lost`.

        Raises `draining` once there is nothing left and will be no more.
        """
        self._busy = False
        while not self.lost and not (frames := self.take()):
            await self._news()
        self._busy = True
        return [] if self.lost else frames

    async def next_of_turn(self) -> list[bytes]:
        """Like `next`, for a reader of one turn: an empty list when the turn has been said to its end."""
        while self.log is not None:
            if self.sign_of_life:
                said, self.sign_of_life = self.sign_of_life, b""
                return [said]
            if self.inexact and self.log.ended:
                entries, self.seq, self.inexact = self.log.endings(self.seq), self.log.shown, False
                return self.dialect(self.log, entries)
            if self.seq < self.log.shown and not self.inexact:
                return self._advance()
            if self.log.ended:
                break
            self._busy = False
            await self._news()
            self._busy = True
        return []

    async def _news(self) -> None:
        if self.over:
            raise ChatError("draining", "The service is restarting. Please come back in a moment.", retry_after=1)
        await self.sleep()

    def take(self) -> list[bytes]:
        frames = [self.wrap(notice) for notice in self.notices]
        self.notices = []
        if self.log is None and self.room.logs:
            self.log, self.seq = self.room.logs[0], -1
        while self.log is not None:
            if self.seq < self.log.shown:
                frames += self._advance()
            if not self.log.ended or self.log.next is None:
                break
            self.log, self.seq = self.log.next, -1
        return frames

    def _advance(self) -> list[bytes]:
        assert self.log is not None
        frames = self.log.frames(self.seq, self.dialect)
        self.seq = self.log.shown
        return frames

    @property
    def lag(self) -> int:
        """Events said and not taken yet."""
        return 0 if self.log is None else self.log.shown - self.seq


class Room:
    """One process's copy of what a session is saying."""

    def __init__(self, relay: Relay, session_id: str) -> None:
        self.relay = relay
        self.session_id = session_id
        self.channel = f"parley:session:{session_id}"
        self.logs: list[TurnLog] = []
        self.followers: set[Follower] = set()
        self.writing = 0  # turns this process owns here
        self.before = ""  # the turn that had ended when this room opened; what came after it readers have to be told
        self._early: list[Said] | None = []  # what is heard before the first read is done
        self._subscription: AbstractAsyncContextManager[Any] | None = None
        self._pump: asyncio.Task[None] | None = None
        self._repairing: asyncio.Task[None] | None = None
        self._again = False
        self._reading = asyncio.Lock()

    # -- opening and closing, under the relay's lock of this session

    async def open(self, own: str = "") -> None:
        """own: the turn it is opened for, which this process is about to begin: there is nothing to read of it."""
        self._subscription = self.relay.broadcast.subscribe(self.channel)
        subscriber = await self._subscription.__aenter__()
        self._pump = asyncio.create_task(self._listen(subscriber))
        try:
            await self._load(own)
        except BaseException:
            await self.close()
            raise

    async def _load(self, own: str) -> None:
        self.before = own  # what is read again before it begins starts there, not at the session's first turn
        latest = None if own else await turns.select_latest_turn(self.relay.database, self.session_id)
        if latest is not None and (latest["status"] == "running" or latest["id"] in self.relay.writers):
            await self.relay.bring(self, latest)
        elif latest is not None:
            self.before = latest["id"]
        early, self._early = self._early or [], None
        for said in early:
            self._said(said)
        if self._again:
            self.repair()

    async def close(self) -> None:
        for task in (self._pump, self._repairing):
            if task is not None:
                task.cancel()
        self._pump = self._repairing = None  # a task that was cancelled keeps its frame, which keeps the room
        if self._subscription is not None:
            await self._subscription.__aexit__(None, None, None)

    # -- hearing

    async def _listen(self, subscriber: Any) -> None:
        while True:
            self._hear((await subscriber.get()).message)

    def _hear(self, payload: str) -> None:
        if payload == GAP:
            self.repair()
            return
        try:
            message = decode_bus(payload if payload.startswith("[") else payload[len(self.relay.origin) :])
        except msgspec.DecodeError:
            self.relay.count("foreign")
            return
        if isinstance(message, Said):
            if self._early is None:
                self._said(message)
            else:
                self._early.append(message)
        elif isinstance(message, Notice):
            self.notice(message)
        elif isinstance(message, Stop):
            self.relay.on_stop(message.turn_id)

    def _said(self, said: Said) -> None:
        if said.turn_id in self.relay.writers:
            return
        turn_log = self.find(said.turn_id)
        if turn_log is None:
            first = said.entries[0] if said.entries else None
            # Said again after an outage it may be an older turn; only storage knows the order.
            next_one = first is not None and first.kind == "created" and not first.from_seq
            if not next_one or said.turn_id <= self.newest or self._behind:
                self.repair()
                return
            turn_log = TurnLog(said.turn_id)
            self.add(turn_log)
        if not turn_log.append(said.entries):
            self.repair()
        if turn_log.show():
            self.notify()

    def notice(self, notice: Notice) -> None:
        for follower in self.followers:
            if not follower.of_turn and (not notice.account_id or follower.account_id != notice.account_id):
                follower.note(notice.json.encode())

    def notify(self) -> None:
        """Say what is new: the same bytes, at once, to everyone in step; the others are woken."""
        turn_log = self.logs[-1] if self.logs else None
        shown = turn_log.shown if turn_log is not None else -1
        seq, dialect, said = shown, None, b""
        pieces: dict[tuple[int, Dialect], bytes] = {}  # not kept: of hundreds of turns it would fill the cache
        for follower in self.followers:
            direct = follower.direct
            if direct is None or direct.blocked or follower.log is not turn_log or not follower.idle:
                follower.wake()
            elif follower.seq < shown:
                if follower.seq != seq or follower.dialect is not dialect:
                    seq, dialect = key = follower.seq, follower.dialect
                    if key not in pieces:  # -1 < -1 is false: there is a log
                        pieces[key] = b"".join(dialect(turn_log, turn_log.after(seq)))  # type: ignore[union-attr, arg-type]
                    said = pieces[key]
                follower.seq = shown
                direct.write(said)
                if follower.of_turn and turn_log.ended:  # type: ignore[union-attr]
                    follower.wake()  # that was all it came for

    # -- logs

    def find(self, turn_id: str) -> TurnLog | None:
        return next((each for each in self.logs if each.id == turn_id), None)

    def add(self, turn_log: TurnLog) -> None:
        """Put the next turn's log behind the others and drop those nobody can resume any more.

        Logs are those of turns that follow one another: one left out here no reader would ever be told.
        """
        then = time.monotonic() - self.relay.settings.log_kept
        behind = bool(self.logs) and not self.logs[-1].ended
        if self.logs:
            self.logs[-1].next = turn_log  # before it is dropped: readers stand in it and go on from there
        kept = dropwhile(lambda each: each.ended and each.ended_at <= then, self.logs)
        self.logs = [*kept, turn_log]
        if behind:
            self.repair()  # one turn runs at a time: the one before has ended, which this room has not heard

    def put_before(self, older: list[TurnLog]) -> None:
        """Bring in the logs of the turns right before those that are here, for the sake of an older cursor."""
        for follower in self.followers:
            if follower.log is None:  # it waits for what comes next and knows these
                follower.log, follower.seq = older[-1], older[-1].shown
        self.logs = older + self.logs
        for each, following in zip(self.logs, self.logs[1:], strict=False):
            each.next = following

    @property
    def running(self) -> TurnLog | None:
        """The log of the turn that is being said, if one is."""
        return self.logs[-1] if self.logs and not self.logs[-1].ended else None

    def agrees(self, rows: list[Row]) -> bool:
        """Whether stored messages and what this room has heard can be told as one: neither knows of more turns.

        Only of the newest turn may storage know less or more: the log says how far its readers are.
        """
        if not rows:
            return True
        running = self.running
        for row in rows:
            ended = row["status"] in ENDED or row["role"] == "user"
            if row["turn_id"] != self.newest:
                if not ended:
                    return False  # it has ended since the rows were read
            elif running is not None and row["status"] in ENDED and running.ending(row["id"]) is None:
                return False
        return rows[-1]["turn_id"] == self.newest or self.find(rows[-1]["turn_id"]) is not None

    # -- repair

    def repair(self) -> None:
        """Read again what may have been missed; once more afterwards if asked meanwhile."""
        self._again = True
        if self._early is None and (self._repairing is None or self._repairing.done()):
            self._repairing = asyncio.create_task(self._repair())

    async def _repair(self) -> None:
        while self._again:
            self._again = False
            try:
                await self.read_again()
            except StorageUnavailable:
                self._again = True
                return  # the next beat or gap asks again

    @property
    def unrepaired(self) -> bool:
        """Whether something may have been missed and could not be read yet."""
        return self._again

    @property
    def _behind(self) -> bool:
        """Whether a turn before the next one may still have to be read."""
        return self._again or self._reading.locked()

    @property
    def newest(self) -> str:
        return self.logs[-1].id if self.logs else self.before

    async def read_again(self) -> None:
        """Bring in what storage or Redis know beyond this room. Turns that begin meanwhile wait for it to end."""
        async with self._reading:
            await self._read_again()
        self.notify()

    async def _read_again(self) -> None:
        oldest = next((each.id for each in self.logs if not each.ended), self.newest)
        while True:
            rows = await turns.select_turns_since(self.relay.database, self.session_id, oldest)
            for row in rows:
                if row["id"] in self.relay.writers or row["id"] == self.before:
                    continue
                if await self.relay.bring(self, row):
                    self.relay.count("gaps_filled")
            if len(rows) < turns.AT_ONCE:
                return
            oldest = rows[-1]["id"]

    async def begin(self, turn_id: str) -> TurnLog:
        """The log of a turn that this process writes, after what may be missing before it.

        What is being read again may have found the turn, whose row is there already: it gets one log, not two.
        """
        async with self._reading:
            if self._again:
                await self._read_again()
            self.before = ""  # it was this turn; should another worker take it, its words are read like any other's
            turn_log = self.find(turn_id)
            if turn_log is None:
                turn_log = TurnLog(turn_id)
                self.add(turn_log)
            return turn_log
