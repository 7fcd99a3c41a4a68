"""Generation: one task per turn, owned by this worker and by no connection.

A turn is one object in one dictionary, entered before its row is written, with one state:

    starting → answering → ending → over, or `lost` when another worker took the turn

Its task runs one provider stream per reply, gives the text to the turn's voice, writes checkpoints, and turns every
ending into a stored status and a `message_complete`. It never raises: its tasks stand beside everyone else's. A lease
in the database makes the ownership; a worker that finds a lease run out takes the turn and ends it `interrupted`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

from ..errors import ChatError
from ..limits import RateLimits
from ..providers import ChatMessage, Finish, Limits, ProviderError, Providers
from ..settings import Settings
from ..store import accounts, sessions, turns
from ..store.accounts import Account
from ..store.database import Database, StorageUnavailable, new_id
from ..store.queries import Row
from ..store.sessions import Session
from ..store.turns import Ask, StoredTurn, Terms
from ..tasks import Tasks
from .answers import ENDED, Answer
from .pace import Rhythm, pieces
from .relay import Relay
from .rooms import Room
from .voice import Voice

log = logging.getLogger("parley.generation")

CHARS_PER_TOKEN = 4  # a rough count for budgets and history, where the provider tells none
HISTORY_MESSAGES = 60
OUTAGE = 60.0  # seconds a model that keeps failing is not drawn for a battle
LOOK_FOR_STOPS = 0.5  # seconds between two looks for stops that Redis did not carry

State = Literal["starting", "answering", "ending", "over", "lost"]


@dataclass
class Result:
    """How one reply ended."""

    status: str = "success"
    reason: str | None = None
    finish: Finish | None = None
    first_token: float | None = None  # seconds after the start


@dataclass(eq=False)
class Turn:
    """A turn of this worker. `early`: why it is to end before its models do, `stopped` or `interrupted`."""

    id: str
    session: Session
    account_id: str
    state: State = "starting"
    early: str | None = None
    stored: StoredTurn | None = None
    voice: Voice | None = None
    task: asyncio.Task[None] | None = None
    streams: dict[str, asyncio.Task[None]] = field(default_factory=dict)  # by side
    results: dict[str, Result] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)  # the sides whose ending is not stored and told
    held: dict[str, str] = field(default_factory=dict)  # of a blind battle: text that has come and is not shown yet
    finished: set[str] = field(default_factory=set)  # … the sides whose model has stopped
    moved: asyncio.Event = field(default_factory=asyncio.Event)  # … something changed for the pace
    waiters: dict[str, asyncio.Future[None]] = field(default_factory=dict)  # … for a side's last piece to leave
    rhythm: Rhythm | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # one ending at a time: the last one ends the turn as well
    unsaved: list[Row] = field(default_factory=list)  # endings that were told and that the database did not take
    checkpointed: dict[str, int] = field(default_factory=dict)  # characters the database has, by side
    checkpointed_at: float = 0.0  # monotonic

    @property
    def runs(self) -> bool:
        return self.state in ("starting", "answering")

    @property
    def replies(self) -> dict[str, Row]:
        assert self.stored is not None
        return {row["participant"]: row for row in self.stored.rows[1:]}

    @property
    def out(self) -> Voice:
        assert self.voice is not None
        return self.voice

    def text(self, side: str) -> str:
        return self.out.answer.replies[side].text

    def end_early(self, why: str) -> None:
        """Cancel the streams that run; a stream that has not begun never will."""
        if self.early is None and self.runs:
            self.early = why
        for stream in self.streams.values():
            stream.cancel()


class Generation:
    """Every turn this worker answers, and those it takes over from workers that died."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        relay: Relay,
        providers: Providers,
        limits: RateLimits,
        worker: str,
        tasks: Tasks | None = None,
    ) -> None:
        self.settings = settings
        self.database = database
        self.relay = relay
        self.providers = providers
        self.limits = limits
        self.worker = worker
        self.tasks = tasks or Tasks()
        self.turns: dict[str, Turn] = {}
        self.draining = False
        self.observe: Callable[[str, Result, float], None] = lambda model, result, seconds: None
        self._failures: dict[str, tuple[int, float]] = {}  # model → failures in a row, and when the last was
        self._awake_at = self._renewed_at = time.monotonic()
        self._slept = False  # this process was frozen until after its lease: its turns may be another worker's
        self._strangers: set[str] = set()  # turns of ours in the database that were not in `turns` at the last renewal
        self._unused = accounts.Unused(database)
        relay.on_stop = self._stop_here

    # -- life

    def start(self) -> None:
        beat = self.tasks.beat
        beat(self._checkpoint, self.settings.checkpoint_every)
        beat(self._renew, self.settings.lease_renew)
        beat(self._sweep, self.settings.sweep_every)
        beat(self.relay.beat, 1.0)
        beat(self._watch, self.settings.lease_renew / 2)
        beat(self.limits.beat, 5.0)
        if self.relay.bus is not None:
            beat(self._look_for_stops, LOOK_FOR_STOPS)

    async def drain(self) -> None:
        """Let running answers finish for a while, then end the rest `interrupted`. Ends in bounded time."""
        self.draining = True
        await self._wait_for_turns(self.settings.drain)
        for turn in list(self.turns.values()):
            turn.end_early("interrupted")
        await self._wait_for_turns(self.settings.storage_timeout)
        with contextlib.suppress(StorageUnavailable):
            await self._unused.give_back()
        await self.tasks.cancel()

    async def _wait_for_turns(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while any(turn.task is None or not turn.task.done() for turn in self.turns.values()):
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(0.01)

    def outages(self) -> set[str]:
        """Return the models whose last few replies here all failed a moment ago."""
        then = time.monotonic() - OUTAGE
        return {model for model, (failures, at) in self._failures.items() if failures >= 3 and at > then}

    # -- starting

    def _terms(self, max_tokens: int, content: str, sides: int) -> Terms:
        settings = self.settings
        return Terms(
            owner=self.worker,
            lease=int(settings.lease * 1000),
            tokens=sides * (max_tokens + len(content) // CHARS_PER_TOKEN),
            limits=(settings.daily_tokens_account, settings.daily_tokens_service),
            daily_messages=settings.daily_messages,
            turns_per_account=settings.turns_per_account,
        )

    async def _admit(self, account_id: str) -> None:
        if self.draining:
            raise ChatError("draining", "The service is restarting. Please try again in a moment.", retry_after=2)
        per_minute = self.settings.messages_per_minute
        await self.limits.hit(f"messages:{account_id}", per_minute, 60, "You are sending messages too quickly.")

    async def begin(
        self, session: Session, account: Account, ask: Ask, *, max_tokens: int = 0, temperature: float | None = None
    ) -> StoredTurn:
        """Start the turn a message asks for, or find the one it started before. Raises `ChatError`."""
        await self._admit(account.id)
        turns.checked_content(ask.content, self.settings.prompt_max)
        max_tokens = max_tokens or self.settings.max_tokens
        terms = self._terms(max_tokens, ask.content, len(session.sides))
        limits = Limits(max_tokens, temperature)

        def insert(turn_id: str) -> Awaitable[StoredTurn]:
            return turns.insert_turn(self.database, session, account.id, ask, terms, turn_id)

        return await self._start(session, account.id, insert, limits, terms.tokens)

    async def again(self, session: Session, account: Account, message_id: str) -> StoredTurn:
        """Answer the session's last user message, or one reply to it, anew. Raises `ChatError`."""
        await self._admit(account.id)
        terms = self._terms(self.settings.max_tokens, "", len(session.sides))

        def insert(turn_id: str) -> Awaitable[StoredTurn]:
            return turns.insert_regeneration(self.database, session, account.id, message_id, terms, turn_id)

        return await self._start(session, account.id, insert, Limits(self.settings.max_tokens), terms.tokens)

    async def _start(
        self,
        session: Session,
        account_id: str,
        insert: Callable[[str], Awaitable[StoredTurn]],
        limits: Limits,
        reserved: int,
    ) -> StoredTurn:
        """Write a turn and launch it. A caller that leaves, or has no more patience, changes nothing of either."""
        turn = Turn(new_id(), session, account_id)
        self.turns[turn.id] = turn
        starting = self.tasks.spawn(self._insert(turn, insert, limits, reserved))
        done, _ = await asyncio.wait({starting}, timeout=self.settings.storage_timeout)
        if not done:
            raise StorageUnavailable
        return starting.result()

    async def _insert(
        self, turn: Turn, insert: Callable[[str], Awaitable[StoredTurn]], limits: Limits, reserved: int
    ) -> StoredTurn:
        try:
            stored = await self._within_budget(turn.id, insert)
        except BaseException:
            del self.turns[turn.id]
            raise
        if not stored.fresh:
            del self.turns[turn.id]
            await self._adopt_found(stored)
            return stored
        self._launch(turn, stored, limits, reserved)
        return stored

    async def _within_budget(self, turn_id: str, insert: Callable[[str], Awaitable[StoredTurn]]) -> StoredTurn:
        """Insert a turn; where the budget does not allow it, once more with what others have not used of it."""
        try:
            return await insert(turn_id)
        except ChatError as problem:
            if problem.code != "budget_exhausted" or not self._unused:
                raise
        await self._unused.give_back()
        return await insert(turn_id)

    def _launch(self, turn: Turn, stored: StoredTurn, limits: Limits, reserved: int) -> None:
        """Hand a stored turn to a task of its own. The row exists: from here on the turn ends, whatever happens."""
        turn.stored = stored
        turn.open = {side for side, row in turn.replies.items() if row["status"] not in ENDED}
        turn.task = self.tasks.spawn(self._run(turn, limits, reserved))

    # -- one turn

    async def _run(self, turn: Turn, limits: Limits, reserved: int) -> None:
        """Answer one turn to its end. Never raises, since nobody awaits it; afterwards every reply has an ending."""
        room = await self.relay.enter(turn.session)
        try:
            await self._answer(turn, room, limits)
        except Exception:  # the outermost frame of a task: readers would wait for ever for an ending
            log.exception("turn %s failed", turn.id)
        finally:
            await self._conclude(turn, room, reserved)

    async def _answer(self, turn: Turn, room: Room, limits: Limits) -> None:
        stored = turn.stored
        assert stored is not None
        self._speak(turn, room, stored)
        try:
            history = [] if turn.early else await self._history(stored)
        except StorageUnavailable:  # a model that is not shown the conversation would answer something else
            turn.state = "ending"
            for side in sorted(turn.open):
                await self._finish(turn, side, Result("failed", "storage_unavailable"), 0.0)
            return
        started = time.monotonic()
        if turn.early is None:
            turn.state = "answering"
            turn.results = {side: Result() for side in turn.open}
            turn.streams = {
                side: asyncio.create_task(self._stream(turn, side, self._prompt(turn, side, history), limits, started))
                for side in sorted(turn.open)
            }
        pacing = self.tasks.spawn(self._keep_pace(turn)) if turn.rhythm is not None else None
        try:
            await asyncio.gather(*(self._side(turn, side, started) for side in sorted(turn.open)))
        finally:
            if pacing is not None:
                pacing.cancel()

    def _speak(self, turn: Turn, room: Room, stored: StoredTurn) -> None:
        """Tell all readers that the turn has begun."""
        messages = self.relay.mask.messages(turn.session, list(stored.rows))
        answer = Answer(turn.id, stored.position, stored.previous, messages)
        turn.voice = self.relay.voice(room, room.begin(answer))
        turn.voice.owned = lambda: self._surely_owned(turn)
        turn.checkpointed = {side: len(turn.text(side)) for side in turn.replies}
        if turn.session.blind and self.settings.pace and len(turn.open) > 1:
            turn.rhythm = Rhythm(self.settings.pace)
            turn.held = dict.fromkeys(turn.open, "")
        turn.voice.begin()

    async def _side(self, turn: Turn, side: str, started: float) -> None:
        """Wait for one reply's stream and end the reply. Only the stream is ever cancelled, never this."""
        stream = turn.streams.get(side)
        if stream is not None:
            await asyncio.wait({stream})
        result = self._outcome(turn, side, stream)
        if turn.state != "lost":
            await self._finish(turn, side, result, time.monotonic() - started)

    def _outcome(self, turn: Turn, side: str, stream: asyncio.Task[None] | None) -> Result:
        """Return how a reply ended, from the way its stream did."""
        result = turn.results.get(side, Result())
        if stream is None or stream.cancelled():
            result.status = turn.early or "interrupted"
            result.reason = "interrupted" if result.status == "interrupted" else None
            return result
        match stream.exception():
            case None:
                return result
            case ProviderError() as problem:
                result.status, result.reason = "failed", problem.code
            case TimeoutError():
                result.status, result.reason = "failed", "provider_timeout"
            case problem:  # a provider's mistake must not take the other side of the battle along
                log.error("reply %s failed", turn.replies[side]["id"], exc_info=problem)
                result.status, result.reason = "failed", "internal"
        return result

    async def _conclude(self, turn: Turn, room: Room, reserved: int) -> None:
        """The post-condition of a turn: every reply has an ending, in the database and for every reader."""
        try:
            turn.rhythm = None  # nothing is paced any more: what was held back leaves with the ending
            if turn.state != "lost":
                turn.state = "ending"
            while turn.open and turn.state == "ending" and turn.voice is not None:
                status = turn.early or "failed"
                reason = {"failed": "internal", "interrupted": "interrupted"}.get(status)
                await self._finish(turn, min(turn.open), Result(status, reason), 0.0)
            self._settle(turn, reserved)
        except Exception:
            log.exception("turn %s could not be concluded", turn.id)
        finally:
            if turn.voice is not None:
                self.relay.silence(turn.voice)
            if not turn.unsaved:
                self._forget(turn)
            await self.relay.leave(room)

    def _forget(self, turn: Turn) -> None:
        if turn.state == "ending":
            turn.state = "over"
        self.turns.pop(turn.id, None)

    def _settle(self, turn: Turn, reserved: int) -> None:
        """Give back the part of the budget that the turn has not used."""
        if turn.voice is not None and turn.state != "lost":
            spent = sum(len(turn.text(side)) for side in turn.replies) // CHARS_PER_TOKEN
            created_at = next(iter(turn.replies.values()))["created_at"]
            self._unused.add(turn.account_id, created_at, reserved - spent)

    # -- what a model is shown

    async def _history(self, stored: StoredTurn) -> list[Row]:
        """Return the conversation up to and with the user's message, newest first, cut to the token budget."""
        user, rows = stored.rows[0], []
        if user["position"]:
            rows = await turns.select_messages(
                self.database, stored.session.id, limit=HISTORY_MESSAGES, before=user["position"]
            )
        budget = self.settings.history_tokens * CHARS_PER_TOKEN
        history: list[Row] = []
        for row in [user, *rows[::-1]]:
            budget -= len(row["content"])
            if history and budget < 0:
                break
            if row["content"] and row["status"] in ("success", "stopped", "interrupted"):
                history.append(row)
        return history

    def _prompt(self, turn: Turn, side: str, history: list[Row]) -> list[ChatMessage]:
        """Return what one model is shown: its own side of the conversation, oldest first."""
        model = self.providers.models.get(turn.replies[side]["model"])
        system = [ChatMessage("system", model.system)] if model is not None and model.system else []
        seen = [row for row in history[::-1] if row["role"] == "user" or row["participant"] == side]
        return system + [ChatMessage(row["role"], row["content"]) for row in seen]

    # -- one stream

    async def _stream(
        self, turn: Turn, side: str, prompt: list[ChatMessage], limits: Limits, started: float
    ) -> None:
        """Stream one reply until all of its text is shown. Raises `ProviderError`, `TimeoutError`."""
        try:
            async with asyncio.timeout(self.settings.reply_timeout):
                await self._stream_with_retry(turn, side, prompt, limits, started)
        finally:
            turn.finished.add(side)
            turn.moved.set()
        await self._shown(turn, side)

    async def _stream_with_retry(
        self, turn: Turn, side: str, prompt: list[ChatMessage], limits: Limits, started: float
    ) -> None:
        try:
            await self._stream_once(turn, side, prompt, limits, started)
        except ProviderError as problem:
            wait = problem.retry_after or 0.5
            began = turn.results[side].first_token is not None
            if began or not problem.retryable or wait > self.settings.retry_after_max:
                raise
            log.info("model %s: one retry after %s", turn.replies[side]["model"], problem.code)
            await asyncio.sleep(wait)
            await self._stream_once(turn, side, prompt, limits, started)

    async def _stream_once(
        self, turn: Turn, side: str, prompt: list[ChatMessage], limits: Limits, started: float
    ) -> None:
        settings, result, said = self.settings, turn.results[side], 0
        limits = Limits(limits.max_tokens, limits.temperature, settings.first_token_timeout, settings.idle_timeout)
        stream = self.providers.stream(turn.replies[side]["model"], prompt, limits)
        say = self._hold if turn.rhythm is not None else self._say
        async with contextlib.aclosing(stream):
            async for piece in stream:  # the providers keep the clocks: they know of pings and of thinking
                if isinstance(piece, Finish):
                    result.finish = piece
                    return
                if result.first_token is None:
                    result.first_token = time.monotonic() - started
                said += len(piece.text)
                if said > settings.reply_max:
                    result.status, result.reason = "failed", "too_long"
                    return
                say(turn, side, piece.text)
        raise ProviderError("provider_truncated")

    def _say(self, turn: Turn, side: str, text: str) -> None:
        turn.out.say(side, text)

    def _hold(self, turn: Turn, side: str, text: str) -> None:
        turn.held[side] += text
        turn.moved.set()

    async def _shown(self, turn: Turn, side: str) -> None:
        """Wait until all text of a reply is shown; in a blind battle its pace decides when."""
        while turn.rhythm is not None and side in turn.held:
            waiter = turn.waiters.setdefault(side, asyncio.get_running_loop().create_future())
            await asyncio.shield(waiter)
        await turn.out.settled(side)

    async def _keep_pace(self, turn: Turn) -> None:
        """Show a blind battle's text in equal pieces, both sides in step, until both sides are out."""
        rhythm, chars = turn.rhythm, self.settings.pace_chars
        assert rhythm is not None
        while turn.held:
            moves = pieces({side: len(text) for side, text in turn.held.items()}, turn.finished, chars)
            if not moves:
                turn.moved.clear()
                await turn.moved.wait()
                continue
            if (wait := rhythm.due() - time.monotonic()) > 0:
                await asyncio.sleep(wait)
                continue
            if not any(turn.results[side].status == "failed" for side in turn.results):
                rhythm.moved(time.monotonic())
            self._move(turn, moves)

    def _move(self, turn: Turn, moves: dict[str, int]) -> None:
        for side, count in sorted(moves.items()):
            text = turn.held[side]
            if count:
                turn.out.say(side, text[:count])
            turn.held[side] = text[count:]
        for side in sorted(moves):
            if not turn.held[side] and side in turn.finished:
                self._release(turn, side)

    def _release(self, turn: Turn, side: str) -> None:
        """The side's last piece has left: its end may be told."""
        if turn.held.pop(side, None) is not None and turn.rhythm is not None:
            turn.rhythm.side_ended()
            waiter = turn.waiters.pop(side, None)
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
            turn.moved.set()

    # -- one ending

    async def _finish(self, turn: Turn, side: str, result: Result, seconds: float) -> None:
        """Store how a reply ended, then tell it; tell `storage_unavailable` when it cannot be stored."""
        if result.status in ("stopped", "interrupted"):
            turn.held.pop(side, None)
            turn.moved.set()
            turn.out.cut(side)
        else:
            await self._shown(turn, side)  # a side of a blind battle fails at its pace as well
        await turn.out.settled(side)
        async with turn.lock:
            if side not in turn.open or turn.state == "lost":
                return
            row = await self._store(turn, side, result, seconds)
            if row is None:
                return
            turn.open.discard(side)
            if not turn.open:
                turn.state = "ending"
            self._note(row["model"], result)
            self.observe(row["model"], result, seconds)
            turn.out.end(side, self.relay.mask.message(turn.session, row))

    async def _store(self, turn: Turn, side: str, result: Result, seconds: float) -> Row | None:
        """Write a reply's ending, and with the last one the turn's. None when another worker owns the turn now."""
        row = turn.replies[side] | {
            "content": turn.text(side),
            "status": result.status,
            "failure_reason": result.reason,
            "latency_ms": int(seconds * 1000),
            "first_token_ms": None if result.first_token is None else int(result.first_token * 1000),
        }
        rows, last = [*turn.unsaved, row], turn.open == {side}
        try:
            ours = await self._keep_trying(
                lambda: turns.update_endings(self.database, self.worker, rows, last=last)
            )
        except StorageUnavailable:
            row |= {"status": "failed", "failure_reason": "storage_unavailable"}
            turn.unsaved.append(row)
            return row
        turn.unsaved = []
        if not ours:
            self._lose(turn)
        return row if ours else None

    async def _keep_trying(self, store: Callable[[], Awaitable[bool]]) -> bool:
        """Offer an ending to the database until it takes it. Raises `StorageUnavailable` after `store_for` seconds."""
        deadline = time.monotonic() + (3.0 if self.draining else self.settings.store_for)
        while True:
            try:
                return await store()
            except StorageUnavailable:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.5)

    def _note(self, model: str, result: Result) -> None:
        failures, _ = self._failures.get(model, (0, 0.0))
        failed = result.status == "failed" and result.reason != "provider_refused"
        self._failures[model] = (failures + 1 if failed else 0, time.monotonic())

    # -- ending early

    async def stop(self, session: Session, account_id: str) -> bool:
        """End the session's running turn, whichever worker has it. False when none runs."""
        own = [turn for turn in self.turns.values() if turn.session.key == session.key and turn.runs]
        if session.is_open or session.account_id == account_id:
            for turn in own:
                turn.end_early("stopped")
        try:
            row = await turns.request_stop(self.database, session.id, account_id)
        except StorageUnavailable:
            if not own:
                raise
            return True
        if row is not None and row["id"] not in self.turns:
            self.relay.send_stop(session, row["id"])
        return row is not None or bool(own)

    def _stop_here(self, turn_id: str) -> None:
        turn = self.turns.get(turn_id)
        if turn is not None:
            turn.end_early("stopped")

    async def _look_for_stops(self) -> None:
        """Find the stops that other workers asked for while Redis did not carry them."""
        if any(turn.runs for turn in self.turns.values()):
            for turn_id in await turns.select_stops(self.database, self.worker):
                self._stop_here(turn_id)

    # -- whose turn it is

    def _lose(self, turn: Turn) -> None:
        """Another worker owns the turn now: this one tells and writes nothing more of it, and learns like any other."""
        if turn.state in ("lost", "over"):
            return
        log.warning("turn %s was taken over from this worker", turn.id)
        self.relay.count("fenced")
        turn.end_early("interrupted")
        turn.state = "lost"
        turn.unsaved = []
        for side in list(turn.held):
            self._release(turn, side)
        if turn.voice is not None:
            turn.voice.fall_silent()
        room = self.relay.rooms.get(turn.session.key)
        if room is not None:
            room.learn_again()

    def _surely_owned(self, turn: Turn) -> bool:
        """Whether the turn is ours without asking. After a freeze longer than the lease the database is asked."""
        if turn.state == "lost":
            return False
        if not self._awake():
            self.tasks.spawn(self._make_sure(turn))
            return False
        return True

    async def _make_sure(self, turn: Turn) -> None:
        while self._slept and turn.state != "lost":
            try:
                await self._renew()
            except StorageUnavailable:  # then nobody else can have taken it either
                self._slept = False
        if turn.state != "lost" and turn.voice is not None:
            turn.voice.go_on()

    async def _watch(self) -> None:
        self._awake()

    def _awake(self) -> bool:
        """Notice a freeze in which the lease ran out: it does from the last renewal, not from when we fell asleep."""
        now = time.monotonic()
        frozen = now - self._awake_at > self.settings.lease_renew
        self._slept = self._slept or (frozen and now - self._renewed_at > self.settings.lease)
        self._awake_at = now
        return not self._slept

    async def _renew(self) -> None:
        """Renew the leases of this worker's turns, and learn which of them it lost."""
        before = set(self.turns)
        await self.database.set_clock()
        asked = time.monotonic()
        owned = await turns.renew_leases(self.database, self.worker, int(self.settings.lease * 1000))
        self._renewed_at = asked
        self._slept = time.monotonic() - asked > self.settings.lease  # frozen before we read this, say
        for turn_id in before & self.turns.keys():
            turn = self.turns[turn_id]
            if turn_id in owned and owned[turn_id]["stop_requested"]:
                turn.end_early("stopped")
            elif turn_id not in owned and turn.state == "answering" and not turn.lock.locked():
                self._lose(turn)
        for turn in list(self.turns.values()):
            if turn.unsaved and turn.task is not None and turn.task.done():
                await self._save(turn)
        # A turn whose insertion was given up and arrived all the same is ours, and nobody answers it yet.
        strangers = owned.keys() - before - self.turns.keys()
        for turn_id in strangers & self._strangers:
            self.tasks.spawn(self._adopt(owned[turn_id]))
        self._strangers = strangers

    async def _save(self, turn: Turn) -> None:
        """Write endings that were told while the database was away."""
        await turns.update_endings(self.database, self.worker, turn.unsaved, last=True)
        turn.unsaved = []
        self._forget(turn)

    async def _adopt_found(self, stored: StoredTurn) -> None:
        """A retry has found its turn: where the turn is ours and nobody answers it, launch it now."""
        if stored.id in self.turns or all(row["status"] in ENDED for row in stored.rows[1:]):
            return
        row = await turns.select_latest_turn(self.database, stored.session.id)
        if row is not None and (row["id"], row["owner"], row["status"]) == (stored.id, self.worker, "running"):
            await self._adopt(row)

    async def _adopt(self, row: Row) -> None:
        """Answer a turn that was written after its caller had been refused: the caller's retry finds it running."""
        turn = await self._from_row(row)
        if turn is None or turn.stored is None:
            return
        if row["stop_requested"] or any(each["content"] for each in turn.replies.values()):
            turn.early = "stopped" if row["stop_requested"] else "interrupted"
        self._launch(turn, turn.stored, Limits(self.settings.max_tokens), 0)

    async def _from_row(self, row: Row) -> Turn | None:
        """Return the turn of a row that is ours and that nobody here knows, entered into `turns`."""
        if row["id"] in self.turns:
            return None
        session = await sessions.select_unchecked(self.database, row["session_id"])
        rows = tuple(await turns.select_turn_messages(self.database, row["id"]))
        if row["id"] in self.turns or not rows:
            return None
        turn = self.turns[row["id"]] = Turn(row["id"], session, row["account_id"])
        turn.stored = StoredTurn(turn.id, session, turn.account_id, row["position"], "", rows, True)
        return turn

    # -- what beats

    async def _checkpoint(self) -> None:
        """Write the text so far of every reply that said something since the last time, in one transaction.

        The whole text each time: what Redis has, too, can wait for a few seconds.
        """
        now = time.monotonic()
        values: list[Row] = []
        for turn in self.turns.values():
            if turn.state != "answering" or turn.voice is None:
                continue
            if turn.voice.safe and now - turn.checkpointed_at < self.settings.checkpoint_with_redis:
                continue
            turn.checkpointed_at = now
            for side in turn.open:
                if (length := len(turn.text(side))) > turn.checkpointed[side]:
                    turn.checkpointed[side] = length
                    values.append(
                        {
                            "session_id": turn.session.id,
                            "id": turn.replies[side]["id"],
                            "turn_id": turn.id,
                            "owner": self.worker,
                            "content": turn.text(side),
                            "now": self.database.now(),
                        }
                    )
        if values:
            await turns.checkpoint(self.database, values)
        await self._unused.give_back()

    async def _sweep(self) -> None:
        """Take over turns whose worker died and end them with the longest text known."""
        # After an outage owners renew as soon as they can; a sweep at that moment would take turns from the living.
        if self.draining or time.monotonic() - self.database.failed_at < self.settings.lease:
            return
        for row in await turns.take_over(self.database, self.worker, int(self.settings.lease * 1000)):
            if row["id"] not in self.turns:  # else it is our own and was not renewed in time: now it is
                self.relay.count("taken_over")
                log.warning("turn %s: its worker is gone, ending it", row["id"])
                self.tasks.spawn(self._take_over(row))
        await accounts.delete_expired(self.database)

    async def _take_over(self, row: Row) -> None:
        """End a turn whose worker died. Where the database goes away meanwhile, the next renewal finds it ours."""
        turn = await self._from_row(row)
        if turn is None:
            return
        turn.early = "stopped" if row["stop_requested"] else "interrupted"
        room = await self.relay.enter(turn.session)
        try:
            await self._inherit(turn, room)
        except Exception:
            log.exception("turn %s could not be taken over", turn.id)
        finally:
            await self._conclude(turn, room, 0)

    async def _inherit(self, turn: Turn, room: Room) -> None:
        """Learn the longest text known of a turn: from the checkpoint, Redis, and the room here."""
        stored = turn.stored
        assert stored is not None
        turn.open = {side for side, row in turn.replies.items() if row["status"] not in ENDED}
        messages = self.relay.mask.messages(turn.session, list(stored.rows))
        answer = Answer(turn.id, stored.position, stored.previous, messages)
        await self.relay.live_texts(answer)
        answer = room.begin(answer)
        turn.voice = self.relay.voice(room, answer)
        turn.voice.begin()
        if not turn.open:  # only the turn itself was left to end
            await turns.update_endings(self.database, self.worker, list(turn.replies.values()), last=True)
        for side in sorted(turn.open):
            ending = answer.replies[side].ending
            if ending is not None:  # readers were told so, and that stays true
                await self._finish(turn, side, Result(ending["status"], ending["failure_reason"]), 0.0)
