"""The machine's own noise: how long processes stood in line for a processor. No fault of theirs, so it is taken off."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Self

from . import POLL


class Noise:
    """Samples while it is open the waiting times of this process and of others, of the thread that runs their loop.

    Linux counts them in /proc/<pid>/schedstat: nanoseconds on a processor, nanoseconds waiting for one, turns. Where
    there is no such file, `between` is 0. A process that sleeps, blocks, computes or is stopped does not wait.
    """

    def __init__(self, *pids: int) -> None:
        self._files = [Path(f"/proc/{pid}/schedstat") for pid in (os.getpid(), *pids)]
        self._at: list[float] = []
        self._waited: list[float] = []

    def between(self, start: float, end: float) -> float:
        """Seconds of `time.monotonic()` that were lost from the last sample before `start` to the first after `end`."""
        if not self._at:
            return 0.0
        first = max(0, bisect_right(self._at, start) - 1)
        last = min(len(self._at) - 1, bisect_left(self._at, end))
        return self._waited[last] - self._waited[first]

    async def _sample(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                waited = sum(int(file.read_text().split()[1]) for file in self._files) / 1e9
                self._at.append(time.monotonic())
                self._waited.append(waited)
                await asyncio.sleep(POLL)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._task.cancel()


@contextlib.asynccontextmanager
async def prompt(within: float, *pids: int) -> AsyncIterator[None]:
    """What happens inside takes less than `within` seconds, those not counted that these processes stood in line."""
    async with Noise(*pids) as noise:
        started = time.monotonic()
        yield
        ended = time.monotonic()
        await asyncio.sleep(3 * POLL)  # until there is a sample after the end
        lost = noise.between(started, ended)
    assert ended - started - lost < within, f"took {ended - started:.2f} s, {lost:.2f} s of them in line"
