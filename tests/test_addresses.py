"""Whose address a caller is counted under: proxies, ports and IPv6; and what the gate says of it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin

from chat.callers import address
from chat.errors import ChatError, RelayUnavailable
from chat.limits import TOLD_AT_ONCE, UNTOLD_MAX, WIDER, RateLimits, buckets
from tests.conftest import CLOSED, SECRET, STORES
from tests.conftest import store as stored
from tests.harness import minute_with_room, until
from tests.harness.api import call, guest, http, new_session, ticket
from tests.harness.client import SocketReader
from tests.harness.journal import Journal
from tests.harness.service import Service

PEER = ("10.0.0.9", 5000)


@pytest.mark.parametrize(
    ("forwarded", "trusted", "expected"),
    [
        ([], 0, "10.0.0.9"),
        (["1.2.3.4"], 0, "10.0.0.9"),
        (["1.2.3.4"], 1, "1.2.3.4"),
        (["6.6.6.6, 1.2.3.4"], 1, "1.2.3.4"),
        (["6.6.6.6", "1.2.3.4, 10.0.0.1"], 2, "1.2.3.4"),
        (["1.2.3.4"], 2, "10.0.0.9"),
        (["1.2.3.4:5678"], 1, "1.2.3.4"),
        (["[2001:db8::7]:443"], 1, "2001:db8::/64"),
        (["[2001:db8::7]"], 1, "2001:db8::/64"),
        (["2001:db8:0:0:ffff::7"], 1, "2001:db8::/64"),
        (["::ffff:1.2.3.4"], 1, "1.2.3.4"),
        (["[::ffff:1.2.3.4]:80"], 1, "1.2.3.4"),
        (["_hidden"], 1, "_hidden"),
        ([""], 1, "unknown"),
        (["x" * 10_000], 1, "x" * 64),
    ],
)
def test_one_caller_is_one_address(forwarded: list[str], trusted: int, expected: str) -> None:
    assert address(PEER, forwarded, trusted) == expected


async def test_a_whole_ipv6_network_is_a_second_bucket() -> None:
    """Each /64 of a /48 has its own limit, and all of them together have one that is larger."""
    limits = RateLimits("worker")
    places = [address(PEER, [f"2001:db8:1:{n:x}::1"], 1) for n in range(WIDER + 1)]
    for place in places[:WIDER]:
        await limits.hit_from(place, "guests", 1, 3600, "Too many.")
    with pytest.raises(ChatError, match="Too many"):
        await limits.hit_from(places[WIDER], "guests", 1, 3600, "Too many.")
    await limits.hit_from(address(PEER, ["2001:db8:2::1"], 1), "guests", 1, 3600, "Too many.")
    assert buckets("guests", "1.2.3.4", 5) == [("guests:1.2.3.4", 5)]


class Slow:
    """Counters that all workers share and that never answer."""

    def name(self, *parts: str) -> str:
        return ":".join(parts)

    def command(self, *command: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()


async def test_who_leaves_while_places_are_counted_leaves_none_behind() -> None:
    limits = RateLimits("worker", Slow())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await limits.enter([("address:1.2.3.4", 5)], "too many")
    assert not limits.open


class Away(Slow):
    """Counters that cannot be reached."""

    def __init__(self) -> None:
        self.asked = 0

    def command(self, *command: Any) -> asyncio.Future[Any]:
        self.asked += 1
        future = super().command(*command)
        future.set_exception(RelayUnavailable("Redis is away"))
        future.exception()
        return future


async def test_an_outage_with_very_many_callers_costs_no_memory_and_no_time() -> None:
    """Each beat tells some of those who came and left, and not more of them are remembered than a limit."""
    away = Away()
    limits = RateLimits("worker", away)
    for n in range(UNTOLD_MAX + 100):
        limits.leave(await limits.enter([(f"address:{n}", 5)], "too many"))
    assert len(limits._untold) <= UNTOLD_MAX
    away.asked = 0
    await limits.beat()
    assert TOLD_AT_ONCE <= away.asked < TOLD_AT_ONCE + 10


def service(folder: Path, **environment: str) -> Service:
    return Service(CLOSED | {"DATABASE_URL": f"sqlite:///{folder / 'parley.db'}"} | environment, server="serve")


async def test_a_proxy_nobody_told_of_is_said_once(tmp_path: Path) -> None:
    async with service(tmp_path) as running:
        for n in range(3):
            await call(running.url, "GET", "/livez", headers={"X-Forwarded-For": f"1.2.3.{n}"})
        assert running.log().count("PARLEY_TRUSTED_PROXIES") == 1
        assert "room for" in running.log(), "and at the start how many connections there is room for"


async def test_a_refused_page_is_named_with_the_setting(tmp_path: Path) -> None:
    """Once each, and not more different ones than an operator reads."""
    async with service(tmp_path) as running:
        pages = ["https://evil.example", "https://evil.example", *[f"https://{n}.example" for n in range(150)]]
        for page in pages:
            assert (await call(running.url, "GET", "/api/models/", headers={"Origin": page})).status_code == 403
        with pytest.raises(InvalidStatus):
            await connect(f"ws://127.0.0.1:{running.ports[0]}/ws/chat/session/x/", origin=Origin(pages[0]), proxy=None)
        log = running.log()
        assert log.count("'https://evil.example'") == 1 and log.count("ALLOWED_ORIGINS") == 100
        assert "ERROR" not in log, log[-2000:]


async def test_a_page_without_an_address_is_not_told_to_be_listed(tmp_path: Path) -> None:
    """`null` cannot be allowed: every sandboxed frame sends it."""
    async with service(tmp_path) as running:
        assert (await call(running.url, "GET", "/api/models/", headers={"Origin": "null"})).status_code == 403
        log = running.log()
        assert "refused the page 'null'" in log and "ALLOWED_ORIGINS" not in log


async def test_the_operators_token_is_guessed_ten_times_a_minute(tmp_path: Path) -> None:
    """From one address; then the right one is refused there as well, or the limit would not end the guessing."""
    token = "the-operators-token"
    environment = {"PARLEY_TRUSTED_PROXIES": "1", "ADMIN_TOKEN": token}
    async with service(tmp_path, **environment) as running:

        async def status(place: str, shown: str | None) -> int:
            headers = {"X-Forwarded-For": place}
            return (await call(running.url, "GET", "/metrics", shown, headers=headers)).status_code

        for shown in [None, token] * 11:
            assert await status("1.2.3.4", shown) == (200 if shown else 401)
        await minute_with_room()
        assert [await status("1.2.3.4", f"guess-{n}") for n in range(12)] == [401] * 10 + [429] * 2
        assert await status("1.2.3.4", token) == 429
        assert await status("1.2.3.5", token) == 200


async def test_one_address_behind_a_proxy_has_so_many_requests_under_way(tmp_path: Path) -> None:
    """Its connections are the proxy's: the gate counts what is not answered yet."""
    environment = {"PARLEY_TRUSTED_PROXIES": "1", "PARLEY_CONNECTIONS_PER_ADDRESS": "3"}
    async with service(tmp_path, **environment) as running:
        head = b"POST /api/auth/anonymous/ HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 1.2.3.4\r\nContent-Length: 9\r\n\r\n"
        held = [await asyncio.open_connection("127.0.0.1", running.ports[0]) for _ in range(3)]
        for _, writer in held:
            writer.write(head)

        async def answered(place: str, status: int) -> bool:
            return (await call(running.url, "GET", "/livez", headers={"X-Forwarded-For": place})).status_code == status

        await until(lambda: answered("1.2.3.4", 429), what="three requests under way")
        assert await answered("1.2.3.5", 200)
        for _, writer in held:
            writer.close()


