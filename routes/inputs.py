"""The inputs of a request: the caller, the address and the body. Raises `ChatError`, decides nothing."""

from __future__ import annotations

import asyncio
import re
import secrets
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response

from chat import callers
from chat.decoding import wrong_field
from chat.errors import ChatError, invalid, not_found
from chat.formats.completions import failure
from chat.limits import buckets, is_loopback
from chat.live.choices import Choice, chosen
from chat.state import State
from chat.store import accounts, sessions
from chat.store.accounts import Account
from chat.store.pages import LAST, select_page
from chat.store.queries import Row
from chat.store.sessions import Session

T = TypeVar("T")
WRONG_TOKENS = 10  # of the operator, a minute and address
OBJECT_MAX = 16_384  # bytes of `metadata` or `preferences` as JSON
OBJECT_DEPTH = 8  # what is nearly as deep as the parser goes could be stored and never read again
NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
NUMBER = re.compile(r"-?[0-9]{1,15}")  # Python's isdigit() takes "²" as well


def state(connection: HTTPConnection) -> State:
    found: State = connection.scope["state"]["chat"]
    return found


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response that no cache may keep, unless `headers` say otherwise: most are personal."""
    kept = {"Cache-Control": "no-store"} | (headers or {})
    return Response(msgspec.json.encode(value), status, kept, "application/json")


def error_answer(problem: ChatError, path: str = "") -> Response:
    """Return an error as the clients of this path read it."""
    headers = {}
    if problem.status in (429, 503):
        headers["Retry-After"] = str(max(1, round(problem.retry_after or 1)))
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if path.startswith("/api/chat"):  # the AI SDK shows the whole body
        return PlainTextResponse(problem.message, problem.status, headers)
    return answer(_openai_error(problem) if path.startswith("/v1/") else _error(problem), problem.status, headers)


def _error(problem: ChatError) -> dict[str, Any]:
    body: dict[str, Any] = {"error": problem.code, "message": problem.message, "detail": problem.message}
    if problem.fields:
        body["fields"] = problem.fields
    if problem.retry_after is not None:
        body["retry_after"] = problem.retry_after
    return body


def _openai_error(problem: ChatError) -> dict[str, Any]:
    return failure(problem.status, problem.code, problem.message, next(iter(problem.fields or ()), None))


# -- the caller


def address(connection: HTTPConnection) -> str:
    forwarded = connection.headers.getlist("x-forwarded-for")
    return callers.address(connection.scope.get("client"), forwarded, state(connection).settings.trusted_proxies)


async def optional_account(connection: HTTPConnection) -> Account | None:
    """Return the caller, or None for one without a credential. A bad credential is refused."""
    chat = state(connection)
    found = callers.credential(connection.headers)
    return None if found is None else await accounts.verified(chat.database, chat.tokens, *found)


async def account(connection: HTTPConnection) -> Account:
    """Return the caller. Raises `authentication_required`, `token_expired` or `token_invalid`."""
    found = await optional_account(connection)
    if found is None:
        raise ChatError("authentication_required", "This needs a token. Get one at /api/auth/anonymous/.")
    return found


async def caller(connection: HTTPConnection) -> tuple[State, Account]:
    """Return the worker's objects and the account that calls. Raises as `account` does."""
    return state(connection), await account(connection)


async def own_session(request: Request) -> tuple[State, Account, Session]:
    """Return the caller's session that the path or `?session_id=` names. Raises `not_found` as well."""
    chat, found = await caller(request)
    id = request.path_params.get("session_id") or request.query_params.get("session_id")
    if not id:
        raise invalid("session_id", "name the session")
    return chat, found, await sessions.select_session(chat.database, id, found.id)


async def check_operator(connection: HTTPConnection) -> str:
    """Return ADMIN_TOKEN, which the caller has. Raises `not_found` where none is set, `authentication_required`.

    An address with too many wrong tokens is refused with `rate_limited`, the right token included: guessing would go on
    otherwise.
    """
    chat, found, place = state(connection), callers.credential(connection.headers), address(connection)
    token = chat.settings.admin_token
    if not token:
        raise not_found("page")
    counts = found is not None and (chat.settings.production or not is_loopback(place))
    limits = buckets("operator", place, WRONG_TOKENS) if counts else []
    places = await chat.limits.enter(limits, "Too many wrong tokens came from this address.")
    if found is not None and secrets.compare_digest(found[1].encode(), token.encode()):
        chat.limits.leave(places)
        return token
    asyncio.get_running_loop().call_later(60, chat.limits.leave, places)
    raise ChatError("authentication_required", "This needs the operator's token.")


async def hit_long_read(connection: HTTPConnection, account: Account | None) -> None:
    """Count one more long read (an export, the votes) of the account and of the address. Raises `rate_limited`."""
    chat = state(connection)
    most, message = chat.settings.reads_per_minute, "You are reading this too often."
    await chat.limits.hit_from(address(connection), "reads", most, 60, message)
    if account is not None:
        await chat.limits.hit(f"reads:{account.id}", most, 60, message)


