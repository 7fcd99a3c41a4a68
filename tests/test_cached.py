"""A value asked for by many at once is found out once, also where that fails."""

from __future__ import annotations

import asyncio

import pytest

from chat.cached import Cached


class Costly:
    """Counts how often it is found out; fails while `broken`."""

    def __init__(self) -> None:
        self.times = 0
        self.broken = False
        self.ready = asyncio.Event()

    async def __call__(self) -> int:
        self.times += 1
        await self.ready.wait()
        if self.broken:
            raise LookupError("away")
        return self.times


@pytest.fixture
async def costly() -> Costly:
    return Costly()


async def ask(cached: Cached[int], count: int) -> list[asyncio.Task[int]]:
    asking = [asyncio.create_task(cached.get()) for _ in range(count)]
    await asyncio.sleep(0)
    return asking


async def test_ten_callers_of_one_failure_all_get_it(costly: Costly) -> None:
    """Not one after the other, each after an attempt of its own. Who asks afterwards tries again."""
    cached = Cached(60, costly)
    costly.broken = True
    asking = await ask(cached, 10)
    costly.ready.set()
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(each) for each in outcomes] == [LookupError] * 10 and costly.times == 1
    costly.broken = False
    assert await cached.get() == 2


async def test_a_caller_that_leaves_ends_it_for_nobody(costly: Costly) -> None:
    cached = Cached(60, costly)
    first, second = await ask(cached, 2)
    first.cancel()
    await asyncio.wait({first})
    costly.ready.set()
    assert await second == 1 and first.cancelled()


async def test_a_value_is_kept_for_a_moment(costly: Costly) -> None:
    costly.ready.set()
    kept, gone = Cached(60, costly), Cached(0, costly)
    assert [await kept.get(), await kept.get()] == [1, 1]
    assert [await gone.get(), await gone.get()] == [2, 3]
