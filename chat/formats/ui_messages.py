"""The AI SDK's UI message chunks: https://ai-sdk.dev/docs/ai-sdk-ui/stream-protocol

A turn is one message whose text parts are the sides `a` and `b`. Clients refuse an unknown type, and the first
versions refuse an unknown key: no extension of ours is used here. Clients cannot resume in the middle of a message,
so a resumed stream repeats the turn from its start, under the same message id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import msgspec

from ..errors import invalid
from . import EventFormat, Id, last_of_user, one_line, problem_of
from .events import encode
from .tellings import Begun, Ended, Message, Over, Telling, Words

Chunk = dict[str, Any]


class Part(msgspec.Struct):
    """Text, or one of many other kinds."""

    type: str = "text"
    text: str = ""


class UIMessage(msgspec.Struct):
    """A message as these clients keep it; they send their whole conversation each time."""

    role: Literal["system", "user", "assistant"]
    id: Id | None = None
    parts: list[Part] | None = None
    content: str = ""


def last_words(messages: list[UIMessage]) -> tuple[str, str]:
    """Return the id ("" for none) and the text of the last user message. Raises `invalid`."""
    place = last_of_user([message.role for message in messages])
    message, parts = messages[place], messages[place].parts or []
    if any(part.type == "file" for part in parts):
        raise invalid(f"messages[{place}].parts", "only text is understood here")
    text = "".join([part.text for part in parts if part.type == "text"]) or message.content
    return message.id or "", text


class UIMessages(EventFormat):
    headers: ClassVar = {"X-Vercel-AI-UI-Message-Stream": "v1"}
    closing = b"data: [DONE]\n\n"

    @staticmethod
    def dialect(turn_id: str, tellings: list[Telling]) -> list[bytes]:
        return [b"".join([b"data: %b\n\n" % one_line(chunk) for chunk in chunks_dialect(turn_id, tellings)])]

    @staticmethod
    def broken_off(problem: str, sides: Sequence[str]) -> bytes:
        return b"data: %b\n\n%b" % (encode({"type": "error", "errorText": problem}), UIMessages.closing)


def chunks_dialect(turn_id: str, tellings: list[Telling]) -> list[bytes]:
    """Speak to those who wrap the chunks themselves: each piece is the JSON of one."""
    return [encode(chunk) for chunk in _chunks(tellings)]


def _chunks(tellings: list[Telling]) -> Iterator[Chunk]:
    started = False
    for telling in tellings:
        match telling:
            case Begun(_, {"role": "assistant"} as reply):
                if not started:
                    yield {"type": "start", "messageId": reply["id"]}
                started = True
                yield {"type": "text-start", "id": reply["participant"]}
            case Words(participant=side, text=text):
                yield {"type": "text-delta", "id": side, "delta": text}
            case Ended(participant=side):
                yield {"type": "text-end", "id": side}
            case Over(messages=replies):
                yield _last(replies)


def _last(replies: tuple[Message, ...]) -> Chunk:
    """Say an error when the whole turn is over and not before: these clients stop reading at one."""
    if problem := problem_of(replies):
        return {"type": "error", "errorText": problem}
    stopped = all(reply["status"] == "stopped" for reply in replies)
    return {"type": "abort"} if stopped else {"type": "finish"}
