"""Where a reply's text comes from: one vocabulary, the choice of provider, and the rules every remote one obeys.

A provider is one async generator: deltas, then one `Finish`, or a `ProviderError`. It knows nothing of turns, rooms or
the database. Each vendor's SDK is imported by its adapter alone, and an adapter only when one of its models is
offered: together they cost 80 MB and three seconds.
"""

from __future__ import annotations

import asyncio
import importlib
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol

import msgspec

from ..errors import REPLY_SENTENCES
from ..settings import Model, Settings


class ChatMessage(msgspec.Struct, frozen=True):
    """One line of the conversation a model is shown. `role`: system, user or assistant."""

    role: str
    content: str


class Limits(msgspec.Struct, frozen=True):
    """What a reply may cost. Seconds; a model that thinks aloud is alive, one that only sends pings is not."""

    max_tokens: int
    temperature: float | None = None
    first_token_timeout: float = 60
    idle_timeout: float = 30


class Delta(msgspec.Struct, frozen=True):
    text: str


class Finish(msgspec.Struct, frozen=True):
    """The provider says the answer is whole ("stop") or reached its limit ("length"). Counts where it tells them."""

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
    """Close the generator to hang up: the connection to the vendor ends with it."""

    def stream(
        self, model: Model, messages: Sequence[ChatMessage], limits: Limits
    ) -> AsyncGenerator[Delta | Finish, None]: ...

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
        # Here and not at the first question: importing an SDK holds up every socket of the worker for a second.
        self._providers = {name: _open(name, environ) for name in {m.provider for m in self.known.values()}}

    def stream(
        self, model: str | Model, messages: Sequence[ChatMessage], limits: Limits
    ) -> AsyncGenerator[Delta | Finish, None]:
        """Ask a model, on offer or of an older session. Raises `ProviderError` at once for one that cannot answer."""
        asked = self.known.get(model if isinstance(model, str) else model.id)
        if asked is None:
            raise ProviderError("provider_unavailable")
        if asked.max_tokens:
            limits = msgspec.structs.replace(limits, max_tokens=min(limits.max_tokens, asked.max_tokens))
        return self._providers[asked.provider].stream(asked, messages, limits)

    async def close(self) -> None:
        await asyncio.gather(*(provider.close() for provider in self._providers.values()))


def _open(name: str, environ: Mapping[str, str]) -> Provider:
    kind = {"demo": "Demo", "openai_chat": "OpenAIChat", "anthropic_messages": "AnthropicMessages"}[name]
    provider: Provider = getattr(importlib.import_module(f".{name}", __name__), kind)(environ)
    return provider
