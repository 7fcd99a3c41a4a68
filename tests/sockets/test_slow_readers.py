"""Readers slower than the models, and those that take nothing."""

from __future__ import annotations

import asyncio
import socket

import pytest

from tests.harness.client import SocketReader
from tests.harness.journal import Journal
from tests.harness.proxy import Proxy
from tests.harness.service import Service

from . import BATTLE, counted, home


class Narrow(Proxy):
    """A proxy whose server believes in a thin line: the kernel keeps kilobytes for it, not megabytes."""

    def _shrink(self, end: socket.socket) -> None:
        super()._shrink(end)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)


@pytest.mark.parametrize("mode", ["direct", "compare"])
async def test_a_slow_reader_gets_fewer_frames_and_all_the_text(fast: Service, journal: Journal, mode: str) -> None:
    """Chunks merge; the alternating sides of an arena do not, so there a snapshot takes their place. A reader beside it
    has everything long before."""
    someone, session_id = await home(fast.url, **(BATTLE if mode == "compare" else {}))
    sides = 2 if mode == "compare" else 1
    number = 4000 // sides
    async with Narrow.before(fast.url, buffer=4096) as proxy:
        url = proxy.through(fast.url)
        async with (
            SocketReader(journal, "quick", fast.url, session_id, token=someone.access) as quick,
            SocketReader(journal, "slow", url, session_id, token=someone.access) as slow,
        ):
            proxy.limit(40_000)
            await quick.say(f"/count {number}")
            await quick.turn_ended()
            assert slow.view.turns_ended == 0
            await slow.turn_ended(within=20)
            assert quick.view.texts() == slow.view.texts() == [counted(number)] * sides
            assert slow.codes == []
    frames = len(journal.events("slow", "message_chunk"))
    spans = [
        event["seq"] - event.get("from_seq", event["seq"]) + 1 for event in journal.events("slow", "message_chunk")
    ]
    assert frames < number / 2, journal.story()
    if mode == "direct":
        assert max(spans) > 20
    else:
        assert len(journal.events("slow", "session_state")) > 1
        assert frames < 1200, "what fits into buffers, and not the rest"


async def test_a_reader_that_wakes_up_in_time_is_told_it_was_slow(fast: Service, journal: Journal) -> None:
    someone, session_id = await home(fast.url)
    async with Narrow.before(fast.url, buffer=4096) as proxy:
        url = proxy.through(fast.url)
        async with SocketReader(journal, "sleepy", url, session_id, token=someone.access) as sleepy:
            proxy.stall("to_client", to="open")
            await sleepy.say("/count 4000")
            await asyncio.sleep(1.6)  # cut after 1 s, forgotten after 2
            proxy.ok()
            await sleepy.until(lambda: sleepy.codes, what="the end of its first connection")
            assert sleepy.codes == [4408]
            await sleepy.turn_ended()
            assert sleepy.view.texts() == [counted(4000)]
