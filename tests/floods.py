"""Floods from one address against the service as the Procfile starts it, and what they cost everyone else.

    python -m tests.floods [--seconds 30] [FLOOD …]

plays each for so many seconds (30) on PostgreSQL, Redis and a vendor's SDK, and prints how much the process grew, how
many descriptors it held, the longest time one read kept the event loop (CPU seconds: other processes do not count), how
late a bystander on another address was answered, and whether everything was given back.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from chat.settings import read_settings
from tests.harness.api import guest, new_session
from tests.harness.servers import Postgres, Redis
from tests.harness.service import SHORT, Service
from tests.vendors import Vendors

HOST = "127.0.0.1"
ELSEWHERE = ("127.0.0.2", 0)  # the bystander's address: limits are per address
GROWTH = 20_000_000  # bytes that one address may make the process grow
STALL = 0.05  # seconds that one read may keep the loop
KEY = "key-of-the-tests-in-production-0123456789"
SET = read_settings(environ={"SECRET_KEY": KEY, "PARLEY_ENV": "production"})
# What an operator has who sets nothing but this; other tests have the limits out of their way.
PRODUCTION = {"PARLEY_ENV": "production", "SECRET_KEY": KEY} | {
    name: str(getattr(SET, name.removeprefix("PARLEY_").lower())) for name in SHORT
}
# `python service.py serve` that notes the longest CPU time of one `data_received`.
WATCHED = """-c
import runpy, sys, time, os
import servers
longest = 0.0
def watched(receive):
    def data_received(self, data):
        global longest
        began = time.thread_time()
        receive(self, data)
        took = time.thread_time() - began
        if took > longest:
            longest = took
            with open(os.environ["FLOODS_LONGEST"], "w") as file:
                file.write(str(took))
    return data_received
for kind in (servers.HeadProtocol, servers.DirectProtocol):
    kind.data_received = watched(kind.data_received)
sys.argv = ["service.py", "serve"]
runpy.run_path("service.py", run_name="__main__")
"""

Flood = Callable[[int, float], Awaitable[None]]  # port, seconds


@dataclass
class Cost:
    """The price of a flood: bytes, descriptors, seconds."""

    before: float = 0
    most: float = 0
    after: float = 0
    descriptors: int = 0
    held: int = 0  # descriptors that are still open at the end
    stall: float = 0
    waits: list[float] = field(default_factory=list)
    unanswered: int = 0

    @property
    def growth(self) -> float:
        return self.most - self.before

    def line(self) -> str:
        waits = sorted(self.waits) or [0.0]
        return (
            f"{self.growth / 1e6:+8.1f} MB, {(self.after - self.before) / 1e6:+7.1f} after; {self.descriptors:4} "
            f"descriptors, {self.held} held; one read {self.stall * 1000:6.1f} ms; bystander p50 "
            f"{waits[len(waits) // 2] * 1000:5.1f}, worst {waits[-1] * 1000:6.1f} ms, {self.unanswered} unanswered"
        )


# -- the floods


async def _send(port: int, first: bytes, then: bytes, seconds: float, *, read: bool = False) -> None:
    """Say the first thing, then the other again and again, as fast as it is taken, until the service hangs up."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        reader, writer = await asyncio.open_connection(HOST, port)
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(left):
                writer.write(first)
                while not reader.at_eof():
                    writer.write(then)
                    await writer.drain()
                    if read:
                        await reader.read(65536)
                    await asyncio.sleep(0)
        writer.transport.abort()
        await asyncio.sleep(0.01)


