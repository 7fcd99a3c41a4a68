"""uvicorn's HTTP with a limit on how long a caller may take to say the head of a request, and answers within reach.

uvicorn has no limit: a connection that says nothing, or half a line, holds a descriptor for as long as it likes. And
what a streamed answer says would go through a message, a task and every middleware for each token: a route finds an
`Answer` in the scope's extensions that is written to directly. Given to uvicorn as its `--http` (`service.py` does).
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from chat.direct import EXTENSION
from consumers.direct import Bounded

PATIENCE = 10.0  # seconds, as long as a socket has to say who it is


class HeadProtocol(Bounded, HttpToolsProtocol):
    """Closes the connection when a head is not complete in time. Between two requests uvicorn's keep-alive counts."""

    _waiting: asyncio.TimerHandle | None = None
    _begun = False  # a head has begun and is not complete

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._waiting is not None or self.parser is None:
            return
        # Most heads come in one piece: a timer each would be for nothing. An empty line ends uvicorn's keep-alive.
        answering = self.cycle is not None and not self.cycle.response_complete
        if self._begun or not (answering or self.timeout_keep_alive_task):
            self._wait()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun = True

    def on_headers_complete(self) -> None:
        self._begun = False
        self._done()
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:  # else it becomes a socket
            self.scope["extensions"] = {EXTENSION: Answer(self, self.cycle)}  # type: ignore[dict-item]

    def handle_websocket_upgrade(self) -> None:
        super().handle_websocket_upgrade()
        self.parser = None  # type: ignore[assignment]  # the two hold each other, and nothing else ends that here

    def connection_lost(self, exc: Exception | None) -> None:
        self._done()
        super().connection_lost(exc)

    async def writable_again(self) -> None:
        await self.flow.drain()

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(PATIENCE, self.transport.close)

    def _done(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class Answer:
    """One answer's body, to be written to without a task between its head and its last part."""

    def __init__(self, connection: HeadProtocol, cycle: RequestResponseCycle) -> None:
        self._connection = connection
        self._cycle = cycle

    @property
    def streams(self) -> bool:
        """Whether its head is sent and says that a body of any length follows."""
        return self._cycle.chunked_encoding is True

    @property
    def blocked(self) -> bool:
        return self._connection.blocked

    async def room(self, patience: float) -> None:
        """Wait until more may be written. Raises `TimeoutError` when for so many seconds nothing leaves."""
        await self._connection.room(patience)

    def write(self, part: bytes) -> None:
        """Write a part, as a chunk: https://www.rfc-editor.org/rfc/rfc9112#section-7.1"""
        transport = self._cycle.transport
        if part and not transport.is_closing():  # an empty chunk would be the end
            transport.write(b"%x\r\n%b\r\n" % (len(part), part))

    def abort(self, code: int = 1006, reason: str = "") -> None:
        """Give up a reader that takes nothing. There is no saying why: what is stuck is before it."""
        self._cycle.transport.abort()
