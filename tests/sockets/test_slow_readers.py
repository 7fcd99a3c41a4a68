"""Readers slower than the models, and those that take nothing.

On Parley's own start bytes are seen leaving; on a plain uvicorn a reader is judged by how long a send has to wait.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.conftest import store
from tests.harness import until
from tests.harness.api import call, post_turn
from tests.harness.client import SocketReader, SSEReader
from tests.harness.journal import Journal
from tests.harness.proxy import Narrow
from tests.harness.service import Service

from . import BATTLE, ENVIRONMENT, UVICORN, callers, counted, home, offer
from .conftest import traceback_in

# Seconds. At `RATE` a plain uvicorn's send waits for 2.4, and longer where the line has to wait as well.
SEND_TIMEOUT = {"serve": 3, "uvicorn": 5}
KERNEL_TIMEOUT = 8  # seconds: more than twice as long, as what left in the first span gives a reader a second one
NUMBER = 8000  # tokens of a turn
RATE = 20_000  # bytes a second: so slow that a plain uvicorn's buffer is full for seconds


@pytest.fixture(scope="module", params=["serve", "uvicorn"])
def fast(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Models of a thousand tokens a second, readers that are given up quickly; pings as in production, where they find the dead."""
    environment = ENVIRONMENT | store("sqlite", request, tmp_path_factory.mktemp("fast"))
    environment |= {
        "PARLEY_MODELS": offer(0.0005),
        "PARLEY_PUBLISH_EVERY": "0",  # many small events to lag behind, also on a busy machine
        "PARLEY_SEND_TIMEOUT": str(SEND_TIMEOUT[request.param]),
        "PARLEY_TCP_USER_TIMEOUT": str(KERNEL_TIMEOUT),
        "PARLEY_PING_INTERVAL": "20",
        "ADMIN_TOKEN": ADMIN,
    }
    options = [] if request.param == "serve" else [*UVICORN, "--ws-ping-interval", "20"]
    with Service(environment, server=request.param, options=options) as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, traceback_in(log)


ADMIN = "an-admin-token-of-more-than-32-characters"


async def test_a_slow_reader_gets_fewer_frames_and_all_the_text(fast: Service, journal: Journal) -> None:
    """What gathers while its line is full leaves as one chunk of each side. A reader beside it is not held up, and it
    is not cut, however long its line is full: it takes what comes."""
    await asyncio.gather(_slow(fast, journal, "direct", 1), _slow(fast, journal, "compare", 2))
    for mode in ("direct", "compare"):
        assert max(_spans(journal, f"slow-{mode}")) > 20
        assert len(journal.events(f"slow-{mode}", "session_state")) == 1


async def _slow(fast: Service, journal: Journal, mode: str, sides: int) -> None:
    someone, session_id = await home(fast.url, **(BATTLE if mode == "compare" else {}))
    quick_name, slow_name = f"quick-{mode}", f"slow-{mode}"
    async with Narrow.before(fast.url, buffer=4096) as proxy:
        url = proxy.through(fast.url)
        async with (
            SocketReader(journal, quick_name, fast.url, session_id, token=someone.access) as quick,
            SocketReader(journal, slow_name, url, session_id, token=someone.access) as slow,
        ):
            proxy.limit(RATE)
            before = proxy.bytes_to_client
            await quick.say(f"/count {NUMBER}")
            await quick.turn_ended()
            await slow.until(lambda: proxy.bytes_to_client > before + 4 * RATE, 20, "four seconds of text")
            proxy.ok()
            await slow.turn_ended()
            assert quick.view.texts() == slow.view.texts() == [counted(NUMBER)] * sides
            assert slow.codes == []
    assert len(_spans(journal, slow_name)) < NUMBER / 2, journal.story()


def _spans(journal: Journal, name: str) -> list[int]:
    """How many tokens each chunk was."""
    return [event["chunk"].count("⟨") for event in journal.events(name, "message_chunk")]


