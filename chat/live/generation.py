"""Generation: one task per turn, owned by this worker and by no connection.

A turn is one object in one dictionary, entered before its row is written, with one state:

    starting → answering → ending → over, or `lost` when another worker took the turn

The turn's task asks the models and turns every ending into a stored status and a `message_complete`. The task never
raises: nobody awaits it. After it every reply has an ending, in the database and for every reader.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable

from ..errors import ChatError
from ..limits import RateLimits, networks
from ..providers import Limits, ProviderError, Providers
from ..settings import Settings
from ..store import turns
from ..store.accounts import Account
from ..store.budgets import Refunds, budgets_of, metered
from ..store.database import Database, StorageUnavailable, new_id
from ..store.pages import LAST
from ..store.queries import Row
from ..store.sessions import Session
from ..store.turns import Ask, StoredTurn, Terms
from ..tasks import Tasks
from .answers import ENDED, Answer
from .events import StopTurn
from .relay import Relay
from .rooms import Room
from .streams import Streams
from .turn import Result, Turn

log = logging.getLogger("parley.generation")

OUTAGE = 60.0  # seconds a model that keeps failing is not drawn for a battle

Insert = Callable[[str, Terms], Awaitable[StoredTurn]]  # writes a turn: its id and its terms in, its rows out


class Generation:
    """Every turn this worker answers."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        relay: Relay,
        providers: Providers,
        rate_limits: RateLimits,
        worker: str,
    ) -> None:
        self.settings = settings
        self.database = database
        self.relay = relay
        self.providers = providers
        self.rate_limits = rate_limits
        self.worker = worker
        self.tasks = Tasks()
        self.turns: dict[str, Turn] = {}
        self.completions: set[asyncio.Task[None]] = set()  # running answers that belong to no turn
        self.draining = False
        self._drain: asyncio.Task[None] | None = None
        self.streams = Streams(settings, database, providers)
        self.refunds = Refunds(database)
        self.observe: Callable[[str, Result], None] = lambda model, result: None
        # `Leases` sets both. surely_owned: whether this worker certainly owns its turns; adopt: launches a turn that is
        # this worker's in the database and is not in `turns`.
        self.surely_owned: Callable[[], bool] = lambda: True
        self.adopt: Callable[[Row], Awaitable[None]] | None = None
        self._failures: dict[str, tuple[int, float]] = {}  # model → failures in a row, and when the last was
        relay.on_stop = self.stop_here

    # -- life

    def start(self) -> None:
        self.tasks.beat(self._checkpoint, self.settings.checkpoint_every)
        self.tasks.beat(self.relay.beat, 1.0)
        self.tasks.beat(self.rate_limits.beat, 5.0)

    def begin_drain(self) -> asyncio.Task[None]:
        """Start nothing new, let running answers finish for a while, end the rest, and send all readers away.

        The task ends in bounded time. A server that waits for its requests calls this before it waits: they would be
        cut off in the middle of answers otherwise.
        """
        if self._drain is None:
            self.draining = True
            self._drain = self.tasks.spawn(self._end_answers())
        return self._drain

    async def _end_answers(self) -> None:
        await self._wait_for_answers(self.settings.drain)
        for turn in list(self.turns.values()):
            turn.end_early("interrupted")
        for completion in list(self.completions):
            completion.cancel()
        await self._wait_for_answers(self.settings.storage_timeout)
        await self.relay.hang_up()

    async def _wait_for_answers(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.completions or not all(turn.state == "over" for turn in self.turns.values()):
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(0.01)

    async def drain(self) -> None:
        """End all answers, then all tasks. Ends in bounded time."""
        await self.begin_drain()
        with contextlib.suppress(StorageUnavailable):
            await self.refunds.give_back()
        await self.tasks.cancel()

    def outages(self) -> set[str]:
        """Return the models whose last few replies here all failed a moment ago."""
        then = time.monotonic() - OUTAGE
        return {model for model, (failures, at) in self._failures.items() if failures >= 3 and at > then}

    # -- starting

    async def begin(
        self,
        session: Session,
        account: Account,
        ask: Ask,
        *,
        address: str = "",
        max_tokens: int = 0,
        temperature: float | None = None,
    ) -> StoredTurn:
        """Start the turn a message asks for, or find the turn that it started before. Raises `ChatError`.

        address: the caller's, as limits count it. A blind battle ignores `max_tokens` and `temperature`: models differ
        in how they follow them, and a voter could tell the two apart.
        """
        turns.check_content(ask.content, self.settings.prompt_max)
        if session.blind:
            max_tokens, temperature = 0, None
        limits = Limits(max_tokens or self.settings.max_tokens, temperature)

        def insert(turn_id: str, terms: Terms) -> Awaitable[StoredTurn]:
            return turns.insert_turn(self.database, session, account.id, ask, terms, turn_id)

        return await self._start(session, account, address, ask.content, insert, limits)

    async def again(self, session: Session, account: Account, message_id: str, *, address: str = "") -> StoredTurn:
        """Answer the session's last user message, or one reply to it, anew. Raises `ChatError`."""

        def insert(turn_id: str, terms: Terms) -> Awaitable[StoredTurn]:
            return turns.insert_regeneration(self.database, session, account.id, message_id, terms, turn_id)

        said = await turns.select_turn_of_message(self.database, session, message_id)
        content = said.rows[0]["content"] if said is not None else ""
        return await self._start(session, account, address, content, insert, Limits(self.settings.max_tokens))

    async def _start(
        self, session: Session, account: Account, address: str, content: str, insert: Insert, limits: Limits
    ) -> StoredTurn:
        """Write a turn and launch it. Both go on when the caller leaves or waits no longer. Raises `ChatError`."""
        per_minute = self.settings.messages_per_minute
        await self.rate_limits.hit(f"messages:{account.id}", per_minute, 60, "You are sending messages too quickly.")
        if self.draining:  # checked right before the turn is entered: a drain waits only for turns that it finds
            raise ChatError("draining", "The service is restarting. Please try again in a moment.", retry_after=2)
        turn = Turn(new_id(), session, account.id)
        self.turns[turn.id] = turn
        starting = self.tasks.spawn(self._insert(turn, address, content, insert, limits))
        try:
            return await self.database.answer(starting)
        except TimeoutError:
            raise StorageUnavailable from None

    async def _insert(self, turn: Turn, address: str, content: str, insert: Insert, limits: Limits) -> StoredTurn:
        try:
            terms = await self._terms(turn, address, content, limits)
            with self.relay.doubtful(turn.session):  # nobody tells a turn that is over at once and has no answer
                stored = await self.refunds.attempt(lambda: insert(turn.id, terms))
        except BaseException:
            del self.turns[turn.id]
            raise
        if stored.fresh:
            self.launch(turn, stored, limits)
        else:
            del self.turns[turn.id]
            await self._adopt_found(stored)
        return stored

    async def _terms(self, turn: Turn, address: str, content: str, limits: Limits) -> Terms:
        """Return the terms of a new turn. `tokens` is the most that its prompts and answers can cost."""
        settings, session = self.settings, turn.session
        history = await self.streams.history(session, LAST if session.message_count else 0)
        tokens = 0
        for side in session.sides:
            model_id = session.model(side).for_server()
            prompt = self.streams.prompt(model_id, side, history, content)
            texts = [message.content for message in prompt]
            tokens += metered(self.providers.known.get(model_id), texts, limits.max_tokens).most
        daily = (settings.daily_tokens_account, settings.daily_tokens_address, settings.daily_tokens_service)
        return Terms(
            owner=self.worker,
            lease=int(settings.lease * 1000),
            tokens=tokens,
            budgets=budgets_of(turn.account_id, self.hashed_networks(address), daily),
            daily_messages=settings.daily_messages,
            turns_per_account=settings.turns_per_account,
            person_reads=settings.person_reads,
        )

    def hashed_networks(self, address: str) -> list[tuple[str, int]]:
        """Return the `networks` of an address under keyed hashes: nobody can read an address from the database."""
        key = self.settings.secret_keys[-1].encode()[:64] if self.settings.secret_keys else b""
        hashes = [(hashlib.blake2b(name.encode(), key=key, digest_size=12), times) for name, times in networks(address)]
        return [(each.hexdigest(), times) for each, times in hashes]

    def launch(self, turn: Turn, stored: StoredTurn, limits: Limits) -> None:
        """Hand a stored turn to a task of its own. From here on its row exists, and the turn ends whatever happens."""
        turn.stored = stored
        turn.open = {side for side, row in turn.replies.items() if row["status"] not in ENDED}
        self.tasks.spawn(self._run(turn, limits))

    async def _adopt_found(self, stored: StoredTurn) -> None:
        """Answer the turn that a retry has found, if the turn is this worker's and no task answers it yet."""
        if stored.id in self.turns:
            return
        if all(row["status"] in ENDED for row in stored.rows[1:]):
            # The worker that wrote it may have died before it told anybody: a message to a person is over at once.
            self.relay.learn_again(stored.session)
            return
        row = await turns.select_latest_turn(self.database, stored.session)
        ours = row is not None and (row["id"], row["owner"], row["status"]) == (stored.id, self.worker, "running")
        if row is not None and ours and self.adopt is not None:
            await self.adopt(row)

    # -- one turn

    async def _run(self, turn: Turn, limits: Limits) -> None:
        """Answer one turn to its end. Never raises: nobody awaits this task."""
        room = self.relay.enter(turn.session)
        try:
            await self._answer(turn, room, limits)
        except Exception:  # the outermost frame of a task: readers would wait for ever for an ending
            log.exception("turn %s failed", turn.id)
        finally:
            await self._conclude(turn, room)

    async def _answer(self, turn: Turn, room: Room, limits: Limits) -> None:
        assert turn.stored is not None
        answer = self._answer_of(turn)
        if not turn.stored.fresh:
            await self.relay.learn_from_redis(answer)
            if turn.early is None and any(answer.replies[side].text for side in turn.open):
                turn.early = "interrupted"  # readers may have seen that text, and a model would say another
        self._speak(turn, room, answer)
        if not (turn.open or turn.stored.fresh):  # only the turn itself is left to end
            await turns.update_endings(self.database, self.worker, list(turn.replies.values()), last=True)
        try:
            position = turn.stored.rows[0]["position"]
            history = [] if turn.early else await self.streams.history(turn.session, position)
        except StorageUnavailable:
            for side in sorted(turn.open):
                await self.finish(turn, side, Result("failed", "storage_unavailable"))
            return
        turn.results = {side: Result() for side in turn.open}
        if turn.early is None:
            turn.state = "answering"
            self.streams.begin(turn, history, limits)
        pacing = [self.tasks.spawn(self.streams.keep_pace(turn))] if turn.rhythm is not None else []
        try:
            await asyncio.gather(*(self._side(turn, side) for side in sorted(turn.open)))
        finally:
            for task in (*pacing, *turn.streams.values()):  # an error with one side must not leave the other running
                task.cancel()

    def _answer_of(self, turn: Turn) -> Answer:
        """Return the turn's answer, made from its stored rows."""
        stored = turn.stored
        assert stored is not None
        messages = self.relay.mask.messages(turn.session, list(stored.rows))
        return Answer(turn.id, stored.position, stored.previous, messages)

    def _speak(self, turn: Turn, room: Room, answer: Answer) -> None:
        """Give the turn its voice and tell all readers that the turn has begun, or that this worker goes on with it."""
        turn.voice = self.relay.voice(room, room.learn_turn(answer), self.surely_owned)
        turn.checkpointed = {side: len(turn.text(side)) for side in turn.replies}
        turn.voice.begin()

    async def _side(self, turn: Turn, side: str) -> None:
        """Wait for one reply's stream and end the reply. A stop cancels the stream, never this coroutine."""
        stream = turn.streams.get(side)
        if stream is not None:
            await asyncio.wait({stream})
        result = _outcome(turn, side, stream)
        if turn.state != "lost":
            await self.finish(turn, side, result)

    async def _conclude(self, turn: Turn, room: Room) -> None:
        """The post-condition of a turn: every reply has an ending, in the database and for every reader."""
        try:
            turn.rhythm = None  # nothing shows the text that is still held back: no ending may wait for it
            while turn.open and turn.state != "lost" and turn.voice is not None:
                status = turn.early or "failed"
                reason = {"failed": "internal", "interrupted": "interrupted"}.get(status)
                await self.finish(turn, min(turn.open), Result(status, reason))
            if turn.stored is not None and turn.stored.reservation is not None:
                self.refunds.settle(turn.stored.reservation, turn.meters.values())
        except Exception:
            log.exception("turn %s could not be concluded", turn.id)
        finally:
            if turn.voice is not None:
                self.relay.voices.discard(turn.voice)
            if turn.state != "lost":
                turn.state = "over"
            if not turn.unsaved:
                del self.turns[turn.id]
            self.relay.leave(room)

    # -- one ending

    async def finish(self, turn: Turn, side: str, result: Result) -> None:
        """Store a reply's ending, then tell it. An ending that cannot be stored is told as `storage_unavailable`."""
        if result.status in ("stopped", "interrupted"):
            turn.held.pop(side, None)
            turn.moved.set()
            turn.out.cut(side)
        else:
            await self.streams.shown(turn, side)  # a model's text before its failure is shown first
        await turn.out.settled(side)
        async with turn.lock:
            if side not in turn.open or turn.state == "lost":
                return
            row = await self._store(turn, side, result)
            if row is None:
                return
            turn.open.discard(side)
            if not turn.open:
                turn.state = "ending"
            self._count_failure(row["model"], result)
            self.observe(row["model"], result)
            turn.out.end(side, self.relay.mask.message(turn.session, row))

    async def _store(self, turn: Turn, side: str, result: Result) -> Row | None:
        """Write a reply's ending; with the last reply the turn ends as well. Returns the row as readers are told it.

        None: another worker owns the turn now.
        """
        row = turn.replies[side] | {
            "content": turn.text(side),
            "status": result.status,
            "failure_reason": result.reason,
            "latency_ms": int((time.monotonic() - result.started) * 1000),
            "first_token_ms": None if result.first_token is None else int(result.first_token * 1000),
        }
        rows, last = [*turn.unsaved, row], turn.open == {side}
        try:
            ours = await self._keep_trying(lambda: turns.update_endings(self.database, self.worker, rows, last=last))
        except StorageUnavailable:
            row |= {"status": "failed", "failure_reason": "storage_unavailable"}
            turn.unsaved.append(row)
            return row
        turn.unsaved = []
        if not ours:
            self.lose(turn)
        return row if ours else None

    async def _keep_trying(self, store: Callable[[], Awaitable[bool]]) -> bool:
        """Retry `store` until the database answers. Raises `StorageUnavailable` after `store_for` seconds."""
        deadline = time.monotonic() + (3.0 if self.draining else self.settings.store_for)
        while True:
            try:
                return await store()
            except StorageUnavailable:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.5)

    def _count_failure(self, model: str, result: Result) -> None:
        """Note whether a reply of this model failed: `outages` looks for failures in a row."""
        if result.status in ("stopped", "interrupted"):
            return  # the end says nothing about the model: visitors who stop a silent one would clear its record
        failures, _ = self._failures.get(model, (0, 0.0))
        failed = result.status == "failed" and result.reason != "provider_refused"
        self._failures[model] = (failures + 1 if failed else 0, time.monotonic())

    # -- ending early

    async def stop(self, session: Session, account_id: str, turn_id: str = "") -> bool:
        """End the session's running turn, on whichever worker it runs. False when none runs, or not the one named."""
        here = [turn for turn in self.turns.values() if turn.session.key == session.key and turn.runs]
        own = [turn for turn in here if turn_id in ("", turn.id)]
        if session.is_open or session.account_id == account_id:
            for turn in own:
                turn.end_early("stopped")
        try:
            if not turn_id:  # a turn that is not written yet may be refused, as another one runs elsewhere
                written = [turn.id for turn in own if turn.stored is not None]
                turn_id = written[0] if written else await turns.select_running_turn(self.database, session)
            runs = await turns.request_stop(self.database, turn_id, account_id)
        except StorageUnavailable:
            if not own:
                raise
            return True
        if runs and turn_id not in self.turns:
            # While Redis carries nothing, the owner finds the request in the database.
            self.relay.tell(session, StopTurn(turn_id))
        return runs or bool(own)

    def stop_here(self, turn_id: str) -> None:
        turn = self.turns.get(turn_id)
        if turn is not None:
            turn.end_early("stopped")

    def lose(self, turn: Turn) -> None:
        """Leave the turn to its new owner: nothing of it is told or written here any more, and the room learns."""
        if turn.state in ("lost", "over"):
            return
        log.warning("turn %s was taken over from this worker", turn.id)
        self.relay.count("fenced")
        turn.end_early("interrupted")
        turn.state, turn.unsaved = "lost", []
        for side in list(turn.held):
            self.streams.release(turn, side)
        if turn.voice is not None:
            turn.voice.fall_silent()
        room = self.relay.rooms.get(turn.session.key)
        if room is not None:
            room.learn_again()

    # -- checkpoints

    async def _checkpoint(self) -> None:
        """Write the text so far of every reply that has grown since the last time, in one transaction.

        Each checkpoint writes the whole text; text that Redis also holds can wait a few seconds. Then give back the
        tokens that ended turns did not use.
        """
        now = time.monotonic()
        values: list[Row] = []
        grown: list[tuple[Turn, str, int]] = []
        for turn in self.turns.values():
            if turn.state != "answering" or turn.voice is None:
                continue
            if now - turn.checkpointed_at < self.settings.checkpoint_with_redis and turn.voice.safe:
                continue
            turn.checkpointed_at = now
            for side in turn.open:
                if (length := len(turn.text(side))) > turn.checkpointed[side]:
                    grown.append((turn, side, length))
                    reply = {"session_id": turn.session.id, "id": turn.replies[side]["id"], "turn_id": turn.id}
                    told = {"content": turn.text(side), "owner": self.worker, "now": self.database.now()}
                    values.append(reply | told)
        if values:
            await turns.checkpoint(self.database, values)
        for turn, side, length in grown:  # after the write: one that failed has to be made again
            turn.checkpointed[side] = length
        await self.refunds.give_back()


def _outcome(turn: Turn, side: str, stream: asyncio.Task[None] | None) -> Result:
    """Return how a reply ended, from the way its stream did. An ending that readers know stays."""
    result, known = turn.results[side], turn.out.answer.replies[side].ending
    if known is not None:
        return Result(known["status"], known["failure_reason"])
    if stream is None or stream.cancelled():
        result.status = turn.early or "interrupted"
        result.reason = "interrupted" if result.status == "interrupted" else None
        return result
    match stream.exception():
        case None:
            pass
        case ProviderError() as problem:
            result.status, result.reason = "failed", problem.code
        case TimeoutError():
            result.status, result.reason = "failed", "provider_timeout"
        case problem:  # an error in a provider must not end the other side of the battle
            log.error("reply %s failed", turn.replies[side]["id"], exc_info=problem)
            result.status, result.reason = "failed", "internal"
    return result

