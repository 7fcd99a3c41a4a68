"""A turn over HTTP: post a message and follow the answer; follow again; stop; ask again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from chat import callers
from chat.direct import direct_of
from chat.errors import ChatError, invalid, not_found
from chat.formats import Format, Id, last_of_user
from chat.formats.arena_lines import ArenaLines
from chat.formats.bare_text import BareText
from chat.formats.event_stream import EventStream
from chat.formats.json_lines import JsonLines
from chat.live import choices
from chat.live.answers import ENDED, TOLD, Cursor, parse_cursor, start_of
from chat.live.choices import Choice
from chat.live.rooms import Follower
from chat.state import State
from chat.store import accounts, sessions, turns
from chat.store.accounts import Account, account_id
from chat.store.database import new_id
from chat.store.mask import audience
from chat.store.rights import Right
from chat.store.sessions import Session
from chat.store.tickets import give_back, give_back_if_refused, note_told, open_stream
from chat.store.turns import Ask, StoredTurn

from . import inputs
from .sessions import NewSession, Title, make

STREAMED = {"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"}  # proxies pass each part on
EARLIEST = "earliest"  # the X-Cursor of a stream that begins at a turn's start


class Line(msgspec.Struct):
    """A message line of the arena; the arena sends more fields than these."""

    role: Literal["user", "assistant", "system"]
    id: Id | None = None
    content: str | None = None
    participant: Literal["a", "b"] | None = None
    modelId: str | None = None


class Wish(Choice, kw_only=True):
    """The fields that every request for a turn may have. The choice and the title are of a new session."""

    session_id: Id | None = None
    title: Title | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=8000)] | None = None


class Post(Wish, kw_only=True):
    """Both shapes of a posted message: arena (`messages`) and short (`content`)."""

    messages: Annotated[list[Line], Meta(max_length=200)] | None = None
    content: str | None = None
    id: Id | None = None


async def stream(request: Request) -> Response:
    """Start the turn a message asks for, and follow it."""
    known, spoken = await speaker(request), chosen_format(request)
    post = inputs.with_query(request, await inputs.body(request, Post))
    return await start(request, known, post, read_ask(post), spoken)


async def start(
    request: Request,
    known: Account | None,
    wish: Wish,
    ask: Ask,
    spoken: type[Format],
    *,
    makes: bool = False,
) -> Response:
    """Start a turn, in a new session where none is named, and follow it.

    spoken: the response's format; makes: the client chooses the ids of new sessions.
    """
    chat = inputs.state(request)
    turns.check_content(ask.content, chat.settings.prompt_max)  # before a guest or a session is made for it
    guest = known is None
    account = known or await inputs.new_guest(request)
    session = await _session(chat, account, wish, guest, makes)
    _check_models(session, wish)
    turn = await chat.generation.begin(
        session,
        account,
        ask,
        address=inputs.address(request),
        max_tokens=wish.max_tokens or 0,
        temperature=wish.temperature,
    )
    if makes:  # these clients send an edited message under its old id and would show the old answer for it
        turn.check(ask)
    headers = {"X-Session-Id": session.id}
    if guest:
        headers["X-Anonymous-Token"] = chat.tokens.make("anonymous", account.id, account.token_version)
    right = Right(chat.database, session, account)
    return await follow(request, right, start_of(turn.id), spoken, headers=headers)


async def speaker(request: Request) -> Account | None:
    """Return the account that posts. None: a caller without a token, for whom a guest is made (local start only)."""
    if inputs.state(request).settings.open_sessions:
        return await inputs.optional_account(request)
    return await inputs.account(request)


def read_ask(post: Post) -> Ask:
    """Return the user message of either shape, and the ids that the client chose for its replies."""
    if post.messages is None:
        return Ask(post.id or new_id(), post.content or "", {})
    place = last_of_user([line.role for line in post.messages])
    user = post.messages[place]
    replies = {}
    lines = [line for line in post.messages[place + 1 :] if line.role == "assistant"]
    for side, line in zip("ab", lines, strict=False):
        if line.id is not None:
            replies[line.participant or side] = line.id
    ids = [user.id, *replies.values()]
    if len(set(ids)) < len(ids):
        raise invalid("messages", "two messages have the same id")
    return Ask(user.id or new_id(), user.content or "", replies)


async def _session(chat: State, account: Account, wish: Wish, guest: bool, makes: bool) -> Session:
    """Return the session of a message: the named one, or a new one where none is named or `makes` allows it."""
    if wish.session_id is not None and not makes and not (chat.settings.open_sessions and guest):
        return await sessions.select_session(chat.database, wish.session_id, account.id)
    chosen = {name: getattr(wish, name) for name in Choice.__struct_fields__}
    new = NewSession(title=wish.title, id=wish.session_id, **chosen)
    session, _ = await make(chat, account, new, is_open=guest and wish.session_id is not None)
    return session


def _check_models(session: Session, wish: Wish) -> None:
    """Refuse models that are not the session's own. The client of a blind battle cannot know its models: all pass."""
    choices.check(session, wish)
    if session.mode == "random" or not isinstance(wish, Post):
        return
    sides = {side: session.model(side).for_server() for side in session.sides}
    for place, line in enumerate(wish.messages or []):
        if line.role == "assistant" and line.modelId and line.modelId not in sides.values():
            raise invalid(f"messages[{place}].modelId", "not this session's model")


