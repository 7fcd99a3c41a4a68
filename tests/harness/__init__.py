"""What the tests stand on: real servers, a proxy that misbehaves, clients that remember, and the rules they check."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

POLL = 0.005  # seconds between two looks, short beside what tests wait for


def pause(looked: float) -> float:
    """Seconds until the next look: as long as the last one took since `looked`, so that looking leaves time for others."""
    return min(max(POLL, time.monotonic() - looked), 10 * POLL)


async def minute_with_room(seconds: float = 6.0) -> None:
    """Wait until the clock's minute lasts that much longer: limits begin to count anew with each."""
    await until(lambda: time.time() % 60 < 60 - seconds, seconds + 1, "the next minute")


async def until(
    condition: Callable[[], Any],
    within: float = 5.0,
    what: str = "the condition",
    story: Callable[[], str] | None = None,
) -> Any:
    """Return the first truthy answer of `condition` (plain or async), or raise TimeoutError after `within` seconds.

    `what` names the thing waited for; `story` is printed with the failure, e.g. `journal.story`.
    """
    deadline = time.monotonic() + within
    while True:
        looked = time.monotonic()
        answer = condition()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {within} s" + (f"\n{story()}" if story else ""))
        await asyncio.sleep(pause(looked))
