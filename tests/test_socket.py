"""Sockets as contract §6 and §7 promise them: who gets in, what is said, what is refused, who cannot disturb whom.

The first service is Parley's own start on SQLite, the second a plain uvicorn: two workers on PostgreSQL and Redis. In
the one events leave as finished frames, in the other through ASGI.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlencode, urlsplit

import pytest
import websockets
from websockets.asyncio.client import ClientConnection, connect

from chat.errors import STATUS
from chat.tokens import LIFETIMES, Tokens
from tests.conftest import CLOSED, SECRET, STORES, store
from tests.harness import until
from tests.harness.api import Guest, call, guest, http, messages, new_session, post_turn, stop, ticket
from tests.harness.client import SocketReader, SSEReader
from tests.harness.journal import Journal
from tests.harness.proxy import Proxy
from tests.harness.service import Service


def offer(pace: float) -> str:
    """Both demo models with this many seconds between tokens, for PARLEY_MODELS."""
    return json.dumps([{"id": f"demo-{who}", "provider": "demo", "personality": who, "pace": pace} for who in PEOPLE])


PEOPLE = ("scholar", "poet")
BATTLE = {"mode": "compare", "model_a_id": "demo-scholar", "model_b_id": "demo-poet"}
ENVIRONMENT = CLOSED | {
    "PARLEY_MODELS": offer(0.005),
    "ALLOWED_ORIGINS": "https://good.example,https://site.example:8443",
    "PARLEY_MAX_TOKENS": "100000",
}


@pytest.fixture(scope="module", params=STORES)
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    environment = ENVIRONMENT | store(request.param, request, tmp_path_factory.mktemp("service"))
    own = request.param == "sqlite"
    with Service(environment, workers=1 if own else 2, server="serve" if own else "uvicorn") as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-6000:]


@pytest.fixture(scope="module", params=STORES)
def strict(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """In production behind one proxy, with room for few."""
    environment = ENVIRONMENT | store(request.param, request, tmp_path_factory.mktemp("strict"))
    environment |= {
        "PARLEY_ENV": "production",
        "PARLEY_TOKEN_IN_QUERY": "false",
        "PARLEY_TRUSTED_PROXIES": "1",
        "ALLOWED_HOSTS": "chat.example,*.parley.example,127.0.0.1",
        "PARLEY_SOCKETS_PER_SESSION": "2",
        "PARLEY_SOCKETS_PER_ACCOUNT": "3",
        "PARLEY_SOCKETS_PER_ADDRESS": "4",
    }
    with Service(environment, workers=1 if request.param == "sqlite" else 2) as running:
        yield running


@pytest.fixture(scope="module", params=["serve", "uvicorn"])
def fast(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Models that never pause, readers that are given up quickly; pings as in production, where they find the dead."""
    environment = ENVIRONMENT | store("sqlite", request, tmp_path_factory.mktemp("fast"))
    environment |= {"PARLEY_MODELS": offer(0), "PARLEY_SEND_TIMEOUT": "1", "PARLEY_TCP_USER_TIMEOUT": "3"}
    environment |= {"PARLEY_PING_INTERVAL": "20", "PARLEY_PING_TIMEOUT": "20"}
    options = [] if request.param == "serve" else ["--ws-ping-interval", "20", "--ws-ping-timeout", "20"]
    with Service(environment, server=request.param, options=options) as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-6000:]


@pytest.fixture(scope="module")
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Started as a developer starts it, with nothing set."""
    environment = store("sqlite", request, tmp_path_factory.mktemp("open")) | {"PARLEY_MODELS": offer(0.005)}
    with Service(environment, server="serve") as running:
        yield running


# -- what every event looks like


NUMBERED = {"turn_id", "seq"}
EVENTS = {
    "connection_established": {"user", "session_id", "version"},
    "session_state": {"session", "messages", "turn"},
    "resumed": {"turn_id", "from_seq"},
    "message_update": NUMBERED | {"message", "action"},
    "message_chunk": NUMBERED | {"message_id", "participant", "chunk"},
    "message_complete": NUMBERED
    | {"message_id", "participant", "status", "failure_reason", "latency_ms", "first_token_ms", "message"},
    "turn_complete": NUMBERED,
    "session_update": {"session", "action", "version"},
    "typing_indicator": {"user_id", "is_typing"},
    "pong": {"timestamp"},
    "test": {"message"},
    "error": {"code", "message", "retryable"},
}
OPTIONAL = {"message_chunk": {"from_seq"}, "error": {"retry_after", "message_id"}}
MESSAGE = set(
    "id session role content model parent_message_ids child_ids position participant status failure_reason attachments "
    "metadata feedback created_at latency_ms first_token_ms has_feedback".split()
)
SESSION = set(
    "id user mode title model_a model_b is_public share_token share_url created_at updated_at metadata expires_at "
    "message_count last_message_at is_pinned version voted".split()
)


def odd(event: dict[str, Any]) -> str:
    """What about an event is not as the contract says; empty when nothing is."""
    kind = event["type"]
    needed = EVENTS[kind] | {"type", "requestId"}
    if not needed <= event.keys() <= needed | OPTIONAL.get(kind, set()):
        return f"expected the fields {sorted(needed)}"
    if event["requestId"] != (event["turn_id"] if EVENTS[kind] >= NUMBERED else "session"):
        return "whose request is this?"
    parts = {
        "connection_established": lambda: event["user"].keys() == {"id", "display_name", "is_anonymous"},
        "session_state": lambda: _is_state(event),
        "message_update": lambda: event["message"].keys() == MESSAGE and event["action"] == "created",
        "message_complete": lambda: event["message"].keys() == MESSAGE,
        "session_update": lambda: event["session"].keys() == ({"id"} if event["action"] == "deleted" else SESSION),
        "error": lambda: event["code"] in STATUS,
    }
    return "" if parts.get(kind, lambda: True)() else "a part of it has other fields"


def _is_state(event: dict[str, Any]) -> bool:
    session, turn = event["session"], event["turn"]
    cards = [session["model_a"], session["model_b"]]
    return (
        session.keys() == {"id", "mode", "title", "model_a", "model_b", "version", "voted"}
        and all(card is None or card.keys() == {"id", "display_name"} for card in cards)
        and all(message.keys() == MESSAGE for message in event["messages"])
        and (turn is None or turn.keys() == {"id", "seq"})
    )


@pytest.fixture
def journal() -> Iterator[Journal]:
    """What the readers of a test saw. Whatever the test is about, it was in order and in the contract's words."""
    journal = Journal()
    yield journal
    assert not journal.violations(), journal.story()
    assert not (found := [(event, problem) for event in journal.events() if (problem := odd(event))]), found[:3]


