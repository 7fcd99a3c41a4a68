"""A completion that belongs to no session: nothing of it is stored; limits, budgets and clocks are those of a turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from ..errors import ChatError
from ..providers import ChatMessage, Limits, ProviderError
from ..store.budgets import Reservation, budgets_of, metered, reserve
from ..store.queries import Query
from .generation import Generation
from .streams import CHARS_PER_TOKEN, ask
from .turn import Result

PEOPLE = 30  # as many accounts as one of the operator's keys stands for: it is a server's, with people behind it


class Caller(NamedTuple):
    """The owner of a completion: the name of its counters, for how many people it counts, and its address."""

    name: str
    people: int = 1
    address: str = ""


class Completion:
    """A completion: admitted, run, and in any case released."""

    def __init__(
        self, generation: Generation, caller: Caller, model: str, messages: list[ChatMessage], limits: Limits
    ) -> None:
        self.model = model
        self.result = Result()
        self._generation = generation
        self._caller = caller
        self._messages = messages
        self._limits = limits
        self._asked = sum(len(message.content) for message in messages) // CHARS_PER_TOKEN
        texts = [message.content for message in messages]
        self._meter = metered(generation.providers.models[model], texts, limits.max_tokens)
        self._place: list[str] = []
        self._reservation: Reservation | None = None

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens asked and answered: the provider's own counts where it tells them."""
        finish = self.result.finish
        asked = finish.input_tokens if finish else None
        answered = finish.output_tokens if finish else None
        estimate = -(-self.result.said // CHARS_PER_TOKEN)
        return self._asked if asked is None else asked, estimate if answered is None else answered

    async def admit(self) -> None:
        """Take a slot among the running completions and reserve tokens of the day's budget. Raises `ChatError`."""
        generation, settings, (name, people, _) = self._generation, self._generation.settings, self._caller
        if generation.draining:
            raise ChatError("draining", "The service is restarting. Please try again in a moment.", retry_after=2)
        per_minute = settings.messages_per_minute * people
        await generation.rate_limits.hit(f"messages:{name}", per_minute, 60, "You are sending messages too quickly.")
        limit = (f"completions:{name}", settings.turns_per_account * people)
        message = "Too many answers are running already. Wait for one."
        self._place = await generation.rate_limits.enter([limit], message)
        await self._reserve()

    async def _reserve(self) -> None:
        database, settings = self._generation.database, self._generation.settings
        person = self._caller.people == 1
        own = (settings.daily_tokens_account, settings.daily_tokens_address) if person else (0, 0)
        networks = self._generation.hashed_networks(self._caller.address)
        budgets = budgets_of(self._caller.name, networks, (*own, settings.daily_tokens_service))
        daily_messages = settings.daily_messages if person else 0

        async def work(query: Query) -> Reservation:
            return await reserve(query, database.now(), budgets, self._meter.most, daily_messages)

        self._reservation = await self._generation.refunds.attempt(lambda: database.transaction(work))

    async def run(self, say: Callable[[str], None]) -> None:
        """Pass the answer's text to `say`; `result` has the ending afterwards. Raises `ProviderError`."""
        settings, providers = self._generation.settings, self._generation.providers
        self.result = result = Result()
        try:
            async with asyncio.timeout(settings.reply_timeout):
                limits = self._limits
                await ask(providers, self.model, self._messages, limits, settings.reply_max, result, self._meter, say)
        except TimeoutError:
            result.reason = "provider_timeout"
            raise ProviderError("provider_timeout") from None
        except ProviderError as problem:
            result.reason = problem.code
            raise
        finally:
            self._generation.observe(self.model, result)

    def release(self) -> None:
        """Free the slot and release the unused reservation. A second call does nothing."""
        place, self._place = self._place, []
        self._generation.rate_limits.leave(place)
        reservation, self._reservation = self._reservation, None
        if reservation is not None:
            self._generation.refunds.settle(reservation, [self._meter])