async def test_a_reader_that_takes_nothing_is_cut_and_comes_back(fast: Service, journal: Journal) -> None:
    """One that wakes up in time is told why: 4408. One that never does is dropped by the kernel, where the start is
    Parley's own. Both have the whole text when they are back."""
    someone, session_id = await home(fast.url)
    own = "service.py" in fast.processes[0].command
    cut = await _readers_cut(fast)
    async with Narrow.before(fast.url, buffer=4096) as awake, Narrow.before(fast.url, buffer=4096) as asleep:
        async with (
            SocketReader(journal, "quick", fast.url, session_id, token=someone.access) as quick,
            SocketReader(journal, "awake", awake.through(fast.url), session_id, token=someone.access) as first,
            SocketReader(journal, "asleep", asleep.through(fast.url), session_id, token=someone.access) as second,
        ):
            assert callers(fast) == 3
            for proxy in (awake, asleep):
                proxy.stall("to_client", to="open")
            await quick.say(f"/count {NUMBER}")
            await until(lambda: _cut(fast, cut + 2), 20, "both are cut", journal.story)
            awake.ok()  # before the kernel drops it: a busy machine may still be at the answer
            await first.until(lambda: first.codes, what="the end of its first connection")
            assert first.codes == [4408]
            await first.until(lambda: first.connections == 2, what="a new connection")
            if own:
                await until(lambda: callers(fast) == 2, 20, "the descriptor is given back", journal.story)
            asleep.rst()
            await quick.turn_ended()
            for reader in (first, second):
                await reader.until(lambda view=reader.view: view.texts() == [counted(NUMBER)], what="the whole text")
            assert second.codes == [1006] and quick.codes == []
            await until(lambda: callers(fast) == 3, what="no descriptor is left over")


async def _cut(fast: Service, number: int) -> bool:
    return await _readers_cut(fast) >= number


async def _readers_cut(fast: Service) -> float:
    found = re.search(r"(?m)^chat_readers_cut_total (\S+)", (await call(fast.url, "GET", "/metrics", ADMIN)).text)
    return float(found[1]) if found else 0.0


async def test_a_slow_stream_gets_fewer_events_and_all_the_text(fast: Service, journal: Journal) -> None:
    """Over HTTP it is the same: what gathers while its line is full leaves as one event."""
    someone, session_id = await home(fast.url)
    async with Narrow.before(fast.url, buffer=4096) as proxy:
        url = proxy.through(fast.url)
        async with (
            SocketReader(journal, "quick", fast.url, session_id, token=someone.access) as quick,
            SSEReader(journal, "slow", url, session_id, token=someone.access, content=f"/count {NUMBER}") as slow,
        ):
            proxy.limit(RATE)
            before = proxy.bytes_to_client
            await quick.turn_ended()
            await slow.until(lambda: proxy.bytes_to_client > before + 4 * RATE, 20, "four seconds of text")
            proxy.ok()
            await slow.turn_ended()
            assert quick.view.texts() == slow.view.texts() == [counted(NUMBER)]
            assert slow.statuses == [200]
    assert len(_spans(journal, "slow")) < NUMBER / 2 and max(_spans(journal, "slow")) > 20, journal.story()


@pytest.mark.parametrize("fast", ["serve"], indirect=True)
async def test_a_stream_that_takes_nothing_is_cut_and_comes_back(fast: Service, journal: Journal) -> None:
    """Where the start is Parley's own; elsewhere nobody sees bytes leave, and the kernel's patience decides."""
    someone, session_id = await home(fast.url)
    cut = await _readers_cut(fast)
    async with Narrow.before(fast.url, buffer=4096) as proxy:
        url, content = proxy.through(fast.url), f"/count {NUMBER}"
        async with SSEReader(journal, "asleep", url, session_id, token=someone.access, content=content) as asleep:
            proxy.stall("to_client", to="open")
            await until(lambda: _cut(fast, cut + 1), 20, "it is cut", journal.story)
            await until(lambda: callers(fast) == 0, 20, "the descriptor is given back", journal.story)
            proxy.ok()
            await asleep.turn_ended()
            assert asleep.view.texts() == [counted(NUMBER)] and asleep.statuses == [200, 200]


@pytest.mark.parametrize("fast", ["serve"], indirect=True)
async def test_a_stream_whose_end_is_not_taken_is_cut(fast: Service, journal: Journal) -> None:
    """All of an ended turn leaves in one piece, and nothing comes after it that could find the reader gone."""
    someone, session_id = await home(fast.url)
    await post_turn(fast.url, someone.access, session_id, f"/count {NUMBER}")
    cut = await _readers_cut(fast)
    async with Narrow.before(fast.url, buffer=4096) as proxy:
        proxy.stall("to_client", to="new")
        parts = urlsplit(proxy.through(fast.url))
        _, writer = await asyncio.open_connection(parts.hostname, parts.port)
        head = f"GET /api/sessions/{session_id}/stream/ HTTP/1.1\r\nHost: localhost\r\n"
        writer.write(f"{head}Authorization: Bearer {someone.access}\r\n\r\n".encode())
        await until(lambda: _cut(fast, cut + 1), 20, "it is cut", journal.story)
        await until(lambda: callers(fast) == 0, 20, "the descriptor is given back", journal.story)
        writer.close()
