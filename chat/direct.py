"""Writing to a connection without a task: what a server's own protocol offers beside ASGI, and where it is found.

`servers.py` implements `Direct` on uvicorn's protocols and puts the connection into the scope's extensions. On every
other server there is none, and bytes go through ASGI.
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

    async def room(self, patience: float) -> None:
        """Wait until more may be written. Raises `TimeoutError` when nothing leaves for `patience` seconds."""
        ...

    def abort(self, code: int = 1006, reason: str = "") -> None:
        """Give up a reader that takes nothing; a socket is told the code and reason if it ever reads again."""
        ...


class Sleeper:
    """A coroutine's place to wait for news. An `asyncio.Event` costs 0.8 KB for each socket that is silent."""

    __slots__ = ("_asleep",)
    _asleep: asyncio.Future[None] | None

    def __init__(self) -> None:
        self._asleep = None

    async def sleep(self) -> None:
        """Wait until roused. A caller that looks for news first and sleeps then misses none."""
        self._asleep = asyncio.get_running_loop().create_future()
        await self._asleep

    def rouse(self) -> None:
        if self._asleep is not None and not self._asleep.done():
            self._asleep.set_result(None)


def direct_of(scope: Any) -> Any:
    """Return the `Direct` connection of an ASGI scope, or None on a server that offers none."""
    return scope.get("extensions", {}).get(EXTENSION)
