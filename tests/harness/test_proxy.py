"""The proxy does to a connection what it says, from the moment it says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.harness import until
from tests.harness.processes import HOST
from tests.harness.proxy import Proxy

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def echo() -> AsyncIterator[int]:
    """A server that sends back what it gets, and says FIN after the client has. Its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, HOST, 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


@pytest.fixture
async def proxy(echo: int) -> AsyncIterator[Proxy]:
    async with Proxy(HOST, echo) as proxy:
        yield proxy


@asynccontextmanager
async def connected(proxy: Proxy) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection(HOST, proxy.port, limit=4096)
    try:
        yield reader, writer
    finally:
        writer.close()


async def said(streams: Streams, data: bytes, within: float = 2.0) -> bytes:
    """What comes back for `data`."""
    reader, writer = streams
    writer.write(data)
    return await asyncio.wait_for(reader.readexactly(len(data)), within)


async def silent(streams: Streams, data: bytes = b"?", during: float = 0.1) -> bool:
    try:
        await said(streams, data, during)
    except TimeoutError:
        return True
    return False


async def test_it_carries_bytes_both_ways_and_counts_them(proxy: Proxy) -> None:
    async with connected(proxy) as one, connected(proxy) as two:
        assert await said(one, b"hello") == b"hello"
        assert await said(two, b"x" * 300_000) == b"x" * 300_000
        assert (proxy.connections, proxy.open) == (2, 2)
        assert (proxy.bytes_to_server, proxy.bytes_to_client) == (300_005, 300_005)
    await until(lambda: proxy.open == 0)
    assert (proxy.bytes_to_server, proxy.bytes_to_client) == (300_005, 300_005)


async def test_a_half_closed_client_still_gets_its_answer(proxy: Proxy) -> None:
    async with connected(proxy) as (reader, writer):
        writer.write(b"last words")
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 2) == b"last words"


async def test_delay_is_added_on_each_way(proxy: Proxy) -> None:
    async with connected(proxy) as streams:
        proxy.delay(0.1)
        began = time.monotonic()
        assert await said(streams, b"hello") == b"hello"
        assert 0.2 <= time.monotonic() - began < 0.5


async def test_a_stall_holds_open_and_new_connections_and_loses_nothing(proxy: Proxy) -> None:
    async with connected(proxy) as old:
        assert await said(old, b"before") == b"before"
        proxy.stall()
        async with connected(proxy) as new:
            assert await silent(old, b"held")
            assert await silent(new, b"held")
            proxy.ok()
            assert await asyncio.wait_for(old[0].readexactly(4), 2) == b"held"
            assert await asyncio.wait_for(new[0].readexactly(4), 2) == b"held"


async def test_a_stall_of_one_direction_lets_the_other_through(proxy: Proxy) -> None:
    async with connected(proxy) as streams:
        assert await said(streams, b"1") == b"1"
        proxy.stall("to_client")
        assert await silent(streams, b"2")
        assert (proxy.bytes_to_server, proxy.bytes_to_client) == (2, 1)
        proxy.stall("to_server")
        assert await asyncio.wait_for(streams[0].readexactly(1), 2) == b"2"
        assert await silent(streams, b"3")
        assert proxy.bytes_to_server == 2


async def test_a_fault_may_concern_only_new_connections_or_only_open_ones(proxy: Proxy) -> None:
    async with connected(proxy) as old:
        assert await said(old, b"a") == b"a"
        proxy.stall(to="new")
        async with connected(proxy) as new:
            assert await said(old, b"b") == b"b"
            assert await silent(new)
            proxy.ok()
        proxy.stall(to="open")
        async with connected(proxy) as new:
            assert await silent(old)
            assert await said(new, b"c") == b"c"


async def test_a_limited_client_gets_so_many_bytes_a_second(proxy: Proxy) -> None:
    async with connected(proxy) as (reader, writer):
        proxy.limit(10_000)
        writer.write(b"x" * 5_000)
        began = time.monotonic()
        assert await asyncio.wait_for(reader.readexactly(5_000), 5) == b"x" * 5_000
        assert 0.4 < time.monotonic() - began < 1.0


