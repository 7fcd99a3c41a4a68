"""Sessions: create, list, open, change, delete, share, export."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from chat.errors import invalid
from chat.formats import Id
from chat.formats.transcripts import EXTENSIONS, MEDIA, Kind, transcript
from chat.live import choices
from chat.live.choices import Choice
from chat.state import State
from chat.store import sessions, turns
from chat.store.accounts import Account, account_id
from chat.store.database import new_id
from chat.store.mask import Audience, audience
from chat.store.pages import each_page
from chat.store.sessions import Session

from . import inputs

END_WAIT = 5.0  # seconds a turn has to end before its session is deleted; its worker may be dead
Title = Annotated[str, Meta(max_length=255)]


class NewSession(Choice, kw_only=True):
    """The body of a new session. Unknown fields are tolerated: the arena's own clients send more than they mean."""

    title: Title | None = None
    metadata: dict[str, Any] | None = None
    session_type: Annotated[str, Meta(max_length=32)] | None = None
    id: Id | None = None


class SessionChange(msgspec.Struct, forbid_unknown_fields=True):
    title: Title | None = None
    is_pinned: bool | None = None
    is_public: bool | None = None


async def create(request: Request) -> Response:
    chat, account = await inputs.caller(request)
    wish = await inputs.body(request, NewSession)
    session, made = await make(chat, account, wish)
    return inputs.answer(chat.mask.session(session, audience(session, account.id)), 201 if made else 200)


async def make(chat: State, account: Account, wish: NewSession, *, is_open: bool = False) -> tuple[Session, bool]:
    """The session a client wishes for, and whether it is new: an id that is already the account's is that session."""
    inputs.check_object("metadata", wish.metadata)
    if wish.id is not None and (existing := await sessions.find_session(chat.database, wish.id, account.id)):
        return existing, False
    mode, models = await choices.choose(wish, chat.generation, chat.leaderboard, chat.dice)
    await chat.limits.hit_session(account.id, chat.settings)
    id = wish.id or new_id()
    made = await sessions.insert_session(
        chat.database,
        account.id,
        mode,
        models,
        id=id,
        title=wish.title,
        session_type=wish.session_type,
        metadata=wish.metadata,
        is_open=is_open,
    )
    # An id of somebody else's is answered like an id that nobody has.
    return made or await sessions.select_session(chat.database, id, account.id), made is not None


async def listing(request: Request) -> Response:
    chat, account = await inputs.caller(request)
    limit = inputs.number(request, "limit", 50, 1, 200)
    found = await sessions.select_sessions(
        chat.database,
        account.id,
        mode=inputs.choice(request, "mode", sessions.MODES),
        search=request.query_params.get("search", "")[:100],
        limit=limit + 1,
        before=_before(request),
    )
    shown, headers = found[:limit], {}
    if len(found) > limit:
        headers = inputs.next_page(request, f"{shown[-1].updated_at}.{shown[-1].id}")
    return inputs.answer([chat.mask.summary(session) for session in shown], headers=headers)


def _before(request: Request) -> tuple[int, str]:
    text = request.query_params.get("before")
    if not text:
        return 2**62, ""
    time, _, id = text.partition(".")
    if not inputs.NUMBER.fullmatch(time):
        raise invalid("before", "expected the cursor of a `Link` header")
    return int(time), id


async def opened(request: Request) -> Response:
    chat = inputs.state(request)
    reader = account_id(await inputs.optional_account(request))
    session = await sessions.select_readable(chat.database, request.path_params["session_id"], reader)
    return await _with_messages(request, session, audience(session, reader))


async def shared(request: Request) -> Response:
    chat = inputs.state(request)
    session = await sessions.select_shared(chat.database, request.path_params["token"])
    return await _with_messages(request, session, "reader")


async def _with_messages(request: Request, session: Session, reader: Audience) -> Response:
    mask = inputs.state(request).mask
    rows, headers = await inputs.page(request, session, 50, 200)
    messages = mask.messages(session, rows, reader)
    return inputs.answer({"session": mask.session(session, reader), "messages": messages}, headers=headers)


async def change(request: Request) -> Response:
    chat, account, session = await inputs.own_session(request)
    wish = await inputs.body(request, SessionChange)
    with chat.relay.doubtful(session):
        session = await sessions.update_session(
            chat.database,
            session.id,
            account.id,
            title=wish.title,
            is_pinned=wish.is_pinned,
            is_public=wish.is_public,
        )
    chat.relay.tell_update(session, "updated")
    if wish.is_public is False:
        chat.relay.check_rights(session)
    return inputs.answer(chat.mask.session(session))


async def delete(request: Request) -> Response:
    chat, account, session = await inputs.own_session(request)
    if await chat.generation.stop(session, account.id):
        await wait_for_end(chat, session)
    with chat.relay.doubtful(session):
        await sessions.delete_session(chat.database, session, account.id)
    chat.relay.tell_deleted(session)
    return Response(status_code=204)


async def wait_for_end(chat: State, session: Session) -> None:
    """Let the worker that has the turn end it: without its rows it could not, and its readers would wait for ever."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_WAIT):
            while await turns.select_running_turn(chat.database, session):
                await asyncio.sleep(0.02)


async def share(request: Request) -> Response:
    session = await _shared(request, True)
    url = inputs.state(request).mask.share_url(session)
    return inputs.answer({"share_token": session.share_token, "share_url": url})


async def unshare(request: Request) -> Response:
    await _shared(request, False)
    return inputs.answer({"status": "unshared"})


async def _shared(request: Request, share: bool) -> Session:
    chat, account, session = await inputs.own_session(request)
    with chat.relay.doubtful(session):
        session = await sessions.update_share(chat.database, session.id, account.id, share)
    if not share:
        chat.relay.check_rights(session)
    return session


async def generate_title(request: Request) -> Response:
    chat, account, session = await inputs.own_session(request)
    first = await turns.select_first_message(chat.database, session)
    title = turns.first_words(first or "") or "New chat"
    if session.account_id == account.id and title != session.title:
        with chat.relay.doubtful(session):
            session = await sessions.update_session(chat.database, session.id, account.id, title=title)
        chat.relay.tell_update(session, "updated")
    return inputs.answer({"title": title})


async def export(request: Request) -> Response:
    """The whole session as a file, read and sent page by page."""
    chat, account, session = await inputs.own_session(request)
    kind: Kind = inputs.choice(request, "format", tuple(EXTENSIONS)) or "json"  # type: ignore[assignment]
    await inputs.hit_long_read(request, account)
    reader = audience(session, account.id)
    pages = (chat.mask.messages(session, rows, reader) async for rows in each_page(chat.database, session))
    name = f'attachment; filename="chat_session_{session.id}.{EXTENSIONS[kind]}"'
    headers = {"Content-Disposition": name, "Cache-Control": "no-store"}
    content = transcript(kind, chat.mask.session(session, reader), pages)
    return StreamingResponse(content, 200, headers, MEDIA[kind])
