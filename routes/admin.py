"""The operator among the visitors: the latest sessions, and a person in the place of a session's model.

Every route asks for ADMIN_TOKEN as a bearer. No cookie is made or read: the page keeps the token in its memory.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from chat.store import operator, sessions
from chat.tokens import LIFETIMES, operator_version

from . import inputs
from .sessions import wait_for_end

Name = Annotated[str, Meta(pattern=r"^[^\s\x00-\x1f][^\x00-\x1f]{0,39}\Z")]


class Change(msgspec.Struct, forbid_unknown_fields=True):
    """operator: the name visitors see; null hands the session back to its model."""

    operator: Name | None


async def listing(request: Request) -> Response:
    """The sessions that changed last."""
    await inputs.check_operator(request)
    return inputs.answer(await operator.select_latest(inputs.state(request).database))


async def opened(request: Request) -> Response:
    """A token that opens the session's socket, to read, and to speak once the session is taken over."""
    chat, secret = inputs.state(request), await inputs.check_operator(request)
    session = await sessions.select_unchecked(chat.database, request.path_params["session_id"])
    token = chat.tokens.make("admin", session.key, operator_version(secret))
    body = {"id": session.id, "title": session.title, "operator": session.operator}
    return inputs.answer(body | {"token": token, "expires_in": LIFETIMES["admin"]})


async def change(request: Request) -> Response:
    """Take the session over, which ends the model's running answer, or hand it back."""
    chat, _ = inputs.state(request), await inputs.check_operator(request)
    wish = await inputs.body(request, Change)
    session = await operator.update_operator(chat.database, request.path_params["session_id"], wish.operator)
    if wish.operator is not None and await chat.generation.stop(session, session.account_id):
        await wait_for_end(chat, session)
    return inputs.answer({"id": session.id, "operator": wish.operator})
