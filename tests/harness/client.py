"""Readers that behave like good clients and remember everything: over a WebSocket, over server-sent events.

    journal = Journal()
    async with SocketReader(journal, "ann", service.urls, session_id, token=guest.access) as ann:
        await ann.send({"type": "message", "content": "hello"})
        await ann.turn_ended()
        journal.fault("redis killed"); redis.kill()

A reader keeps a cursor, comes back with it when its connection ends in a way the contract says to come back from (the
next of its bases each time), and stops when the contract says to stop. `drop` loses its connection, `hold` stops
reading. What it knows is in `view`; what it saw is in the journal, for `checker.py` and for `journal.story()`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from . import until
from .api import Answer, Guest, call, decoded, guest, http, messages, new_session, post_turn, short_body, stop, ticket
from .journal import Journal
from .reader import COME_BACK, GIVE_UP, Reader
from .sse import SSEEvent, SSEParser
from .view import View

__all__ = ["Answer", "Guest", "Journal", "Reader", "SSEReader", "SocketReader", "View"]
__all__ += ["call", "guest", "messages", "new_session", "post_turn", "stop", "ticket", "until"]


class SocketReader(Reader):
    """A WebSocket to one session. `credentials` is how the token is shown: header, subprotocol, query (`?token=`),
    anonymous (`?anonymous_token=`), ticket, frame (a first `auth`) or none.

    `cursor` is where to begin, `resume=False` means not to come back.
    `query` is added to the URL, `receive_buffer` (bytes) bounds what the kernel keeps for a reader on hold, and
    `options` go to `websockets.connect`.
    """

    def __init__(
        self,
        journal: Journal,
        name: str,
        bases: str | Sequence[str],
        session_id: str,
        *,
        token: str | None = None,
        credentials: str = "header",
        cursor: str | None = None,
        resume: bool = True,
        origin: str | None = None,
        query: dict[str, str] | None = None,
        receive_buffer: int = 0,
        give_up: float = GIVE_UP,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(journal, name, bases, session_id, token, resume=resume, greeted=False, give_up=give_up)
        self.credentials = credentials if token else "none"
        self.first_cursor, self.origin, self.query = cursor, origin, query or {}
        self.receive_buffer, self.options = receive_buffer, options or {}
        self.codes: list[int] = []  # why each connection ended
        self.socket: ClientConnection | None = None

    async def send(self, frame: dict[str, Any] | str | bytes) -> None:
        """Send a frame; text and bytes go as they are. Raises `ConnectionClosed` between two connections."""
        if self.socket is None:
            raise ConnectionError(f"{self.name} is not connected")
        self.journal.add(self.name, "sent", frame if isinstance(frame, dict) else {"raw": frame[:100]})
        if isinstance(frame, dict) and frame.get("type") == "message" and "id" in frame:
            self.view.says_ids = True
        await self.socket.send(json.dumps(frame) if isinstance(frame, dict) else frame)

    async def say(self, content: str, id: str | None = None) -> None:
        """Send a message that starts a turn."""
        await self.send({"type": "message", "content": content} | ({"id": id} if id else {}))

    async def event(self, kind: str, within: float = 5.0, after: int = 0) -> dict[str, Any]:
        """Wait for the event number `after` (from 0) of one type."""
        return await self.until(
            lambda: (found := self.journal.events(self.name, kind))[after:] and found[after], within, kind
        )

    def drop(self) -> None:
        if self.socket is not None:
            self._note("drops its connection")
            self.socket.transport.abort()

    async def _connection(self, base: str) -> bool:
        cursor = self.cursor or (None if self.connections else self.first_cursor)
        self.journal.add(self.name, "connect", {"url": base, "cursor": cursor})
        try:
            socket = await self._open(base, cursor)
        except InvalidStatus as refusal:
            return self._refused(refusal)
        except (OSError, InvalidHandshake, TimeoutError, httpx.TransportError) as problem:
            self.journal.add(self.name, "unreachable", {"why": f"{type(problem).__name__}: {problem}"})
            return True
        self.socket = socket
        try:
            self._accepted(cursor)
            await self._read(socket)
        except asyncio.CancelledError:
            self._note("leaves")
            if self._reading.is_set():
                await socket.close()  # bounded by close_timeout
            raise
        finally:
            self.socket = None
            socket.transport.abort()
        return self._ended(socket.close_code or 1006, socket.close_reason or "")

    async def _open(self, base: str, cursor: str | None) -> ClientConnection:
        query, headers, protocols = dict(self.query), {}, []
        token = self.token or ""
        match self.credentials:
            case "header":
                headers["Authorization"] = f"Bearer {token}"
            case "subprotocol":
                protocols = ["parley.v1", f"t.{token}"]
            case "query":
                query["token"] = token
            case "anonymous":
                query["anonymous_token"] = token
            case "ticket":
                query["ticket"] = await ticket(base, token)
        if cursor is not None:
            query["cursor"] = cursor
        url = f"ws{base.removeprefix('http')}/ws/chat/session/{quote(self.session_id or '')}/"
        options: dict[str, Any] = {"max_size": None, "compression": None, "proxy": None, "close_timeout": 1}
        options |= {"open_timeout": 10, "origin": self.origin, "additional_headers": headers}
        options |= {"subprotocols": protocols or None}
        if self.receive_buffer:
            options["sock"] = await _small_socket(base, self.receive_buffer)
        return await connect(f"{url}?{urlencode(query)}" if query else url, **options | self.options)

    async def _read(self, socket: ClientConnection) -> None:
        """Ends when the connection does."""
        with contextlib.suppress(ConnectionClosed):
            if self.credentials == "frame":
                await socket.send(json.dumps({"type": "auth", "token": self.token}))
            while True:
                await self._reading.wait()
                self._take(await socket.recv())

    def _refused(self, refusal: InvalidStatus) -> bool:
        """An HTTP answer instead of a socket: a 5xx may pass, anything else will not."""
        response = refusal.response
        body = bytes(response.body or b"").decode(errors="replace")
        self.journal.add(self.name, "refused", {"status": response.status_code, "body": body[:500]})
        return response.status_code >= 500

    def _ended(self, code: int, reason: str) -> bool:
        self.codes.append(code)
        self.journal.add(self.name, "closed", {"code": code, "reason": reason})
        return self.resume and code in COME_BACK


async def _small_socket(base: str, size: int) -> socket.socket:
    """A connected socket with a small receive buffer: set before it connects, the window is agreed on then."""
    parts = urlsplit(base)
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    small.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(small, (parts.hostname, parts.port))
    except BaseException:
        small.close()
        raise
    return small


class SSEReader(Reader):
    """Server-sent events. With `content` (or `body`) it starts a turn and follows it; without, it follows the session.

    The turn is posted under one id until an answer begins, however often that takes; after that it is followed by
    GET with `Last-Event-ID`. A 204 or `event: done` is the end; so is a refusal below 500. The turn's start is sent
    when the reader starts, so with `async with` the answer has begun inside.
    """

    def __init__(
        self,
        journal: Journal,
        name: str,
        bases: str | Sequence[str],
        session_id: str,
        *,
        token: str | None = None,
        content: str | None = None,
        id: str | None = None,
        body: dict[str, Any] | None = None,
        cursor: str | None = None,
        resume: bool = True,
        query: dict[str, str] | None = None,
        give_up: float = GIVE_UP,
    ) -> None:
        super().__init__(journal, name, bases, session_id, token, resume=resume, greeted=True, give_up=give_up)
        self.body = short_body(session_id, content, id) if content is not None else body
        self.first_cursor, self.query = cursor, query or {}
        self.statuses: list[int] = []
        self.comments: list[str] = []
        self._response: httpx.Response | None = None
        self._dropping: asyncio.Task[bool] | None = None

    def drop(self) -> None:
        if self._dropping is not None:
            self._note("drops its connection")
            self._dropping.cancel()

    async def _connection(self, base: str) -> bool:
        """In a task of its own, so that `drop` can end it wherever it is."""
        self._dropping = asyncio.create_task(self._attempt(base))
        try:
            return await self._dropping
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) and task.cancelling():  # it is we who end, not just the connection
                self._note("leaves")
                raise
            return self.resume
        finally:
            self._dropping = None

    async def _attempt(self, base: str) -> bool:
        cursor = self.cursor or self.first_cursor
        posting = self.body is not None and self.cursor is None
        self.journal.add(self.name, "connect", {"url": base, "cursor": cursor})
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": cursor} if cursor else {})
        method, path = ("POST", "/api/messages/stream/") if posting else ("GET", self._path())
        try:
            async with (
                http(base, self.token) as client,
                client.stream(
                    method, path, headers=headers, params=self.query, json=self.body if posting else None
                ) as response,
            ):
                return await self._follow(response, cursor)
        except httpx.TransportError as problem:
            self.journal.add(self.name, "unreachable", {"why": f"{type(problem).__name__}: {problem}"})
            return self.resume

    def _path(self) -> str:
        return f"/api/sessions/{quote(self.session_id or '')}/stream/"

    async def _follow(self, response: httpx.Response, cursor: str | None) -> bool:
        self.statuses.append(response.status_code)
        if response.status_code != 200:
            await response.aread()
            refusal = {"status": response.status_code, "body": decoded(response)}
            self.journal.add(self.name, "refused" if response.status_code >= 300 else "note", _noted(refusal))
            self.connections += response.status_code == 204
            return response.status_code >= 500
        self._accepted(cursor)
        parser = SSEParser(comments=self.comments)
        async for data in response.aiter_bytes():
            for event in parser.feed(data):
                if event.event == "done":
                    self.journal.add(self.name, "closed", {"code": "done", "reason": ""})
                    return False
                self._event(event)
            await self._reading.wait()
        self.journal.add(self.name, "closed", {"code": "eof", "reason": "without event: done"})
        return self.resume

    def _event(self, sse: SSEEvent) -> None:
        event = self._take(sse.data)
        if event is None:
            return
        if event.get("type") != sse.event:
            self.view.violation("shape", f"SSE event {sse.event!r} carries type {event.get('type')!r}")
        if sse.id != event.get("cursor"):
            self.view.violation("shape", f"expected SSE id {event.get('cursor')}, got {sse.id}")


def _noted(refusal: dict[str, Any]) -> dict[str, Any]:
    return refusal if refusal["status"] >= 300 else {"text": f"{refusal['status']}: nothing to read"}
