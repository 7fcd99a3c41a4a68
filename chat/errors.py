"""The errors a client can meet: one exception, a closed list of codes, and the status each has over HTTP.

Nothing here knows of requests or sockets: `service.py` turns a `ChatError` into a response, `consumers/session.py`
into an `error` event. An upstream's own words are never part of one.
"""

from __future__ import annotations

STATUS: dict[str, int] = {
    "bad_request": 400,
    "invalid": 400,
    "authentication_required": 401,
    "token_expired": 401,
    "token_invalid": 401,
    "forbidden": 403,
    "origin_not_allowed": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "busy": 409,
    "conflict": 409,
    "already_voted": 409,
    "too_large": 413,
    "unsupported_media_type": 415,
    "rate_limited": 429,
    "daily_limit_reached": 403,
    "budget_exhausted": 429,
    "storage_unavailable": 503,
    "relay_unavailable": 503,
    "draining": 503,
    "internal": 500,
}

# The reasons a reply can fail, and the sentence a reader is shown: the provider's own words stay in the log.
REPLY_SENTENCES: dict[str, str] = {
    "provider_timeout": "The model took too long to answer.",
    "provider_rate_limited": "The model is busy. Please try again in a moment.",
    "provider_refused": "The model declined to answer this.",
    "provider_unavailable": "The model could not be reached.",
    "provider_truncated": "The model's answer broke off before its end.",
    "provider_protocol": "The model answered in a way that could not be read.",
    "too_long": "The answer grew past the longest that is kept.",
    "interrupted": "The answer was interrupted by a restart.",
    "storage_unavailable": "The answer could not be saved.",
    "internal": "Something went wrong while answering.",
}

RETRYABLE = {"busy", "rate_limited", "storage_unavailable", "relay_unavailable", "draining", "internal"}


class ChatError(Exception):
    """A refusal with a code of the closed list, a plain sentence, and what is wrong where (`fields`)."""

    def __init__(
        self, code: str, message: str, *, fields: dict[str, str] | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.fields = fields
        self.retry_after = retry_after

    @property
    def status(self) -> int:
        return STATUS[self.code]

    @property
    def retryable(self) -> bool:
        return self.code in RETRYABLE


class StartupError(Exception):
    """The service cannot start; the message is the one line the operator reads. Never carries a secret."""


class RelayUnavailable(Exception):
    """Redis is away or did not answer in time. A command that was sent may still have been executed."""


class RelayRefused(RelayUnavailable):
    """Redis answered with an error (`OOM`, `MISCONF`, `READONLY`, …): it is there, and this command had no effect."""


def not_found(what: str) -> ChatError:
    """Missing objects and other people's objects give the same error, so that ids cannot be probed."""
    return ChatError("not_found", f"There is no such {what}.")


def invalid(path: str, problem: str) -> ChatError:
    return ChatError("invalid", f"{path}: {problem}", fields={path: problem})
