"""A socket in a session: admit the socket, join it to the room, send it the room's events, act on its frames.

A socket is two coroutines in one task group: one reads frames, one follows the room. A third acts on frames while there
are any. Every send has a deadline. The coroutine that fails first ends the others. A socket that leaves stops no turn.
"""

from __future__ import annotations

import asyncio
import time

from starlette.websockets import WebSocket, WebSocketDisconnect

from chat.direct import Direct, direct_of
from chat.errors import ChatError
from chat.formats.events import event_json, resumed_json, socket_dialect
from chat.formats.frames import framed
from chat.formats.tellings import Telling
from chat.live import choices
from chat.live.answers import Cursor, parse_cursor, start_of
from chat.live.events import SessionNotice, error_event, session_event
from chat.live.rooms import Follower
from chat.state import State
from chat.store import operator, turns
from chat.store.database import StorageUnavailable, new_id
from chat.store.rights import Right
from chat.store.turns import Ask

from . import admission, frames
from .admission import Closed
from .ai_sdk import Requests

BAD_FRAMES_WINDOW = 60.0  # seconds in which protocol errors are counted
TYPING_EVERY = 1.0  # seconds between two typing indicators of one socket that are passed on
HELD = 65_536  # bytes a server's transport holds before it makes a sender wait


async def session(socket: WebSocket) -> None:
    """The consumer of `/ws/chat/session/<session_id>`. Refusals are sent after accept, so that a browser sees them."""
    chat: State = socket.scope["state"]["chat"]
    places: list[str] = []
    try:
        await socket.accept(subprotocol=admission.subprotocol(socket))
        right = await admission.admit(socket, chat, places)
        await _converse(socket, chat, right)
    except Closed as closed:
        await _close(socket, chat, closed)
    except WebSocketDisconnect:
        pass
    except asyncio.CancelledError:  # some servers end so: a client that is told about the restart comes back
        await _close(socket, chat, Closed(1012, "service restarts"))
        raise
    finally:
        chat.limits.leave(places)


async def _converse(socket: WebSocket, chat: State, right: Right) -> None:
    """Serve an admitted socket to its end. Raises `Closed` or `WebSocketDisconnect`."""
    try:
        dialect = socket_dialect if direct_of(socket.scope) is None else socket_frames
        follower = await chat.relay.join(right, dialect)
        conversation = Conversation(chat, socket, right, follower)
        try:
            await conversation.run()
        finally:
            conversation.end()
            chat.relay.part(follower)
    except ChatError as problem:
        # The right to read has ended, the worker ends, or the database is away: the code says whether to come back.
        await _close(socket, chat, admission.closed_by(problem), error_event(problem))


async def _close(socket: WebSocket, chat: State, closed: Closed, *last_words: bytes) -> None:
    """Close the socket after `last_words`. A peer that does not read these within the deadline is left."""
    try:
        async with asyncio.timeout(chat.settings.send_timeout):
            for event in last_words:
                await socket.send_text(event.decode())
            await socket.close(closed.code, closed.reason)
    except (TimeoutError, WebSocketDisconnect, RuntimeError):
        pass  # the peer is gone already


