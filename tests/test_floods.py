"""Floods of a second or so (`tests/floods.py` plays longer ones), and the answer to each thing that is too much."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

import servers
from chat.settings import read_settings
from tests.conftest import CLOSED
from tests.floods import CHUNKED, FLOODS, GROWTH, HANDSHAKE, HEAD, HOST, STALL, Flood, play, served
from tests.harness import until
from tests.harness.service import Service


@pytest.fixture(scope="module")
def served_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with served(tmp_path_factory.mktemp("floods")) as service:
        yield service


@pytest.fixture
def flooded(served_once: Service) -> Iterator[Service]:
    """A service that nobody else is connected to; no traceback in its log."""
    logged = len(served_once.log())
    yield served_once
    log = served_once.log()[logged:]
    assert "Traceback" not in log, log[-6000:]


@pytest.mark.parametrize("flood", FLOODS.values(), ids=list(FLOODS))
async def test_a_flood_costs_little_and_all_is_given_back(tmp_path: Path, flood: Flood) -> None:
    """Each on a service of its own: memory that one flood left free would hide what the next one takes."""
    async with served(tmp_path) as service:
        cost = await play(service, tmp_path, flood, 1.5)
        log = service.log()
    assert "Traceback" not in log, log[-6000:]
    assert cost.growth < GROWTH, cost.line()
    assert cost.stall < STALL, cost.line()
    assert cost.unanswered == 0 and cost.held <= 0, cost.line()


def test_a_burst_of_connections_is_accepted_in_few_passes() -> None:
    """Between two passes of a busy loop lie milliseconds: thousands of readers who come back would wait for many."""
    made: list[asyncio.BaseTransport] = []

    class Accepted(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            made.append(transport)

    async def passes(burst: int) -> int:
        listeners = servers._listen(read_settings(environ=CLOSED | {"PORT": "0"}))
        serving = [await asyncio.get_running_loop().create_server(Accepted, sock=each) for each in listeners]
        place = listeners[0].getsockname()
        with contextlib.ExitStack() as stack:
            for _ in range(burst):
                stack.enter_context(socket.create_connection(place))
            count = 0
            while len(made) < burst:
                await asyncio.sleep(0)
                count += 1
            for each in (*serving, *made):
                each.close()
        return count

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(passes(64)) < 20


async def spoken(port: int, *parts: bytes) -> bytes:
    """All that is answered to these bytes until the service closes."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.05)
        async with asyncio.timeout(30):
            return await reader.read()
    finally:
        writer.transport.abort()


def refusal(answer: bytes) -> tuple[int, str]:
    """The status and code of an answer in the shape of every error."""
    head, _, body = answer.partition(b"\r\n\r\n")
    said = json.loads(body)
    assert said.keys() == {"error", "message", "detail"}
    return int(head.split()[1]), said["error"]


async def test_a_head_that_is_too_much_is_431(flooded: Service) -> None:
    port = flooded.ports[0]
    ends = [b"a: b\r\n" * 200 + b"\r\n", b"X-Long: " + b"x" * 40_000]
    said = [await spoken(port, HEAD + end) for end in ends]
    assert [refusal(each) for each in said] == [(431, "too_large")] * 2
    assert not any(b"Retry-After" in each for each in said)  # the same head would be refused again
    fits = HEAD + b"Connection: close\r\nContent-Length: 0\r\nX-Long: " + b"x" * 20_000 + b"\r\n" + b"a: b\r\n" * 90 + b"\r\n"
    assert (await spoken(port, fits)).startswith(b"HTTP/1.1 200")


async def test_trailers_are_bounded_and_no_headers(flooded: Service) -> None:
    """As many as fit are read over: what a proxy vouches for has been judged when the body begins."""
    port = flooded.ports[0]
    close = CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    few = await spoken(port, close, b"2\r\n{}\r\n0\r\n", b"X-Forwarded-For: 9.9.9.9\r\n\r\n")
    assert few.startswith(b"HTTP/1.1 200")
    many = await spoken(port, close, b"2\r\n{}\r\n0\r\n", b"a: b\r\n" * 200)
    assert refusal(many) == (431, "too_large")


