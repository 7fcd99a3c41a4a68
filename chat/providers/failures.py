"""The meaning of a vendor's errors: one of our errors for the reader, one log line for the operator.

A vendor's own words go to the log, redacted, and never further.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any

from ..settings import Model
from . import ProviderError

# By name: the SDKs and the two generations of httpx below them share no classes, and importing them has its price.
TIMED_OUT = {"TimeoutError", "TimeoutException"}
CUT_OFF = {"TransportError", "TooManyRedirects", "OSError", "ClientConnectionError", "ClientPayloadError"}
INVALID = {"DecodingError"}
REFUSED = {"APIError", "InStream"}

OPERATOR_FAULTS = {401, 402, 403, 404}  # a bad key, an empty account, no such model: nobody's retry will help
STATUS_OF_KIND = {"invalid_request_error": 400, "authentication_error": 401, "permission_error": 403}
STATUS_OF_KIND |= {"billing_error": 402, "not_found_error": 404, "timeout_error": 408, "content_filter": 400}
STATUS_OF_KIND |= {"rate_limit_error": 429, "rate_limit_exceeded": 429}
HTTP_ERROR = re.compile(r"[45][0-9][0-9]")
EMPTY = re.compile(r"insufficient_quota|credit balance is too low")  # as OpenAI and Anthropic say that an account is


class InStream(Exception):
    """The error a vendor tells inside a stream that began well."""

    def __init__(self, error: Any) -> None:
        super().__init__(f"in the stream: {error}")
        self.code, self.type = (error.get("code"), error.get("type")) if isinstance(error, dict) else (None, None)


def causes(problem: BaseException | None) -> Iterator[BaseException]:
    while problem is not None:
        yield problem
        problem = problem.__cause__


def kinds(problem: Exception) -> set[str]:
    """Return the names of all classes of an error and of its causes."""
    names = {kind.__name__ for each in causes(problem) for kind in type(each).__mro__}
    if "ClientConnectionError" in names and "TimeoutError" not in names:
        names -= TIMED_OUT  # OpenAI's transport over aiohttp calls a refused or reset connection a timeout
    return names


def translated(problem: Exception, answered: bool) -> ProviderError:
    """Return our error for any exception. `answered`: the vendor's headers had come, so a cut is a cut answer."""
    if isinstance(problem, ProviderError):
        return problem
    names = kinds(problem)
    if names & TIMED_OUT:
        return ProviderError("provider_timeout")
    if names & INVALID:
        return ProviderError("provider_protocol")
    if names & CUT_OFF:
        return ProviderError("provider_truncated" if answered else "provider_unavailable", retryable=True)
    if names & REFUSED:
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
    words = [str(getattr(problem, name, None)) for name in ("code", "type")]
    if EMPTY.search(" ".join([*words, str(problem)])):
        return 402  # sent as 429 or 400, but neither waiting nor another question fills an account
    if isinstance(status, int) and status >= 400:
        return status
    meant = [int(word) if HTTP_ERROR.fullmatch(word) else STATUS_OF_KIND.get(word, 500) for word in words]
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


def advice(problem: Exception, model: Model) -> str:
    """Return where an operator is to look: the setting or the variable that decides."""
    names, key = kinds(problem), f"the key in {model.api_key_env}" if model.api_key_env else "no key (`api_key_env`)"
    if names & TIMED_OUT:
        return "there was no answer in time: look at the network, `first_token_timeout` and `idle_timeout`"
    if names & CUT_OFF:
        return "the connection failed: look at `base_url` and the network"
    match status_of(problem) if names & REFUSED else 0:
        case 401 | 403:
            return f"{key} was not accepted: look at {model.api_key_env or '`api_key_env`'}"
        case 402:
            return f"the account of {key} has no credit or quota left: look at the vendor's billing page"
        case 404:
            return f"there is no model {model.model_code or model.id!r}: look at `model_code` and `base_url`"
    return "the vendor's words follow"


def words(problem: Exception, key: str) -> str:
    """Return an error and its first cause as the log may have them: "Connection error." alone says nothing."""
    told = {type(each).__name__: str(each) for each in causes(problem)}
    first, last = (list(told.items())[n] for n in (0, -1))
    return redacted(" from ".join(f"{name}: {text}" for name, text in dict([first, last]).items()), key)


SECRETS = re.compile(r"\b(?:sk|pk|gsk|xai|key)[-_][\w-]{6,}|\bBearer\s+\S+", re.IGNORECASE)


def redacted(text: str, *keys: str) -> str:
    """Return a vendor's words as the log may have them: short, without anything that looks like a key."""
    for key in keys:
        text = text.replace(key, "***") if len(key) > 4 else text  # the "none" of a model without key is no secret
    return SECRETS.sub("***", text)[:500]
