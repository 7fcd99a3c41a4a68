"""Background tasks that are never forgotten: each is kept until it ends, and an exception that ends one is logged."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
log = logging.getLogger("parley")


class Tasks:
    """The background tasks of a worker.

    `failures` counts the exceptions that nobody else saw; `lag` is how late the event loop was last, in seconds.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self.failures = 0
        self.lag = 0.0

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run `work` beside everything else until it ends or the worker does."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        problem = None if task.cancelled() else task.exception()
        if problem is not None and _unexpected(problem) is not None:
            self.failures += 1
            log.error("a background task failed", exc_info=problem)

    def beat(self, work: Callable[[], Awaitable[None]], every: float) -> None:
        """Call `work` every so many seconds for ever. An exception is logged and counted; the next beat comes."""
        self.spawn(self._beat(work, every))

    async def _beat(self, work: Callable[[], Awaitable[None]], every: float) -> None:
        name, failing = getattr(work, "__qualname__", repr(work)), ""
        while True:
            try:
                await work()
                failing = ""
            except Exception as problem:  # whatever it is: the beats after it must come, or leases run out unseen
                self.failures += 1
                if failing != repr(problem):
                    failing = repr(problem)
                    log.warning("%s: %s", name, failing, exc_info=_unexpected(problem))
            due = time.monotonic() + every
            await asyncio.sleep(every)
            self.lag = time.monotonic() - due

    async def cancel(self) -> None:
        """Cancel all tasks and wait for their ends."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def settle(future: asyncio.Future[Any], answer: Any) -> None:
    """Give a future its result, or an exception, unless the future is done: its caller may have stopped waiting."""
    if future.done():
        return
    if isinstance(answer, BaseException):
        future.set_exception(answer)
        future.exception()  # a caller that stopped waiting would otherwise be reported as never having looked
    else:
        future.set_result(answer)


def _unexpected(problem: BaseException) -> BaseException | None:
    """Errors with a code are states of the world (storage away); anything else is a mistake and wants its traceback."""
    return None if hasattr(problem, "code") or isinstance(problem, TimeoutError) else problem
