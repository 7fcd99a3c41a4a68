"""Which pages and hosts may open sockets, how many, and what waits at the door."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from websockets.asyncio.client import connect

from tests.conftest import store
from tests.harness import until
from tests.harness.api import call, new_session, ticket
from tests.harness.client import SocketReader
from tests.harness.journal import Journal
from tests.harness.service import Service

from . import ENVIRONMENT, address, bearer, callers, counted, fate, hear, home, plain
from .raw import Raw, handshake

# -- which pages and hosts


PAGES = {
    None: 101,
    "https://good.example": 101,
    "https://site.example:8443": 101,
    "https://site.example": 403,
    "https://good.example:8443": 403,
    "http://good.example": 403,
    "https://GOOD.example": 403,  # no browser writes it so
    "https://good.example.": 403,
    "https://good.example/": 403,
    "https://good.example.evil.com": 403,
    "https://evil-good.example": 403,
    "https://www.good.example": 403,
    "https://good.example@evil.com": 403,
    "https://evil.com#https://good.example": 403,
    "https://evil.com": 403,
    "http://127.0.0.1.evil.com": 403,
    "http://localhost.evil.com": 403,
    "http://localhost@evil.com": 403,
    "null": 403,
    "": 403,
    "file://": 403,
    "http://[": 403,
    "*": 403,
}


async def test_only_allowed_pages_shake_hands(service: Service) -> None:
    """A page that is listed, of this host, or on this machine; a native client says no page."""
    await _shake_hands(service, local=101)


async def test_in_production_this_machine_s_pages_are_nothing_special(strict: Service) -> None:
    await _shake_hands(strict, local=403)
    raw = await Raw.open(strict.url, "any", "Origin: https://evil.com")
    body = json.loads(await raw.reader.read())
    assert body["error"] == "origin_not_allowed" and body.keys() == {"error", "message", "detail"}


async def _shake_hands(served: Service, local: int) -> None:
    here = dict.fromkeys(["http://localhost:3000", "https://127.0.0.1", "http://[::1]:80", "http://localhost"], local)
    own = {served.url: 101, served.url.replace("http", "https"): 101, f"{served.url}1": local}
    pages = PAGES | here | own
    # one after the other: an address has few places in production
    statuses = [
        await handshake(served.url, f"Origin: {page}" if page is not None else "X-Native: yes") for page in pages
    ]
    assert dict(zip(pages, statuses, strict=True)) == pages


EVIL = ["", "evil.com", "evil.com:80", "localhost.evil.com", "chat.example.evil.com", "good@evil", "chat.example@evil"]
EVIL += ["evilparley.example", "evil.com/chat.example", "127.0.0.1.evil.com", "::1", "[::1", ":80", "*"]


async def test_only_this_machine_s_hosts_are_answered(service: Service) -> None:
    local = ["localhost", "localhost:80", "LOCALHOST", "127.0.0.1", "127.0.0.1:1", "[::1]:8001"]
    await _answered(service, local, EVIL)


async def test_in_production_only_allowed_hosts_are_answered(strict: Service) -> None:
    public = ["chat.example", "Chat.Example:443", "eu.parley.example", "127.0.0.1"]
    await _answered(strict, public, [*EVIL, "localhost"])


async def _answered(served: Service, good: list[str], evil: list[str]) -> None:
    hosts = dict.fromkeys(good, 101) | dict.fromkeys(evil, 400)
    statuses = [await handshake(served.url, host=host) for host in hosts]
    assert dict(zip(hosts, statuses, strict=True)) == hosts


# -- how many


async def test_a_session_an_account_and_an_address_have_so_many_sockets(strict: Service) -> None:
    """Over all workers; who leaves makes room."""
    urls = [strict.urls[0], strict.urls[-1]]
    one, session_id = await home(urls[0])
    sessions = [session_id, *[(await new_session(urls[0], one.access))["id"] for _ in range(2)]]
    full = (4429, "too many sockets")
    async with plain(urls[0], session_id, one.access) as first, plain(urls[1], session_id, one.access) as second:
        await asyncio.gather(hear(first, "session_state"), hear(second, "session_state"))
        for base in urls:
            assert await fate(base, session_id, **bearer(one.access)) == full, "the session has two"
        async with plain(urls[0], sessions[1], one.access) as third:
            await hear(third, "session_state")
            assert await fate(urls[1], sessions[2], **bearer(one.access)) == full, "the account has three"
    await until(lambda: _admitted(urls[1], sessions[2], one.access), what="the places are given back")


async def test_a_ticket_of_a_socket_that_found_no_room_is_good_again(strict: Service) -> None:
    """Its client comes back with the address it has; once the ticket has let a socket in, it is used up."""
    one, session_id = await home(strict.url)
    text = await ticket(strict.url, one.access)
    async with plain(strict.url, session_id, one.access) as first, plain(strict.url, session_id, one.access) as second:
        await asyncio.gather(hear(first, "session_state"), hear(second, "session_state"))
        for base in strict.urls:
            assert await fate(base, session_id, query={"ticket": text}) == (4429, "too many sockets")
    await until(lambda: _admitted(strict.url, session_id, None, ticket=text), what="the places are given back")
    assert await fate(strict.url, session_id, query={"ticket": text}) == (4401, "authentication required")


async def _admitted(base: str, session_id: str, token: str | None, **query: str) -> bool:
    async with plain(base, session_id, token, **query) as opened:
        with contextlib.suppress(Exception):
            await hear(opened, "session_state")
        return opened.close_code is None


async def test_an_address_is_counted_before_it_says_who_it_is(strict: Service) -> None:
    """And by what the proxy in front of us says, not by what the caller says before it."""
    full = (4429, "too many sockets")
    someone, session_id = await home(strict.url)
    silent = [
        await Raw.open(strict.urls[n % len(strict.urls)], "any", f"X-Forwarded-For: 10.9.9.{n}, 10.0.0.1")
        for n in range(4)
    ]
    for base in strict.urls:
        for forwarded in ("10.0.0.1", "10.0.0.2, 10.0.0.1"):
            headers = {"Authorization": f"Bearer {someone.access}", "X-Forwarded-For": forwarded}
            assert await fate(base, session_id, additional_headers=headers) == full
    headers = {"Authorization": f"Bearer {someone.access}", "X-Forwarded-For": "10.0.0.1, 10.0.0.2"}
    async with connect(address(strict.url, session_id), additional_headers=headers, proxy=None) as opened:
        await hear(opened, "session_state")
    for raw in silent:
        raw.close()


# -- what waits at the door


SILENT = 500
SECONDS = 6  # to say who they are: long enough to open all of them on a busy machine


async def test_five_hundred_silent_sockets_are_seen_off(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Without a token, without a word: health is answered meanwhile, all are closed with 4401, nothing is left."""
    environment = ENVIRONMENT | store("sqlite", request, tmp_path) | {"PARLEY_AUTH_TIMEOUT": str(SECONDS)}
    async with Service(environment, server="serve") as crowded:
        started = time.monotonic()
        raws = await asyncio.gather(*[Raw.open(crowded.url, "any") for _ in range(SILENT)])
        assert {raw.status for raw in raws} == {101}
        ends = asyncio.gather(*[raw.code(within=SECONDS + 10) for raw in raws])
        answers = [await _asked(crowded.url, "/api/health/") for _ in range(5)]
        assert min(answers) < 0.2, "the quickest of five: a busy machine delays some, a blocked service all"
        assert callers(crowded) == SILENT, "they were all there meanwhile"
        assert await ends == [4401] * SILENT
        assert time.monotonic() - started >= SECONDS
        await until(lambda: not callers(crowded), what="the descriptors are given back")
        assert "Traceback" not in crowded.log()


