"""Where a reply's text comes from: one vocabulary, the choice of provider, and what holds for all of them.

A provider is one coroutine: it says an answer's text as it comes, then returns a `Finish` or raises `ProviderError`. A
provider has no access to turns, rooms or the database. Each vendor's SDK is imported by its adapter alone, an adapter
only when one of its models is offered, and beside the loop: together they cost 80 MB and three seconds.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec

from ..errors import REPLY_SENTENCES
from ..settings import Model, Settings


class ChatMessage(msgspec.Struct, frozen=True):
    """A message of the conversation that a model receives. `role`: system, user or assistant."""

    role: str
    content: str


class Limits(msgspec.Struct, frozen=True):
    """The limits of a reply. Times are seconds; reasoning text counts as a sign of life, pings do not."""

    max_tokens: int
    temperature: float | None = None
    first_token_timeout: float = 60
    idle_timeout: float = 30


Say = Callable[[str], None]  # takes the next text of an answer; its exception ends the answer
Think = Callable[[int], None]  # takes the size of a thought in bytes: it is paid for like text, which goes no further


class Finish(msgspec.Struct, frozen=True):
    """The answer is whole ("stop") or reached its limit ("length"). Token counts are there if the vendor sends them."""

    reason: str
    input_tokens: int | None = None
    output_tokens: int | None = None


class ProviderError(Exception):
    """Why there is no (whole) answer, in our words only. `retryable`: worth asking again if no text came yet."""

    def __init__(self, code: str, *, retryable: bool = False, retry_after: float | None = None) -> None:
        super().__init__(f"{code}: {REPLY_SENTENCES[code]}")
        self.code = code
        self.retryable = retryable
        self.retry_after = retry_after


class Provider(Protocol):
    """A source of answers whose text can be stored and sent: see `clean`."""

    async def answer(
        self, model: Model, messages: Sequence[ChatMessage], limits: Limits, say: Say, think: Think
    ) -> Finish:
        """Answer the last message. Cancel the call to hang up: the connection to the vendor ends with it.

        Raises `ProviderError`, and what `say` raises.
        """
        ...

    async def close(self) -> None: ...


def offered(known: dict[str, Model], settings: Settings) -> dict[str, Model]:
    """The models new sessions may have: in production no demo model beside real ones, unless the operator says so."""
    real = {id: model for id, model in known.items() if not model.demo}
    return real if real and settings.production and settings.demo_models == "auto" else known


def fighters(models: Mapping[str, Model]) -> list[str]:
    """The models on offer that a blind battle is drawn from: real ones, wherever two of them can meet."""
    real = [id for id, model in models.items() if not model.demo]
    return real if len(real) > 1 else list(models)


class Providers:
    """The models on offer and what answers for each; opened once per worker, closed at its end."""

    def __init__(self, settings: Settings, environ: Mapping[str, str] = os.environ) -> None:
        answering = [m for m in settings.models if not m.api_key_env or environ.get(m.api_key_env, "").strip()]
        # The first is who answers where nobody chose: a real model as soon as there is one.
        self.known = {model.id: model for model in sorted(answering, key=lambda model: model.demo)}
        self.models = offered(self.known, settings)
        self._environ = environ
        self._opened: dict[str, asyncio.Task[Provider]] = {}

    @property
    def ready(self) -> bool:
        """Whether every known model can be asked at once."""
        names = {model.provider for model in self.known.values()}
        return all(name in self._opened and _succeeded(self._opened[name]) for name in names)

    async def load(self) -> None:
        """Open what answers for the known models. Raises `ImportError` for an SDK that is not installed."""
        for name in sorted({model.provider for model in self.known.values()}):
            await self._provider(name)

    async def answer(
        self, model: str | Model, messages: Sequence[ChatMessage], limits: Limits, say: Say, think: Think
    ) -> Finish:
        """Have a model answer, one on offer or one of an older session. Raises `ProviderError` for an unknown one."""
        asked = self.known.get(model if isinstance(model, str) else model.id)
        if asked is None:
            raise ProviderError("provider_unavailable")
        if asked.max_tokens:
            limits = msgspec.structs.replace(limits, max_tokens=min(limits.max_tokens, asked.max_tokens))
        return await (await self._provider(asked.provider)).answer(asked, messages, limits, say, think)

    async def _provider(self, name: str) -> Provider:
        if name not in self._opened:
            models = [model for model in self.known.values() if model.provider == name]
            opening = asyncio.to_thread(_open, name, models, self._environ)
            self._opened[name] = asyncio.create_task(opening)
        return await asyncio.shield(self._opened[name])  # a cancelled caller must not cancel the import for others

    async def close(self) -> None:
        opened = await asyncio.gather(*self._opened.values(), return_exceptions=True)
        providers = [provider for provider in opened if not isinstance(provider, BaseException)]
        await asyncio.gather(*(provider.close() for provider in providers))


def _succeeded(task: asyncio.Task[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _open(name: str, models: Sequence[Model], environ: Mapping[str, str]) -> Provider:
    kind = {"demo": "Demo", "openai_chat": "OpenAIChat", "anthropic_messages": "AnthropicMessages"}[name]
    with _collector_off():
        provider: Provider = getattr(importlib.import_module(f".{name}", __name__), kind)(models, environ)
    return provider


@contextmanager
def _collector_off() -> Iterator[None]:
    """Import without looking for cycles: Python would look through an SDK's 300,000 objects many times, each for long.

    Nothing else runs meanwhile, the event loop included. Imported objects are permanent, so the collector skips them
    later.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
