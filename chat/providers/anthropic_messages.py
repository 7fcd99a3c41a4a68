"""Anthropic's messages.

The only file that knows the Anthropic SDK, which sends the request; the stream is read by `sse`. `Upstream` handles
errors, timeouts and unusual endings.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import dropwhile
from typing import Any, ClassVar

import anthropic
import msgspec

from ..settings import Model
from . import ChatMessage, Limits
from .body import Body
from .failures import InStream
from .sse import Count, decoder
from .upstream import Piece, Upstream

OFFICIAL = "https://api.anthropic.com"  # explicit: without it, $ANTHROPIC_BASE_URL would decide who gets the key


class MessageUsage(msgspec.Struct):
    """Tokens read from or written to the vendor's cache are paid for and are not among its `input_tokens`."""

    input_tokens: Count | None = None
    cache_creation_input_tokens: Count | None = None
    cache_read_input_tokens: Count | None = None
    output_tokens: Count | None = None

    @property
    def input(self) -> int | None:
        cached = (self.cache_creation_input_tokens or 0) + (self.cache_read_input_tokens or 0)
        return None if self.input_tokens is None else self.input_tokens + cached


class MessageStart(msgspec.Struct):
    usage: MessageUsage | None = None


class MessagePart(msgspec.Struct):
    """A block as it begins, or what is added to it, or what is said of the message at its end."""

    type: str | None = None
    text: str | None = None
    thinking: str | None = None
    stop_reason: str | None = None


class MessageEvent(msgspec.Struct):
    """The fields we read of an event. Other fields may hold any value."""

    type: str = ""
    message: MessageStart | None = None
    content_block: MessagePart | None = None
    delta: MessagePart | None = None
    usage: MessageUsage | None = None
    error: Any = None


decode = decoder(MessageEvent)


class AnthropicMessages(Upstream):
    sdk: ClassVar[Any] = anthropic
    client = anthropic.AsyncAnthropic
    official = OFFICIAL

    async def ask(self, client: Any, model: Model, messages: Sequence[ChatMessage], limits: Limits) -> Body:
        return await self.post(client, "/v1/messages", request(model, messages, limits))

    def read(self, event: bytes) -> Piece:
        said = decode(event)
        if said.error:
            raise InStream(said.error)
        delta, usage = said.delta or MessagePart(), said.usage or MessageUsage()
        match said.type:
            case "message_start":
                usage = (said.message or MessageStart()).usage or MessageUsage()
                return Piece(input_tokens=usage.input)
            case "content_block_start":
                return Piece(text=(said.content_block or MessagePart()).text or "")
            case "content_block_delta" if delta.type == "text_delta":
                return Piece(text=delta.text or "")
            case "content_block_delta":
                return Piece(thinking=delta.thinking or "")
            case "message_delta":
                return Piece(reason=delta.stop_reason, input_tokens=usage.input, output_tokens=usage.output_tokens)
        return Piece()


def request(model: Model, messages: Sequence[ChatMessage], limits: Limits) -> dict[str, Any]:
    """Return the body of one request. The API wants the user first and no empty text, and refuses any temperature."""
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
    }
    if text := "\n\n".join(filter(None, system)):
        asked["system"] = text
    return asked
