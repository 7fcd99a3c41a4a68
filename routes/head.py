"""uvicorn's HTTP with a limit on how long a caller may take to say the head of a request.

uvicorn has none: a connection that says nothing, or half a line, holds a descriptor for as long as it likes. Given to
uvicorn as its `--http` (`service.py` does).
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

PATIENCE = 10.0  # seconds, as long as a socket has to say who it is


class ImpatientProtocol(HttpToolsProtocol):
    """Closes the connection when a head is not complete in time. Between two requests uvicorn's keep-alive counts."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._waiting is None:
            self._wait()

    def on_headers_complete(self) -> None:
        self._done()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._done()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(PATIENCE, self.transport.close)

    def _done(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