async def test_back_pressure_reaches_the_sender() -> None:
    """With small buffers a server cannot write much more than a stalled client has room for."""
    written = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.transport.set_write_buffer_limits(0)
        try:
            while written < 50_000_000:
                writer.write(b"x" * 10_000)
                await writer.drain()
                written += 10_000
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(flood, HOST, 0)
    async with Proxy(HOST, server.sockets[0].getsockname()[1], buffer=4096) as proxy:
        proxy.stall("to_client")
        async with connected(proxy):
            await until(lambda: proxy.open == 1)
            before = -1
            while written != before:
                before = written
                await asyncio.sleep(0.2)
        assert written < 8_000_000
    server.close()


@pytest.mark.parametrize("reset", [False, True])
async def test_a_cut_lets_exactly_so_many_bytes_through(proxy: Proxy, reset: bool) -> None:
    async with connected(proxy) as (reader, writer):
        assert await said((reader, writer), b"before") == b"before"
        proxy.cut(after=7, reset=reset)
        writer.write(b"0123456789")
        if reset:
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.readexactly(10), 2)
        else:
            assert await asyncio.wait_for(reader.read(), 2) == b"0123456"
        assert proxy.bytes_to_client == len("before") + 7
        await until(lambda: proxy.open == 0)


async def test_a_cut_counts_bytes_to_the_server_when_told(proxy: Proxy) -> None:
    async with connected(proxy) as (reader, writer):
        proxy.cut(after=3, direction="to_server")
        writer.write(b"012345")
        await asyncio.wait_for(reader.read(), 2)
        assert proxy.bytes_to_server == 3


async def test_rst_resets_open_connections_and_lets_new_ones_in(proxy: Proxy) -> None:
    async with connected(proxy) as old:
        assert await said(old, b"a") == b"a"
        proxy.rst()
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(old[0].readexactly(1), 2)
    async with connected(proxy) as new:
        assert await said(new, b"b") == b"b"


async def test_half_close_ends_one_direction(proxy: Proxy) -> None:
    async with connected(proxy) as (reader, writer):
        assert await said((reader, writer), b"a") == b"a"
        proxy.half_close("to_client")
        assert await asyncio.wait_for(reader.read(), 2) == b""
        writer.write(b"still heard")
        await until(lambda: proxy.bytes_to_server == len("a" + "still heard"))


async def test_refuse_gives_connection_refused_until_ok(proxy: Proxy) -> None:
    async with connected(proxy) as old:
        assert await said(old, b"a") == b"a"
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(HOST, proxy.port)
        assert await said(old, b"b") == b"b"
        proxy.ok()
        async with connected(proxy) as new:
            assert await said(new, b"c") == b"c"


async def test_close_all_says_fin(proxy: Proxy) -> None:
    async with connected(proxy) as streams:
        assert await said(streams, b"a") == b"a"
        proxy.close_all()
        assert await asyncio.wait_for(streams[0].read(), 2) == b""


async def test_a_server_that_is_down_looks_like_a_reset(echo: int) -> None:
    async with Proxy(HOST, 1) as proxy, connected(proxy) as (reader, _):
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.readexactly(1), 2)
        assert proxy.refused == 1


def test_a_url_keeps_everything_but_its_port() -> None:
    proxy = Proxy.before("postgresql://me:secret@localhost:5432/db?x=1")
    assert (proxy.host, proxy.target_port) == ("localhost", 5432)
    assert proxy.through("postgresql://me:secret@localhost:5432/db?x=1") == (
        f"postgresql://me:secret@127.0.0.1:{proxy.port}/db?x=1"
    )
    with pytest.raises(ValueError, match="a host and a port"):
        Proxy.before("sqlite:///file.db")


async def test_ending_it_ends_its_connections_and_tasks(echo: int) -> None:
    before = len(asyncio.all_tasks())
    proxy = await Proxy(HOST, echo).start()
    async with connected(proxy) as streams:
        assert await said(streams, b"a") == b"a"
        await proxy.stop()
        assert await asyncio.wait_for(streams[0].read(), 2) == b""
    await until(lambda: len(asyncio.all_tasks()) <= before)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(HOST, proxy.port)
