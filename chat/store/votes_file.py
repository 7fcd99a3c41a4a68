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
        """Yield the lines of all votes, oldest first: the file, page by page what it lacks, then the last moments."""
        offset = 0
        while offset < self._size or await self._grows(offset):
            piece = await asyncio.to_thread(os.pread, self._file.fileno(), min(PIECE, self._size - offset), offset)
            yield piece
            offset += len(piece)
        after = self._last
        while page := await select_votes(self._database, after, PAGE):
            yield b"".join(map(self._line, page))
            after = _place(page[-1])

    async def _grows(self, offset: int) -> bool:
        """Write the next page of settled votes if the file ends at this offset; return whether it goes on there now."""
        async with self._growing:
            settled = self._database.now() - SETTLED
            if offset == self._size and (page := await select_votes(self._database, self._last, PAGE, settled)):
                lines = b"".join(map(self._line, page))
                await asyncio.to_thread(os.pwrite, self._file.fileno(), lines, self._size)
                self._size += len(lines)
                self._last = _place(page[-1])
            return offset < self._size


def _place(vote: Row) -> Place:
    return vote["created_at"], vote["id"]
