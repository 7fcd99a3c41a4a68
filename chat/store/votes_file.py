"""The counted votes as a file that only grows, like the votes: each is read from the database and encoded once.

A file made anew for every caller would cost seconds of CPU for each request.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable

from .database import Database
from .queries import Row
from .votes import select_votes

PAGE = 1000  # votes read at once
PIECE = 262_144  # bytes handed out at once
SETTLED = 10_000  # milliseconds after which no vote of an earlier moment can still appear: transactions have ended
Place = tuple[int, str]  # the created_at and id of a vote


class VotesFile:
    """A temporary file of this worker; it is gone with its process."""

    def __init__(self, database: Database, line: Callable[[Row], bytes]) -> None:
        self._database = database
        self._line = line
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the worker
        self._size = 0
        self._last: Place = (-1, "")
        self._growing = asyncio.Lock()

    def close(self) -> None:
        self._file.close()

    async def pieces(self) -> AsyncIterator[bytes]:
        """All votes there are, oldest first, whole lines. The file first grows by what it lacks, for all callers."""
        async with self._growing:
            while page := await select_votes(self._database, self._last, PAGE, self._database.now() - SETTLED):
                lines = b"".join(map(self._line, page))
                await asyncio.to_thread(os.pwrite, self._file.fileno(), lines, self._size)
                self._size, self._last = self._size + len(lines), _place(page[-1])
            size, after = self._size, self._last
        for offset in range(0, size, PIECE):
            yield await asyncio.to_thread(os.pread, self._file.fileno(), min(PIECE, size - offset), offset)
        while page := await select_votes(self._database, after, PAGE):  # the last moments' few
            yield b"".join(map(self._line, page))
            after = _place(page[-1])


def _place(vote: Row) -> Place:
    return vote["created_at"], vote["id"]
