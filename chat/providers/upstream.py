"""A vendor behind its SDK: how every remote provider is asked, read, timed and translated, once.

An adapter says how to ask and how to read one event; whatever its SDK raises becomes a `ProviderError` here and nowhere
else. A vendor's own words go to the log, redacted, and never further.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

from ..settings import Model
from . import ChatMessage, Delta, Finish, Limits, ProviderError

log = logging.getLogger(__name__)

DELTA_MAX = 1_000_000  # characters in one event; a whole answer in one piece is fine, an endless one is not
AFTERMATH = 2.0  # seconds a finished stream may take for its token counts; the answer is complete without them


class Piece(msgspec.Struct, frozen=True):
    """What one event of a vendor adds to an answer. `thinking` is a sign of life whose text is never shown."""

    text: str = ""
    thinking: bool = False
    reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


class Upstream(ABC):
    """A vendor behind its SDK: an adapter says how to ask and how to read one event, the rules are here, once."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._clients: dict[tuple[str, str], Any] = {}
        for name in ("openai", "anthropic", "httpx2", "httpcore2"):
            logging.getLogger(name).setLevel(logging.WARNING)  # below it they print prompts and error bodies

    @abstractmethod
    def connect(self, base_url: str, key: str) -> Any:
        """Return a new SDK client that never retries: a retry bills again, so it is the caller's decision."""

    @abstractmethod
    async def ask(self, client: Any, model: Model, messages: Sequence[ChatMessage], limits: Limits) -> Any:
        """Send the request; return the SDK's stream once the vendor has answered with good headers."""

    @abstractmethod
    def read(self, event: Any) -> Piece:
        """Read one event of the stream. May raise anything: an event is the vendor's word, not ours."""

    async def stream(
        self, model: Model, messages: Sequence[ChatMessage], limits: Limits
    ) -> AsyncGenerator[Delta | Finish, None]:
        answered, reason, failure = False, None, None
        counts: list[int | None] = [None, None]
        try:
            async with aclosing(self._pieces(model, messages, limits)) as pieces:
                async for piece in pieces:
                    answered, reason = True, piece.reason or reason
                    counts = [_latest(piece.input_tokens, counts[0]), _latest(piece.output_tokens, counts[1])]
                    if piece.text:
                        yield Delta(piece.text)
        except Exception as problem:
            # Everything: the SDKs let through httpx's errors, JSON's and Unicode's, bare assertions and their own.
            if reason is None:
                failure = self._failed(model, problem, answered)
        if failure is not None:
            raise failure  # outside the `except`, or the vendor's text would travel along as its context
        yield Finish(self._finished(model, reason), *counts)

    async def _pieces(
        self, model: Model, messages: Sequence[ChatMessage], limits: Limits
    ) -> AsyncGenerator[Piece, None]:
        """Yield an empty piece when the vendor answers, then one per event. Our clocks, since pings reset the SDKs'."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + limits.first_token_timeout
        async with asyncio.timeout_at(deadline):
            events = await self.ask(self._client(model), model, messages, limits)
        try:
            yield Piece()
            while True:
                async with asyncio.timeout_at(deadline):
                    event = await anext(events, None)
                if event is None:
                    return
                piece = checked(self.read(event))
                yield piece  # the reader may take its time: the clock starts after it
                if piece.reason:
                    deadline = clock() + AFTERMATH
                elif piece.text or piece.thinking:
                    deadline = clock() + limits.idle_timeout
        finally:
            await events.close()

    def _client(self, model: Model) -> Any:
        place = (model.base_url, self._key(model))
        if place not in self._clients:
            self._clients[place] = self.connect(*place)
        return self._clients[place]

    def _key(self, model: Model) -> str:
        """A model without a key gets a word instead: given nothing, an SDK would send the key it finds by itself."""
        return (self._environ.get(model.api_key_env, "").strip() if model.api_key_env else "") or "none"

    def _failed(self, model: Model, problem: Exception, answered: bool) -> ProviderError:
        failure = translated(problem, answered)
        level = logging.ERROR if status_of(problem) in OPERATOR_FAULTS else logging.WARNING
        words = redacted(f"{type(problem).__name__}: {problem}", self._key(model))
        log.log(level, "model %s: %s after %r", model.id, failure.code, words)  # %r: no line breaks of theirs
        return failure

    def _finished(self, model: Model, reason: str | None) -> str:
        """Return our finish reason for a vendor's. Without one the stream just ended, which the SDKs call success."""
        if reason in FINISHED:
            return FINISHED[reason]
        code = "provider_truncated" if reason is None else REFUSED.get(reason, "provider_protocol")
        log.warning("model %s: %s after finish reason %.40r", model.id, code, reason)
        raise ProviderError(code, retryable=reason is None)

    async def close(self) -> None:
        clients, self._clients = list(self._clients.values()), {}
        await asyncio.gather(*(client.close() for client in clients), return_exceptions=True)


