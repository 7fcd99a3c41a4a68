"""OpenAI's chat completions, and everything that speaks them: vLLM, Ollama, llama.cpp, DeepInfra, … by `base_url`.

The only file that knows the OpenAI SDK, which sends the request; the stream is read by `sse`. `Upstream` handles
errors, timeouts and unusual endings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec
import openai

from ..settings import Model
from . import ChatMessage, Limits, ProviderError
from .body import Body
from .failures import InStream
from .sse import Count, decoder
from .upstream import Piece, Upstream

OFFICIAL = "https://api.openai.com/v1"  # explicit: without it, $OPENAI_BASE_URL would decide who gets the key


class ChunkDelta(msgspec.Struct):
    content: str | None = None
    refusal: Any = None
    reasoning_content: Any = None
    reasoning: Any = None


class ChunkChoice(msgspec.Struct):
    delta: ChunkDelta | None = None
    finish_reason: str | None = None


class ChunkUsage(msgspec.Struct):
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None


class CompletionChunk(msgspec.Struct):
    """The fields we read of an event. Other fields may hold any value."""

    choices: list[ChunkChoice] | None = None
    usage: ChunkUsage | None = None
    error: Any = None


decode = decoder(CompletionChunk)


class OpenAIChat(Upstream):
    sdk: ClassVar[Any] = openai
    client = openai.AsyncOpenAI
    official = OFFICIAL

    async def ask(self, client: Any, model: Model, messages: Sequence[ChatMessage], limits: Limits) -> Body:
        return await self.post(client, "/chat/completions", request(model, messages, limits))

    def read(self, event: bytes) -> Piece:
        chunk = decode(event)
        if chunk.error:
            raise InStream(chunk.error)
        usage, choice = chunk.usage or ChunkUsage(), chunk.choices[0] if chunk.choices else ChunkChoice()
        delta = choice.delta or ChunkDelta()
        thought = delta.reasoning_content or delta.reasoning
        if delta.refusal:
            raise ProviderError("provider_refused")
        return Piece(
            text=delta.content or "",
            thinking=str(thought) if thought else None,
            reason=choice.finish_reason or None,  # some servers say "" while they go on
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
        )


def request(model: Model, messages: Sequence[ChatMessage], limits: Limits) -> dict[str, Any]:
    """Return the body of one request. OpenAI's own models refuse `max_tokens`; most others know nothing else."""
    official = not model.base_url or model.base_url.rstrip("/") == OFFICIAL
    asked: dict[str, Any] = {
        "model": model.model_code or model.id,
        "messages": [{"role": message.role, "content": message.content} for message in messages],
        "max_completion_tokens" if official else "max_tokens": limits.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return asked if limits.temperature is None else {**asked, "temperature": limits.temperature}
