"""OpenAI's chat completions, and everything that speaks them: vLLM, Ollama, llama.cpp, DeepInfra, … by `base_url`.

The only file that knows the OpenAI SDK. What becomes of its errors, clocks and odd endings is `Upstream`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import openai

from ..settings import Model
from . import ChatMessage, Limits, ProviderError
from .upstream import Piece, Upstream

OFFICIAL = "https://api.openai.com/v1"  # said aloud: left out, $OPENAI_BASE_URL would decide who gets the key


class OpenAIChat(Upstream):
    def connect(self, base_url: str, key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(api_key=key, base_url=base_url or OFFICIAL, max_retries=0)

    async def ask(
        self, client: openai.AsyncOpenAI, model: Model, messages: Sequence[ChatMessage], limits: Limits
    ) -> Any:
        return await client.chat.completions.create(**request(model, messages, limits))

    def read(self, event: Any) -> Piece:
        usage, choice = event.usage, event.choices[0] if event.choices else None
        if choice is None:
            return Piece(input_tokens=usage and usage.prompt_tokens, output_tokens=usage and usage.completion_tokens)
        delta = choice.delta
        if getattr(delta, "refusal", None):
            raise ProviderError("provider_refused")
        return Piece(
            text=delta.content or "",
            thinking=bool(getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None)),
            reason=choice.finish_reason or None,  # some servers say "" while they go on
            input_tokens=usage and usage.prompt_tokens,
            output_tokens=usage and usage.completion_tokens,
        )


def request(model: Model, messages: Sequence[ChatMessage], limits: Limits) -> dict[str, Any]:
    """Return the arguments of one call. OpenAI's own models refuse `max_tokens`; most others know nothing else."""
    official = not model.base_url or model.base_url.rstrip("/") == OFFICIAL
    asked: dict[str, Any] = {
        "model": model.model_code or model.id,
        "messages": [{"role": message.role, "content": message.content} for message in messages],
        "max_completion_tokens" if official else "max_tokens": limits.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "timeout": openai.Timeout(max(limits.first_token_timeout, limits.idle_timeout), connect=5, write=10, pool=5),
    }
    return asked if limits.temperature is None else {**asked, "temperature": limits.temperature}
