"""AG-UI's requests, as TanStack AI and AG-UI's own client post them → our turns. https://docs.ag-ui.com

A thread is a session, made by its first run. A run is a turn: the run id of a client becomes the first reply's id,
by which the run is found again. A client that was cut off posts the same body again; another run of a message that was
sent before takes the place of its turn and all after it.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from chat.errors import invalid, not_found
from chat.formats import Id, last_of_user
from chat.formats.ag_ui import AgUi
from chat.live.answers import ENDED, parse_cursor, start_of
from chat.live.choices import Choice
from chat.store import sessions, turns
from chat.store.accounts import Account, account_id
from chat.store.database import new_id
from chat.store.pages import select_page
from chat.store.rights import Right
from chat.store.sessions import Session
from chat.store.turns import Ask, StoredTurn

from . import inputs, messages
from .inputs import ContentPart, text_of
from .messages import Wish


class RunMessage(msgspec.Struct):
    """Only the last one of a user counts: the conversation we have is the one that is told."""

    role: str
    id: Id | None = None
    content: str | list[ContentPart] | None = None


class Run(Wish, kw_only=True):
    """AG-UI's RunAgentInput. The choice stands in `forwardedProps`, or beside."""

    threadId: Id
    runId: Id
    messages: Annotated[list[RunMessage], Meta(max_length=1000)]
    forwardedProps: Choice | None = None


async def run(request: Request) -> Response:
    """Start a run and tell it; with `Last-Event-ID`, go on telling one and start nothing."""
    account = await messages.speaker(request)
    wish = inputs.with_query(request, await inputs.body(request, Run))
    wish = inputs.with_choice(wish, wish.forwardedProps or Choice())
    wish.session_id = wish.threadId
    place = last_of_user([each.role for each in wish.messages])
    message = wish.messages[place]
    ask = Ask(message.id or new_id(), text_of(place, message.content), {"a": wish.runId}, replaces=True)
    if ask.message_id == wish.runId:
        raise invalid("runId", "a message has this id")
    found = await _find(request, wish.threadId, ask.message_id, account)
    cut_off = "last-event-id" in request.headers
    if found is None and cut_off:
        raise not_found("run")
    if found is None or not (cut_off or _goes_on(found[1], wish.runId)):
        return await messages.start(request, account, wish, ask, makes=True, spoken=AgUi)
    found[1].check(ask)
    return await _told(request, found[0], found[1].id, account)


def _goes_on(turn: StoredTurn, run_id: str) -> bool:
    return any(row["id"] == run_id or row["status"] not in ENDED for row in turn.rows)


async def _find(
    request: Request, session_id: str, message_id: str, account: Account | None
) -> tuple[Session, StoredTurn] | None:
    """Return the turn of a message that was sent before, if there is one."""
    database = inputs.state(request).database
    session = await sessions.find_session(database, session_id, account_id(account))
    turn = None if session is None else await turns.select_turn_of_message(database, session, message_id)
    return (session, turn) if session is not None and turn is not None else None


async def _told(request: Request, session: Session, turn_id: str, account: Account | None) -> Response:
    """Tell a turn, from the cursor if the client has one that can be served, else from its start."""
    given = request.headers.get("last-event-id") or request.query_params.get("offset")
    cursor = parse_cursor(given)
    if cursor is None or cursor.turn_id != turn_id:
        cursor = start_of(turn_id)
    right = Right(inputs.state(request).database, session, account)
    return await messages.follow(request, right, cursor, spoken=AgUi)


async def join(request: Request) -> Response:
    """Tell a run to whoever did not start it; for a thread, say what was said in it and which run goes on."""
    account = await messages.speaker(request)
    if thread_id := request.query_params.get("threadId"):
        return await _thread(request, thread_id, account)
    run_id, database = request.query_params.get("runId", ""), inputs.state(request).database
    session = await sessions.select_session_of_message(database, run_id, account_id(account))
    turn = await turns.select_turn_of_message(database, session, run_id)
    if turn is None:
        raise not_found("run")
    return await _told(request, session, turn.id, account)


async def _thread(request: Request, id: str, account: Account | None) -> Response:
    chat = inputs.state(request)
    session = await sessions.select_session(chat.database, id, account_id(account))
    rows, _ = await select_page(chat.database, session, 50)
    running = next((row for row in rows if row["status"] not in ENDED), None)
    told = [message for message in chat.mask.messages(session, rows) if message["status"] in ENDED]
    return inputs.answer(
        {
            "messages": [_ui_message(message) for message in told],
            "activeRun": None if running is None else {"runId": running["id"]},
        }
    )


def _ui_message(message: dict[str, Any]) -> dict[str, Any]:
    parts = [{"type": "text", "content": message["content"]}]
    return {"id": message["id"], "role": message["role"], "parts": parts, "createdAt": message["created_at"]}
