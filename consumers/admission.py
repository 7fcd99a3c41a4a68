"""The admission of sockets: credentials, the session, and how many are open already."""

from __future__ import annotations

import asyncio
import contextlib
import re

from starlette.websockets import WebSocket, WebSocketDisconnect

from chat import callers
from chat.errors import ChatError, not_found
from chat.limits import buckets
from chat.live import choices
from chat.state import State
from chat.store import accounts, sessions
from chat.store.accounts import Account
from chat.store.rights import Right
from chat.store.sessions import Session
from chat.store.tickets import give_back_if_refused
from chat.tokens import SKEW, Token, operator_version

from . import frames

PROTOCOL = "parley.v1"
SESSION_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Closed(Exception):
    """The socket is to be closed with this code and reason."""

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason


def subprotocol(socket: WebSocket) -> str | None:
    """Return our subprotocol if the client offers it. The token that is offered beside it must not be echoed."""
    return PROTOCOL if PROTOCOL in socket.scope["subprotocols"] else None


REFUSALS = {
    "authentication_required": (4401, "authentication required"),
    "token_invalid": (4401, "authentication required"),
    "token_expired": (4401, "authentication expired"),
    "invalid": (4400, "no such choice of models"),
    "forbidden": (4403, "forbidden"),
    "not_found": (4404, "no such session"),
    "rate_limited": (4429, "too many sockets"),
}


async def admit(socket: WebSocket, chat: State, places: list[str]) -> Right:
    """Return the right by which this socket reads its session. Raises `Closed`.

    places: the function adds the names of all places it takes, for `limits.leave`, also those of a refused socket.
    """
    full = "Too many sockets are open."
    try:
        # Before authentication: a socket that says nothing costs memory as well.
        outside = buckets("address", address(socket, chat), chat.settings.sockets_per_address)
        places += await chat.limits.enter(outside, full)
        if not SESSION_ID.fullmatch(socket.path_params["session_id"]):
            raise not_found("session")
        if (token := _operators_token(socket, chat)) is not None:
            right = await _operators_right(socket, chat, token)
            places += await chat.limits.enter(_inside(chat, right), full)
            return right
        account, expires_at, ticket = await _account(socket, chat)
        async with give_back_if_refused(chat.database, chat.tokens, ticket):
            right = await _right(socket, chat, account, expires_at)
            places += await chat.limits.enter(_inside(chat, right), full)
            return right
    except ChatError as problem:
        raise closed_by(problem) from None


def closed_by(problem: ChatError) -> Closed:
    """Return how a socket ends after this error. Other codes than `REFUSALS` pass: the client is to come back."""
    return Closed(*REFUSALS.get(problem.code, (1012, "try again")))


async def _right(socket: WebSocket, chat: State, account: Account | None, expires_at: float) -> Right:
    session_id = socket.path_params["session_id"]
    share_token = socket.query_params.get("share_token")
    if share_token:
        return await _admit_by_share(chat, session_id, share_token, account, expires_at)
    guest = account is None and chat.settings.open_sessions
    if guest:
        await chat.limits.hit_guest(address(socket, chat), chat.settings)
        account = await accounts.insert_guest(chat.database, None)
    elif account is None:
        account, expires_at = await _first_frame(socket, chat)
    choice = choices.chosen(socket.query_params)
    session = await _session(chat, session_id, account, guest, choice)
    choices.check(session, choice)
    return Right(chat.database, session, account, expires_at=expires_at)


async def _admit_by_share(
    chat: State, session_id: str, share_token: str, account: Account | None, expires_at: float
) -> Right:
    """Admit whoever has the link, with or without an account; the session's owner is admitted as its owner."""
    own = None if account is None else await sessions.find_session(chat.database, session_id, account.id)
    if own is not None:
        return Right(chat.database, own, account, expires_at=expires_at)
    session = await sessions.select_shared(chat.database, share_token)
    if session.id != session_id:
        raise Closed(4404, "no such session")
    return Right(chat.database, session, share_token=share_token, member=False)


async def _operators_right(socket: WebSocket, chat: State, token: Token) -> Right:
    session = await sessions.select_unchecked(chat.database, socket.path_params["session_id"])
    if token.id != session.key:  # of another session, or of one that had this id before
        raise Closed(4401, "authentication required")
    return Right(chat.database, session, operator=True, member=False, expires_at=float(token.exp + SKEW))


def _operators_token(socket: WebSocket, chat: State) -> Token | None:
    """Return the operator's token for one session, where it is shown and ADMIN_TOKEN is still the same."""
    found = callers.credential(socket.headers, subprotocols=socket.scope["subprotocols"])
    if found is None or not chat.settings.admin_token:
        return None
    try:
        token = chat.tokens.verify(found[1], "admin")
    except ChatError:
        return None
    return token if token.tv == operator_version(chat.settings.admin_token) else None


async def _account(socket: WebSocket, chat: State) -> tuple[Account | None, float, str]:
    """Return the account behind the first credential present, when that expires, and the credential if it is a ticket.

    Without any credential the account is None.
    """
    found = callers.credential(
        socket.headers,
        socket.query_params,
        socket.scope["subprotocols"],
        token_in_query=chat.settings.token_in_query,
    )
    if found is None:
        return None, 0.0, ""
    account, expires_at = await accounts.verified_until(chat.database, chat.tokens, *found)
    return account, expires_at, found[1] if found[0] == "ticket" else ""


def address(socket: WebSocket, chat: State) -> str:
    forwarded = socket.headers.getlist("x-forwarded-for")
    return callers.address(socket.scope.get("client"), forwarded, chat.settings.trusted_proxies)


async def _first_frame(socket: WebSocket, chat: State) -> tuple[Account, float]:
    """Wait for `{type: "auth", token}`; return the account and when the token expires."""
    frame = None
    with contextlib.suppress(TimeoutError, ChatError):
        async with asyncio.timeout(chat.settings.auth_timeout):
            message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code") or 1006)
        frame = frames.parse(message.get("text") or "")
    if not isinstance(frame, frames.Auth):
        raise Closed(4401, "authentication required")
    return await accounts.verified_until(chat.database, chat.tokens, "access", frame.token)


async def _session(chat: State, id: str, account: Account, guest: bool, choice: choices.Choice) -> Session:
    """Return the session. On a local start a session that does not exist is made with the models of the query."""
    session = await sessions.find_session(chat.database, id, account.id)
    if session is not None:
        return session
    if not chat.settings.open_sessions:
        raise not_found("session")
    mode, models = await choices.choose(choice, chat.generation, chat.leaderboard, chat.dice)
    await chat.limits.hit_session(account.id, chat.settings)
    made = await sessions.insert_session(chat.database, account.id, mode, models, id=id, is_open=guest)
    return made or await sessions.select_session(chat.database, id, account.id)


def _inside(chat: State, right: Right) -> list[tuple[str, int]]:
    """Return the limits of an admitted socket. Readers of a share, and the operator, have places of their own."""
    kind = "operator" if right.operator else "session" if right.member else "viewers"
    limits = [(f"{kind}:{right.session.key}", chat.settings.sockets_per_session)]
    if right.account is not None:
        limits.append((f"account:{right.account.id}", chat.settings.sockets_per_account))
    return limits
