"""All rooms of a worker and the turns it writes: entering and leaving, cursors, logs read again, signs of life.

A room is opened by its first follower or owned turn and closed by its last; it has one broadcaster subscription. Join
is: subscribe, then read, then drop what is known already.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from itertools import takewhile
from typing import Any
from weakref import WeakValueDictionary

from broadcaster import Broadcast

from ..settings import Settings
from ..store import sessions, turns
from ..store.database import Database
from ..store.queries import Row
from ..store.sessions import Mask, Session
from .bus import Gather, RedisBus, RelayUnavailable
from .events import Dialect, Notice, Said, Stop, TurnLog, decode_bus, encode
from .rooms import Follower, Room
from .writer import Pace, Patience, Writer, log_key

SAID = ("content", "status", "failure_reason", "latency_ms", "first_token_ms")  # what a log says of a message
SNAPSHOT_TRIES = 3  # storage and a room that still tell different stories are told as they are
ONE_MOMENT = 4.0  # seconds to wait for a checkpoint after a side's end; longer than between two with Redis
FAREWELL = 1.0  # seconds readers have to hear that this worker ends: most need milliseconds, a blocked one will not


class Relay:
    """All rooms of this worker and the turns it writes."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        mask: Mask,
        broadcast: Broadcast,
        bus: RedisBus | None,
        worker: str,
    ) -> None:
        self.settings = settings
        self.database = database
        self.mask = mask
        self.broadcast = broadcast
        self.bus = bus
        self.origin = worker
        self.rooms: dict[str, Room] = {}
        self.writers: dict[str, Writer] = {}  # running ones, and ended ones while their log is kept
        self.counts: dict[str, int] = {}
        self.lag = 0.0  # seconds that message took
        self._sent_at = 0.0
        self.heard_at = 0.0  # monotonic: when our own sign of life last came back through the bus
        self.on_stop: Any = lambda turn_id: None
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._channel = f"parley:worker:{worker}"
        self._gather = Gather(settings.publish_every) if bus is None else bus.gather
        self._patience = Patience(settings.relay_ack)
        self._echo: asyncio.Task[None] | None = None
        if bus is not None:
            bus.on_return = self._resend

    def count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    # -- life

    async def start(self) -> None:
        await self.broadcast.connect()
        started = asyncio.Event()
        self._echo = asyncio.create_task(self._hear_own(started))
        await started.wait()
        await self.beat()

    async def stop(self) -> None:
        await self._hang_up()
        if self._echo is not None:
            self._echo.cancel()
        for room in list(self.rooms.values()):
            await room.close()
        await self.broadcast.disconnect()

    async def _hang_up(self) -> None:
        """Send every reader away, to come back to another worker: not every server does that when it ends."""
        for room in self.rooms.values():
            for follower in room.followers:
                follower.hang_up()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL):
                while any(room.followers for room in self.rooms.values()):
                    await asyncio.sleep(0.01)

    async def _hear_own(self, started: asyncio.Event) -> None:
        async with self.broadcast.subscribe(self._channel) as subscriber:
            started.set()
            while await subscriber.get():
                self.heard_at = time.monotonic()
                self.lag = self.heard_at - self._sent_at

    async def beat(self) -> None:
        """Send a sign of life through the bus, look after silent turns, forget old logs. Called every second or so."""
        self._sent_at = time.monotonic()
        await self._publish(self._channel, "alive")
        now = time.monotonic()
        for turn_id, writer in list(self.writers.items()):
            if writer.stored and writer.log.ended_at and now - writer.log.ended_at > self.settings.log_kept:
                del self.writers[turn_id]
        for room in self.rooms.values():
            if room.unrepaired:
                room.repair()
            for turn_log in room.logs:
                silent = not turn_log.ended and turn_log.id not in self.writers
                if silent and now - turn_log.heard_at > self.settings.relay_silence:
                    turn_log.heard_at = now
                    room.repair()

    async def _publish(self, channel: str, payload: str) -> bool:
        try:
            async with asyncio.timeout(self.settings.relay_ack):
                await self.broadcast.publish(channel, payload)
        except (RelayUnavailable, TimeoutError):
            return False
        return True

    def _resend(self) -> None:
        for writer in self.writers.values():
            writer.resend()

    # -- entering and leaving

    def _lock(self, session_id: str) -> asyncio.Lock:
        lock = self._locks.get(session_id)
        if lock is None:
            lock = self._locks[session_id] = asyncio.Lock()
        return lock

    async def _enter(self, session_id: str, own: str = "") -> Room:
        """The session's room, open. Call under its lock."""
        room = self.rooms.get(session_id)
        if room is None:
            room = Room(self, session_id)
            await room.open(own)
            self.rooms[session_id] = room
        return room

    async def _leave(self, room: Room) -> None:
        async with self._lock(room.session_id):
            await self._close_empty(room)

    async def _close_empty(self, room: Room) -> None:
        """Close the room if nobody is in it. Call under its session's lock."""
        if not room.followers and not room.writing and self.rooms.get(room.session_id) is room:
            del self.rooms[room.session_id]
            await room.close()

    async def join(self, session_id: str, dialect: Dialect, account_id: str = "") -> Follower:
        """Follow a session from its running turn's start, or from what comes next. Leave with `leave`."""
        async with self._lock(session_id):
            room = await self._enter(session_id)
            follower = Follower(room, dialect, account_id)
            room.followers.add(follower)
        follower.log = room.logs[-1] if room.logs else None
        follower.seq = follower.log.shown if follower.log else -1
        return follower

    async def leave(self, follower: Follower) -> None:
        follower.room.followers.discard(follower)
        await self._leave(follower.room)

    # -- cursors

    async def resume(self, follower: Follower, cursor: tuple[str, int]) -> bool:
        """Put the follower at its cursor. False: the cursor cannot be served exactly; it needs a snapshot."""
        turn_id, seq = cursor
        turn_log = follower.room.find(turn_id)
        writer = self.writers.get(turn_id)
        if writer is not None and writer.fence is not None and seq > writer.log.last:
            await writer.fence()  # a reader knows more of our turn than we do: somebody else has gone on with it
        if turn_log is None:
            turn_log = await self._fetch(follower.room, turn_id)
        elif seq > turn_log.last and turn_id not in self.writers:
            await follower.room.read_again()
        if turn_log is None or not turn_log.serves(seq):
            return False
        follower.log, follower.seq = turn_log, seq
        return True

    async def _fetch(self, room: Room, turn_id: str) -> TurnLog | None:
        """Bring the logs from this turn on into the room; None when one of them is not kept any more."""
        rows = await turns.select_turns_since(self.database, room.session_id, turn_id)
        if rows and room.find(rows[-1]["id"]) is None and rows[-1]["id"] != room.before:
            await room.read_again()  # what is missing at the end; then only the beginning is
        found: dict[str, TurnLog] = {}
        for row in takewhile(lambda row: room.find(row["id"]) is None, rows):
            kept = await self._kept(row["id"])
            if kept is None or not kept.ended:
                return None
            found[row["id"]] = kept
        if room.find(turn_id) is None:  # else another reader has brought it meanwhile, and all after it
            known = room.logs[0].id if room.logs else room.before
            ids = [row["id"] for row in rows]
            end = ids.index(known) + (not room.logs) if known in ids else 0
            older = [found.get(each) for each in ids[:end]]
            if not older or None in older:
                return None  # too many, or logs have been forgotten meanwhile
            room.put_before([each for each in older if each is not None])
        return room.find(turn_id)

    async def follow_turn(self, follower: Follower, turn_id: str, seq: int) -> bool:
        """Put the follower in one turn, whether its log is kept or only its rows are left. False: nothing to read."""
        turn_log = follower.room.find(turn_id)
        if turn_log is None:
            rows = await turns.select_turns_since(self.database, follower.room.session_id, turn_id)
            if not rows:
                return False
            if rows[0]["status"] == "running":  # it began elsewhere and this room has not heard of it
                await follower.room.read_again()
            turn_log = follower.room.find(turn_id)
            if turn_log is None:
                turn_log = TurnLog(turn_id)  # of this reader alone: for the room's others it is long over
                await self.refresh(follower.room.session_id, turn_log, rows[0])
        follower.log, follower.seq, follower.of_turn, follower.notices = turn_log, seq, True, []
        follower.inexact = not turn_log.serves(seq)
        return True

    async def snapshot(self, follower: Follower, session: Session) -> dict[str, Any]:
        """The fields of `session_state`, and the follower moved to just behind it."""
        rows = await turns.select_messages(self.database, session.id)
        for _ in range(SNAPSHOT_TRIES):
            if follower.room.agrees(rows):
                break
            # Said while the bus was away it must not come after this again; ended meanwhile its end would not come.
            await follower.room.read_again()
            rows = await turns.select_messages(self.database, session.id)
        logs = follower.room.logs
        messages = self.mask.messages(session, rows)
        if logs:
            messages = _as_of(logs[-1], messages, [row["turn_id"] for row in rows])
        follower.log = logs[-1] if logs else None
        follower.seq = follower.log.shown if follower.log else -1
        running = follower.room.running
        turn = {"id": running.id, "seq": running.shown} if running is not None else None
        return {"session": self.mask.state(session), "messages": messages[-50:], "turn": turn}

    # -- reading logs

    async def _kept(self, turn_id: str) -> TurnLog | None:
        """The turn's log as it was said: from our own memory or from Redis."""
        writer = self.writers.get(turn_id)
        if writer is not None:
            return writer.log
        if self.bus is None:
            return None
        try:
            async with asyncio.timeout(self.settings.relay_ack * 4):
                batches = await self.bus.command("LRANGE", log_key(turn_id), 0, -1)
        except (RelayUnavailable, TimeoutError):
            return None
        turn_log = TurnLog(turn_id)
        for batch in batches:
            said = decode_bus(batch)
            if isinstance(said, Said):
                turn_log.append(said.entries)
        turn_log.show()
        return turn_log if turn_log.entries else None

    async def bring(self, room: Room, row: Row) -> bool:
        """Bring a turn's log in the room up to date. Whether it was behind."""
        turn_log = room.find(row["id"])
        if turn_log is not None:
            return await self.refresh(room.session_id, turn_log, row)
        turn_log = TurnLog(row["id"])
        await self.refresh(room.session_id, turn_log, row)
        room.add(turn_log)
        return True

    async def refresh(self, session_id: str, turn_log: TurnLog, row: Row) -> bool:
        """Add what a log lacks, from Redis or else from the turn's rows. Whether it was behind."""
        kept = await self._kept(row["id"])
        if kept is not None:
            turn_log.append(kept.entries)
        if kept is None or turn_log.last < row["seq"] or (row["status"] == "ended" and not turn_log.closed):
            end = row["seq"] if row["status"] == "ended" else None
            # For a turn taken from a dead worker nobody writes another moment down.
            deadline = time.monotonic() + (ONE_MOMENT if row["owner"] != self.origin else 0.0)
            while not await self._catch_up(session_id, turn_log, end, time.monotonic() > deadline):
                await asyncio.sleep(self.settings.checkpoint_every / 2)
        return turn_log.show()

    async def _catch_up(self, session_id: str, turn_log: TurnLog, end: int | None, anyway: bool) -> bool:
        session = await sessions.select_unchecked(self.database, session_id)
        rows = await turns.select_turn_messages(self.database, turn_log.id)
        seqs = {each["id"]: each["seq"] for each in rows}
        return turn_log.catch_up(self.mask.messages(session, rows), seqs, end, anyway=anyway)

    # -- writing and telling

    async def write(self, session: Session, turn_id: str, taken: Row | None = None) -> Writer:
        """Become the writer of a new turn, or of one `taken` from a worker that died, after what that one said."""
        settings = self.settings
        paced = session.blind
        pace = Pace(
            ack=settings.relay_ack,
            tick=settings.pace if paced else 0.0,
            chars=settings.pace_chars,
            kept=settings.log_kept,
        )
        async with self._lock(session.id):
            room = await self._enter(session.id, turn_id if taken is None else "")
            room.writing += 1
            try:
                if taken is not None:
                    await room.read_again()
                turn_log = await room.begin(turn_id)
            except BaseException:
                room.writing -= 1
                await self._close_empty(room)
                raise
            writer = self.writers[turn_id] = Writer(
                turn_log, room.channel, self.bus, pace, room.notify, self._gather, self._patience
            )
        return writer

    def give_up(self, session_id: str, writer: Writer) -> None:
        """Another worker has taken the turn: its words are read from now on, as on any worker."""
        self.writers.pop(writer.log.id, None)
        writer.abandon()
        room = self.rooms.get(session_id)
        if room is not None:
            room.repair()

    async def finish(self, session_id: str) -> None:
        """A turn this process wrote has ended."""
        room = self.rooms.get(session_id)
        if room is not None:
            room.writing -= 1
            await self._leave(room)

    async def tell(self, session_id: str, event: bytes, *, but: str = "") -> None:
        """Send an event of the session itself to all its readers but one account's."""
        notice = Notice(event.decode(), but)
        if not await self._publish(f"parley:session:{session_id}", encode(notice).decode()):
            room = self.rooms.get(session_id)
            if room is not None:
                room.notice(notice)

    async def send_stop(self, session_id: str, turn_id: str) -> None:
        """Tell a turn's owner to end it. Lost while Redis is away: the owner also finds it in storage."""
        await self._publish(f"parley:session:{session_id}", encode(Stop(turn_id)).decode())

    @property
    def healthy(self) -> bool:
        """Whether a message went through the relay and back within the last 10 seconds."""
        return time.monotonic() - self.heard_at < 10


def _as_of(turn_log: TurnLog, messages: list[dict[str, Any]], turn_ids: list[str]) -> list[dict[str, Any]]:
    """Stored messages, those of the log's turn as that log tells them: what storage is ahead by is still to be said."""
    stored = {message["id"]: message for message in messages}
    said = turn_log.messages()
    known = {message["id"] for message in said}
    before = next((n for n, turn_id in enumerate(turn_ids) if turn_id == turn_log.id), len(messages))
    older = [message for message in messages[:before] if message["id"] not in known]
    for message in said:
        row = stored.get(message["id"], message)
        if not turn_log.ended or row["status"] in ("pending", "streaming"):  # else storage knows more: votes, clocks
            row = row | {name: message[name] for name in SAID}
        older.append(row)
    return older