# -- ways to open a socket


def address(base: str, session_id: str, **query: str) -> str:
    path = f"/ws/chat/session/{quote(session_id)}/" + (f"?{urlencode(query)}" if query else "")
    return f"ws{base.removeprefix('http')}{path}"


@asynccontextmanager
async def plain(base: str, session_id: str, token: str | None, **query: str) -> AsyncIterator[ClientConnection]:
    """A socket that knows nothing of cursors."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with connect(
        address(base, session_id, **query), additional_headers=headers, compression=None, proxy=None, close_timeout=1
    ) as opened:
        yield opened


async def hear(opened: ClientConnection, last: str) -> list[dict[str, Any]]:
    """The next events, up to one of type `last`."""
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(10):
        while not events or events[-1]["type"] != last:
            events.append(json.loads(await opened.recv()))
            assert not odd(events[-1]), (odd(events[-1]), events[-1])
    return events


async def fate(base: str, session_id: str, say: str | bytes | None = None, **options: Any) -> tuple[int | None, str]:
    """How a socket ends that was accepted: the code and the reason its client is told."""
    query = options.pop("query", {})
    async with connect(address(base, session_id, **query), compression=None, proxy=None, **options) as opened:
        if say is not None:
            await opened.send(say)
        async with asyncio.timeout(10):
            await opened.wait_closed()
        return opened.close_code, opened.close_reason or ""


def bearer(token: str) -> dict[str, Any]:
    return {"additional_headers": {"Authorization": f"Bearer {token}"}}


class Raw:
    """A socket spoken byte by byte: what no client library would send."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: str) -> None:
        self.reader, self.writer, self.head = reader, writer, head
        self.status = int(head.split(" ", 2)[1])

    @classmethod
    async def open(cls, base: str, session_id: str, *headers: str, host: str | None = None) -> Self:
        parts = urlsplit(base)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        lines = [
            f"GET /ws/chat/session/{session_id}/ HTTP/1.1",
            f"Host: {parts.netloc if host is None else host}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            *headers,
        ]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        return cls(reader, writer, (await reader.readuntil(b"\r\n\r\n")).decode("latin-1"))

    def send(self, opcode: int, payload: bytes = b"", *, first: int = 0x80, mask: bool = True, claim: int = 0) -> None:
        """One frame: `first` are its flags, `claim` the length it says to have."""
        size = claim or len(payload)
        short = size if size < 126 else 126 if size < 65_536 else 127
        head = bytes([first | opcode, (0x80 if mask else 0) | short])
        head += {126: struct.pack("!H", size & 0xFFFF), 127: struct.pack("!Q", size)}.get(short, b"")
        self.writer.write(head + (b"\0\0\0\0" if mask else b"") + payload)

    async def frame(self) -> tuple[int, bytes]:
        opcode, size = await self.reader.readexactly(2)
        if size == 126:
            (size,) = struct.unpack("!H", await self.reader.readexactly(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", await self.reader.readexactly(8))
        return opcode & 0x0F, await self.reader.readexactly(size)

    async def event(self, kind: str) -> dict[str, Any]:
        async with asyncio.timeout(5):
            while True:
                opcode, payload = await self.frame()
                if opcode == 1 and (event := json.loads(payload))["type"] == kind:
                    return event

    async def code(self, within: float = 5.0) -> int:
        """The code it is closed with; 1006 when the connection just ends."""
        try:
            async with asyncio.timeout(within):
                while True:
                    opcode, payload = await self.frame()
                    if opcode == 8:
                        return struct.unpack("!H", payload[:2])[0]
        except (asyncio.IncompleteReadError, ConnectionError):
            return 1006
        finally:
            self.close()

    def close(self) -> None:
        self.writer.close()


async def handshake(base: str, *headers: str, host: str | None = None, session_id: str = "any") -> int:
    raw = await Raw.open(base, session_id, *headers, host=host)
    raw.close()
    return raw.status


async def share(base: str, someone: Guest, session_id: str) -> str:
    return (await call(base, "POST", f"/api/sessions/{session_id}/share/", someone.access)).json()["share_token"]


async def home(base: str, **body: Any) -> tuple[Guest, str]:
    """A guest and a session of theirs."""
    someone = await guest(base)
    return someone, (await new_session(base, someone.access, **body))["id"]


def counted(number: int) -> str:
    return " ".join(f"⟨{n}⟩" for n in range(number))


# -- admission


@pytest.mark.parametrize("way", ["header", "subprotocol", "query", "anonymous", "ticket", "frame"])
async def test_each_way_to_show_a_token_admits(service: Service, journal: Journal, way: str) -> None:
    someone, session_id = await home(service.url)
    token = someone.anonymous_token if way == "anonymous" else someone.access
    for n, base in enumerate(service.urls):
        async with SocketReader(journal, f"{way}{n}", base, session_id, token=token, credentials=way) as reader:
            hello = await reader.event("connection_established")
            assert hello["user"] == {
                "id": someone.id,
                "display_name": someone.answer["user"]["display_name"],
                "is_anonymous": True,
            }
            assert hello["session_id"] == session_id
            await reader.say("/count 2")
            await reader.turn_ended()
            assert reader.view.texts()[-1] == counted(2)


async def test_an_anonymous_token_is_good_wherever_a_token_is(service: Service, journal: Journal) -> None:
    someone, session_id = await home(service.url)
    for way in ("header", "subprotocol", "query", "frame"):
        token = someone.anonymous_token
        async with SocketReader(journal, way, service.url, session_id, token=token, credentials=way) as reader:
            await reader.event("session_state")


async def test_a_token_in_the_subprotocol_is_not_echoed(service: Service) -> None:
    someone, session_id = await home(service.url)
    raw = await Raw.open(service.url, session_id, f"Sec-WebSocket-Protocol: parley.v1, t.{someone.access}")
    assert raw.status == 101
    assert [line for line in raw.head.splitlines() if line.lower().startswith("sec-websocket-protocol")] == [
        next(line for line in raw.head.splitlines() if line.lower() == "sec-websocket-protocol: parley.v1")
    ]
    assert someone.access not in raw.head
    assert (await raw.event("connection_established"))["user"]["id"] == someone.id
    raw.close()


async def test_a_ticket_opens_one_socket_or_event_stream(service: Service, journal: Journal) -> None:
    """Of five that come with it at once, over all workers, one gets in; then nobody, not even an EventSource."""
    someone, session_id = await home(service.url)
    text = await ticket(service.url, someone.access)
    ends = await asyncio.gather(
        *[_greeting_or_code(service.urls[n % len(service.urls)], session_id, text) for n in range(5)]
    )
    assert sorted(map(str, ends)) == ["(4401, 'authentication required')"] * 4 + ["greeted"]
    answer = await call(service.urls[-1], "GET", f"/api/sessions/{session_id}/stream/", params={"ticket": text})
    assert (answer.status_code, answer.json()["error"]) == (401, "token_invalid")


async def _greeting_or_code(base: str, session_id: str, text: str) -> Any:
    async with connect(address(base, session_id, ticket=text), proxy=None, close_timeout=1) as opened:
        try:
            return "greeted" if json.loads(await opened.recv())["type"] == "connection_established" else "said"
        except websockets.ConnectionClosed:
            return opened.close_code, opened.close_reason


async def test_a_share_token_admits_to_read_and_not_to_write(service: Service, journal: Journal) -> None:
    """Also somebody with an account of their own; the session's owner goes on as its owner."""
    owner, session_id = await home(service.url)
    stranger = await guest(service.url)
    query = {"share_token": await share(service.url, owner, session_id)}
    base = service.urls[-1]
    async with (
        SocketReader(journal, "owner", service.url, session_id, token=owner.access, query=query) as writer,
        SocketReader(journal, "nobody", base, session_id, query=query) as nobody,
        SocketReader(journal, "stranger", base, session_id, token=stranger.access, query=query) as somebody,
    ):
        for reader in (nobody, somebody):
            assert (await reader.event("connection_established"))["user"]["id"] is None
            for frame in ({"type": "message", "content": "hi", "id": "m1"}, {"type": "stop"}, TYPING):
                await reader.send(frame)
            refusals = [await reader.event("error", after=n) for n in range(3)]
            assert [refusal["code"] for refusal in refusals] == ["forbidden"] * 3
            assert refusals[0]["message_id"] == "m1"
        await writer.say("/count 5")
        for reader in (writer, nobody, somebody):
            await reader.turn_ended()
            assert reader.view.texts() == [counted(5)]


TYPING = {"type": "typing_indicator", "is_typing": True}


def bad_tokens(someone: Guest, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Access tokens that are not good, with the reason a socket is told."""
    ours, others = Tokens([SECRET]), Tokens(["another-key-of-more-than-32-characters"])
    with monkeypatch.context() as past:
        for kind in ("access", "anonymous"):
            past.setitem(LIFETIMES, kind, -90)  # a minute is forgiven
        expired = [ours.make(kind, someone.id) for kind in ("access", "anonymous")]
    required, gone = "authentication required", "authentication expired"
    bad = ["", "x", someone.access[:-1], someone.access + "x", someone.refresh, others.make("access", someone.id)]
    bad += [ours.make("access", "nobody"), ours.make("access", someone.id, 2), ours.make("ticket", someone.id)]
    return [(token, required) for token in bad] + [(token, gone) for token in expired]


async def test_a_bad_token_is_refused_after_accept(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it stands: 4401, and why. A browser sees nothing of a refused handshake."""
    someone, session_id = await home(service.url)
    bad = bad_tokens(someone, monkeypatch)
    tries = []
    for token, _ in bad:
        tries.append(fate(service.url, session_id, **bearer(token)))
        tries.append(fate(service.url, session_id, query={"token": token}))
        tries.append(fate(service.url, session_id, json.dumps({"type": "auth", "token": token})))
    assert await asyncio.gather(*tries) == [(4401, reason) for _, reason in bad for _ in range(3)]
    offered = {"subprotocols": ["parley.v1", "t.nonsense"]}
    assert await fate(service.url, session_id, **offered) == (4401, "authentication required")
    for name, token in [("ticket", someone.access), ("anonymous_token", someone.access), ("ticket", "")]:
        assert await fate(service.url, session_id, query={name: token}) == (4401, "authentication required")


async def test_the_first_credential_present_counts(service: Service) -> None:
    """A bad one is not made good by a good one after it."""
    someone, session_id = await home(service.url)
    good = someone.access
    refused = (4401, "authentication required")
    assert await fate(service.url, session_id, **bearer("bad"), subprotocols=["parley.v1", f"t.{good}"]) == refused
    assert await fate(service.url, session_id, subprotocols=["t.bad"], query={"token": good}) == refused
    assert await fate(service.url, session_id, query={"ticket": "bad", "token": good}) == refused
    assert await fate(service.url, session_id, query={"token": "bad", "anonymous_token": good}) == refused


async def test_without_a_token_there_are_seconds_to_send_one(service: Service) -> None:
    """Silence, or a first frame that is no `auth`, ends in 4401."""
    _, session_id = await home(service.url)
    first = ["hello", "[]", '{"type": "ping"}', '{"type": "auth"}', '{"type": "auth", "token": 5}', b"\x01"]
    started = time.monotonic()
    ends = await asyncio.gather(*[fate(service.url, session_id, say) for say in [*first, None]])
    assert ends == [(4401, "authentication required")] * 7
    assert 1.5 < time.monotonic() - started < 5, "the deadline is 2 s here"


async def test_what_is_not_yours_does_not_exist(service: Service) -> None:
    """4404 for a session that is not there, is another's, or cannot be; and for a share token of another session."""
    owner, session_id = await home(service.url)
    other, others_session = await home(service.url)
    token = await share(service.url, owner, session_id)
    gone = await share(service.url, other, others_session)
    assert (await call(service.url, "POST", f"/api/sessions/{others_session}/unshare/", other.access)).is_success
    cases = [(id, bearer(owner.access)) for id in (others_session, "no-such-session", "x" * 65, "ü", "a b", "a'--")]
    cases += [(id, {"query": {"share_token": wrong}}) for id, wrong in [(session_id, "wrong"), (others_session, token)]]
    cases += [(others_session, {"query": {"share_token": gone}})]
    cases += [(session_id, bearer(other.access) | {"query": {"share_token": gone}})]
    ends = await asyncio.gather(*[fate(service.url, id, **how) for id, how in cases])
    assert ends == [(4404, "no such session")] * len(cases)


async def test_tokens_in_urls_can_be_turned_off(strict: Service) -> None:
    """Then they are as if not there: the socket waits for a first frame."""
    someone, session_id = await home(strict.url)
    query = {"token": someone.access, "anonymous_token": someone.anonymous_token}
    assert await fate(strict.url, session_id, query=query) == (4401, "authentication required")
    answer = await call(strict.url, "GET", f"/api/sessions/{session_id}/stream/", params=query)
    assert answer.status_code in (401, 404), "no caller, or no session that they could see"
    async with connect(address(strict.url, session_id, **query), proxy=None) as opened:
        await opened.send(json.dumps({"type": "auth", "token": someone.access}))
        assert (await hear(opened, "session_state"))[0]["user"]["id"] == someone.id
    async with plain(strict.url, session_id, None, ticket=await ticket(strict.url, someone.access)) as opened:
        await hear(opened, "session_state")


async def test_no_token_reaches_a_log(service: Service) -> None:
    """Good ones and bad ones, wherever a client may put them."""
    someone, session_id = await home(service.url)
    shown = [await ticket(service.url, someone.access), await share(service.url, someone, session_id)]
    names = ["token", "anonymous_token", "ticket", "share_token"]
    tokens = [someone.access, someone.anonymous_token, *shown]
    for base in service.urls:
        for name, token in [*zip(names, tokens, strict=True), *[(name, "CANARY-1234") for name in names]]:
            query = {"before": "1", name: token, "after": "2"}
            with contextlib.suppress(Exception):
                async with plain(base, session_id, None, **query) as opened:
                    await opened.recv()
            await call(base, "GET", f"/api/sessions/{session_id}/stream/", params=query)
        for say in ("CANARY-1234", '{"type": "auth", "token": "CANARY-1234"}', '{"CANARY-1234": 1}'):
            await fate(base, session_id, say)
        await fate(base, session_id, **bearer("CANARY-1234"))
        await fate(base, session_id, subprotocols=["parley.v1", "t.CANARY-1234"])
        await call(base, "GET", "/api/users/me/", "CANARY-1234")
    log = service.log()
    assert [text for text in ["CANARY", *tokens] if text in log] == []


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


async def test_only_allowed_hosts_are_answered(service: Service, strict: Service) -> None:
    local = dict.fromkeys(["localhost", "localhost:80", "LOCALHOST", "127.0.0.1", "127.0.0.1:1", "[::1]:8001"], 101)
    public = dict.fromkeys(["chat.example", "Chat.Example:443", "eu.parley.example", "127.0.0.1"], 101)
    evil = [
        "",
        "evil.com",
        "evil.com:80",
        "localhost.evil.com",
        "chat.example.evil.com",
        "good@evil",
        "chat.example@evil",
    ]
    evil += ["evilparley.example", "evil.com/chat.example", "127.0.0.1.evil.com", "::1", "[::1", ":80", "*"]
    for served, hosts in [(service, local), (strict, public | {"localhost": 400})]:
        hosts = hosts | dict.fromkeys(evil, 400)
        statuses = await asyncio.gather(*[handshake(served.url, host=host) for host in hosts])
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


async def _admitted(base: str, session_id: str, token: str) -> bool:
    async with plain(base, session_id, token) as opened:
        with contextlib.suppress(Exception):
            await hear(opened, "session_state")
        return opened.close_code is None


# -- the four lines


async def test_the_four_lines_work_on_a_service_just_started(opened: Service) -> None:
    """`new WebSocket(…/test123/)`, `onopen`, `onmessage`, `send({type: 'test', message: 'Hello'})`."""
    async with connect(address(opened.url, "test123"), origin="http://localhost:5500", proxy=None) as browser:
        await browser.send('{"type": "test", "message": "Hello"}')
        events = await hear(browser, "test")
    assert [event["type"] for event in events] == ["connection_established", "session_state", "test"]
    assert events[0]["user"]["display_name"].startswith("Anonymous_")
    assert events[1]["session"]["mode"] == "direct"
    assert events[1]["session"]["model_a"] == {"id": "demo-scholar", "display_name": "demo-scholar"}
    assert events[2] == {"type": "test", "requestId": "session", "message": "Hello"}


async def test_two_guests_in_an_open_session_see_the_same_tokens(opened: Service, journal: Journal) -> None:
    async with (
        SocketReader(journal, "ann", opened.url, "meeting") as ann,
        SocketReader(journal, "ben", opened.url, "meeting") as ben,
    ):
        users = [(await reader.event("connection_established"))["user"]["id"] for reader in (ann, ben)]
        assert len(set(users)) == 2
        await ann.send(TYPING)
        assert (await ben.event("typing_indicator"))["user_id"] == users[0]
        for reader, count in [(ann, 1), (ben, 2)]:
            await reader.say("/count 20")
            await asyncio.gather(ann.turn_ended(count), ben.turn_ended(count))
        assert ann.view.texts() == ben.view.texts() == [counted(20)] * 2
        assert journal.events("ann", "message_chunk")[0] in journal.events("ben", "message_chunk")
    assert not journal.events("ann", "typing_indicator")


async def test_an_account_s_own_session_is_not_open(opened: Service) -> None:
    """Whether it was made over HTTP or by opening a socket: strangers cannot get in."""
    owner, session_id = await home(opened.url)
    async with plain(opened.url, "mine", owner.access) as mine:
        await hear(mine, "session_state")
    stranger = await guest(opened.url)
    for id in (session_id, "mine"):
        for how in ({}, bearer(stranger.access)):
            assert await fate(opened.url, id, **how) == (4404, "no such session")
        async with plain(opened.url, id, owner.access) as mine:
            await hear(mine, "session_state")


# -- what is said


@pytest.mark.parametrize("mode", ["direct", "compare", "random"])
async def test_a_turn_is_told_in_order_on_every_worker(service: Service, journal: Journal, mode: str) -> None:
    """The user's message, empty replies, their text, their ends, the turn's end: numbered from 0 without a hole."""
    someone, session_id = await home(service.url, **(BATTLE | {"mode": mode} if mode != "direct" else {}))
    async with contextlib.AsyncExitStack() as stack:
        readers = [
            await stack.enter_async_context(SocketReader(journal, f"r{n}", base, session_id, token=someone.access))
            for n, base in enumerate([*service.urls, service.url])
        ]
        await readers[0].say("/count 12", id="question-1")
        await asyncio.gather(*[reader.turn_ended() for reader in readers])
    for reader in readers:
        events = [event for event in journal.events(reader.name) if "seq" in event]
        assert [event.get("from_seq", event["seq"]) for event in events] == [
            0,
            *[event["seq"] + 1 for event in events[:-1]],
        ]
        kinds = [event["type"] for event in events]
        sides = 1 if mode == "direct" else 2
        assert kinds[: 1 + sides] == ["message_update"] * (1 + sides)
        assert kinds.count("message_update") == 1 + sides and kinds.count("message_complete") == sides
        assert kinds[-1] == "turn_complete"
        user, *replies = [event["message"] for event in events[: 1 + sides]]
        assert (user["id"], user["role"], user["content"], user["model"]) == ("question-1", "user", "/count 12", None)
        assert [reply["participant"] for reply in replies] == ["a", "b"][:sides]
        assert {(reply["content"], reply["status"]) for reply in replies} == {("", "pending")}
        assert all(reply["parent_message_ids"] == ["question-1"] for reply in replies)
        for end in events:
            if end["type"] == "message_complete":
                assert (end["status"], end["failure_reason"]) == ("success", None)
                assert end["message"]["content"] == counted(12)
                assert (end["latency_ms"] is None) == (mode == "random"), "a blind battle's clocks are not shown"
        assert reader.view.texts() == [counted(12)] * sides
    rows = await messages(service.url, someone.access, session_id)
    assert [row["content"] for row in rows] == ["/count 12", *[counted(12)] * sides]


async def test_ping_and_test_come_back_as_they_were(service: Service) -> None:
    """To the sender alone, whatever is in them."""
    someone, session_id = await home(service.url)
    deep = "[" * 400 + "]" * 400
    values = ["1", '"now"', "null", "1.5", "123456789012345678901234567890", '"\\u0000ü😀"', '{"a": [1, {}]}', deep]
    async with (
        plain(service.url, session_id, someone.access) as opened,
        plain(service.urls[-1], session_id, someone.access) as bystander,
    ):
        await asyncio.gather(hear(opened, "session_state"), hear(bystander, "session_state"))
        for value in values:
            await opened.send(f'{{"type": "ping", "timestamp": {value}}}')
            await opened.send(f'{{"type": "test", "message": {value}}}')
            pong, test = (await hear(opened, "pong"))[-1], (await hear(opened, "test"))[-1]
            assert pong == {"type": "pong", "requestId": "session", "timestamp": json.loads(value)}
            assert test == {"type": "test", "requestId": "session", "message": json.loads(value)}
            await asyncio.sleep(0.1)  # 20 frames a second are allowed
        await opened.send('{"type": "ping"}')
        assert (await hear(opened, "pong"))[-1]["timestamp"] is None
        await bystander.send('{"type": "ping"}')
        assert [event["type"] for event in await hear(bystander, "pong")] == ["pong"]


async def test_where_it_starts_over_it_goes_on_exactly(service: Service) -> None:
    """While tokens come as fast as they can, a client that trusts every `resumed` and `session_state` and knows of no
    duplicates asks for them again and again: what follows each is the next event, never an older or a later one."""
    someone, session_id = await home(service.url)
    async with (
        plain(service.url, session_id, someone.access) as writer,
        plain(service.urls[-1], session_id, someone.access) as opened,
    ):
        await asyncio.gather(hear(writer, "session_state"), hear(opened, "session_state"))
        await writer.send('{"type": "message", "content": "/count 300"}')
        expected, text, asked, answered = 0, "", 0, {"resumed": 0, "session_state": 0}
        texts = {-1: "", 0: "", 1: ""}  # what had been said at each event
        while True:
            event = json.loads(await asyncio.wait_for(opened.recv(), 10))
            if event["type"] == "session_state":
                text, expected = event["messages"][-1]["content"], event["turn"]["seq"] + 1
                texts[event["turn"]["seq"]] = text
                answered["session_state"] += 1
                continue
            if event["type"] == "resumed":
                expected = event["from_seq"]
                text = texts[expected - 1]
                answered["resumed"] += 1
                continue
            assert event.get("from_seq", event["seq"]) == expected, (event, expected)
            expected = event["seq"] + 1
            text += event.get("chunk", "")
            texts[event["seq"]] = text
            if event["type"] == "turn_complete":
                break
            if event["seq"] > 20 * (asked + 1) and asked < 14:
                asked += 1
                back = max(n for n in texts if n <= event["seq"] - 15)
                ask = (
                    {"type": "resume", "cursor": f"{event['turn_id']}.{back}"}
                    if asked % 2
                    else {"type": "request_state"}
                )
                await opened.send(json.dumps(ask))
        assert text == counted(300)
        assert answered["resumed"] >= 5 and answered["session_state"] >= 5, answered


async def test_a_state_asked_for_in_mid_answer_has_the_text_so_far(service: Service, journal: Journal) -> None:
    someone, session_id = await home(service.url)
    for n, base in enumerate(service.urls):
        async with SocketReader(journal, f"asker{n}", base, session_id, token=someone.access) as reader:
            await reader.say("/count 60")
            await reader.chunks(10)
            await reader.send({"type": "request_state"})
            state = await reader.event("session_state", after=1)
            assert state["messages"][-1]["status"] == "streaming"
            assert counted(60).startswith(state["messages"][-1]["content"].strip())
            assert state["turn"]["seq"] >= 10
            await reader.turn_ended()
            assert reader.view.texts()[-1] == counted(60)


async def test_stop_keeps_what_was_said(service: Service, journal: Journal) -> None:
    """From whichever worker, over the socket and over HTTP; with nothing to stop it does nothing."""
    someone, session_id = await home(service.url)
    base = service.urls[-1]
    async with (
        SocketReader(journal, "writer", service.url, session_id, token=someone.access) as writer,
        SocketReader(journal, "stopper", base, session_id, token=someone.access) as stopper,
    ):
        await stopper.send({"type": "stop"})
        for turn in (1, 2):
            await writer.say("/count 2000")
            await stopper.chunks(5 * turn)
            await (stopper.send({"type": "stop"}) if turn == 1 else stop(base, someone.access, session_id))
            await asyncio.gather(writer.turn_ended(turn, 3), stopper.turn_ended(turn, 3))
            end = journal.events("stopper", "message_complete")[-1]
            assert (end["status"], end["failure_reason"]) == ("stopped", None)
            assert counted(2000).startswith(end["message"]["content"].strip()) and end["message"]["content"]
        assert writer.view.texts() == stopper.view.texts()
        assert not journal.events(None, "error")


async def test_typing_is_told_to_the_others_once_a_second(service: Service, journal: Journal) -> None:
    """The first word at once, the last of each second at its end; not to the account's own sockets."""
    owner, session_id = await home(service.url)
    query = {"share_token": await share(service.url, owner, session_id)}
    base = service.urls[-1]
    async with (
        SocketReader(journal, "owner", service.url, session_id, token=owner.access) as typist,
        SocketReader(journal, "tablet", base, session_id, token=owner.access) as tablet,
        SocketReader(journal, "viewer", base, session_id, query=query) as viewer,
    ):
        for n in range(9):
            await typist.send({"type": "typing_indicator", "is_typing": n % 2 == 0})
        await typist.send({"type": "typing_indicator", "is_typing": False})
        await viewer.event("typing_indicator", after=1)
        await call(base, "PATCH", f"/api/sessions/{session_id}/", owner.access, json={"title": "done"})
        for reader in (typist, tablet, viewer):
            await reader.event("session_update")
    heard = [e for e in journal.of("viewer", "event") if e.data["type"] == "typing_indicator"]
    assert [(e.data["user_id"], e.data["is_typing"]) for e in heard] == [(owner.id, True), (owner.id, False)]
    assert heard[1].at - heard[0].at > 0.9
    assert not journal.events("owner", "typing_indicator") + journal.events("tablet", "typing_indicator")


async def test_changes_over_http_reach_sockets_on_every_worker(service: Service, journal: Journal) -> None:
    """Renamed, pinned, deleted; and after that there is no session to speak in, but no socket is cut for it."""
    someone, session_id = await home(service.url)
    path = f"/api/sessions/{session_id}/"
    async with contextlib.AsyncExitStack() as stack:
        readers = [
            await stack.enter_async_context(SocketReader(journal, f"r{n}", base, session_id, token=someone.access))
            for n, base in enumerate(service.urls)
        ]
        for n, (base, change) in enumerate(
            [(service.urls[0], {"title": "New"}), (service.urls[-1], {"is_pinned": True})]
        ):
            answer = await call(base, "PATCH", path, someone.access, json=change)
            for reader in readers:
                update = await reader.event("session_update", after=n)
                assert update["action"] == "updated" and update["session"] == answer.json()
                assert update["version"] == update["session"]["version"] == 2 + n
        await call(service.url, "DELETE", path, someone.access)
        for reader in readers:
            assert (await reader.event("session_update", after=2))["action"] == "deleted"
            await reader.say("hello?", id="late")
            refusal = await reader.event("error")
            assert (refusal["code"], refusal["message_id"]) == ("not_found", "late")
            await reader.send({"type": "request_state"})
            assert (await reader.event("error", after=1))["code"] == "not_found"
            await reader.send({"type": "ping"})
            await reader.event("pong")
    assert await fate(service.url, session_id, **bearer(someone.access)) == (4404, "no such session")


async def test_a_vote_reveals_the_names_on_every_worker(service: Service, journal: Journal) -> None:
    someone, session_id = await home(service.url, mode="random")
    async with SocketReader(journal, "voter", service.urls[-1], session_id, token=someone.access) as reader:
        for n, action in enumerate(["revealed", "voted"]):
            await reader.say("/count 2", id=f"q{n}")
            await reader.turn_ended(n + 1)
            vote = {"session_id": session_id, "message_id": f"q{n}", "feedback_type": "preference", "preference": "tie"}
            answer = await call(service.url, "POST", "/api/feedback/", someone.access, json=vote)
            assert answer.status_code == 201, answer.text
            update = await reader.event("session_update", after=n)
            assert (update["action"], update["session"]["voted"]) == (action, True)
            assert {update["session"][f"model_{side}"]["id"] for side in "ab"} == {"demo-scholar", "demo-poet"}


# -- messages that start nothing


async def test_a_message_while_one_is_answered_is_busy(service: Service, journal: Journal) -> None:
    """Five of them: each refused by its id, and the socket lives on through its pings, one a second here."""
    someone, session_id = await home(service.url)
    async with SocketReader(journal, "eager", service.url, session_id, token=someone.access, resume=False) as reader:
        await reader.say("/count 500", id="first")
        await reader.chunks(3)
        for n in range(5):
            await reader.say("and?", id=f"more-{n}")
        refusals = [await reader.event("error", after=n) for n in range(5)]
        assert [(each["code"], each["message_id"], each["retryable"]) for each in refusals] == [
            ("busy", f"more-{n}", True) for n in range(5)
        ]
        assert all(each["retry_after"] > 0 for each in refusals)
        await reader.turn_ended()
        assert reader.view.texts() == [counted(500)] and reader.codes == []
    assert len(await messages(service.url, someone.access, session_id)) == 2


async def test_one_message_id_is_one_turn(service: Service, journal: Journal) -> None:
    """Sent ten times at once from all workers, again while it is answered, and again later."""
    someone, session_id = await home(service.url)
    async with contextlib.AsyncExitStack() as stack:
        readers = [
            await stack.enter_async_context(
                SocketReader(journal, f"r{n}", service.urls[n % len(service.urls)], session_id, token=someone.access)
            )
            for n in range(4)
        ]
        await asyncio.gather(*[readers[n % 4].say("/count 30", id="once") for n in range(10)])
        await readers[0].chunks(3)
        await readers[1].say("/count 30", id="once")
        await asyncio.gather(*[reader.turn_ended() for reader in readers])
        await readers[2].say("/count 30", id="once")
        await readers[2].send({"type": "request_state"})
        state = await readers[2].event("session_state", after=1)
        assert (len(state["messages"]), state["turn"]) == (2, None)
    assert not journal.events(None, "error"), journal.story()


async def test_a_message_has_to_be_some_text_of_bearable_length(service: Service, journal: Journal) -> None:
    someone, session_id = await home(service.url)
    cases = [("", "invalid"), (" \n\t", "invalid"), ("x" * 32_001, "too_large"), ("a\0b", "invalid")]
    async with SocketReader(journal, "r", service.url, session_id, token=someone.access) as reader:
        for n, (content, code) in enumerate(cases):
            await reader.say(content, id=f"m{n}")
            refusal = await reader.event("error", after=n)
            assert (refusal["code"], refusal["message_id"], refusal["retryable"]) == (code, f"m{n}", False)
        await reader.say("/echo " + "x" * 31_994)
        await reader.turn_ended()
        assert reader.view.texts() == ["x" * 31_994]


# -- cursors


async def _cursors(base: str, someone: Guest, session_id: str) -> tuple[str, int]:
    """A turn that has ended, and its last number."""
    answer = await post_turn(base, someone.access, session_id, "/count 20")
    return answer.events[-1]["turn_id"], answer.events[-1]["seq"]


@pytest.mark.parametrize("way", ["query", "frame"])
async def test_a_good_cursor_is_continued_exactly(service: Service, way: str) -> None:
    """After the turn's end, on every worker, from its start, its middle and its end."""
    someone, session_id = await home(service.url)
    turn_id, last = await _cursors(service.url, someone, session_id)
    for base in service.urls:
        for seq in (-1, 0, 7, last - 1, last):
            cursor = f"{turn_id}.{seq}"
            async with plain(
                base, session_id, someone.access, **({"cursor": cursor} if way == "query" else {})
            ) as opened:
                if way == "frame":
                    await hear(opened, "session_state")
                    await opened.send(json.dumps({"type": "resume", "cursor": cursor}))
                resumed = (await hear(opened, "resumed"))[-1]
                assert (resumed["turn_id"], resumed["from_seq"]) == (turn_id, seq + 1)
                await opened.send('{"type": "ping"}')
                events = (await hear(opened, "turn_complete"))[:] if seq < last else []
                events = [event for event in events if "seq" in event]
                firsts = [event.get("from_seq", event["seq"]) for event in events]
                assert firsts == [seq + 1, *[event["seq"] + 1 for event in events[:-1]]][: len(events)]
                if seq == last:
                    assert [event["type"] for event in await hear(opened, "pong")] == ["pong"]


GARBAGE = [
    "",
    ".",
    "x",
    "5",
    ".5",
    "x.",
    "x.y",
    "x.5",
    "x.-1",
    "x.--5",
    "x.1e3",
    "x.5.5",
    "x.²",
    "x\u0000.5",
    "ü.3",
    "x." + "9" * 90,
]


@pytest.mark.parametrize("way", ["query", "frame"])
async def test_any_other_cursor_gets_a_snapshot(service: Service, way: str) -> None:
    """Unknown, far beyond the end, of another session, or no cursor at all; then the next turn follows."""
    someone, session_id = await home(service.url)
    turn_id, last = await _cursors(service.url, someone, session_id)
    other, others_session = await home(service.url)
    others_turn, _ = await _cursors(service.url, other, others_session)
    unknown = [f"{turn_id}.{last + 1}", f"{turn_id}.999999999", f"{turn_id}.-2", f"{others_turn}.3", f"{turn_id}x.3"]
    cursors = unknown + [text for text in GARBAGE if way == "frame" or "\0" not in text]
    for number, cursor in enumerate(cursors):
        base = service.urls[number % len(service.urls)]
        async with plain(base, session_id, someone.access, **({"cursor": cursor} if way == "query" else {})) as opened:
            if way == "frame":
                await hear(opened, "session_state")
                await opened.send(json.dumps({"type": "resume", "cursor": cursor}))
            events = await hear(opened, "session_state")
            assert [event["type"] for event in events][-2:-1] in ([], ["connection_established"]), cursor
            assert [message["content"] for message in events[-1]["messages"]] == ["/count 20", counted(20)], cursor
            assert events[-1]["turn"] is None


async def test_a_cursor_two_turns_back_gets_the_rest_of_both(service: Service, journal: Journal) -> None:
    someone, session_id = await home(service.url)
    turn_id, last = await _cursors(service.url, someone, session_id)
    second, end = await _cursors(service.urls[-1], someone, session_id)
    for n, base in enumerate(service.urls):
        async with plain(base, session_id, someone.access, cursor=f"{turn_id}.9") as opened:
            first = await hear(opened, "turn_complete")
            rest = await hear(opened, "turn_complete")
        numbered = [event for event in first + rest if "seq" in event]
        assert numbered[0]["turn_id"] == turn_id and numbered[0].get("from_seq", numbered[0]["seq"]) == 10
        covered = [
            (event["turn_id"], seq)
            for event in numbered
            for seq in range(event.get("from_seq", event["seq"]), event["seq"] + 1)
        ]
        assert covered == [(turn_id, seq) for seq in range(10, last + 1)] + [(second, seq) for seq in range(end + 1)], n
        assert "".join(event.get("chunk", "") for event in rest) == counted(20)


async def test_a_reader_that_keeps_losing_its_connection_misses_nothing(service: Service, journal: Journal) -> None:
    """Direct and arena; it comes back with its cursor, to any worker."""
    someone, session_id = await home(service.url)
    battle = (await new_session(service.url, someone.access, **BATTLE))["id"]
    urls = [service.urls[0], service.urls[-1]]

    async def lose(name: str, session_id: str, sides: int) -> None:
        async with SocketReader(journal, name, urls, session_id, token=someone.access) as reader:
            await reader.say("/count 150")
            for n in range(1, 6):
                await reader.chunks(15 * n)
                reader.drop()
                await reader.until(lambda n=n: reader.connections > n, what="a new connection")
            await reader.turn_ended()
            assert reader.view.texts() == [counted(150)] * sides
            assert len(journal.events(name, "resumed")) == 5, journal.story()

    await asyncio.gather(lose("direct", session_id, 1), lose("arena", battle, 2))


# -- protocol


async def _admitted_raw(base: str, session_id: str, someone: Guest, *headers: str) -> Raw:
    raw = await Raw.open(base, session_id, f"Authorization: Bearer {someone.access}", *headers)
    await raw.event("session_state")
    return raw


async def test_frames_have_a_size(service: Service) -> None:
    """64 KiB and not a byte more; of 17 MB not even the beginning is kept."""
    someone, session_id = await home(service.url)
    before = service.resources()["rss"]
    async with plain(service.url, session_id, someone.access) as opened:
        head, tail = '{"type": "test", "message": "', '"}'
        await hear(opened, "session_state")
        await opened.send(head + "x" * (65_536 - len(head) - len(tail)) + tail)
        assert len((await hear(opened, "test"))[-1]["message"]) == 65_536 - len(head) - len(tail)
        await opened.send(head + "x" * (65_537 - len(head) - len(tail)) + tail)
        await opened.wait_closed()
        assert opened.close_code == 1009
    for size, parts in ((65_537, 1), (1_000_000, 1), (17_000_000, 1), (40_000, 2)):
        raw = await _admitted_raw(service.url, session_id, someone)
        raw.send(1, b"x" * 40_000, first=0x80 if parts == 1 else 0, claim=size)
        if parts == 2:
            raw.send(0, b"x" * 40_000)
        assert await raw.code() == 1009, size
    assert service.resources()["rss"] - before < 5_000_000


async def test_compression_is_not_negotiated(service: Service) -> None:
    """A few bytes on the wire could be megabytes here."""
    someone, session_id = await home(service.url)
    raw = await _admitted_raw(service.url, session_id, someone, "Sec-WebSocket-Extensions: permessage-deflate")
    assert raw.status == 101 and "sec-websocket-extensions" not in raw.head.lower()
    raw.send(1, b"\xaa\x56\x2a", first=0xC0)
    assert await raw.code() == 1002


JUNK = [
    "",
    "hello",
    "[]",
    "5",
    "null",
    "{}",
    '{"type": null}',
    '{"type": "nonsense"}',
    '{"type": "session_state"}',
    '{"type": "message"}',
    '{"type": "message", "content": 5}',
    '{"type": "message", "content": null}',
    '{"type": "message", "content": "hi", "id": 5}',
    '{"type": "message", "content": "hi", "id": ""}',
    '{"type": "message", "content": "hi", "id": "a b"}',
    '{"type": "message", "content": "hi", "id": "a\\n"}',
    '{"type": "message", "content": "\\ud800"}',
    '{"type": "typing_indicator"}',
    '{"type": "typing_indicator", "is_typing": "yes"}',
    '{"type": "resume"}',
    '{"type": "resume", "cursor": 5}',
    '{"type": "resume", "cursor": "' + "x" * 101 + '"}',
    '{"type": "ping", "timestamp": NaN}',
    '{"type": "ping", "timestamp": ' + "[" * 20_000 + "]" * 20_000 + "}",
    '{"type": "ping"',
]


async def test_what_is_not_understood_is_answered(service: Service) -> None:
    """Twice a typed error and the socket stays; at the third within a minute it is closed with 4400."""
    someone, session_id = await home(service.url)
    for start in range(0, len(JUNK), 2):
        async with plain(service.url, session_id, someone.access) as opened:
            await hear(opened, "session_state")
            for text in (JUNK + JUNK)[start : start + 2]:
                await opened.send(text)
                refusal = (await hear(opened, "error"))[-1]
                assert (refusal["code"], refusal["retryable"]) == ("bad_request", False), text
            await opened.send('{"type": "ping", "timestamp": 1}')
            assert (await hear(opened, "pong"))[-1]["timestamp"] == 1
            if start < 4:
                await opened.send("hello")
                assert (await hear(opened, "error"))[-1]["code"] == "bad_request"
                await opened.wait_closed()
                assert (opened.close_code, opened.close_reason) == (4400, "bad frames")


async def test_twenty_frames_a_second_are_heard_and_no_more(service: Service) -> None:
    someone, session_id = await home(service.url)
    async with plain(service.url, session_id, someone.access) as opened:
        await hear(opened, "session_state")
        for n in range(20):
            await opened.send(f'{{"type": "ping", "timestamp": {n}}}')
        assert [(await hear(opened, "pong"))[-1]["timestamp"] for _ in range(20)] == list(range(20))
        await asyncio.sleep(1.0)
        for _ in range(60):
            with contextlib.suppress(Exception):
                await opened.send('{"type": "ping"}')
        await opened.wait_closed()
        assert (opened.close_code, opened.close_reason) == (4429, "too many frames")


# -- slow readers


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


# -- restarts


async def test_a_deploy_closes_with_1012_and_the_reader_goes_on(
    request: pytest.FixtureRequest, tmp_path: Path, journal: Journal
) -> None:
    """The answer is finished while the process drains; the reader comes back to the next one and has all of it."""
    environment = ENVIRONMENT | store("sqlite", request, tmp_path)
    async with Service(environment, server="serve") as restarted:
        someone, session_id = await home(restarted.url)
        async with SocketReader(journal, "reader", restarted.url, session_id, token=someone.access) as reader:
            await reader.say("/count 200")
            await reader.chunks(20)
            journal.fault("SIGTERM")
            await restarted.restart()
            await reader.until(lambda: reader.connections == 2, what="a new connection")
            await reader.until(lambda: reader.view.texts() == [counted(200)], what="the whole answer")
            assert reader.codes == [1012]
            assert {message.status for message in reader.view.messages.values()} == {"success"}


# -- §7: the same events over HTTP


async def test_sse_says_the_sockets_numbered_events_and_nothing_else(service: Service, journal: Journal) -> None:
    someone, session_id = await home(service.url, **BATTLE)
    async with (
        SocketReader(journal, "socket", service.url, session_id, token=someone.access) as reader,
        SSEReader(journal, "sse", service.urls[-1], session_id, token=someone.access, content="/count 30") as sse,
    ):
        await asyncio.gather(reader.turn_ended(), sse.turn_ended())
        await sse.ended()
        assert sse.view.texts() == reader.view.texts() == [counted(30)] * 2
        assert sse.comments[0] == "ok"
    kinds = {event["type"] for event in journal.events("sse")}
    assert kinds == {"message_update", "message_chunk", "message_complete", "turn_complete"}
    whole = {event["seq"]: event for event in journal.events("socket") if "seq" in event}
    for event in journal.events("sse"):
        if event["type"] != "message_chunk":
            assert event == whole[event["seq"]]


async def test_an_event_source_resumes_by_its_last_id(service: Service, journal: Journal) -> None:
    """By header or by `?after=`; admitted by a ticket or a token in the URL, as it can send no header."""
    someone, session_id = await home(service.url)
    path = f"/api/sessions/{session_id}/stream/"
    async with http(service.url, someone.access) as client:
        assert (await client.get(path)).status_code == 204, "there is nothing to read yet"
    turn_id, last = await _cursors(service.url, someone, session_id)
    for base in service.urls:
        for way in ("header", "after"):
            cursor = f"{turn_id}.{last - 5}"
            headers = {"Last-Event-ID": cursor} if way == "header" else {}
            query = {"after": cursor} if way == "after" else {}
            query |= {"ticket": await ticket(base, someone.access)} if way == "header" else {"token": someone.access}
            async with http(base) as client:
                answer = await client.get(path, headers=headers, params=query)
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            blocks = answer.text.split("\n\n")
            assert blocks[0] == ": ok\nretry: 1000" and blocks[-2] == "event: done\ndata: {}"
            for block in blocks[1:-2]:
                lines = dict(line.split(": ", 1) for line in block.splitlines())
                event = json.loads(lines["data"])
                assert lines.keys() == {"id", "event", "data"} and not odd(event)
                assert (lines["id"], lines["event"]) == (f"{turn_id}.{event['seq']}", event["type"])
            first = json.loads(blocks[1].split("data: ", 1)[1])
            assert first.get("from_seq", first["seq"]) == last - 4
        ended = await call(base, "GET", path, someone.access, headers={"Last-Event-ID": f"{turn_id}.{last}"})
        assert ended.status_code == 204, "an EventSource that has everything is told to stop"


