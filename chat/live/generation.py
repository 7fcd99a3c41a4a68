"""Generation: one task per turn, owned by this worker and by no connection.

It runs one provider stream per reply, says what they produce through the turn's writer, writes checkpoints, and turns
every ending into a stored status and a `message_complete`. It never raises: its tasks stand beside everyone else's.
A lease makes the ownership; whoever finds it run out takes the turn and ends it `interrupted`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from ..errors import ChatError
from ..limits import Limits as RateLimits
from ..providers import ChatMessage, Finish, Limits, ProviderError, Providers
from ..settings import Settings
from ..store import accounts, sessions, turns
from ..store.accounts import Account
from ..store.database import Database, StorageUnavailable
from ..store.queries import Row
from ..store.sessions import Session
from ..store.turns import Ask, Terms, Turn
from .relay import Relay
from .writer import Ends, Writer

log = logging.getLogger("parley.generation")

CHARS_PER_TOKEN = 4  # a rough count for budgets and history, where the provider tells none
HISTORY_MESSAGES = 60
OUTAGE = 60.0  # seconds a model that keeps failing is not drawn for a battle


@dataclass
class Running:
    """A turn this worker is answering. `stop`: why it should end before its models do."""

    turn: Turn
    writer: Writer
    task: asyncio.Task[None] | None = None
    stop: str | None = None
    fenced: bool = False
    ending: bool = False  # storage may have the end already: that it is not ours there any more is no wonder
    streams: list[asyncio.Task[None]] = field(default_factory=list)
    checkpointed: int = -1  # the last event storage has been told of
    checkpointed_at: float = 0.0  # monotonic, when it was
    unsaved: list[Row] = field(default_factory=list)  # ended replies that storage does not have so


@dataclass
class Result:
    """How one reply ended."""

    status: str = "success"
    reason: str | None = None
    finish: Finish | None = None
    first_token: float | None = None  # seconds after the start


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
    ) -> None:
        self.settings = settings
        self.database = database
        self.relay = relay
        self.providers = providers
        self.limits = limits
        self.worker = worker
        self.running: dict[str, Running] = {}
        self._launching: set[str] = set()  # turns of ours that are stored and wait for their room
        self.draining = False
        self.observe: Callable[[str, Result, float], None] = lambda model, result, seconds: None
        self._failures: dict[str, tuple[int, float]] = {}  # model → failures in a row, and when the last was
        self._tasks: set[asyncio.Task[Any]] = set()
        self._awake_at = self._renewed_at = time.monotonic()
        self._slept = False  # this process was frozen until after its lease: its turns may be someone else's
        self.lag = 0.0  # seconds the event loop was late the last time something was due
        self._strangers: set[str] = set()  # turns of ours in storage that nobody here knew at the last renewal
        self._orphans: set[str] = set()  # turns that are being ended for somebody else
        self._unused = accounts.Unused(database)
        relay.on_stop = self._stop_here

    # -- life

    def start(self) -> None:
        self.spawn(self._forever(self._checkpoint, self.settings.checkpoint_every))
        self.spawn(self._forever(self._renew, self.settings.lease_renew))
        self.spawn(self._forever(self._sweep, self.settings.sweep_every))
        self.spawn(self._forever(self.relay.beat, 1.0))
        self.spawn(self._forever(self._watch, self.settings.lease_renew / 2))
        self.spawn(self._forever(self.limits.beat, 5.0))

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something beside everything else, until it ends or the worker does."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() and not isinstance(task.exception(), StorageUnavailable):
            log.error("a background task died", exc_info=task.exception())

    async def _forever(self, work: Callable[[], Awaitable[None]], every: float) -> None:
        """Do something again and again; an error now is no reason not to try later."""
        while True:
            try:
                await work()
            except StorageUnavailable:
                pass  # said once where it was found
            except (ChatError, TimeoutError) as problem:
                log.warning("%s: %s", getattr(work, "__name__", work), problem)
            due = time.monotonic() + every
            await asyncio.sleep(every)
            self.lag = time.monotonic() - due

    async def drain(self) -> None:
        """Let running answers finish for a while, then end the rest `interrupted`. Ends in bounded time."""
        self.draining = True
        tasks = [running.task for running in self.running.values() if running.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=self.settings.drain)
        for running in list(self.running.values()):
            self._end_early(running, "interrupted")
        tasks = [running.task for running in self.running.values() if running.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=self.settings.storage_timeout)
        with contextlib.suppress(StorageUnavailable):
            await self._unused.give_back()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def outages(self) -> set[str]:
        """Models whose last few replies here all failed a moment ago."""
        then = time.monotonic() - OUTAGE
        return {model for model, (failures, at) in self._failures.items() if failures >= 3 and at > then}

    def _note(self, model: str, result: Result) -> None:
        failures, _ = self._failures.get(model, (0, 0.0))
        failed = result.status == "failed" and result.reason != "provider_refused"
        self._failures[model] = (failures + 1 if failed else 0, time.monotonic())

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
    ) -> Turn:
        """Start the turn a message asks for, or find the one it started before. Raises `ChatError`."""
        await self._admit(account.id)
        turns.checked_content(ask.content, self.settings.prompt_max)
        max_tokens = max_tokens or self.settings.max_tokens
        terms = self._terms(max_tokens, ask.content, len(session.sides))
        turn = await self._within_budget(
            lambda: turns.insert_turn(self.database, session, account.id, ask, terms)
        )
        if turn.fresh:
            await self._launch(turn, Limits(max_tokens, temperature), terms.tokens)
        return turn

    async def again(self, session: Session, account: Account, message_id: str) -> Turn:
        """Answer the session's last user message anew. Raises `ChatError`."""
        await self._admit(account.id)
        terms = self._terms(self.settings.max_tokens, "", len(session.sides))
        turn = await self._within_budget(
            lambda: turns.insert_regeneration(self.database, session, account.id, message_id, terms)
        )
        await self._launch(turn, Limits(self.settings.max_tokens), terms.tokens)
        return turn

    async def _within_budget(self, insert: Callable[[], Awaitable[Turn]]) -> Turn:
        """Insert a turn; where the budget does not allow it, once more with what others have not used of it."""
        try:
            return await insert()
        except ChatError as problem:
            if problem.code != "budget_exhausted" or not self._unused:
                raise
        await self._unused.give_back()
        return await insert()

    async def _launch(self, turn: Turn, limits: Limits, reserved: int) -> None:
        """Hand a stored turn to a task of its own. The row exists: from here on it ends, whatever happens."""
        launched = asyncio.ensure_future(self._launched(turn, limits, reserved))
        self._tasks.add(launched)
        launched.add_done_callback(self._ended)
        await asyncio.shield(launched)

    async def _launched(self, turn: Turn, limits: Limits, reserved: int) -> None:
        self._launching.add(turn.id)  # a room waits for Redis; nobody here may think meanwhile that it was forgotten
        try:
            writer = await self.relay.write(turn.session, turn.id)
            running = self.running[turn.id] = Running(turn, writer)
        finally:
            self._launching.discard(turn.id)
        writer.sure = lambda: self._awake() and not running.fenced
        writer.fence = lambda: self._still_ours(running)
        writer.ending = lambda ends, seq: self._store_end(running, ends, seq)
        for message in self.relay.mask.messages(turn.session, list(turn.rows)):
            writer.create(message)
        running.task = self.spawn(self._run(running, limits, reserved))

    # -- one turn

    async def _run(self, running: Running, limits: Limits, reserved: int) -> None:
        """Answer one turn to its end. Never raises: nobody awaits it."""
        turn = running.turn
        saying = self.spawn(running.writer.run())
        try:
            history = await self._history(turn)
            running.streams = [
                asyncio.create_task(self._reply(running, reply, history, limits)) for reply in turn.replies
            ]
            if running.stop is not None:
                self._end_early(running, running.stop)
            await asyncio.gather(*running.streams)
        except Exception:  # the outermost frame of a task: what is forgotten here hangs every reader
            log.exception("turn %s failed", turn.id)
            for reply in turn.replies:
                await self._finish(running, reply, Result("failed", "internal"), 0.0)
        running.writer.end()
        if running.fenced:
            saying.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await saying
        await self._end(running, reserved)

    async def _store_end(self, running: Running, ends: Ends, seq: int) -> bool:
        """End the turn in storage before readers hear of it: they may begin the next one that moment, anywhere.

        False when the turn is somebody else's. A storage that is away keeps nobody waiting; `_end` tries again.
        """
        if running.unsaved:
            return True
        running.ending = True
        try:
            ours = await turns.end_turn(self.database, self.worker, running.turn.id, seq, ends, [])
        except StorageUnavailable:
            return True
        running.writer.stored = ours
        if not ours:
            self._fence(running)
        return ours

    async def _end(self, running: Running, reserved: int) -> None:
        turn = running.turn
        try:
            if running.fenced:
                return
            with contextlib.suppress(StorageUnavailable):  # the next renewal or sweep finds the row and ends it as said
                if not running.writer.stored:
                    last, ends = running.writer.log.last, running.writer.ends()
                    await self._keep_trying(
                        lambda: turns.end_turn(self.database, self.worker, turn.id, last, ends, running.unsaved)
                    )
                    running.writer.stored = True
                spent = sum(len(running.writer.log.text(reply["id"])) for reply in turn.replies) // CHARS_PER_TOKEN
                self._unused.add(turn.account_id, turn.replies[0]["created_at"], reserved - spent)
        finally:
            self.running.pop(turn.id, None)
            running.writer.retire()
            await self.relay.finish(turn.session.id)

    async def _history(self, turn: Turn) -> list[Row]:
        """The conversation up to and with the turn's user message, newest first, cut to the token budget."""
        rows: list[Row] = []
        if turn.user["position"]:
            with contextlib.suppress(StorageUnavailable):
                rows = await turns.select_messages(
                    self.database, turn.session.id, limit=HISTORY_MESSAGES, before=turn.user["position"]
                )
        budget = self.settings.history_tokens * CHARS_PER_TOKEN
        kept: list[Row] = []
        for row in [turn.user, *rows[::-1]]:
            budget -= len(row["content"])
            if kept and budget < 0:
                break
            if row["content"] and row["status"] in ("success", "stopped", "interrupted"):
                kept.append(row)
        return kept

    def _prompt(self, reply: Row, history: list[Row]) -> list[ChatMessage]:
        """What one model is shown: its own side of the conversation, oldest first."""
        model = self.providers.models.get(reply["model"])
        system = [ChatMessage("system", model.system)] if model is not None and model.system else []
        seen = [row for row in history[::-1] if row["role"] == "user" or row["participant"] == reply["participant"]]
        return system + [ChatMessage(row["role"], row["content"]) for row in seen]

    async def _reply(self, running: Running, reply: Row, history: list[Row], limits: Limits) -> None:
        """Stream one reply and write down how it ended."""
        started = time.monotonic()
        result = Result()
        try:
            async with asyncio.timeout(self.settings.reply_timeout):
                await self._stream(running, reply, self._prompt(reply, history), limits, result, started)
            running.writer.over(reply["id"], result.status)
            await running.writer.spoken(reply["id"])  # a blind battle says it slower than it came, and may be stopped
        except ProviderError as problem:
            result.status, result.reason = "failed", problem.code
        except TimeoutError:
            result.status, result.reason = "failed", "provider_timeout"
        except asyncio.CancelledError:
            # Only `_end_early` cancels a stream; the ending still has to be written.
            result.status = running.stop or "interrupted"
            result.reason = "interrupted" if result.status == "interrupted" else None
        except Exception:  # a provider's bug must not take the other side of the battle along
            log.exception("reply %s failed", reply["id"])
            result.status, result.reason = "failed", "internal"
        if running.fenced:
            return
        # It has ended: who ends the turn early from here on must not cancel the writing down.
        running.streams = [each for each in running.streams if each is not asyncio.current_task()]
        await self._finish(running, reply, result, time.monotonic() - started)

    async def _stream(
        self, running: Running, reply: Row, prompt: list[ChatMessage], limits: Limits, result: Result, started: float
    ) -> None:
        try:
            await self._stream_once(running, reply, prompt, limits, result, started)
        except ProviderError as problem:
            wait = problem.retry_after or 0.5
            if result.first_token is not None or not problem.retryable or wait > self.settings.retry_after_max:
                raise
            log.info("model %s: one retry after %s", reply["model"], problem.code)
            await asyncio.sleep(wait)
            await self._stream_once(running, reply, prompt, limits, result, started)

    async def _stream_once(
        self, running: Running, reply: Row, prompt: list[ChatMessage], limits: Limits, result: Result, started: float
    ) -> None:
        settings = self.settings
        said = 0
        limits = Limits(limits.max_tokens, limits.temperature, settings.first_token_timeout, settings.idle_timeout)
        stream = self.providers.stream(reply["model"], prompt, limits)
        say, side, id = running.writer.say, reply["participant"], reply["id"]
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
                say(side, id, piece.text)
        raise ProviderError("provider_truncated")

    async def _finish(self, running: Running, reply: Row, result: Result, seconds: float) -> None:
        """Store how a reply ended, then say so; say `storage_unavailable` when it cannot be stored."""
        writer = running.writer
        writer.over(reply["id"], result.status)
        await writer.spoken(reply["id"])
        row = None if running.fenced else await self._store(running, reply, result, seconds)
        if row is None:
            return
        self._note(reply["model"], result)
        self.observe(reply["model"], result, seconds)
        writer.complete(self.relay.mask.message(running.turn.session, row))

    async def _store(self, running: Running, reply: Row, result: Result, seconds: float) -> Row | None:
        """The reply as it is to be told; None when the turn is no longer ours to tell of."""
        log = running.writer.log
        row = reply | {
            "content": log.text(reply["id"]),
            "seq": log.shown,
            "status": result.status,
            "failure_reason": result.reason,
            "latency_ms": int(seconds * 1000),
            "first_token_ms": None if result.first_token is None else int(result.first_token * 1000),
        }
        try:
            ours = await self._keep_trying(
                lambda: turns.update_reply(self.database, self.worker, row, self.database.now())
            )
        except StorageUnavailable:
            row |= {"status": "failed", "failure_reason": "storage_unavailable"}
            running.unsaved.append(row)
            return row
        if not ours:
            self._fence(running)
        return row if ours else None

    async def _keep_trying(self, store: Callable[[], Awaitable[bool]]) -> bool:
        """Offer an ending to storage until it takes it. Raises `StorageUnavailable` after `store_for` seconds."""
        deadline = time.monotonic() + (3.0 if self.draining else self.settings.store_for)
        while True:
            try:
                return await store()
            except StorageUnavailable:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.5)

    # -- ending early

    async def stop(self, session: Session, account_id: str) -> bool:
        """End the session's running turn, whichever worker has it. False when none runs."""
        row = await turns.request_stop(self.database, session.id, account_id)
        if row is None:
            return False
        self._stop_here(row["id"])
        if row["id"] not in self.running:
            await self.relay.send_stop(session.id, row["id"])
        return True

    def _stop_here(self, turn_id: str) -> None:
        running = self.running.get(turn_id)
        if running is not None:
            self._end_early(running, "stopped")

    def _end_early(self, running: Running, why: str) -> None:
        running.stop = running.stop or why
        for stream in running.streams:
            stream.cancel()
        running.streams = []

    def _fence(self, running: Running) -> None:
        """Somebody else owns the turn now: say and write nothing more of it, and hear what the new owner says."""
        if running.fenced:
            return
        log.warning("turn %s was taken over from this worker", running.turn.id)
        running.fenced = True
        self.relay.count("fenced")
        self._end_early(running, "interrupted")
        self.relay.give_up(running.turn.session.id, running.writer)

    async def _still_ours(self, running: Running) -> bool:
        """Cheap while this process was awake; after a freeze that outlasted the lease it asks the database."""
        await self._watch()
        if self._slept and not running.fenced:
            with contextlib.suppress(StorageUnavailable):  # nobody else can have taken it then
                await self._renew()
        return not running.fenced

    async def _watch(self) -> None:
        self._awake()

    def _awake(self) -> bool:
        """Notice a freeze in which the lease ran out: it does from the last renewal, not from when we fell asleep.

        A clock of its own: that storage answers late is no sign of having slept.
        """
        now = time.monotonic()
        frozen = now - self._awake_at > self.settings.lease_renew
        self._slept = self._slept or (frozen and now - self._renewed_at > self.settings.lease)
        self._awake_at = now
        return not self._slept

    # -- what beats

    async def _renew(self) -> None:
        known = set(self.running)
        await self.database.set_clock()
        asked = time.monotonic()
        owned = await turns.renew_leases(self.database, self.worker, int(self.settings.lease * 1000))
        self._renewed_at = asked
        self._slept = time.monotonic() - asked > self.settings.lease  # frozen before we read this, say
        for turn_id in known & self.running.keys():
            running = self.running[turn_id]
            if turn_id not in owned and not running.ending and not running.writer.log.ended:
                self._fence(running)
            elif turn_id in owned and owned[turn_id]["stop_requested"]:
                self._end_early(running, "stopped")
        # A turn whose insertion outlasted its caller's patience is ours, and nobody answers it.
        strangers = owned.keys() - known - self.running.keys() - self._launching
        for turn_id in strangers & self._strangers:
            self.spawn(self._end_orphan(owned[turn_id]))
        self._strangers = strangers

    async def _checkpoint(self) -> None:
        """Write the text so far of every reply that said something since the last time, in one transaction.

        The whole text each time: what Redis has, too, can wait for a few seconds.
        """
        now = time.monotonic()
        values: list[Row] = []
        for running in self.running.values():
            turn_log = running.writer.log
            rests = now - running.checkpointed_at < self.settings.checkpoint_with_redis and running.writer.safe
            if turn_log.shown <= running.checkpointed or running.fenced or rests:
                continue
            running.checkpointed, running.checkpointed_at = turn_log.shown, now
            if not any(turn_log.text(reply["id"]) for reply in running.turn.replies):
                continue
            # All replies or none: only where each says what it is at one event, storage knows all that was said by it.
            values += [
                {
                    "session_id": running.turn.session.id,
                    "id": reply["id"],
                    "turn_id": running.turn.id,
                    "owner": self.worker,
                    "content": turn_log.text(reply["id"]),
                    "seq": turn_log.shown,
                    "now": self.database.now(),
                }
                for reply in running.turn.replies
            ]
        if values:
            await turns.checkpoint(self.database, values)
        await self._unused.give_back()

    async def _sweep(self) -> None:
        """Take over turns whose worker died and end them with the longest text known."""
        # After an outage owners renew as soon as they can; a sweep at that moment would take turns from the living.
        if self.draining or time.monotonic() - self.database.failed_at < self.settings.lease:
            return
        for row in await turns.take_over(self.database, self.worker, int(self.settings.lease * 1000)):
            if row["id"] in self.running or row["id"] in self._launching:
                continue  # our own, not renewed in time: now it is
            self.relay.count("taken_over")
            log.warning("turn %s: its worker is gone, ending it", row["id"])
            self.spawn(self._end_orphan(row))
        await accounts.delete_expired(self.database)

    async def _end_orphan(self, row: Row) -> None:
        """End a turn nobody answers. Where storage goes away meanwhile, the next renewal finds it still ours."""
        if row["id"] in self._orphans or row["id"] in self.running:
            return
        self._orphans.add(row["id"])
        try:
            with contextlib.suppress(StorageUnavailable):
                await self._bury(row)
        finally:
            self._orphans.discard(row["id"])

    async def _bury(self, row: Row) -> None:
        """End a turn taken from a dead worker: what was said of it is kept, the rest is `interrupted`."""
        session = await sessions.select_unchecked(self.database, row["session_id"])
        rows = tuple(await turns.select_turn_messages(self.database, row["id"]))
        turn = Turn(row["id"], session, row["account_id"], rows, True)
        known = max(each["seq"] for each in rows)
        writer = await self.relay.write(session, turn.id, row | {"status": "running", "seq": known})
        running = self.running[turn.id] = Running(turn, writer)
        writer.ending = lambda ends, seq: self._store_end(running, ends, seq)
        writer.skip_ahead()
        status, reason = ("stopped", None) if row["stop_requested"] else ("interrupted", "interrupted")
        # All is stored before any of it is told: should we die, too, the next one tells it with the same numbers.
        endings: list[Row] = []
        for reply in turn.replies:
            said, known = writer.log.ending(reply["id"]), self.relay.mask.message(session, reply)
            if said is not None:
                # What readers were told stays true, also where storage took something else or nothing in time.
                if any(said[name] != known[name] for name in ("content", "status", "failure_reason")):
                    ending = {name: said[name] for name in turns.ENDING if name in said}
                    running.unsaved.append(reply | ending | {"seq": writer.log.shown})
            elif reply["status"] in ("pending", "streaming"):
                stored = await self._store(running, reply, Result(status, reason), 0.0)
                endings += [stored] if stored is not None else []
            else:
                endings.append(reply)
        saying = self.spawn(writer.run())
        for message in self.relay.mask.messages(session, list(rows)):
            if message["id"] not in writer.log.bodies:  # its worker died before it said a word
                writer.create(message)
        for ending in endings:
            writer.complete(self.relay.mask.message(session, ending))
        writer.end()
        await saying
        await self._end(running, 0)
