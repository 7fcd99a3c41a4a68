"""The AI SDK's `WebSocketChatTransport` on a session's socket: each of its requests is a follower of its own.

The SDK's frames `send`, `resume` and `abort` stand beside ours, and so do `start`, `chunk`, `end`, `error` and
`no-active` beside our events: the client takes what carries a `requestId` of its own.
https://ai-sdk.dev/docs/ai-sdk-ui/transport
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from chat.errors import ChatError, invalid, not_found
from chat.formats.events import encode
from chat.formats.ui_messages import chunks_dialect, last_words
from chat.live import choices
from chat.live.answers import start_of
from chat.state import State
from chat.store import turns
from chat.store.database import new_id
from chat.store.rights import Right
from chat.store.sessions import Session
from chat.store.turns import Ask

from . import frames

REQUESTS_MAX = 8  # running at once on one socket: each is a follower of the room
SECOND_THOUGHTS = 0.3  # seconds from an abort to the stop: a page that mounts twice aborts and resumes at once


@dataclass
class Requests:
    """The requests on one socket. right: the socket's; spawn: starts a task that ends with the socket."""

    chat: State
    right: Right
    address: str
    send: Callable[[bytes], Awaitable[None]]
    spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
    running: dict[str, tuple[str, asyncio.Task[None]]] = field(default_factory=dict)  # the turn, and its telling
    resumed: int = 0  # requests to resume so far

    async def take(self, frame: frames.Send | frames.Resume | frames.Abort) -> None:
        """Do what a frame asks. A refusal goes to the request that caused it."""
        request_id = frame.requestId or ""
        if isinstance(frame, frames.Abort):
            await self._abort(request_id)
            return
        self.resumed += isinstance(frame, frames.Resume)
        try:
            if len(self.running) == REQUESTS_MAX or request_id in self.running:
                raise ChatError("rate_limited", "Too many requests are running on this connection.")
            session = await self.right.select()
            if frame.id != session.id:
                raise invalid("id", "this connection is another chat's")
            if isinstance(frame, frames.Send):
                turn_id = await self._begun(frame, session)
            else:
                turn_id = await turns.select_running_turn(self.chat.database, session)
        except ChatError as problem:
            await self._say("error", request_id, errorText=problem.message)
            return
        if turn_id:
            self.running[request_id] = turn_id, self.spawn(self._tell(request_id, turn_id))
        else:
            await self._say("no-active", request_id)

    async def _begun(self, frame: frames.Send, session: Session) -> str:
        """Return the turn that a message began, now or before."""
        account = self.right.writer()
        choices.check(session, frame.body)
        message_id, text = last_words(frame.messages)
        again = frame.trigger == "regenerate-message"
        reply_ids = {"a": new_id()} if again else {}  # as over HTTP: an answer made again is a new one
        ask = Ask(message_id or new_id(), text, reply_ids, replaces=again or frame.messageId == message_id)
        turn = await self.chat.generation.begin(session, account, ask, address=self.address)
        turn.check(ask)
        return turn.id

    async def _tell(self, request_id: str, turn_id: str) -> None:
        """Tell a turn from its start to its end, or until the request is aborted. Raises what ends the socket."""
        relay = self.chat.relay
        try:
            follower = await relay.join(self.right, chunks_dialect, one_turn=True)
            try:
                if not await relay.resume(follower, start_of(turn_id)):
                    raise not_found("turn")
                await self._say("start", request_id)
                sequence = 0
                while chunks := await follower.next():
                    for chunk in chunks:
                        head = encode({"type": "chunk", "requestId": request_id, "sequence": sequence})
                        await self.send(b'%b,"chunk":%b}' % (head[:-1], chunk))
                        sequence += 1
                await self._say("end", request_id)
            finally:
                relay.part(follower)
        except ChatError as problem:
            await self._say("error", request_id, errorText=problem.message)
        finally:
            self.running.pop(request_id, None)

    async def _abort(self, request_id: str) -> None:
        """Stop the turn, unless the client only has second thoughts about which request shows it, and resumes."""
        if request_id in self.running:
            turn_id, telling = self.running[request_id]
            telling.cancel()
            self.spawn(self._stop(turn_id, self.resumed))

    async def _stop(self, turn_id: str, resumed: int) -> None:
        await asyncio.sleep(SECOND_THOUGHTS)
        if resumed == self.resumed and self.right.account is not None:
            with contextlib.suppress(ChatError):  # a session that is gone has no turn to stop
                await self.chat.generation.stop(await self.right.select(), self.right.account.id, turn_id)

    async def _say(self, kind: str, request_id: str, **fields: str) -> None:
        await self.send(encode({"type": kind, "requestId": request_id} | fields))
