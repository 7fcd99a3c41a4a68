"""A value that is costly to find out and asked for by many: found out once, and kept for a moment. Pure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Cached(Generic[T]):
    """Who finds the value older than `seconds` has it found out again; who asks meanwhile gets the same outcome."""

    def __init__(self, seconds: float, find_out: Callable[[], Awaitable[T]]) -> None:
        self._seconds = seconds
        self._find_out = find_out
        self._found: tuple[float, T] | None = None  # monotonic: when finding out began
        self._finding: asyncio.Task[T] | None = None

    async def get(self) -> T:
        """Raises what finding out raises, for all who wait; the next who asks tries again."""
        if self._found is not None and time.monotonic() - self._found[0] < self._seconds:
            return self._found[1]
        if self._finding is None:
            # A task of its own: were it the first caller's, that one's leaving would end it for the others.
            self._finding = asyncio.create_task(self._find())
            self._finding.add_done_callback(self._done)
        return await asyncio.shield(self._finding)

    async def _find(self) -> T:
        began = time.monotonic()
        value = await self._find_out()
        self._found = began, value
        return value

    def _done(self, finding: asyncio.Task[T]) -> None:
        self._finding = None
        if not finding.cancelled():
            finding.exception()  # read it: everybody who waited may have left
