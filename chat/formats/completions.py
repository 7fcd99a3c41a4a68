"""OpenAI's chat completions, streamed and whole: https://platform.openai.com/docs/api-reference/chat

They belong to no turn: a completion is asked for, said and forgotten. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from . import one_line
from .events import encode

CLOSING = b"data: [DONE]\n\n"


class Head(msgspec.Struct, frozen=True):
    """The fields that every chunk of a completion repeats. `created`: Unix seconds."""

    id: str
    created: int
    model: str


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def chunk(head: Head, delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return event(_object(head, "chat.completion.chunk") | {"choices": [choice], "usage": None})


def usage_chunk(head: Head, usage: Usage) -> bytes:
    return event(_object(head, "chat.completion.chunk") | {"choices": [], "usage": usage})


def whole(head: Head, text: str, finish: str, usage: Usage) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    return _object(head, "chat.completion") | {"choices": [choice], "usage": usage}


def failure(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """Return the body of an error. SDKs show `message`, and choose their exception by the status."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(value: Any) -> bytes:
    return b"data: %b\n\n" % one_line(encode(value))


def _object(head: Head, kind: str) -> dict[str, Any]:
    return {"id": head.id, "object": kind, "created": head.created, "model": head.model, "system_fingerprint": None}


class Stops:
    """Ends a text before the first of some sequences, and holds back what may be the beginning of one."""

    def __init__(self, sequences: Iterable[str]) -> None:
        self._sequences = [sequence for sequence in sequences if sequence]
        self._held = ""
        self.met = False

    def feed(self, text: str) -> str:
        """Return what may be said of the text so far."""
        text = self._held + text
        places = [place for sequence in self._sequences if (place := text.find(sequence)) >= 0]
        if places:
            self.met, self._held = True, ""
            return text[: min(places)]
        said = len(text) - max((_begun(text, sequence) for sequence in self._sequences), default=0)
        self._held = text[said:]
        return text[:said]

    def rest(self) -> str:
        """Return what was held back of a text that has ended."""
        return self._held


def _begun(text: str, sequence: str) -> int:
    """Return how many characters at the text's end may be the beginning of the sequence."""
    lengths = range(min(len(sequence) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(sequence[:n])), 0)
