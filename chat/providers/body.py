"""The bytes of a vendor's streamed response, handed on as they come."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

from ..tasks import settle

DRAIN = 0.1  # seconds for the body's end after [DONE]: only a connection whose answer was read whole is used again

Feed = Callable[[bytes], bool]  # takes the next bytes, b"" at the end; returns whether the answer is over


class Body:
    """The body of a response. Cancel `pour` to read no more of it."""

    def __init__(self, response: Any) -> None:
        self._response = response

    async def pour(self, feed: Feed) -> None:
        """Hand the bytes to `feed` until the answer is over. Raises whatever `feed` and the connection raise."""
        reader = plain_reader(self._response)
        if reader is not None:
            await Tap(reader, feed).pour()
            return
        async with aclosing(self._response.aiter_bytes()) as pieces:
            async for data in pieces:
                if feed(data):
                    await drained(read_out(pieces))
                    return
        feed(b"")

    async def aclose(self) -> None:
        await self._response.aclose()


async def read_out(pieces: AsyncIterator[bytes]) -> None:
    async for _ in pieces:
        pass


async def drained(end: Awaitable[object]) -> None:
    """Wait a moment for the body's end. The answer is whole, whatever the connection does."""
    with suppress(Exception):
        async with asyncio.timeout(DRAIN):
            await end


def plain_reader(response: Any) -> Any:
    """Return aiohttp's reader of a response whose bytes need no decoding; None for any other response."""
    reader = None if "content-encoding" in response.headers else response.stream
    for name in ("_stream", "_aiohttp_response", "content"):
        reader = getattr(reader, name, None)
    return reader if hasattr(reader, "_buffer") else None  # that of a response without a body has none


class Tap:
    """Stands in aiohttp's reader for the future of a task that waits, and hands each piece on as it is parsed.

    A task that waits costs each token a future, a pass of the loop, seven frames and another run of the parser: 20 % of
    all that a token of OpenAI's costs. `done`, `set_result` and `set_exception` are those of a future.
    """

    def __init__(self, reader: Any, feed: Feed) -> None:
        self._reader = reader
        self._feed = feed
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def pour(self) -> None:
        """Hand the bytes to `feed` until the answer is over."""
        reader = self._reader
        reader._http_chunk_splits = deque(maxlen=1)  # it grows with each chunk, and the reader stops where it is long
        while not self._over.done() and (data := reader.read_nowait()):
            self._take(data)
        self.set_result(None)
        try:
            await self._over
            await drained(reader.wait_eof())
        finally:
            reader._waiter = None

    def done(self) -> bool:
        return False

    def set_result(self, _: None) -> None:
        """Take what has come. The reader's own `read_nowait` would run its parser, which is running already."""
        reader = self._reader
        try:
            while reader._buffer and not self._over.done():
                data = reader._buffer.popleft()
                reader._size -= len(data)
                self._take(data)
            if reader.is_eof() and not self._over.done():
                self._take(b"")
        except Exception as problem:
            settle(self._over, problem)
        if not self._over.done():
            reader._waiter = self

    def set_exception(self, problem: BaseException) -> None:
        settle(self._over, problem)

    def _take(self, data: bytes) -> None:
        if self._feed(data) or not data:
            settle(self._over, None)