# -- following


FORMATS: dict[str, tuple[str, type[Format]]] = {  # in the query, in `Accept`
    "text": ("text/plain;format=text", BareText),
    "sse": ("text/event-stream", EventStream),
    "ndjson": ("application/x-ndjson", JsonLines),
    "lines": ("", ArenaLines),  # whatever else is accepted
}


def chosen_format(request: Request) -> type[Format]:
    """Return the format that the query names, or else `Accept`. Raises `invalid`."""
    if named := inputs.choice(request, "format", tuple(FORMATS)):
        return FORMATS[named][1]
    accept = request.headers.get("accept", "").replace(" ", "").lower()
    return next(spoken for kind, spoken in FORMATS.values() if kind in accept)


async def follow(
    request: Request,
    right: Right,
    cursor: Cursor,
    spoken: type[Format],
    *,
    headers: dict[str, str] | None = None,
    cut: Callable[[], object] = lambda: None,
) -> Response:
    """Return a response that tells the rest of the cursor's turn. A client that leaves changes nothing.

    cut: called when the stream ends before the turn's end was told.
    """
    chat = inputs.state(request)
    places = await inputs.stream_places(request, right.account)
    with ExitStack() as leaving:
        leaving.callback(chat.limits.leave, places)
        follower = await chat.relay.join(right, spoken.dialect, one_turn=True)
        leaving.callback(chat.relay.part, follower)
        follower.polls = request.query_params.get("poll") == "1"
        if not await chat.relay.resume(follower, cursor):
            raise not_found("turn")
        leaving.callback(lambda: follower.cursor.over or cut())
        release = leaving.pop_all().close
    told = {"X-Turn-Id": cursor.turn_id, "X-Cursor": str(cursor) if cursor.begun else EARLIEST}
    pieces = _told(chat, follower, spoken, direct_of(request.scope))
    return ReleasedResponse(pieces, release, spoken, told | (headers or {}))


class ReleasedResponse(StreamingResponse):
    """A stream that is released at its end, even when its reader is gone before the first byte."""

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        release: Callable[[], None],
        spoken: type[Format],
        headers: dict[str, str],
    ) -> None:
        fixed = STREAMED | {"Content-Type": spoken.content_type} | spoken.headers
        super().__init__(pieces, headers=fixed | headers)
        self._pieces = pieces
        self._release = release

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async with aclosing(self._pieces):
                if scope["method"] == "HEAD":  # the client's next request would wait for the end of the stream
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await send({"type": "http.response.body"})
                else:
                    await super().__call__(scope, receive, send)
        finally:
            self._release()


async def _told(chat: State, follower: Follower, spoken: type[Format], direct: Any) -> AsyncGenerator[bytes, None]:
    """Yield the part of a stream that its own task writes: the room writes directly to a reader that keeps up."""
    cursor = follower.cursor
    yield spoken.opening + (spoken.resumed(cursor.turn_id, str(cursor)) if cursor.begun else b"")
    if direct is not None and direct.streams:
        follower.direct = direct
    # Proxies close a silent stream. A single task pings for all waits: each token would need a timer otherwise.
    pings = asyncio.create_task(_pings(follower, spoken.ping, chat.settings.sse_ping)) if spoken.ping else None
    try:
        while True:
            frames = await follower.next()
            if direct is not None:  # also before the end: the last bytes would wait without a deadline
                await direct.drained(chat.settings.send_timeout)
            if not frames:
                break
            yield b"".join(frames)
    except ChatError as problem:
        if not follower.cursor.over:
            open_sides = [side for side, have in zip("ab", follower.cursor.parts, strict=False) if have != TOLD]
            yield spoken.broken_off(problem.message, open_sides)
            return
    except TimeoutError:
        chat.relay.count("readers_cut")
        if direct is not None:
            direct.abort()
        return
    finally:
        follower.direct = None
        if pings is not None:
            pings.cancel()
    # A turn may be gone, and a poll may leave before its turn's end: the next request is told about both.
    if not follower.starts_over and (follower.cursor.over or not follower.polls):
        yield spoken.closing