async def test_answers_carry_what_browsers_obey(tmp_path: Path) -> None:
    production = {"PARLEY_ENV": "production", "ALLOWED_HOSTS": "127.0.0.1", "SECRET_KEY": SECRET}
    async with service(tmp_path, **production) as running:
        someone = await guest(running.url)
        personal = await call(running.url, "GET", "/api/users/me/", someone.access)
        assert personal.headers["cache-control"] == "no-store"
        assert personal.headers["referrer-policy"] == "no-referrer"
        assert personal.headers["strict-transport-security"] == "max-age=31536000"
        refused = await call(running.url, "GET", "/api/users/me/", "nonsense")
        assert (refused.status_code, refused.headers["cache-control"]) == (401, "no-store")


async def test_at_debug_a_bare_uvicorn_prints_no_token_and_no_prompt(tmp_path: Path) -> None:
    """Wherever a client may put a token; the prompt over a socket and over HTTP."""
    environment = CLOSED | {"DATABASE_URL": f"sqlite:///{tmp_path / 'parley.db'}", "PARLEY_LOG_LEVEL": "debug"}
    environment["PARLEY_MODELS"] = '[{"id": "hasty", "provider": "demo", "pace": 0.001}]'
    async with Service(environment, options=["--log-level", "debug"]) as running:
        someone = await guest(running.url)
        session_id = (await new_session(running.url, someone.access))["id"]
        for way in ("header", "subprotocol", "query", "frame"):
            async with SocketReader(
                Journal(), way, running.url, session_id, token=someone.access, credentials=way
            ) as reader:
                await reader.say("CANARY-PROMPT")
                await reader.turn_ended()
        body = {"session_id": session_id, "content": "CANARY-PROMPT"}
        await call(running.url, "POST", "/api/messages/stream/", someone.access, json=body)
        log = running.log()
    secrets = (someone.access, someone.anonymous_token, "CANARY-PROMPT")
    assert [secret for secret in secrets if secret in log] == []


