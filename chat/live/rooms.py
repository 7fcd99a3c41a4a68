"""A process's view of a session: the answer of the latest turn, and the followers that read it here.

A follower holds only a cursor, so a slow reader costs nothing and gets fewer, larger events. A follower that is behind
an older turn is told the rest of that turn from the database before it goes on. A room that may have missed something
(words that begin beyond its text, a bus that was away, a running turn that fell silent) learns again from Redis and
the database. A room knows nothing of sockets: its followers turn tellings into bytes and write them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

import msgspec

from ..direct import Direct, Sleeper
from ..errors import ChatError
from ..formats.tellings import Dialect, Telling
from ..store.database import StorageUnavailable
from ..store.rights import Right
from ..store.sessions import Session
from .answers import NOTHING, Answer, Cursor, start_of
from .events import (
    BusMessage,
    LearnAgain,
    ReplyEnded,
    RightsChanged,
    SessionNotice,
    StopTurn,
    TurnBegun,
    TurnWords,
    decode_bus,
)
from .source import Past, Source

log = logging.getLogger("parley.rooms")

NOTICES_MAX = 32  # session events waiting for one reader; the oldest passing one is dropped first
AHEAD_MAX = 1_000  # messages of words kept while the text before them is missing here
LEARN_EVERY = 0.25  # seconds between two attempts to learn again
STORAGE_RETRY = 0.5  # seconds until a follower that is behind asks the database again


class Follower(Sleeper):
    """A reader of a room: its cursor, and the session events it has not been told yet."""

    __slots__ = (
        "_busy", "_notices", "cursor", "dialect", "direct", "ended", "one_turn", "polls", "right", "room",
        "starts_over", "version", "wrap",
    )  # fmt: skip

    def __init__(self, room: Room, dialect: Dialect, right: Right, *, one_turn: bool = False) -> None:
        """right: is checked again when rights change; one_turn: the follower reads one turn and nothing else."""
        self.room = room
        self.dialect = dialect
        self.right = right
        self._asleep = None
        self.version = right.session.version  # the highest version of the session that the reader knows
        self.cursor: Cursor = NOTHING
        self.one_turn = one_turn
        self.polls = False  # the reader takes everything there is now and leaves
        self.starts_over = False  # the turn of the cursor is gone, too many events wait, or the client has asked for it
        self.ended: ChatError | None = None  # the error with which the follower is sent away
        self.direct: Direct | None = None  # the room writes to this connection while the reader keeps up
        self.wrap: Callable[[bytes], bytes] = bytes  # makes the bytes of a session event, as `dialect` does of a turn's
        self._busy = True  # the reader's own coroutine is writing: the room must not write beside it
        self._notices: list[tuple[bool, int, bytes]] = []  # each with whether it passes, and its version or 0

    # -- what the room does

    @property
    def idle(self) -> bool:
        """Whether the reader's coroutine waits for news and has nothing of its own to write first."""
        return not (self._busy or self.starts_over or self._notices or self.ended)

    def tell(self, notice: SessionNotice) -> None:
        """Tell a session event, unless the reader may not see it or knows of it.

        Notices of two workers come in any order: a reader would keep the state of an older one that comes last.
        """
        if 0 < notice.version <= self.version:
            return
        self.version = max(self.version, notice.version)
        said = notice.json if self.right.member else notice.public_json
        caused = notice.author and self.right.account_id == notice.author
        if said and not (caused or self.one_turn):
            self.note(said.encode(), passing=bool(notice.author), version=notice.version)

    def note(self, notice: bytes, *, passing: bool = False, version: int = 0) -> None:
        """Write an event that belongs to no turn, or queue the event for a reader that does not keep up.

        Passing events (typing, signs of life) are the first to be dropped from the queue. version: of the session.
        """
        if self.direct is not None and not self.direct.blocked and self.idle:
            self.direct.write(self.wrap(notice))
            return
        self._notices.append((passing, version, notice))
        if len(self._notices) > NOTICES_MAX:
            old = next((n for n, (passes, *_) in enumerate(self._notices) if passes), None)
            if old is None:
                self.starts_over = True  # a snapshot says all that these events say
            del self._notices[old or 0]
        self.rouse()

    def catch_up(self, version: int) -> None:
        """Drop the events that a snapshot of this version of the session makes old."""
        self.version = max(self.version, version)
        self._notices = [each for each in self._notices if not 0 < each[1] <= version]

    def start_over(self) -> None:
        """Have `next` return at once: the reader's coroutine goes on from somewhere else."""
        self.starts_over = True
        self.rouse()

    def send_away(self, problem: ChatError) -> None:
        """Have `next` raise `problem`: at once, or for `draining`, after everything known was told."""
        self.ended = self.ended or problem
        self.rouse()

    # -- what the reader's coroutine does

    async def next(self) -> list[bytes]:
        """Wait until there is something to tell and return all of it.

        Empty when the follower starts over, and at the end of its one turn; for a poll, when there is nothing more to
        tell now. Raises the error with which the follower is sent away.
        """
        while True:
            if self.ended is not None and self.ended.code != "draining":
                raise self.ended
            if self.starts_over:
                return []
            own, owed = self._take_notices(), await self._owed()
            if frames := own + (owed or []):
                return frames
            if self.ended is not None:
                raise self.ended
            if self.polls or (self.one_turn and self.cursor.over and owed is not None):
                return []
            if owed is None:
                continue
            self._busy = False
            await self.sleep()
            self._busy = True

    def _take_notices(self) -> list[bytes]:
        notices, self._notices = self._notices, []
        return [self.wrap(notice) for *_, notice in notices]

    async def _owed(self) -> list[bytes] | None:
        """Return the bytes to tell now: of the room's answer, or else of the older turn the cursor is in.

        None: call again. Storage was away or had nothing new, the cursor was moved meanwhile, or its turn is gone.
        """
        answer = self.room.answer
        if self.room.in_step(self):
            assert answer is not None
            tellings, self.cursor = answer.owed(self.cursor)
            return self.dialect(answer.turn_id, tellings) if tellings else []
        if self.one_turn and self.cursor.over:
            return []
        if answer is None and self.cursor.turn_id == "":
            return []
        return await self._owed_from_storage()

    async def _owed_from_storage(self) -> list[bytes] | None:
        """Tell the rest of an older turn, then go on to the turn after it."""
        cursor = self.cursor
        try:
            answer, next_id, _ = await self.room.past(cursor.turn_id)
        except StorageUnavailable:
            await asyncio.sleep(STORAGE_RETRY)
            return None
        if self.cursor is not cursor:
            return None  # the room has moved the follower meanwhile
        if cursor.turn_id and (answer is None or not answer.fits(cursor)):
            self.starts_over = True
            return None
        tellings: list[Telling] = []
        if answer is not None:
            tellings, self.cursor = answer.owed(cursor)
        if self.cursor.over and next_id and not self.one_turn:
            self.cursor = start_of(next_id)
        elif not tellings:
            # The reader has all that the database has: the room has to learn which turn is the latest.
            self.room.learn_again()
            await asyncio.sleep(LEARN_EVERY)
        return self.dialect(cursor.turn_id, tellings) if tellings else None


