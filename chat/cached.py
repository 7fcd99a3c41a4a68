"""A value that is costly to compute and asked for by many: computed once, and kept for a moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Cached(Generic[T]):
    """A value older than `seconds` is computed again; all callers that ask meanwhile share one computation."""

    def __init__(self, seconds: float, find_out: Callable[[], Awaitable[T]]) -> None:
        self._seconds = seconds
        self._find_out = find_out
        self._found: tuple[float, T] | None = None  # monotonic: when finding out began
        self._finding: asyncio.Task[T] | None = None

    async def get(self) -> T:
        """Return the value. An error of the computation is raised for all its callers; the next caller tries again."""
        if self._found is not None and time.monotonic() - self._found[0] < self._seconds:
            return self._found[1]
        if self._finding is None:
            # A task of its own: inside the first caller's, that caller's cancellation would end it for the others.
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
            finding.exception()  # read here: all callers may have left, and asyncio would report it as never retrieved