HEAD = b"POST /api/auth/anonymous/ HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = HEAD + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
UPGRADE = (
    b"Host: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
HANDSHAKE = b"GET /ws/chat/session/any/ HTTP/1.1\r\n" + UPGRADE  # of nobody, who has some seconds to say a name


async def handshake(port: int) -> bytes:
    """The handshake of a new guest, whom a session of their own admits."""
    base = f"http://{HOST}:{port}"
    someone = await guest(base)
    session = await new_session(base, someone.access)
    head = f"GET /ws/chat/session/{session['id']}/ HTTP/1.1\r\nAuthorization: Bearer {someone.access}\r\n"
    return head.encode() + UPGRADE


async def header_lines(port: int, seconds: float) -> None:
    await _send(port, HEAD, b"a: b\r\n" * 40_000, seconds)


async def long_header(port: int, seconds: float) -> None:
    await _send(port, HEAD + b"X-Long: ", b"x" * 262_144, seconds)


async def long_address(port: int, seconds: float) -> None:
    await _send(port, b"GET /", b"x" * 262_144, seconds)


async def trailers(port: int, seconds: float) -> None:
    await _send(port, CHUNKED + b"2\r\n{}\r\n0\r\n", b"a: b\r\n" * 40_000, seconds)


async def long_trailer(port: int, seconds: float) -> None:
    await _send(port, CHUNKED + b"2\r\n{}\r\n0\r\nX-Long: ", b"x" * 262_144, seconds)


async def endless_body(port: int, seconds: float) -> None:
    await _send(port, CHUNKED, b"10000\r\n%b\r\n" % (b" " * 65_536), seconds)


async def chunk_extensions(port: int, seconds: float) -> None:
    await _send(port, CHUNKED + b"1;", b"x" * 262_144, seconds)


async def pipelined(port: int, seconds: float) -> None:
    await _send(port, b"", b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5_000, seconds)


async def _socket(port: int, frames: bytes, seconds: float) -> None:
    hello = await handshake(port)
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        reader, writer = await asyncio.open_connection(HOST, port)
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(left):
                writer.write(hello)
                await reader.readuntil(b"\r\n\r\n")
                writer.transport.pause_reading()  # type: ignore[attr-defined]
                while True:
                    writer.write(frames)
                    await writer.drain()
                    await asyncio.sleep(0)
        writer.transport.abort()
        await asyncio.sleep(0.01)


async def pings(port: int, seconds: float) -> None:
    """From a peer that reads none of the pongs."""
    await _socket(port, (b"\x89\xfd\0\0\0\0" + b"x" * 125) * 2_000, seconds)


async def empty_pings(port: int, seconds: float) -> None:
    await _socket(port, b"\x89\x80\0\0\0\0" * 40_000, seconds)


async def empty_fragments(port: int, seconds: float) -> None:
    await _socket(port, b"\x01\x80\0\0\0\0" + b"\x00\x80\0\0\0\0" * 40_000, seconds)


async def _many(port: int, seconds: float, said: bytes, slowly: bytes, count: int = 400) -> None:
    """Hold as many connections as one can get, and say a byte on each now and then."""
    held: list[asyncio.StreamWriter] = []
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            held = [writer for writer in held if not writer.transport.is_closing()]
            while len(held) < count:
                _, writer = await asyncio.open_connection(HOST, port)
                writer.write(said)
                held.append(writer)
            for writer in held:
                writer.write(slowly)
            await asyncio.sleep(0.2)
    finally:
        for writer in held:
            writer.transport.abort()


async def idle_connections(port: int, seconds: float) -> None:
    await _many(port, seconds, b"", b"")


async def slow_heads(port: int, seconds: float) -> None:
    await _many(port, seconds, HEAD, b"x")


async def slow_bodies(port: int, seconds: float) -> None:
    await _many(port, seconds, HEAD + b"Content-Length: 250000\r\n\r\n" + b"{" * 200_000, b" ")


async def silent_sockets(port: int, seconds: float) -> None:
    await _many(port, seconds, HANDSHAKE, b"")


async def refused_sockets(port: int, seconds: float) -> None:
    """Whose peers do not answer when they are closed."""
    await _many(port, seconds, HANDSHAKE.replace(b"Host", b"Authorization: Bearer nonsense\r\nHost"), b"", 2_000)


FLOODS: dict[str, Flood] = {
    flood.__name__: flood
    for flood in (
        header_lines, long_header, long_address, trailers, long_trailer, endless_body, chunk_extensions, pipelined,
        pings, empty_pings, empty_fragments, idle_connections, slow_heads, slow_bodies, silent_sockets,
        refused_sockets,
    )
}  # fmt: skip


# -- watching


def real_model(vendors: Vendors) -> dict[str, str]:
    """The environment of a service whose models a vendor's SDK asks."""
    place = {"provider": "openai_chat", "base_url": f"{vendors.url}/v1", "api_key_env": "OPENAI_API_KEY"}
    models = [{"id": name, "model_code": "fake-ok", **place} for name in ("one", "two")]
    return {"OPENAI_API_KEY": "sk-key-of-the-floods", "PARLEY_MODELS": json.dumps(models)}


def served(folder: Path, **environment: str) -> Service:
    longest = folder / "longest"
    longest.write_text("0")
    storage = {"DATABASE_URL": f"sqlite:///{folder / 'parley.db'}", "FLOODS_LONGEST": str(longest)}
    return Service(PRODUCTION | storage | environment, command=WATCHED.split("\n", 1))


async def play(service: Service, folder: Path, flood: Flood, seconds: float) -> Cost:
    """Measure a flood. The bystander asks on from before the flood until after it."""
    port, longest = service.ports[0], folder / "longest"
    cost = Cost()
    stop = asyncio.Event()
    watching = asyncio.gather(_bystander(port, cost, stop), _gauge(service, cost, stop))
    await _bystander_is_served(cost)
    cost.before, descriptors = service.resources()["rss"], service.resources()["fds"]
    longest.write_text("0")
    await flood(port, seconds)
    for _ in range(100):
        cost.held = int(service.resources()["fds"] - descriptors)
        if cost.held <= 0:
            break
        await asyncio.sleep(0.1)
    stop.set()
    await watching
    cost.after, cost.stall = service.resources()["rss"], float(longest.read_text())
    return cost


async def _bystander_is_served(cost: Cost) -> None:
    async with asyncio.timeout(10):
        while not cost.waits:
            await asyncio.sleep(0.01)


async def _bystander(port: int, cost: Cost, stop: asyncio.Event) -> None:
    while not stop.is_set():
        began = time.monotonic()
        try:
            async with asyncio.timeout(10):
                reader, writer = await asyncio.open_connection(HOST, port, local_addr=ELSEWHERE)
                writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                answer = await reader.read()
                writer.close()
            if not answer.startswith(b"HTTP/1.1 200"):
                raise OSError
            cost.waits.append(time.monotonic() - began)
        except (OSError, TimeoutError):
            cost.unanswered += 1
        await asyncio.sleep(0.02)


async def _gauge(service: Service, cost: Cost, stop: asyncio.Event) -> None:
    while not stop.is_set():
        held = service.resources()
        cost.most, cost.descriptors = max(cost.most, held["rss"]), max(cost.descriptors, int(held["fds"]))
        await asyncio.sleep(0.02)


async def main(seconds: float, names: list[str]) -> None:
    with Postgres() as postgres, Redis() as redis, Vendors() as vendors:
        given = real_model(vendors) | {"REDIS_URL": redis.url}
        for name in names:
            given["DATABASE_URL"] = postgres.create_database()
            with tempfile.TemporaryDirectory() as place:
                async with served(Path(place), **given) as service:
                    cost = await play(service, Path(place), FLOODS[name], seconds)
                    print(f"{name:18}{cost.line()}", flush=True)
                    if "Traceback" in service.log():
                        print(service.log()[-2000:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="FLOOD", help=f"{', '.join(FLOODS)}; all without any")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each (30)")
    options = parser.parse_args()
    if unknown := set(options.names) - FLOODS.keys():
        parser.error(f"no such flood: {', '.join(sorted(unknown))}")
    asyncio.run(main(options.seconds, options.names or list(FLOODS)))
