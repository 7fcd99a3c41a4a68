"""Anthropic's messages.

The only file that knows the Anthropic SDK. What becomes of its errors, clocks and odd endings is `Upstream`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import dropwhile
from typing import Any

import anthropic

from ..settings import Model
from . import ChatMessage, Limits
from .upstream import Piece, Upstream

OFFICIAL = "https://api.anthropic.com"  # said aloud: left out, $ANTHROPIC_BASE_URL would decide who gets the key


class AnthropicMessages(Upstream):
    def connect(self, base_url: str, key: str) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(api_key=key, base_url=base_url or OFFICIAL, max_retries=0)

    async def ask(
        self, client: anthropic.AsyncAnthropic, model: Model, messages: Sequence[ChatMessage], limits: Limits
    ) -> Any:
        return await client.messages.create(**request(model, messages, limits))

    def read(self, event: Any) -> Piece:
        match event.type:
            case "message_start":
                return Piece(input_tokens=event.message.usage.input_tokens)
            case "content_block_start":
                return Piece(text=getattr(event.content_block, "text", None) or "")
            case "content_block_delta" if event.delta.type == "text_delta":
                return Piece(text=event.delta.text)
            case "content_block_delta":
                return Piece(thinking=True)
            case "message_delta":
                return Piece(reason=event.delta.stop_reason, output_tokens=event.usage and event.usage.output_tokens)
        return Piece()


def request(model: Model, messages: Sequence[ChatMessage], limits: Limits) -> dict[str, Any]:
    """Return the arguments of one call. The API wants the user first and no empty text, and refuses any temperature."""
    system = [message.content for message in messages if message.role == "system"]
    spoken = [message for message in messages if message.role != "system" and message.content.strip()]
    asked: dict[str, Any] = {
        "model": model.model_code or model.id,
        "messages": [
            {"role": message.role, "content": message.content}
            for message in dropwhile(lambda message: message.role == "assistant", spoken)
        ],
        "max_tokens": limits.max_tokens,
        "stream": True,
        "timeout": anthropic.Timeout(max(limits.first_token_timeout, limits.idle_timeout), connect=5, write=10, pool=5),
    }
    if text := "\n\n".join(filter(None, system)):
        asked["system"] = text
    return asked