async def test_a_slow_body_is_given_up_and_a_quick_one_is_not(flooded: Service) -> None:
    port = flooded.ports[0]
    length = HEAD + b"Connection: close\r\nContent-Length: 12000\r\n\r\n{"

    async def slowly(each: bytes) -> tuple[bytes, float]:
        began = time.monotonic()
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(length)
        answer = asyncio.create_task(reader.read())
        async with asyncio.timeout(40):
            while not answer.done() and len(each) > 0:
                writer.write(each)
                await asyncio.wait([answer], timeout=1)
        writer.transport.abort()
        return await answer, time.monotonic() - began

    (slow, took), (quick, _) = await asyncio.gather(slowly(b" "), slowly(b" " * 1_000))
    assert refusal(slow) == (408, "bad_request") and 9 < took < 25
    assert quick.startswith(b"HTTP/1.1 400"), "it is not JSON, and it was read to its end"


async def test_an_address_has_so_many_connections(flooded: Service) -> None:
    """The one too many is told so at once; another address, and a socket that has its own limit, do not count."""
    port = flooded.ports[0]
    held = [await asyncio.open_connection(HOST, port) for _ in range(128)]
    try:
        await until(lambda: flooded.resources()["fds"] > 128, what="they are in")
        assert refusal(await spoken(port)) == (429, "rate_limited")
        reader, writer = await asyncio.open_connection(HOST, port, local_addr=("127.0.0.3", 0))
        writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()
        held[0][1].write(HANDSHAKE)
        assert b" 101 " in await held[0][0].readuntil(b"\r\n\r\n")
        assert b" 200 " in await spoken(port, b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    finally:
        for _, writer in held:
            writer.transport.abort()


UPGRADES = {
    "curl --http2": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
    "Java": b"Connection: Upgrade\r\nUpgrade: h2c\r\n",
    "TLS": b"Upgrade: TLS/1.0\r\nConnection: Upgrade\r\n",
}


@pytest.mark.parametrize("offer", UPGRADES.values(), ids=list(UPGRADES))
@pytest.mark.parametrize("chunked", [False, True])
async def test_an_unknown_upgrade_is_answered_as_plain_http(flooded: Service, offer: bytes, chunked: bool) -> None:
    """Body and all, also when it comes later or in pieces; and the connection goes on."""
    body = b'{"display_name": "Upgraded"}'
    size = b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: %d\r\n" % len(body)
    sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    head = HEAD + b"Content-Type: application/json\r\n" + size + offer + b"\r\n"
    last = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    for parts in ([head + sent, last], [head, sent, last], [head[:60], head[60:] + sent[:5], sent[5:], last]):
        answer = await spoken(flooded.ports[0], *parts)
        assert answer.startswith(b"HTTP/1.1 200") and b'"display_name":"Upgraded"' in answer
        assert answer.endswith(b"ok"), "the next request is answered as well"


CLOSES = {
    "text that is not UTF-8, and a close": (b"\x81\x82\0\0\0\0\xff\xfe\x88\x80\0\0\0\0", None),
    "a close inside a fragmented message": (b"\x01\x81\0\0\0\0a\x88\x82\0\0\0\0\x03\xe8\x80\x81\0\0\0\0b", 1000),
    "too many frames": (b"\x89\x80\0\0\0\0" * 600, 4429),
}


@pytest.mark.parametrize(("frames", "code"), CLOSES.values(), ids=list(CLOSES))
async def test_a_socket_s_odd_end_is_an_end_like_any_other(flooded: Service, frames: bytes, code: int | None) -> None:
    """No traceback (the fixture looks); the code is the peer's own, as it was sent."""
    reader, writer = await asyncio.open_connection(HOST, flooded.ports[0])
    writer.write(HANDSHAKE)
    await reader.readuntil(b"\r\n\r\n")
    writer.write(frames)
    async with asyncio.timeout(10):
        said = await reader.read()
    writer.close()
    if code is not None:
        assert said.rpartition(b"\x88")[2][1:3] == code.to_bytes(2, "big"), said[-80:]