class Room:
    """A process's view of a session. The room belongs to the session, not to its id: an id may be used again."""

    def __init__(self, source: Source, session: Session, channel: str) -> None:
        self.session = session
        self.channel = channel
        self.answer: Answer | None = None  # of the latest turn
        self.followers: set[Follower] = set()
        self.writing = 0  # turns of this session that this process answers
        self.version = session.version  # the highest version of the session that is known here
        self.news_at = time.monotonic()  # when the last message about a turn came
        self._source = source
        self._ahead: deque[TurnWords] = deque(maxlen=AHEAD_MAX)  # words that cannot be learned yet
        self.subscribed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.listening: asyncio.Task[None] | None = None  # the relay's: it brings the messages of the channel
        self._learning: asyncio.Task[None] | None = None
        self._again = False  # something may have been missed since the last learning began
        self._rights_due = False  # followers are to be admitted again after the next learning
        self._loaded: asyncio.Task[None] | None = None  # the first learning
        self._pasts: dict[str, asyncio.Task[Past]] = {}  # readings of older turns that go on now, by the turn's id

    # -- opening and closing

    async def load(self) -> None:
        """Read the latest turn, once for all who join. Raises `not_found`, `StorageUnavailable`.

        A turn that this worker answers is the latest one. A turn that the bus has brought may be an old one.
        """
        if self.writing and self.answer is not None and not self.answer.over:
            return
        if self._loaded is None or (self._loaded.done() and self._loaded.exception() is not None):
            self._loaded = self._source.tasks.spawn(self.learn())
        await asyncio.shield(self._loaded)

    def close(self) -> None:
        for task in (self.listening, self._learning):
            if task is not None:
                task.cancel()
        self.listening = self._learning = self._loaded = None

    # -- learning

    def hear(self, payload: str) -> None:
        """Learn from one message of the bus. Never raises: the room would hear nothing more."""
        try:
            self.take(decode_bus(payload))
        except msgspec.DecodeError:
            self._source.count("foreign")
        except Exception:
            log.exception("a message of the bus could not be learned from")
            self._source.count("foreign")
            self.learn_again()

    def take(self, message: BusMessage) -> None:
        """Learn from a message, or do what it asks for."""
        match message:
            case TurnWords():
                self._words(message)
            case TurnBegun(turn_id, position, previous, messages):
                self.learn_turn(Answer(turn_id, position, previous, messages))
            case ReplyEnded(turn_id, side, ending):
                if (answer := self._answer_or_learn(turn_id)) is not None:
                    answer.learn_ending(side, ending)
                    self.notify()
            case SessionNotice():
                self.tell(message)
            case RightsChanged():
                self.check_rights()
            case LearnAgain():
                self._rights_due = True  # the news that a right has ended may have been lost as well
                self.learn_again()
            case StopTurn(turn_id):
                self._source.on_stop(turn_id)

    def _answer_or_learn(self, turn_id: str) -> Answer | None:
        """Return the room's answer if it is of this turn. Otherwise the beginning of that turn may have been missed."""
        self.news_at = time.monotonic()
        if self.answer is not None and self.answer.turn_id == turn_id:
            return self.answer
        self.learn_again()
        return None

    def _words(self, words: TurnWords) -> None:
        answer = self._answer_or_learn(words.turn_id)
        if answer is None or not answer.learn_pieces(words.pieces):
            self._ahead.append(words)
            self.learn_again()
        self.notify()

    def learn_turn(self, answer: Answer) -> Answer:
        """Learn a turn. A later turn takes the place of the room's; an older turn changes nothing.

        Returns the room's answer when the turn is the room's already, else the given answer.
        """
        self.news_at = time.monotonic()
        if self.answer is not None and answer.turn_id == self.answer.turn_id:
            self.answer.learn(answer)
            answer = self.answer
        elif self.answer is None or answer.position > self.answer.position:
            self.answer = answer
        self.notify()
        return answer

    def learn_again(self) -> None:
        """Start learning from Redis and the database. Calls that come while it goes on cause one more round."""
        self._again = True
        if self._learning is None or self._learning.done():
            self._learning = self._source.tasks.spawn(self._keep_learning())

    async def _keep_learning(self) -> None:
        while self._again:
            self._again = False
            self._source.count("gaps_filled")
            try:
                await self.learn()
            except StorageUnavailable:
                self._again = True
            except ChatError:
                return  # the session is gone, and its followers are sent away
            else:  # storage answers now: without it the check would fail, and a right that ended would stay
                if self._rights_due:
                    self._rights_due = False
                    self.check_rights()
            await asyncio.sleep(LEARN_EVERY)

    async def learn(self) -> None:
        """Learn from the database and Redis. Raises `not_found`, `StorageUnavailable`."""
        try:
            session, answer = await self._source.latest(self.session)
        except ChatError as problem:
            if problem.code == "not_found":
                self.send_away(ChatError("not_found", "There is no such session."))
            raise
        if answer is not None:
            await self._source.learn_from_redis(answer)
            self.learn_turn(answer)
        ahead = list(self._ahead)
        self._ahead.clear()
        for words in ahead:
            current = self.answer
            if current is None or words.turn_id != current.turn_id or current.learn_pieces(words.pieces):
                continue
            self._ahead.append(words)
            self._again = True
        self._compare(session)
        self.notify()

    def _compare(self, session: Session) -> None:
        """Tell followers of a change in the session's row whose notice may have been lost."""
        before = self.session
        if session.version < before.version:
            return  # another reading began later and ended earlier
        self.session = session
        if session.version > self.version:
            self.tell(self._source.change_of(before, session))

    async def past(self, turn_id: str) -> Past:
        """Read an older turn, once for all followers that ask meanwhile."""
        if turn_id not in self._pasts:
            task = self._pasts[turn_id] = self._source.tasks.spawn(self._source.past(self.session, turn_id))
            task.add_done_callback(lambda _: self._pasts.pop(turn_id, None))
        return await asyncio.shield(self._pasts[turn_id])

    @property
    def silent_since(self) -> float:
        """The time of the last message of a turn that runs elsewhere; infinity when no such turn runs."""
        waiting = self._again or (self.answer is not None and not self.answer.over and not self.writing)
        return self.news_at if waiting else float("inf")

    # -- telling

    def in_step(self, follower: Follower) -> bool:
        """Whether the follower reads the room's answer, to which it goes on from the end of the turn before."""
        answer, cursor = self.answer, follower.cursor
        if answer is None:
            return False
        if cursor.turn_id == answer.turn_id:
            return answer.fits(cursor)
        if cursor.over and cursor.turn_id == answer.previous and not follower.one_turn:
            follower.cursor = start_of(answer.turn_id)
            return True
        return False

    def notify(self) -> None:
        """Send new text to all followers that keep up: bytes are made once for each cursor; wake the others."""
        answer = self.answer
        if answer is None:
            return
        told: dict[tuple[Cursor, Dialect], tuple[bytes, Cursor]] = {}
        before: Cursor | None = None
        dialect: Dialect | None = None
        said, after = b"", NOTHING
        for follower in self.followers:
            direct = follower.direct
            if direct is None or direct.blocked or not follower.idle:
                follower.rouse()
                continue
            if follower.cursor is not before or follower.dialect is not dialect:
                if not self.in_step(follower):
                    follower.rouse()
                    continue
                before, dialect = follower.cursor, follower.dialect
                if (found := told.get((before, dialect))) is None:
                    tellings, after = answer.owed(before)
                    said = b"".join(dialect(answer.turn_id, tellings)) if tellings else b""
                    told[before, dialect] = said, after
                else:
                    said, after = found
            follower.cursor = after
            if said:
                direct.write(said)
            if after.over and follower.one_turn:
                follower.rouse()

    def tell(self, notice: SessionNotice) -> None:
        """Send a session event to every follower that may see it and does not know of it."""
        self.version = max(self.version, notice.version)
        for follower in list(self.followers):
            follower.tell(notice)

    # -- rights

    def check_rights(self, account_id: str = "") -> None:
        """Admit followers again: all, or an account's and those of its session. Whose right has ended is sent away."""
        self._source.rights_changed_at = time.monotonic()
        groups: dict[tuple[str, int, bool, str, bool], list[Follower]] = {}
        for follower in self.followers:
            if account_id in ("", self.session.account_id, follower.right.account_id):
                groups.setdefault(follower.right.grounds, []).append(follower)
        for group in groups.values():
            self._source.tasks.spawn(self._check(group))

    async def _check(self, group: list[Follower]) -> None:
        """Run one admission for followers that were admitted by the same right."""
        try:
            await group[0].right.check()
        except StorageUnavailable:
            self.take(LearnAgain())  # nobody can be admitted now: the check is due once storage answers
        except ChatError as problem:
            for follower in group:
                follower.send_away(problem)

    def send_away(self, problem: ChatError) -> None:
        for follower in list(self.followers):
            follower.send_away(problem)

    def expire(self, now: float) -> None:
        """Send away the followers whose credential has expired. now: Unix seconds."""
        for follower in self.followers:
            if follower.right.expires_at and now > follower.right.expires_at:
                follower.send_away(ChatError("token_expired", "The token of this connection has expired."))


def latest_cursor(answer: Answer | None) -> Cursor:
    """Return the cursor of a reader that has everything of the room's answer."""
    return NOTHING if answer is None else answer.latest_cursor()

