"""The input and output of models: one provider stream per reply, with one retry, clocks, and a battle's pace.

A stream ends when all of its text is shown. A failure is an exception; a success has its `Finish` in the turn's
`results`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial

from ..providers import ChatMessage, Limits, ProviderError, Providers, Say
from ..settings import Settings
from ..store.budgets import Meter, metered
from ..store.database import Database
from ..store.pages import select_page
from ..store.queries import Row
from ..store.sessions import Session
from .pace import Rhythm, pieces
from .turn import Result, Turn

log = logging.getLogger("parley.generation")

CHARS_PER_TOKEN = 4  # a rough count by which history is cut
HISTORY_MESSAGES = 60


class Streams:
    """Asks the models of this worker's turns."""

    def __init__(self, settings: Settings, database: Database, providers: Providers) -> None:
        self.settings = settings
        self.database = database
        self.providers = providers

    # -- what a model is shown

    async def history(self, session: Session, before: int) -> list[Row]:
        """Return the newest messages below a position that models may be shown, newest first.

        Raises `StorageUnavailable`: a model that is not shown the conversation would answer something else.
        """
        if not before:
            return []
        rows, _ = await select_page(self.database, session, HISTORY_MESSAGES, before)
        return [row for row in rows[::-1] if row["content"] and row["status"] in ("success", "stopped", "interrupted")]

    def prompt(self, model_id: str, side: str, history: list[Row], content: str) -> list[ChatMessage]:
        """Return what one model is shown: its own side of the conversation, oldest first, and the user's message.

        `history_tokens` bounds each model's own side: the other model's replies take nothing of it.
        """
        model = self.providers.known.get(model_id)
        system = [ChatMessage("system", model.system)] if model is not None and model.system else []
        budget = self.settings.history_tokens * CHARS_PER_TOKEN
        shown: list[ChatMessage] = []
        for row in history:
            if row["role"] == "user" or row["participant"] == side:
                budget -= len(row["content"])
                if budget < 0:
                    break
                shown.append(ChatMessage(row["role"], row["content"]))
        return [*system, *shown[::-1], ChatMessage("user", content)]

    def begin(self, turn: Turn, history: list[Row], limits: Limits) -> None:
        """Begin the stream of every reply. Never waits: a stop finds either no stream or all streams."""
        assert turn.stored is not None
        content = turn.stored.rows[0]["content"]
        if turn.session.blind and self.settings.pace and len(turn.open) > 1:
            turn.rhythm, turn.held = Rhythm(self.settings.pace), dict.fromkeys(turn.open, "")
            turn.released = {side: asyncio.Event() for side in turn.open}
        for side in sorted(turn.open):
            model_id = turn.replies[side]["model"]
            prompt = self.prompt(model_id, side, history, content)
            model, texts = self.providers.known.get(model_id), [message.content for message in prompt]
            turn.meters[side] = metered(model, texts, limits.max_tokens)
            turn.streams[side] = asyncio.create_task(self._stream(turn, side, prompt, limits))

    async def _stream(self, turn: Turn, side: str, prompt: list[ChatMessage], limits: Limits) -> None:
        """Stream one reply until all of its text is shown. Raises `ProviderError`, `TimeoutError`."""
        try:
            async with asyncio.timeout(self.settings.reply_timeout):
                await self._stream_with_retry(turn, side, prompt, limits)
        finally:
            turn.finished.add(side)
            turn.moved.set()
        await self.shown(turn, side)

    async def _stream_with_retry(self, turn: Turn, side: str, prompt: list[ChatMessage], limits: Limits) -> None:
        settings, model, result = self.settings, turn.replies[side]["model"], turn.results[side]
        limits = Limits(limits.max_tokens, limits.temperature, settings.first_token_timeout, settings.idle_timeout)
        say = partial(self._hold, turn, side) if turn.rhythm is not None else partial(turn.out.say, side)
        asked = partial(ask, self.providers, model, prompt, limits, settings.reply_max, result, turn.meters[side], say)
        try:
            await asked()
        except ProviderError as problem:
            wait = problem.retry_after or 0.5
            if result.first_token is not None or not problem.retryable or wait > settings.retry_after_max:
                raise
            log.info("model %s: one retry after %s", model, problem.code)
            await asyncio.sleep(wait)
            await asked()

    def _hold(self, turn: Turn, side: str, text: str) -> None:
        turn.held[side] += text
        turn.moved.set()

    async def shown(self, turn: Turn, side: str) -> None:
        """Wait until all text of a reply is shown; in a blind battle its pace decides when."""
        if turn.rhythm is not None and side in turn.held:
            await turn.released[side].wait()
        await turn.out.settled(side)

    async def keep_pace(self, turn: Turn) -> None:
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
            # A battle with a failed side gets no vote: the rest is shown as fast as it comes.
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
                self.release(turn, side)

    def release(self, turn: Turn, side: str) -> None:
        """Allow a side's ending to be published: its last piece is out."""
        if turn.held.pop(side, None) is not None and turn.rhythm is not None:
            turn.rhythm.side_ended()
            turn.released[side].set()
            turn.moved.set()


async def ask(
    providers: Providers,
    model: str,
    prompt: list[ChatMessage],
    limits: Limits,
    reply_max: int,
    result: Result,
    meter: Meter,
    say: Say,
) -> None:
    """Ask a model once and pass its text on to `say`; `result` has its counts and its `Finish` afterwards.

    Raises `ProviderError`, also for an answer without an end and for one of more than `reply_max` characters.
    """

    def said(text: str) -> None:
        if result.first_token is None:
            result.first_token = time.monotonic() - result.started
        result.said += len(text)
        meter.came(text)
        if result.said > reply_max:
            raise ProviderError("too_long")
        say(text)

    meter.call()
    try:
        result.finish = finish = await providers.answer(model, prompt, limits, said, meter.thought)
        meter.told(finish.input_tokens, finish.output_tokens)
    except BaseException as problem:
        # Only a call that we ended may have thought in silence: not one that the provider refused or broke off.
        if not isinstance(problem, ProviderError) or problem.code in ("provider_timeout", "too_long"):
            meter.cut()
        raise
