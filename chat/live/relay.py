"""All rooms of a worker: how they are entered and left, how they learn, and how rooms of other workers are told.

A room is opened by its first follower or owned turn and closed by its last; it has one broadcaster subscription.
Joining is: subscribe, then read, then merge what is learned twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from broadcaster import Broadcast

from ..errors import ChatError, RelayUnavailable
from ..formats.tellings import BLANK, Dialect
from ..settings import Settings
from ..store.database import Database, StorageUnavailable
from ..store.mask import Mask
from ..store.pages import select_page
from ..store.rights import Right
from ..store.sessions import Session
from ..tasks import settle
from .answers import ENDED, TOLD, Answer, Cursor
from .bus import GAP, Gather, RedisBus
from .events import BusMessage, LearnAgain, RightsChanged, SessionNotice, decode_bus, encode, session_event
from .rooms import Follower, Room, latest_cursor
from .source import Source
from .voice import Voice

SUBSCRIBE_TIMEOUT = 1.0  # seconds a reader who joins waits for a Redis that stalls
ADMISSION = 10.0  # seconds from the admission of a reader to its place in a room, while Redis and storage stall
FAREWELL = 1.0  # seconds for all readers to be told that this worker ends: most take milliseconds, a blocked one hangs
SHOWN = 50  # messages of a snapshot, or fewer when they are long
SNAPSHOT_TRIES = 3  # reads until the database and a room agree which turn is the latest
UNTOLD_MAX = 10_000  # sessions remembered while Redis is away


class Relay(Source):
    """All rooms of this worker."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        mask: Mask,
        broadcast: Broadcast,
        bus: RedisBus | None,
        worker: str,
    ) -> None:
        super().__init__(settings, database, mask, bus)
        self.broadcast = broadcast
        self.rooms: dict[str, Room] = {}  # by the session's key
        self.voices: set[Voice] = set()
        self.lag = 0.0  # seconds that our own sign of life took through the bus
        self.heard_at = 0.0  # monotonic: when the sign of life last came back
        self._beat_channel = self._channel("worker", worker)
        self._everyone = self._channel("workers")
        self._gather = Gather(settings.publish_every) if bus is None else bus.gather
        self._untold: dict[str, None] = {}  # channels on which something could not be published
        if bus is not None:
            bus.on_return = self._redis_is_back

    def _channel(self, *parts: str) -> str:
        return self.bus.name(*parts) if self.bus is not None else ":".join(parts)

    # -- life

    async def start(self) -> None:
        await self.broadcast.connect()
        for channel, hear in ((self._beat_channel, self._hear_own), (self._everyone, self._hear_everyone)):
            subscribed = asyncio.get_running_loop().create_future()
            self.tasks.spawn(self._listen(channel, hear, subscribed))
            await _confirmed(subscribed)
        if self.bus is not None:
            self.tasks.beat(self._show_late, self.settings.relay_ack / 2)
        await self.beat()

    async def stop(self) -> None:
        await self.hang_up()  # on some servers readers have come back since the drain
        await self.tasks.cancel()
        await self.broadcast.disconnect()

    async def hang_up(self) -> None:
        """Send every reader away, to reconnect to another worker: some servers end without closing their sockets."""
        restarting = ChatError("draining", "The service is restarting. Please come back in a moment.", retry_after=1)
        for room in self.rooms.values():
            room.send_away(restarting)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL):
                while any(room.followers for room in self.rooms.values()):
                    await asyncio.sleep(0.01)

    async def _listen(self, channel: str, hear: Callable[[str], None], subscribed: asyncio.Future[None]) -> None:
        """Bring the messages of a channel to `hear`, until cancelled. Entering and leaving never wait for Redis.

        The first gap marker is Redis' confirmation: nothing was read before it, so nothing can be missing.
        """
        async with self.broadcast.subscribe(channel) as subscriber:
            if self.bus is None or not self.bus.listening:
                settle(subscribed, None)
            while True:
                payload = (await subscriber.get()).message
                if payload == GAP and not subscribed.done():
                    settle(subscribed, None)
                else:
                    hear(payload)

    def _hear_own(self, payload: str) -> None:
        with contextlib.suppress(ValueError):  # a gap marker
            sent_at = float(payload)
            self.heard_at = time.monotonic()
            self.lag = self.heard_at - sent_at

    def _hear_everyone(self, payload: str) -> None:
        with contextlib.suppress(ValueError):
            match decode_bus(payload):
                case RightsChanged(account_id):
                    self._check_account(account_id)
                case LearnAgain():
                    self._check_account("")  # the news that a right has ended may have been lost

    async def beat(self) -> None:
        """Send a sign of life through the bus; look after silent turns and expired credentials. Called every second."""
        with contextlib.suppress(RelayUnavailable, TimeoutError):
            async with asyncio.timeout(self.settings.relay_ack):
                await self.broadcast.publish(self._beat_channel, str(time.monotonic()))
            self._tell_untold()
        now, date = time.monotonic(), time.time()
        for room in list(self.rooms.values()):
            room.expire(date)
            if now - room.silent_since > self.settings.relay_silence:
                room.news_at = now
                room.learn_again()

    @property
    def healthy(self) -> bool:
        """Whether a message went through the relay and back within the last 10 seconds."""
        return time.monotonic() - self.heard_at < 10

    # -- entering and leaving

    def enter(self, session: Session) -> Room:
        """Open the session's room for a turn of this worker; `leave` it after the turn. Reads nothing, never fails."""
        room = self._room(session)
        room.writing += 1
        return room

    def leave(self, room: Room) -> None:
        room.writing -= 1
        self._close_empty(room)

    async def join(self, right: Right, dialect: Dialect, *, one_turn: bool = False) -> Follower:
        """Follow a session from the next event on. Leave with `part`.

        Raises `not_found`, `token_invalid`, `StorageUnavailable`.
        """
        room = self._room(right.session)
        follower = Follower(room, dialect, right, one_turn=one_turn)
        room.followers.add(follower)
        try:
            await _confirmed(room.subscribed)
            await room.load()
            # Between its admission and its place in the room a reader is told neither that the session has changed nor
            # that its right has ended. The owner who reads one turn needs neither.
            own = right.account_id == right.session.account_id
            changed = room.version > right.session.version and not (own and one_turn)
            if changed or time.monotonic() - self.rights_changed_at < ADMISSION:
                follower.tell(self.change_of(right.session, await right.check()))
        except BaseException:
            self.part(follower)
            raise
        follower.cursor = latest_cursor(room.answer)
        return follower

    def part(self, follower: Follower) -> None:
        """Stop following."""
        follower.room.followers.discard(follower)
        self._close_empty(follower.room)

    def _room(self, session: Session) -> Room:
        room = self.rooms.get(session.key)
        if room is None:
            room = self.rooms[session.key] = Room(self, session, self._channel("session", session.key))
            room.listening = self.tasks.spawn(self._listen(room.channel, room.hear, room.subscribed))
        return room

    def _close_empty(self, room: Room) -> None:
        """Close a room that nobody follows or writes in. A new room of the session subscribes after this one's end."""
        key = room.session.key
        if not room.followers and not room.writing and self.rooms.get(key) is room:
            del self.rooms[key]
            room.close()

    # -- cursors

    async def resume(self, follower: Follower, cursor: Cursor) -> bool:
        """Put the follower at a client's cursor. False: the turn is gone, or the cursor does not fit it."""
        room = follower.room
        answer = room.answer
        if answer is not None and answer.turn_id == cursor.turn_id:
            if not answer.fits(cursor):
                return False
            if (cursor.over or TOLD in cursor.parts) and not answer.over:
                room.learn_again()  # the reader may have more than this room
        else:
            past = await room.past(cursor.turn_id)
            if past.answer is None or not past.resumable or not past.answer.fits(cursor):
                return False
        follower.cursor = cursor
        return True

    async def snapshot(self, follower: Follower, session: Session) -> dict[str, Any]:
        """Return the fields of `session_state` and move the follower behind it."""
        room = follower.room
        for _ in range(SNAPSHOT_TRIES):
            rows, _ = await select_page(self.database, session, SHOWN)
            answer = room.answer
            if (rows[-1]["turn_id"] if rows else None) == (answer.turn_id if answer is not None else None):
                break
            await room.learn()
        messages = self.mask.messages(session, rows)
        if answer is not None:
            current = [message for message, row in zip(messages, rows, strict=True) if row["turn_id"] == answer.turn_id]
            if len(current) == len(answer.messages):
                answer.learn(Answer(answer.turn_id, answer.position, answer.previous, current))
            messages = _as_told(answer, messages)
            room.notify()
        follower.catch_up(session.version)  # not before: a reader without its snapshot needs the events that wait
        follower.cursor = latest_cursor(answer)
        running = answer is not None and not answer.over
        turn = {"id": follower.cursor.turn_id, "cursor": str(follower.cursor)} if running else None
        shown = messages[-SHOWN:] if follower.right.member else [self.mask.shared(each) for each in messages[-SHOWN:]]
        return {"session": self.mask.state(session), "messages": shown, "turn": turn}

    # -- telling

    def voice(self, room: Room, answer: Answer, owned: Callable[[], bool]) -> Voice:
        """Return the voice of a turn of this worker. Discard it from `voices` after the turn."""
        voice = Voice(
            answer,
            room.notify,
            lambda message: self._publish(room.channel, message),
            owned,
            self._gather,
            bus=self.bus,
            channel=room.channel,
        )
        self.voices.add(voice)
        return voice

    async def _show_late(self) -> None:
        for voice in list(self.voices):
            voice.show_late(self.settings.relay_ack)

    def tell(self, session: Session, message: BusMessage) -> None:
        """Have all rooms of the session take a message, here and on other workers."""
        room = self.rooms.get(session.key)
        if room is not None:
            room.take(message)
        self._publish(self._channel("session", session.key), message)

    def tell_update(self, session: Session, action: str) -> None:
        self.tell(session, self.notice_of(session, action))

    def tell_deleted(self, session: Session) -> None:
        """Tell all readers that the session is gone, and send them away."""
        event = session_event(
            "session_update", session={"id": session.id}, action="deleted", version=session.version + 1
        ).decode()
        self.tell(session, SessionNotice(event, event))
        self.check_rights(session)

    def check_rights(self, session: Session) -> None:
        """Have every follower of the session admitted again, on all workers."""
        self.tell(session, RightsChanged())

    def learn_again(self, session: Session) -> None:
        """Have all rooms of the session learn from the database again: something was written there and not told."""
        self.tell(session, LearnAgain())

    @contextlib.contextmanager
    def doubtful(self, session: Session) -> Iterator[None]:
        """Have all rooms learn again when storage leaves open whether it wrote what they have to be told about."""
        try:
            yield
        except StorageUnavailable as problem:
            if problem.in_doubt:
                self.learn_again(session)
            raise

    def check_account(self, account_id: str) -> None:
        """Have the account's followers and its sessions' readers admitted again, on all workers.

        The account's tokens were revoked, or the account was deleted.
        """
        self._check_account(account_id)
        self._publish(self._everyone, RightsChanged(account_id))

    def _check_account(self, account_id: str) -> None:
        self.rights_changed_at = time.monotonic()
        for room in self.rooms.values():
            room.check_rights(account_id)

    def _publish(self, channel: str, message: BusMessage) -> None:
        if self.bus is None:
            return

        def answered(answer: Any) -> None:
            if isinstance(answer, Exception) and len(self._untold) < UNTOLD_MAX:
                self._untold[channel] = None

        self.bus.tell(channel, encode(message), answered)

    def _redis_is_back(self) -> None:
        """Give Redis the texts it may have lost, and have other rooms learn what could not be published to them."""
        for voice in self.voices:
            voice.restore()
            self._untold[voice.channel] = None
        self._tell_untold()

    def _tell_untold(self) -> None:
        untold, self._untold = self._untold, {}
        for channel in untold:
            self._publish(channel, LearnAgain())


async def _confirmed(subscribed: asyncio.Future[None]) -> None:
    """Wait until Redis has confirmed a subscription. A confirmation after the timeout is a gap."""
    await asyncio.wait({subscribed}, timeout=SUBSCRIBE_TIMEOUT)
    settle(subscribed, None)


def _as_told(answer: Answer, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return stored messages; those that ran when they were read are as the room's answer has them."""
    told = {message["id"]: message for message in answer.messages}
    merged = []
    for message in messages:
        now = told.pop(message["id"], message)
        if message["status"] not in ENDED:
            message = message | {name: now[name] for name in BLANK}
        merged.append(message)
    return [*merged, *told.values()]