class Conversation:
    """An admitted socket and its follower."""

    def __init__(self, chat: State, socket: WebSocket, right: Right, follower: Follower) -> None:
        self.chat = chat
        self.socket = socket
        self.right = right
        self.account = right.account
        self.session = right.session
        self.follower = follower
        self.direct: Direct | None = direct_of(socket.scope)
        if self.direct is not None:
            follower.direct, follower.wrap = self.direct, framed
        self._asked: list[Cursor | None] = []  # cursors from which the client wants to go on; None: a snapshot
        self._group = asyncio.TaskGroup()
        self._todo: list[frames.Frame] = []  # frames that wait for `_work`
        self._working: asyncio.Task[None] | None = None  # runs `_work`
        self._frames: list[float] = []  # monotonic: when the frames of the last second came
        self._bad: list[float] = []  # monotonic: when the last bad frames came
        self._types: bool | None = None  # the client's last typing indicator that is not passed on yet
        self._typing: asyncio.TimerHandle | None = None  # runs for a second after an indicator was passed on
        self._written = 0  # bytes of the last write
        self._requests: Requests | None = None  # those of the AI SDK's transport, once there was one

    async def run(self) -> None:
        await self._greet()
        try:
            async with self._group:
                self._group.create_task(self._read())
                await self._follow()
        except BaseExceptionGroup as ended:
            problem = ended.exceptions[0]  # the other coroutines ended because of this one
            ended.__traceback__ = None  # in Python 3.11 the group's frame refers to the exception, and the reverse
        # The group and the exception refer to each other: the socket's memory would stay until a collection.
        self._group = asyncio.TaskGroup()
        try:
            raise problem
        finally:
            del problem

    def end(self) -> None:
        self._requests = None  # these refer to this object: the cycle would stay until a collection
        if self._typing is not None:
            self._typing.cancel()

    # -- out

    async def send(self, event: bytes) -> None:
        """Send one event. Raises `Closed` or `WebSocketDisconnect` when the reader takes nothing for too long."""
        await self._write(event if self.direct is None else framed(event))

    async def _write(self, said: bytes) -> None:
        """Write an event, or on a direct socket finished frames."""
        patience = self.chat.settings.send_timeout
        try:
            if self.direct is not None:
                await self.direct.drained(patience)
                self.direct.write(said)
            else:
                # The progress of a send is not visible, and a send waits for all earlier bytes: a reader that takes
                # a buffer full within the patience is slow, not silent.
                async with asyncio.timeout(patience * (2 + self._written / HELD)):
                    await self.socket.send({"type": "websocket.send", "text": said.decode()})
                self._written = len(said)
        except TimeoutError:
            self.chat.relay.count("readers_cut")
            if self.direct is None:
                raise Closed(4408, "slow") from None
            self.direct.abort(4408, "slow")
            raise WebSocketDisconnect(4408) from None
        except RuntimeError:  # the server has closed the socket by itself, for an unanswered ping or a broken frame
            raise WebSocketDisconnect(1006) from None

    async def _greet(self) -> None:
        user = {
            "id": self.account.id if self.account else None,
            "display_name": self.account.display_name if self.account else "Guest",
            "is_anonymous": True,
        }
        hello = session_event(
            "connection_established", user=user, session_id=self.session.id, version=self.session.version
        )
        await self.send(hello)
        await self._start_over(parse_cursor(self.socket.query_params.get("cursor")))

    async def _start_over(self, cursor: Cursor | None = None) -> None:
        """Go on behind the cursor if it can be served, else behind a snapshot. Raises `ChatError`."""
        self.follower.starts_over = False
        if cursor is not None and await self.chat.relay.resume(self.follower, cursor):
            await self.send(resumed_json(cursor.turn_id, str(cursor)))
            return
        session = await self.right.select()
        state = await self.chat.relay.snapshot(self.follower, session)
        await self.send(session_event("session_state", **state))

    async def _follow(self) -> None:
        """Write what the follower is owed. While this coroutine is busy, nothing else moves the follower's cursor."""
        while True:
            for said in await self.follower.next():
                await self._write(said)
            if self._asked:
                await self._answer(self._asked.pop())
            elif self.follower.starts_over:
                await self._start_over()

    async def _answer(self, cursor: Cursor | None) -> None:
        self._asked.clear()
        try:
            await self._start_over(cursor)
        except StorageUnavailable as problem:  # the reader goes on where it was
            await self.send(error_event(problem))

    # -- in

    async def _read(self) -> None:
        """Read frames as fast as they come: a socket that is not read cannot answer pings either."""
        while True:
            message = await self.socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code") or 1006)
            text = message.get("text")
            if text is None:
                raise Closed(1003, "text frames only")
            if len(text.encode()) > self.chat.settings.frame_max:
                raise Closed(1009, "frame too big")
            most = self.chat.settings.frames_per_second
            if len(self._todo) == most or _times(self._frames, 1.0) > most:
                raise Closed(4429, "too many frames")
            try:
                self._todo.append(frames.parse(text))
            except ChatError as problem:
                await self.send(error_event(problem))
                if _times(self._bad, BAD_FRAMES_WINDOW) == self.chat.settings.bad_frames:
                    raise Closed(4400, "bad frames") from None
            if self._todo and (self._working is None or self._working.done()):
                self._working = self._group.create_task(self._work())

    async def _work(self) -> None:
        """Act on the frames in their order. Runs beside `_read`: storage that hangs must not stop the reading."""
        while self._todo:
            frame = self._todo.pop(0)
            try:
                await self._do(frame)
            except ChatError as problem:
                message_id = frame.id if isinstance(frame, frames.NewMessage) else None
                await self.send(error_event(problem, message_id))

    async def _do(self, frame: frames.Frame) -> None:
        match frame:
            case frames.Ping(timestamp):
                await self.send(session_event("pong", timestamp=timestamp))
            case frames.Test(message):
                await self.send(session_event("test", message=message))
            case frames.RequestState():
                self._ask(None)
            case frames.Resume(text, None):
                self._ask(parse_cursor(text))
            case frames.Auth():
                pass  # the socket is admitted already, and a second frame does no harm
            case frames.NewMessage():
                await self._message(frame)
            case frames.Stop():
                await self.chat.generation.stop(await self.right.select(), self.right.writer().id)
            case frames.Typing(is_typing):
                self._hear_typing(is_typing)
            case frames.Send() | frames.Resume() | frames.Abort():
                await self._take_request(frame)

    def _ask(self, cursor: Cursor | None) -> None:
        """Have the follower start over, after the events that it is writing now."""
        self._asked.append(cursor)
        self.follower.start_over()

    async def _take_request(self, frame: frames.Send | frames.Resume | frames.Abort) -> None:
        if self._requests is None:
            address, spawn = admission.address(self.socket, self.chat), self._group.create_task
            self._requests = Requests(self.chat, self.right, address, self.send, spawn)
        await self._requests.take(frame)

    async def _message(self, frame: frames.NewMessage) -> None:
        if self.right.operator:
            await self._speak(frame)
            return
        account = self.right.writer()
        current = await self.right.select()
        choices.check(current, frame)
        ask, address = Ask(frame.id or new_id(), frame.content, {}), admission.address(self.socket, self.chat)
        turn = await self.chat.generation.begin(current, account, ask, address=address)
        reading = self.follower.cursor.turn_id == turn.id and not self.follower.cursor.over
        if not turn.fresh and not reading:  # a message that was sent again gets the turn it began, as over HTTP
            self._ask(start_of(turn.id))

    async def _speak(self, frame: frames.NewMessage) -> None:
        """Store an operator's words as a turn and tell all readers of the session."""
        turns.check_content(frame.content, self.chat.settings.prompt_max)
        session = await self.right.select()
        with self.chat.relay.doubtful(session):
            await operator.insert_words(self.chat.database, session, frame.id or new_id(), frame.content)
        self.chat.relay.learn_again(self.session)

    def _hear_typing(self, is_typing: bool) -> None:
        self.right.writer()
        self._types = is_typing
        if self._typing is None:
            self._tell_typing()

    def _tell_typing(self) -> None:
        """Pass on the client's last indicator. A later one waits for a second and is then passed on as well.

        Without that, the last `is_typing: false` could be lost.
        """
        self._typing = None
        if self._types is None:
            return
        account = self.right.writer()
        event = session_event("typing_indicator", user_id=account.id, is_typing=self._types).decode()
        public = session_event("typing_indicator", user_id=None, is_typing=self._types).decode()
        self._types = None
        self._typing = asyncio.get_running_loop().call_later(TYPING_EVERY, self._tell_typing)
        self.chat.relay.tell(self.session, SessionNotice(event, public, author=account.id))


def _times(when: list[float], seconds: float) -> int:
    """Note the present time in `when`; return how many times of the last `seconds` stand there."""
    now = time.monotonic()
    when[:] = [each for each in when if now - each < seconds]
    when.append(now)
    return len(when)


def socket_frames(turn_id: str, tellings: list[Telling]) -> list[bytes]:
    """The dialect of direct sockets: all events as finished frames, in one piece."""
    return [b"".join([framed(event_json(turn_id, telling)) for telling in tellings])]