async def _pings(follower: Follower, ping: bytes, every: float) -> None:
    """Send a sign of life every so many seconds, until cancelled."""
    while True:
        await asyncio.sleep(every)
        follower.note(ping, passing=True)


async def session_stream(request: Request) -> Response:
    """Tell the running or latest turn as SSE, after `Last-Event-ID` if given; 204 when there is nothing to read."""
    chat = inputs.state(request)
    account, ticket = await _reader(request)
    async with give_back_if_refused(chat.database, chat.tokens, ticket):
        return await _read(request, account, ticket)


async def _reader(request: Request) -> tuple[Account | None, str]:
    """Return who reads, and the ticket that says so, if one does. EventSource sends no headers: its URL says it."""
    chat, query = inputs.state(request), request.query_params
    found = callers.credential(request.headers, query, token_in_query=chat.settings.token_in_query)
    if found is None:
        return None, ""
    if found[0] != "ticket":
        return await accounts.verified(chat.database, chat.tokens, *found), ""
    cursor = parse_cursor(request.headers.get("last-event-id"))
    turn_id = "" if cursor is None else cursor.turn_id
    session_id, ticket = request.path_params["session_id"], found[1]
    return await open_stream(chat.database, chat.tokens, ticket, session_id, turn_id), ticket


async def _read(request: Request, account: Account | None, ticket: str, missed: str = "") -> Response:
    """Tell the turn that the request asks for. `missed`: the turn that was gone when it was to be told."""
    chat = inputs.state(request)
    session = await sessions.select_readable(chat.database, request.path_params["session_id"], account_id(account))
    given = request.headers.get("last-event-id") or request.query_params.get("after")
    cursor = await _where_to_read(chat, session, parse_cursor(given))
    if cursor is None:
        return Response(status_code=204)
    right = Right(chat.database, session, account, member=False)

    def cut() -> None:
        if ticket:
            chat.generation.tasks.spawn(give_back(chat.database, chat.tokens, ticket))

    if ticket:
        await note_told(chat.database, chat.tokens, ticket, session.id, cursor.turn_id)
    try:
        return await follow(request, right, cursor, EventStream, cut=cut)
    except ChatError as problem:
        if problem.code != "not_found" or cursor.turn_id == missed:
            raise
        # The turn was made again a moment ago, perhaps not for the first time: an EventSource that is refused never
        # comes back.
        return await _read(request, account, ticket, cursor.turn_id)


async def _where_to_read(chat: State, session: Session, cursor: Cursor | None) -> Cursor | None:
    """Return the client's cursor while its turn goes on, then the start of the next turn.

    Without a cursor, or with one whose turn is gone, the latest turn's start. None: there is nothing to read.
    """
    if cursor is not None:
        past = await chat.relay.past(session, cursor.turn_id)
        if past.answer is not None and past.resumable and past.answer.fits(cursor):
            if not cursor.over:
                return cursor
            return start_of(past.next_id) if past.next_id else None
    latest = await turns.select_latest_turn(chat.database, session)
    return None if latest is None else start_of(latest["id"])


async def stop(request: Request) -> Response:
    chat, asking = inputs.state(request), account_id(await speaker(request))
    session = await sessions.select_session(chat.database, request.path_params["session_id"], asking)
    return inputs.answer({"stopped": await chat.generation.stop(session, asking)})


async def regenerate(request: Request) -> Response:
    """Answer again: one reply under its own id, or all replies. The stream tells these replies alone."""
    spoken = chosen_format(request)
    chat, account = await inputs.caller(request)
    message_id = request.path_params["message_id"]
    session = await sessions.select_session_of_message(chat.database, message_id, account.id)
    turn = await chat.generation.again(session, account, message_id, address=inputs.address(request))
    return await follow(request, Right(chat.database, session, account), _again(turn), spoken)


def _again(turn: StoredTurn) -> Cursor:
    """Return the start of a turn for a reader that has the replies that are not made again."""
    replies = sorted(turn.rows[1:], key=lambda row: str(row["participant"]))
    return Cursor(turn.id, tuple(TOLD if row["status"] in ENDED else 0 for row in replies), begun=False)


async def listing(request: Request) -> Response:
    """Return a page of a session's last messages; `Link` leads to the page before."""
    chat, account, session = await inputs.own_session(request)
    rows, headers = await inputs.page(request, session, 500, 1000)
    return inputs.answer(chat.mask.messages(session, rows, audience(session, account.id)), headers=headers)
