"""A value that is costly to find out and asked for by many: found out once, and kept for a moment. Pure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Cached(Generic[T]):
    """Who finds it older than `seconds` finds it out again; who asks meanwhile waits for that one answer."""

    def __init__(self, seconds: float, find_out: Callable[[], Awaitable[T]]) -> None:
        self._seconds = seconds
        self._find_out = find_out
        self._found: tuple[float, T] | None = None  # monotonic: when finding out began
        self._turn = asyncio.Lock()

    async def get(self) -> T:
        """Raises what finding out raises; the next who asks tries again."""
        asked = time.monotonic()
        if (found := self._fresh(asked)) is None:
            async with self._turn:
                if (found := self._fresh(asked)) is None:
                    began = time.monotonic()
                    found = self._found = began, await self._find_out()
        return found[1]

    def _fresh(self, asked: float) -> tuple[float, T] | None:
        return self._found if self._found is not None and asked - self._found[0] < self._seconds else None
