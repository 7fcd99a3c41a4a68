"""A completion that belongs to no session: nothing of it is stored; limits, budgets and clocks are those of a turn."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import NamedTuple

from ..errors import ChatError
from ..providers import ChatMessage, Finish, Limits, ProviderError
from ..store import accounts
from ..store.database import StorageUnavailable
from ..store.queries import Query
from .generation import CHARS_PER_TOKEN, Generation, Result

PEOPLE = 30  # as many accounts as one of the operator's keys stands for: it is a server's, with people behind it


class Caller(NamedTuple):
    """Whose completion it is: the name of its counters, and how many people's worth of them it may use."""

    name: str
    people: int = 1


class Completion:
    """One completion: admitted, run, and in any case released."""

    def __init__(
        self, generation: Generation, caller: Caller, model: str, messages: list[ChatMessage], limits: Limits
    ) -> None:
        self.model = model
        self.finish: Finish | None = None
        self._generation = generation
        self._caller = caller
        self._messages = messages
        self._limits = limits
        self._asked = sum(len(message.content) for message in messages) // CHARS_PER_TOKEN
        self._said = 0  # characters
        self._place: list[str] = []
        self._reserved_at = 0  # 0: nothing is reserved

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens asked and answered: the provider's own counts where it tells them."""
        asked = self.finish.input_tokens if self.finish else None
        answered = self.finish.output_tokens if self.finish else None
        estimate = -(-self._said // CHARS_PER_TOKEN)
        return self._asked if asked is None else asked, estimate if answered is None else answered

    async def admit(self) -> None:
        """Take a place among those running, and tokens from the day's budget. Raises `ChatError`."""
        generation, settings, (name, people) = self._generation, self._generation.settings, self._caller
        if generation.draining:
            raise ChatError("draining", "The service is restarting. Please try again in a moment.", retry_after=2)
        per_minute = settings.messages_per_minute * people
        await generation.limits.hit(f"messages:{name}", per_minute, 60, "You are sending messages too quickly.")
        place = f"completions:{name}"
        if not await generation.limits.enter([(place, settings.turns_per_account * people)]):
            raise ChatError("rate_limited", "Too many answers are running already. Wait for one.", retry_after=5)
        self._place = [place]
        await self._reserve()

    async def _reserve(self) -> None:
        database, settings = self._generation.database, self._generation.settings
        own = settings.daily_tokens_account if self._caller.people == 1 else 0
        budgets = (own, settings.daily_tokens_service)
        daily_messages = settings.daily_messages if self._caller.people == 1 else 0
        now, tokens = database.now(), self._asked + self._limits.max_tokens

        async def work(query: Query) -> None:
            await accounts.reserve(query, now, self._caller.name, tokens, budgets, daily_messages)

        await database.transaction(work)
        self._reserved_at = now

    async def run(self, say: Callable[[str], None]) -> None:
        """Say the answer's text piece by piece; `finish` tells afterwards how it ended. Raises `ProviderError`."""
        started, result = time.monotonic(), Result()
        try:
            async with asyncio.timeout(self._generation.settings.reply_timeout):
                await self._stream(say, result, started)
        except TimeoutError:
            result.reason = "provider_timeout"
            raise ProviderError("provider_timeout") from None
        except ProviderError as problem:
            result.reason = problem.code
            raise
        finally:
            result.finish = self.finish
            self._generation.observe(self.model, result, time.monotonic() - started)

    async def _stream(self, say: Callable[[str], None], result: Result, started: float) -> None:
        pieces = self._generation.providers.stream(self.model, self._messages, self._limits)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, Finish):
                    self.finish = piece
                    return
                if result.first_token is None:
                    result.first_token = time.monotonic() - started
                self._said += len(piece.text)
                if self._said > self._generation.settings.reply_max:
                    raise ProviderError("too_long")
                say(piece.text)
        raise ProviderError("provider_truncated")

    async def release(self) -> None:
        """Leave the place, and give back what was reserved and not used. Harmless when done again."""
        place, self._place = self._place, []
        self._generation.limits.leave(place)
        reserved_at, self._reserved_at = self._reserved_at, 0
        if reserved_at:
            unused = accounts.Unused(self._generation.database)
            unused.add(self._caller.name, reserved_at, self._asked + self._limits.max_tokens - sum(self.tokens))
            with contextlib.suppress(StorageUnavailable):
                await unused.give_back()
