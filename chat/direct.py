"""Writing to a connection without a task, past ASGI.

`servers.py` implements `Direct` on uvicorn's protocols and puts the connection into the scope's extensions. Other
servers offer no `Direct`, and bytes go through ASGI.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

EXTENSION = "parley.direct"


class Direct(Protocol):
    """A socket, or the body of a streamed answer, that can be written to directly."""

    @property
    def blocked(self) -> bool:
        """Whether the connection's buffers are full: its reader does not keep up."""
        ...

    def write(self, data: bytes) -> None:
        """Write finished frames or a part of the body, unless the connection is closing."""
        ...

    async def drained(self, patience: float) -> None:
        """Wait until more may be written. Raises `TimeoutError` when nothing leaves for `patience` seconds."""
        ...

    def abort(self, code: int = 1006, reason: str = "") -> None:
        """Drop a reader that reads nothing; a socket is told the code and reason if it ever reads again."""
        ...


class Sleeper:
    """A coroutine that sleeps until something rouses it. An `asyncio.Event` would cost 0.8 KB a socket."""

    __slots__ = ("_asleep",)
    _asleep: asyncio.Future[None] | None

    def __init__(self) -> None:
        self._asleep = None

    async def sleep(self) -> None:
        """Wait until roused. Look for news first: `rouse` wakes only a coroutine that sleeps already."""
        self._asleep = asyncio.get_running_loop().create_future()
        await self._asleep

    def rouse(self) -> None:
        if self._asleep is not None and not self._asleep.done():
            self._asleep.set_result(None)


def direct_of(scope: Any) -> Any:
    """Return the `Direct` connection of an ASGI scope, or None on a server that offers none."""
    return scope.get("extensions", {}).get(EXTENSION)