HALVES = [b"", b"GET /ws/chat/session/any/ HTTP/1.1\r\nHost: 127", b"POST /api/auth/anonymous/ HTTP/1.1\r\nContent-"]
WHOLE = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def test_half_a_head_is_waited_for_so_long(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Ten seconds, on a new connection and on one that has asked before; a socket that is open has all the time."""
    async with Service(ENVIRONMENT | store("sqlite", request, tmp_path), server="serve") as service:
        someone, session_id = await home(service.url)
        async with plain(service.url, session_id, someone.access) as opened:
            await hear(opened, "session_state")
            started = time.monotonic()
            ends = [_end_of_connection(service.url, half) for half in HALVES + [WHOLE + half for half in HALVES[1:]]]
            ends.append(_end_of_connection(service.url, WHOLE, b"\r\n"))  # which a parser reads over
            answers = await asyncio.gather(*ends)
            assert time.monotonic() - started >= 10
            assert [answer[:12] for answer in answers] == [b""] * 3 + [b"HTTP/1.1 200"] * 3
            assert callers(service) == 1
            await opened.send('{"type": "ping"}')
            await hear(opened, "pong")


BODY = b"GET /ws/chat/session/any/ HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 9\r\n\r\n"


async def test_a_socket_that_promises_a_body_is_not_held(service: Service) -> None:
    """There is none: the parser gives it up, and nobody else knows of the connection."""
    assert b" 101 " not in await _end_of_connection(service.urls[-1], BODY)
    await until(lambda: callers(service) == 0, what="no descriptor is held")


async def _end_of_connection(base: str, said: bytes, then: bytes = b"") -> bytes:
    """What is answered until the service closes; `then` is said after the first answer."""
    parts = urlsplit(base)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(said)
    async with asyncio.timeout(20):
        answer = b""
        if then:
            answer = await reader.readuntil(b"ok")
            writer.write(then)
        answer += await reader.read()
    writer.close()
    return answer


async def _asked(base: str, path: str) -> float:
    """The seconds a good answer took."""
    started = time.monotonic()
    assert (await call(base, "GET", path)).status_code == 200
    return time.monotonic() - started


# `ulimit -n` for the service alone
NARROW = """-c
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
sys.argv = ["service.py", "serve"]
runpy.run_path("service.py", run_name="__main__")
"""


async def test_without_descriptors_who_is_in_goes_on(
    request: pytest.FixtureRequest, tmp_path: Path, journal: Journal
) -> None:
    """More connections than the process may hold: it goes on with those it has, quietly, and takes more when it can."""
    environment = ENVIRONMENT | store("sqlite", request, tmp_path)
    async with Service(environment, command=NARROW.split("\n", 1)) as full:
        someone, session_id = await home(full.url)
        async with SocketReader(journal, "reader", full.url, session_id, token=someone.access) as reader:
            await reader.say("/count 100000")
            await reader.tokens(5)
            crowd = await asyncio.gather(*[_connected(full.url, n) for n in range(300)])
            await until(lambda: full.resources()["fds"] >= 190, what="no descriptor is left")
            lines, busy = full.log().count("\n"), _cpu(full)
            await reader.tokens(reader.told + 200)
            assert _cpu(full) - busy < 0.4, "seconds, in at least one: it does not try again and again"
            assert full.log().count("\n") - lines < 10, full.log()[-3000:]
            for writer in crowd:
                writer.close()
            await reader.send({"type": "stop"})
            await reader.turn_ended()
            assert counted(100_000).startswith(reader.view.texts()[0]) and reader.codes == []
        await until(lambda: full.resources()["fds"] < 100, what="the descriptors are given back")
        async with plain(full.url, session_id, someone.access) as opened:
            await hear(opened, "session_state")
        assert "Traceback" not in full.log()


async def _connected(base: str, number: int) -> asyncio.StreamWriter:
    """A connection that says nothing; the kernel accepts it whether the service does or not. Each from elsewhere."""
    parts = urlsplit(base)
    here = (f"127.0.{number // 200}.{number % 200 + 2}", 0)  # one address may have half of the descriptors
    return (await asyncio.open_connection(parts.hostname, parts.port, local_addr=here))[1]


def _cpu(service: Service) -> float:
    used = service.worker().cpu_times()
    return used.user + used.system