async def new_guest(connection: HTTPConnection, display_name: str | None = None) -> Account:
    chat = state(connection)
    await chat.limits.hit_guest(address(connection), chat.settings)
    return await accounts.insert_guest(chat.database, display_name)


async def stream_places(connection: HTTPConnection, account: Account | None) -> list[str]:
    """Count one more streamed answer of this address and account. Raises `rate_limited` at a limit.

    Returns the names to give to `limits.leave` at the stream's end.
    """
    chat = state(connection)
    limits = buckets("streams", address(connection), chat.settings.streams_per_address)
    if account is not None:
        limits.append((f"streams:{account.id}", chat.settings.streams_per_account))
    return await chat.limits.enter(limits, "You are reading too many answers at once.")


# -- the body and the query


async def body(request: Request, kind: type[T]) -> T:
    """Return the JSON body as a struct; an empty body counts as `{}`. Raises `invalid` with the path of the field."""
    raw, most = bytearray(), state(request).settings.body_max
    try:
        async for part in request.stream():
            raw += part
            if len(raw) > most:
                raise ChatError("too_large", "The body is too large.")
    except ClientDisconnect:
        raise ChatError("bad_request", "The body broke off.") from None
    if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise ChatError("unsupported_media_type", f"Send the body as it is, without Content-Encoding: {coding}.")
    content_type = (request.headers.get("content-type") or "application/json").partition(";")[0].strip().lower()
    if raw and content_type not in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
        raise ChatError("unsupported_media_type", f"Send JSON (application/json), not {content_type}.")
    return decode(bytes(raw) or b"{}", kind)


def decode(raw: bytes, kind: type[T]) -> T:
    if NUL.search(raw):
        raise invalid("body", "text cannot contain NUL characters")  # PostgreSQL stores none
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as problem:
        path, what = wrong_field(problem, kind)
        raise invalid(path or "body", what) from None
    except (msgspec.DecodeError, RecursionError) as problem:
        raise ChatError("bad_request", f"The body is not valid JSON: {problem}.") from None
    except UnicodeDecodeError:
        raise ChatError("bad_request", "The body is not valid UTF-8.") from None


class ContentPart(msgspec.Struct):
    """A piece of a message, as OpenAI's and AG-UI's clients send them."""

    type: str = "text"
    text: str = ""
    content: str = ""


def text_of(place: int, content: str | list[ContentPart] | None) -> str:
    """Return the text of the message at this place of a conversation. Raises `invalid`."""
    if content is None or isinstance(content, str):
        return content or ""
    if any(part.type not in ("text", "input_text", "refusal") for part in content):
        raise invalid(f"messages[{place}].content", "only text is understood here")
    return "".join([part.text or part.content for part in content])


C = TypeVar("C", bound=Choice)


def with_query(request: Request, wish: C) -> C:
    """Fill in from the query the fields of a choice that the body leaves out."""
    return with_choice(wish, chosen(request.query_params))


def with_choice(wish: C, other: Choice) -> C:
    for name in Choice.__struct_fields__:
        if getattr(wish, name) is None:
            setattr(wish, name, getattr(other, name))
    return wish


def check_object(name: str, value: dict[str, Any] | None) -> None:
    """Refuse a client's own object (`metadata`, `preferences`) that is too long or too deep to be stored."""
    if value is not None and _deep(value, OBJECT_DEPTH):
        raise invalid(name, f"nested deeper than {OBJECT_DEPTH}")
    if value is not None and len(msgspec.json.encode(value)) > OBJECT_MAX:
        raise invalid(name, f"longer than {OBJECT_MAX} bytes")


def _deep(value: Any, most: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return most < 0 or any(_deep(each, most - 1) for each in inside)


def number(request: Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query_params.get(name)
    if text is None or text == "":
        return default
    if not NUMBER.fullmatch(text) or not least <= int(text) <= most:
        raise invalid(name, f"expected a whole number from {least} to {most}, got {text[:20]!r}")
    return int(text)


async def page(request: Request, session: Session, default: int, most: int) -> tuple[list[Row], dict[str, str]]:
    """Return the rows of the page that `?before` and `?limit` name, and the `Link` header of the page before."""
    before, limit = number(request, "before", LAST, 0, LAST), number(request, "limit", default, 1, most)
    rows, more = await select_page(state(request).database, session, limit, before)
    return rows, next_page(request, rows[0]["position"]) if more else {}


def next_page(request: Request, before: Any) -> dict[str, str]:
    """Return the `Link` header of the same list from this cursor on."""
    query = request.url.include_query_params(before=before).query
    return {"Link": f'<{request.url.path}?{query}>; rel="next"'}


def choice(request: Request, name: str, allowed: tuple[str, ...]) -> str | None:
    text = request.query_params.get(name) or None
    if text is not None and text not in allowed:
        raise invalid(name, f"expected one of {', '.join(allowed)}, got {text[:20]!r}")
    return text