@pytest.mark.parametrize("store", STORES)
async def test_an_account_and_an_address_read_so_many_answers(
    store: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Over all workers; who leaves makes room, and whoever is refused can read on later, with the same ticket too."""
    environment = CLOSED | stored(store, request, tmp_path)
    environment |= {"PARLEY_STREAMS_PER_ACCOUNT": "2", "PARLEY_STREAMS_PER_ADDRESS": "3"}
    async with Service(environment, workers=1 if store == "sqlite" else 2) as running:
        ann, ben = await guest(running.url), await guest(running.url)
        sessions = {one.access: (await new_session(running.url, one.access))["id"] for one in (ann, ben)}
        for token, session_id in sessions.items():
            body = {"session_id": session_id, "content": "/slow 0.2 Tell me of the sea"}
            assert await status(running.urls[0], "POST", "/api/messages/stream/", token, json=body) == 200
        async with AsyncExitStack() as readers:
            for base, token in ((running.urls[0], ann.access), (running.urls[-1], ann.access)):
                path = f"/api/sessions/{sessions[token]}/stream/"
                client = await readers.enter_async_context(http(base, token))
                async with asyncio.timeout(5):
                    while (await readers.enter_async_context(client.stream("GET", path))).status_code == 429:
                        await asyncio.sleep(0.05)
            own, others = (f"/api/sessions/{sessions[one.access]}/stream/" for one in (ann, ben))
            assert await status(running.urls[-1], "GET", own, ann.access) == 429, "the account has two"
            by_ticket = f"{own}?ticket={await ticket(running.url, ann.access)}"
            for base in (*running.urls, running.url):
                assert await status(base, "GET", by_ticket) == 429, "the ticket is not used up"
            client = await readers.enter_async_context(http(running.url, ben.access))
            async with asyncio.timeout(5):  # the posts that nobody waited for may still be counted
                while (await readers.enter_async_context(client.stream("GET", others))).status_code == 429:
                    await asyncio.sleep(0.05)
            assert await status(running.urls[0], "GET", others, ben.access) == 429, "the address has three"
        async with asyncio.timeout(5):
            while (last := await status(running.urls[-1], "GET", by_ticket)) == 429:
                await asyncio.sleep(0.05)
        assert last == 200


async def status(base: str, method: str, path: str, token: str | None = None, **options: Any) -> int:
    """The status of an answer whose body nobody waits for."""
    async with http(base, token) as client, client.stream(method, path, **options) as response:
        return int(response.status_code)
