"""Accounts: a guest's tokens, their refresh, the ticket for a socket, and who I am."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from chat.state import State
from chat.store import accounts, sessions
from chat.store.accounts import Account, account_json
from chat.tokens import LIFETIMES

from . import inputs


class Guest(msgspec.Struct):
    display_name: Annotated[str, Meta(max_length=255)] | None = None


class Refresh(msgspec.Struct):
    refresh: str


class AccountChange(msgspec.Struct, forbid_unknown_fields=True):
    display_name: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    preferences: dict[str, Any] | None = None


def pair(chat: State, account: Account) -> dict[str, Any]:
    return {
        "access": chat.tokens.make("access", account.id, account.token_version),
        "refresh": chat.tokens.make("refresh", account.id, account.token_version),
        "token_type": "Bearer",
        "expires_in": LIFETIMES["access"],
    }


async def anonymous(request: Request) -> Response:
    chat = inputs.state(request)
    wish = await inputs.body(request, Guest)
    account = await inputs.new_guest(request, (wish.display_name or "").strip() or None)
    return inputs.answer(
        {
            "user": account_json(account),
            "tokens": pair(chat, account),
            "anonymous_token": chat.tokens.make("anonymous", account.id, account.token_version),
            "expires_at": accounts.iso(account.expires_at),
        }
    )


async def refresh(request: Request) -> Response:
    """A new pair of tokens. The old one stays good until its end: a client that never got the answer asks with it."""
    chat = inputs.state(request)
    limit, message = chat.settings.refreshes_per_minute, "Too many refreshes from this address."
    await chat.limits.hit_from(inputs.address(request), "refreshes", limit, 60, message)
    token = chat.tokens.verify((await inputs.body(request, Refresh)).refresh, "refresh")
    return inputs.answer(pair(chat, await accounts.renew_account(chat.database, token.id, token.tv)))


async def revoke(request: Request) -> Response:
    """End every token of the account, the one shown included; its sockets and streams close."""
    chat, account = await inputs.caller(request)
    try:
        await accounts.revoke_tokens(chat.database, account.id)
    finally:  # storage may have revoked them without an answer
        chat.relay.check_account(account.id)
    return Response(status_code=204)


async def delete_me(request: Request) -> Response:
    """Delete the account with all that is its own. Running answers are asked to end and are not waited for."""
    chat, account = await inputs.caller(request)
    for session in await sessions.select_running(chat.database, account.id):
        await chat.generation.stop(session, account.id)
    try:
        await accounts.delete_account(chat.database, account.id)
    finally:  # the tokens end first: storage may have gone away in the middle of the rest
        chat.relay.check_account(account.id)
    return Response(status_code=204)


async def ticket(request: Request) -> Response:
    chat, account = await inputs.caller(request)
    text = chat.tokens.make("ticket", account.id, account.token_version)
    return inputs.answer({"ticket": text, "expires_in": LIFETIMES["ticket"]})


async def me(request: Request) -> Response:
    return inputs.answer(account_json(await inputs.account(request)))


async def change_me(request: Request) -> Response:
    chat, account = await inputs.caller(request)
    change = await inputs.body(request, AccountChange)
    inputs.check_object("preferences", change.preferences)
    changed = await accounts.update_account(chat.database, account.id, change.display_name, change.preferences)
    return inputs.answer(account_json(changed))
