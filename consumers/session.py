"""One socket in one session: admit it, join it to the room, say what the room says, do what its frames ask.

A socket is three coroutines in one group: one reads frames, one follows the room, and every send keeps a deadline.
Whichever ends first ends the others. Generation is none of its business: a socket that leaves stops nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from chat import sessions
from chat.accounts import Account
from chat.database import new_id
from chat.errors import ChatError
from chat.events import error_event, parse_cursor, session_event, socket_json
from chat.relay import Follower
from chat.state import State
from chat.turns import Ask

from . import admission, frames

BAD_FRAMES_WINDOW = 60.0  # seconds in which protocol errors are counted
TYPING_EVERY = 1.0  # seconds between two typing indicators of one socket that are passed on


class Closed(Exception):
    """The socket is to be closed with this code and reason."""

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason


class Slow(Exception):
    """The reader took nothing for too long: nothing more can be said to it, not even a close."""


async def session(socket: WebSocket) -> None:
    """The consumer of `/ws/chat/session/<session_id>`."""
    chat: State = socket.scope["state"]["chat"]
    await socket.accept(subprotocol=admission.subprotocol(socket))
    places: list[str] = []
    try:
        admitted = await admission.admit(socket, chat)
        places = await admission.take_places(socket, chat, admitted)
        await Conversation(chat, socket, admitted).run()
    except admission.Refused as refusal:
        await _close(socket, chat, refusal.code, refusal.reason)
    except (WebSocketDisconnect, Slow):
        pass
    finally:
        chat.limits.leave(places)


async def _close(socket: WebSocket, chat: State, code: int, reason: str) -> None:
    try:
        async with asyncio.timeout(chat.settings.send_timeout):
            await socket.close(code, reason)
    except (TimeoutError, WebSocketDisconnect, RuntimeError):
        pass  # gone already


class Conversation:
    """An admitted socket and its follower."""

    def __init__(self, chat: State, socket: WebSocket, admitted: admission.Admitted) -> None:
        self.chat = chat
        self.socket = socket
        self.account = admitted.account
        self.session = admitted.session
        self.cursor = parse_cursor(socket.query_params.get("cursor", ""))
        self.follower: Follower | None = None
        self._bad: deque[float] = deque(maxlen=chat.settings.bad_frames)
        self._frames: deque[float] = deque(maxlen=chat.settings.frames_per_second)
        self._typed_at = 0.0

    @property
    def account_id(self) -> str:
        return self.account.id if self.account is not None else ""

    async def run(self) -> None:
        """Speak until either side ends it."""
        try:
            self.follower = await self.chat.relay.join(self.session.id, socket_json, self.account_id)
            await self._greet()
            await self._first_of(self._read(), self._follow())
        except Closed as closed:
            await _close(self.socket, self.chat, closed.code, closed.reason)
        except ChatError as problem:
            # Storage is away while joining: there is nothing to say yet, so let the client come back.
            await self.send(error_event(problem))
            await _close(self.socket, self.chat, 1012, "try again")
        finally:
            if self.follower is not None:
                self.chat.generation.spawn(self.chat.relay.leave(self.follower))

    async def _first_of(self, *work: Any) -> None:
        """Run coroutines until the first ends; end the others; raise what ended it."""
        tasks = [asyncio.ensure_future(each) for each in work]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    # -- out

    async def send(self, event: bytes) -> None:
        try:
            async with asyncio.timeout(self.chat.settings.send_timeout):
                await self.socket.send({"type": "websocket.send", "text": event.decode()})
        except TimeoutError:
            self.chat.relay.count("readers_cut")
            raise Slow from None

    async def _greet(self) -> None:
        user = {
            "id": self.account_id or None,
            "display_name": self.account.display_name if self.account else "Guest",
            "is_anonymous": True,
        }
        hello = session_event(
            "connection_established", user=user, session_id=self.session.id, version=self.session.version
        )
        await self.send(hello)
        if self.cursor is None or not await self._resume(self.cursor):
            await self._send_state()

    async def _resume(self, cursor: tuple[str, int]) -> bool:
        assert self.follower is not None
        if not await self.chat.relay.resume(self.follower, cursor):
            return False
        await self.send(session_event("resumed", turn_id=cursor[0], from_seq=cursor[1] + 1))
        return True

    async def _send_state(self) -> None:
        """A snapshot; the follower goes on right behind it."""
        assert self.follower is not None
        session = await sessions.select_unchecked(self.chat.database, self.session.id)
        state = await self.chat.relay.snapshot(self.follower, session)
        await self.send(session_event("session_state", **state))

    async def _follow(self) -> None:
        assert self.follower is not None
        while True:
            for frame in await self.follower.next():
                await self.send(frame)
            if self.follower.lost:
                await self._send_state()

    # -- in

    async def _read(self) -> None:
        """Take frames as fast as they come: a socket that is not read cannot answer pings either."""
        while True:
            message = await self.socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code") or 1006)
            text = message.get("text")
            if text is None:
                raise Closed(1003, "text frames only")
            if len(text) > self.chat.settings.frame_max:
                raise Closed(1009, "frame too big")
            await self._take(text)

    async def _take(self, text: str) -> None:
        self._count_frame()
        try:
            frame = frames.parse(text)
        except ChatError as problem:
            await self.send(error_event(problem))
            self._count_bad()
            return
        try:
            await self._do(frame)
        except ChatError as problem:
            message_id = frame.id if isinstance(frame, frames.Message) else None
            await self.send(error_event(problem, message_id))

    def _count_frame(self) -> None:
        now = time.monotonic()
        if len(self._frames) == self._frames.maxlen and now - self._frames[0] < 1.0:
            raise Closed(4429, "too many frames")
        self._frames.append(now)

    def _count_bad(self) -> None:
        now = time.monotonic()
        self._bad.append(now)
        if len(self._bad) == self._bad.maxlen and now - self._bad[0] < BAD_FRAMES_WINDOW:
            raise Closed(4400, "bad frames")

    async def _do(self, frame: frames.Frame) -> None:
        match frame:
            case frames.Ping(timestamp):
                await self.send(session_event("pong", timestamp=timestamp))
            case frames.Test(message):
                await self.send(session_event("test", message=message))
            case frames.RequestState():
                await self._send_state()
            case frames.Resume(text):
                cursor = parse_cursor(text)
                if cursor is None or not await self._resume(cursor):
                    await self._send_state()
            case frames.Auth():
                pass  # admitted already: a client that says it twice means no harm
            case frames.Message(content, id):
                await self._message(content, id)
            case frames.Stop():
                await self.chat.generation.stop(self.session, self._writer().id)
            case frames.Typing(is_typing):
                await self._typing(is_typing)

    def _writer(self) -> Account:
        if self.account is None:
            raise ChatError("forbidden", "This is a read-only view of the session.")
        return self.account

    async def _message(self, content: str, id: str | None) -> None:
        account = self._writer()
        current = await sessions.select_session(self.chat.database, self.session.id, account.id)
        await self.chat.generation.begin(current, account, Ask(id or new_id(), content, {}))

    async def _typing(self, is_typing: bool) -> None:
        account = self._writer()
        now = time.monotonic()
        if is_typing and now - self._typed_at < TYPING_EVERY:
            return
        self._typed_at = now
        event = session_event("typing_indicator", user_id=account.id, is_typing=is_typing)
        await self.chat.relay.tell(self.session.id, event, but=account.id)