def _latest(new: int | None, old: int | None) -> int | None:
    return old if new is None else new


def checked(piece: Piece) -> Piece:
    """Refuse what an SDK took for a text: it builds its values from JSON without looking at the types."""
    if not isinstance(piece.text, str) or len(piece.text) > DELTA_MAX:
        raise ProviderError("provider_protocol")
    return piece


FINISHED = {"stop": "stop", "end_turn": "stop", "stop_sequence": "stop", "eos": "stop"}
FINISHED |= {"length": "length", "max_tokens": "length", "model_context_window_exceeded": "length"}
REFUSED = {"content_filter": "provider_refused", "refusal": "provider_refused", "error": "provider_unavailable"}

# By name: the SDKs and the two generations of httpx below them share no classes, and importing them has its price.
TIMED_OUT = {"TimeoutError", "TimeoutException", "APITimeoutError"}
CUT_OFF = {"APIConnectionError", "TransportError", "OSError"}
INVALID = {"APIResponseValidationError", "DecodingError"}

OPERATOR_FAULTS = {401, 402, 403, 404}  # a bad key, an empty account, no such model: nobody's retry will help
STATUS_OF_KIND = {"invalid_request_error": 400, "authentication_error": 401, "permission_error": 403}
STATUS_OF_KIND |= {"billing_error": 402, "not_found_error": 404, "timeout_error": 408, "content_filter": 400}
STATUS_OF_KIND |= {"rate_limit_error": 429, "rate_limit_exceeded": 429}
HTTP_ERROR = re.compile(r"[45][0-9][0-9]")


def translated(problem: Exception, answered: bool) -> ProviderError:
    """Return our error for any exception. `answered`: the vendor's headers had come, so a cut is a cut answer."""
    if isinstance(problem, ProviderError):
        return problem
    names = {kind.__name__ for kind in type(problem).__mro__}
    if names & TIMED_OUT:
        return ProviderError("provider_timeout")
    if names & INVALID:
        return ProviderError("provider_protocol")
    if names & CUT_OFF:
        return ProviderError("provider_truncated" if answered else "provider_unavailable", retryable=True)
    if "APIError" in names:
        return _of_status(status_of(problem), retry_after(problem))
    return ProviderError("provider_protocol")


def _of_status(status: int, wait: float | None) -> ProviderError:
    if status == 429:
        return ProviderError("provider_rate_limited", retryable=True, retry_after=wait)
    if status == 408:
        return ProviderError("provider_timeout")
    if status in OPERATOR_FAULTS:
        return ProviderError("provider_unavailable")
    if status >= 500:
        return ProviderError("provider_unavailable", retryable=True, retry_after=wait)
    return ProviderError("provider_refused")


def status_of(problem: Exception) -> int:
    """Return the HTTP status of a refusal; for one inside a stream that began well, the status it stands for."""
    status = getattr(problem, "status_code", 200)
    kinds = [str(getattr(problem, name, None)) for name in ("code", "type")]
    if "insufficient_quota" in kinds:
        return 402  # sent as 429, but waiting does not fill an account
    if isinstance(status, int) and status >= 400:
        return status
    meant = [int(kind) if HTTP_ERROR.fullmatch(kind) else STATUS_OF_KIND.get(kind, 500) for kind in kinds]
    return min(meant)  # 500 is what an unknown word means


def retry_after(problem: Exception) -> float | None:
    """Return the seconds the vendor asks us to wait, from either of the header's two forms, or None."""
    text = getattr(getattr(problem, "response", None), "headers", {}).get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


SECRETS = re.compile(r"\b(?:sk|pk|gsk|xai|key)[-_][\w-]{6,}|\bBearer\s+\S+", re.IGNORECASE)


def redacted(text: str, *keys: str) -> str:
    """Return a vendor's words as the log may have them: short, without anything that looks like a key."""
    for key in keys:
        text = text.replace(key, "***") if len(key) > 4 else text  # the "none" of a model without key is no secret
    return SECRETS.sub("***", text)[:500]
