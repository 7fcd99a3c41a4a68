"""Who gets in, by which credentials, and who does not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import websockets
from websockets.asyncio.client import connect

from chat.tokens import LIFETIMES, Tokens
from tests.conftest import SECRET, store
from tests.harness.api import Guest, call, guest, ticket
from tests.harness.client import SocketReader
from tests.harness.journal import Journal
from tests.harness.service import Service

from . import TYPING, address, bearer, counted, fate, hear, home, offer, plain, share
from .raw import Raw


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
    assert 2 <= time.monotonic() - started < 10, "the deadline is 2 s here"


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
    """Then they are as if not there: the first frame has to show one."""
    someone, session_id = await home(strict.url)
    query = {"token": someone.access, "anonymous_token": someone.anonymous_token}
    end = await fate(strict.url, session_id, '{"type": "auth", "token": "bad"}', query=query)
    assert end == (4401, "authentication required")
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


# -- the four lines


@pytest.fixture(scope="module")
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Started as a developer starts it, with one limit that a test can reach."""
    environment = store("sqlite", request, tmp_path_factory.mktemp("open"))
    environment |= {"PARLEY_MODELS": offer(0.005), "PARLEY_SESSIONS_PER_MINUTE": "5"}
    with Service(environment, server="serve") as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-6000:]


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


async def test_sockets_make_no_more_sessions_than_requests_do(opened: Service) -> None:
    """So many a minute and account, as over HTTP; the sessions that exist go on."""
    someone = await guest(opened.url)
    made: list[str] = []
    for n in range(11):  # one more than two minutes' worth: the minute may end meanwhile
        async with plain(opened.url, f"made-{n}", someone.access) as one:
            try:
                await hear(one, "session_state")
            except websockets.ConnectionClosed:
                assert one.close_code == 4429
                break
        made.append(f"made-{n}")
    assert 5 <= len(made) < 11
    async with plain(opened.url, made[0], someone.access) as again:
        await hear(again, "session_state")
