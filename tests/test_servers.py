"""Parley under servers it was not tuned for: plain uvicorn, hypercorn, granian and daphne, each as its manual starts it.

There is no `DirectProtocol` here, compression may be on, and Daphne runs no lifespan: the service starts itself when it
is first asked.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from routes.operations import VERSION
from tests.conftest import CLOSED
from tests.harness import until
from tests.harness.api import Guest, call, guest, http, messages, new_session, post_turn, short_body, stop
from tests.harness.client import SocketReader, SSEReader
from tests.harness.journal import Journal
from tests.harness.proxy import Narrow
from tests.harness.servers import Postgres, Redis
from tests.harness.service import Service
from tests.harness.sse import SSEParser

COMMANDS = {
    "uvicorn": "-m uvicorn {app} --port {port}",
    "hypercorn": "-m hypercorn {app} --bind 127.0.0.1:{port}",
    "granian": "-m granian {app} --interface asgi --port {port}",
    "daphne": "-m daphne {app} -p {port}",
}
SERVERS = list(COMMANDS)
CALM, HASTY = (
    {"id": name, "provider": "demo", "pace": pace, "personality": "scholar"}
    for name, pace in (("calm", 0.01), ("hasty", 0.0))
)
ENVIRONMENT = CLOSED | {
    "PARLEY_MODELS": json.dumps([CALM, HASTY]),
    "PARLEY_MAX_TOKENS": "100000",
    "PARLEY_SEND_TIMEOUT": "10",
}


def under(server: str, folder: Path, **more: str) -> Service:
    environment = ENVIRONMENT | {"DATABASE_URL": f"sqlite:///{folder / 'parley.db'}"} | more
    return Service(environment, server=server, command=COMMANDS[server].split())


@pytest.fixture(scope="module", params=SERVERS)
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with under(request.param, tmp_path_factory.mktemp(request.param)) as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-6000:]


@pytest.fixture
def journal() -> Iterator[Journal]:
    journal = Journal()
    yield journal
    assert not journal.violations(), journal.story()


async def home(base: str, model: str = "calm") -> tuple[Guest, str]:
    someone = await guest(base)
    return someone, (await new_session(base, someone.access, model_a_id=model))["id"]


def counted(number: int) -> str:
    return " ".join(f"⟨{n}⟩" for n in range(number))


async def test_health_is_exactly_this(service: Service) -> None:
    expected = {
        "status": "healthy",
        "container_type": "asgi",
        "async_enabled": True,
        "checks": {"database": "ok", "cache": "ok", "channels": "configured"},
        "version": VERSION,
    }
    for path in ("/api/health/", "/api/health", "/health/"):
        response = await call(service.url, "GET", path)
        assert (response.status_code, response.json()) == (200, expected)
        assert list(response.json()) == list(expected), "monitors that compare text see the same text"


async def test_a_posted_turn_is_streamed_as_it_is_made(service: Service) -> None:
    """The first token is here while the service still holds the reply to be running; the last one ends the stream."""
    someone, session_id = await home(service.url)
    parser, events, status_then = SSEParser(), [], ""
    async with (
        http(service.url, someone.access) as client,
        client.stream(
            "POST",
            "/api/messages/stream/",
            json=short_body(session_id, "/count 150"),
            headers={"Accept": "text/event-stream"},
        ) as response,
    ):
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert "content-length" not in response.headers
        async for data in response.aiter_bytes():
            events += parser.feed(data)
            if not status_then and any(event.event == "message_chunk" for event in events):
                status_then = (await messages(service.url, someone.access, session_id))[1]["status"]
    assert status_then in ("pending", "streaming")
    assert events[-1].event == "done"
    chunks = [json.loads(event.data) for event in events if event.event == "message_chunk"]
    assert "".join(chunk["chunk"] for chunk in chunks) == counted(150)
    assert len(chunks) > 20, "one by one, or nearly"
    stored = await messages(service.url, someone.access, session_id)
    assert [(row["role"], row["status"], row["content"]) for row in stored] == [
        ("user", "success", "/count 150"),
        ("assistant", "success", counted(150)),
    ]


@pytest.mark.parametrize("accept", ["lines", "ndjson", "text"])
async def test_other_dialects_are_whole(service: Service, accept: str) -> None:
    someone, session_id = await home(service.url)
    answer = await post_turn(service.url, someone.access, session_id, "/count 20", accept=accept)
    assert answer.status == 200 and answer.ended
    said = answer.text.removesuffix("\n") if accept == "text" else answer.sides()["a"]
    assert said == counted(20)


async def test_sockets_of_a_session_see_each_token_once_and_in_order(service: Service, journal: Journal) -> None:
    """Two from the start, and an SSE reader that comes in the middle; `Journal` knows what came twice or was left out."""
    someone, session_id = await home(service.url)
    async with (
        SocketReader(journal, "ann", service.url, session_id, token=someone.access) as ann,
        SocketReader(journal, "ben", service.url, session_id, token=someone.access, credentials="subprotocol") as ben,
    ):
        await ann.say("/count 100")
        await ben.tokens(10)
        async with SSEReader(journal, "cat", service.url, session_id, token=someone.access) as cat:
            await asyncio.gather(*[reader.turn_ended() for reader in (ann, ben, cat)])
            assert [reader.view.texts() for reader in (ann, ben, cat)] == [[counted(100)]] * 3


async def test_a_socket_resumes_by_its_cursor(service: Service, journal: Journal) -> None:
    someone, session_id = await home(service.url)
    async with SocketReader(journal, "reader", service.url, session_id, token=someone.access) as reader:
        await reader.say("/count 120")
        await reader.tokens(30)
        reader.drop()
        await reader.event("resumed")
        await reader.turn_ended()
        assert reader.view.texts() == [counted(120)]
        assert len(journal.events("reader", "session_state")) == 1, "the first connection's"


async def test_an_event_source_resumes_by_its_last_id(service: Service, journal: Journal) -> None:
    someone, session_id = await home(service.url)
    async with SSEReader(
        journal, "reader", service.url, session_id, token=someone.access, content="/count 120"
    ) as reader:
        await reader.tokens(30)
        reader.drop()
        await reader.turn_ended()
        assert reader.view.texts() == [counted(120)]
        assert reader.statuses == [200, 200]


async def test_stop_works_by_frame_and_by_request(service: Service, journal: Journal) -> None:
    someone, session_id = await home(service.url)
    async with SocketReader(journal, "reader", service.url, session_id, token=someone.access) as reader:
        await reader.say("/count 100000")
        await reader.tokens(5)
        await reader.send({"type": "stop"})
        await reader.turn_ended(1)
        await reader.say("/count 100000")
        await reader.until(lambda: all(reader.view.texts()[1:] or [""]), what="the second turn's text")
        assert await stop(service.url, someone.access, session_id)
        await reader.turn_ended(2)
        replies = [row for row in await messages(service.url, someone.access, session_id) if row["role"] == "assistant"]
        assert [row["status"] for row in replies] == ["stopped"] * 2
        assert [row["content"] for row in replies] == reader.view.texts()
        assert all(row["content"] and counted(100_000).startswith(row["content"]) for row in replies)


@pytest.mark.parametrize("kind", [SocketReader, SSEReader])
async def test_a_slow_reader_gets_everything(
    service: Service, journal: Journal, kind: type[SocketReader | SSEReader]
) -> None:
    """It takes 200 kB a second of an answer that is made at once; the one beside it need not wait for it."""
    someone, session_id = await home(service.url, "hasty")
    async with (
        SocketReader(journal, "quick", service.url, session_id, token=someone.access) as quick,
        Narrow.before(service.url, buffer=4096) as proxy,
    ):
        proxy.limit(200_000)
        asks = {"content": "/count 8000"} if kind is SSEReader else {}
        async with kind(journal, "slow", proxy.through(service.url), session_id, token=someone.access, **asks) as slow:
            if kind is SocketReader:
                await quick.say("/count 8000")
            await quick.turn_ended()
            assert slow.view.turns_ended == 0
            await slow.turn_ended(within=30)
            assert quick.view.texts() == slow.view.texts() == [counted(8_000)]
            assert slow.connections == 1


async def test_a_refused_socket_is_told_why(service: Service, journal: Journal) -> None:
    """By a code after accept, which is all that a browser's page can see."""
    someone, session_id = await home(service.url)
    for token, session, code in (("nonsense", session_id, 4401), (someone.access, "nowhere", 4404)):
        async with SocketReader(journal, f"{code}", service.url, session, token=token) as reader:
            assert reader.codes == [code]


async def test_a_frame_that_is_too_much_closes_its_socket(
    request: pytest.FixtureRequest, service: Service, journal: Journal
) -> None:
    """Daphne's library sends no code of the standard's own but 1000: there it is one of ours that also says stop."""
    someone, session_id = await home(service.url)
    daphne = request.node.callspec.params["service"] == "daphne"
    for frame, code in ((b"binary", 1003), ("x" * 70_000, 1009)):
        async with SocketReader(journal, f"{code}", service.url, session_id, token=someone.access) as reader:
            await reader.event("session_state")
            await reader.send(frame)
            await reader.ended()
            assert reader.codes == [4400 if daphne else code]


async def test_no_token_reaches_a_log(service: Service) -> None:
    """Request lines are printed by every server in its own way, with what stands behind the question mark or not."""
    someone, session_id = await home(service.url)
    shown = {"token": someone.access, "anonymous_token": someone.anonymous_token, "ticket": "CANARY-1"}
    for name, token in shown.items():
        query = {"before": "1", name: token, "after": "2"}
        referer = {"Referer": f"{service.url}/?{name}={token}"}
        for path in (f"/api/sessions/{session_id}/stream/", f"/ws/chat/session/{session_id}/"):
            await call(service.url, "GET", path, params=query, headers=referer)
        reader = SocketReader(Journal(), "reader", service.url, session_id, query=query, resume=False)
        async with reader:
            await reader.until(lambda reader=reader: reader.connections or reader.finished)
    log = service.log()
    assert [text for text in ("CANARY", someone.access, someone.anonymous_token) if text in log] == []
    assert "Logging error" not in log


# What each tells its readers at SIGTERM. Granian cuts them off before the service hears of it; they come back as well.
FAREWELL = {"uvicorn": 1012, "hypercorn": 1012, "granian": 1006, "daphne": 4408}
# CPython before 3.12.2 prints this for every connection that its server cancels, which is how hypercorn ends.
CANCELLED = re.compile(r"Exception in callback StreamReaderProtocol.*?CancelledError\n", re.DOTALL)


@pytest.mark.parametrize("server", SERVERS)
async def test_sigterm_ends_it_cleanly(server: str, tmp_path: Path, journal: Journal) -> None:
    """An answer runs and a socket reads it. The process is gone in time and says nothing ugly; the next one has what
    was shown of the answer, ended."""
    async with under(server, tmp_path) as service:
        someone, session_id = await home(service.url)
        async with SocketReader(journal, "reader", service.url, session_id, token=someone.access) as reader:
            await reader.say("/count 100000")
            await reader.tokens(20)
            journal.fault("SIGTERM")
            service.terminate()
            assert await service.ended(within=25) in (0, -signal.SIGTERM), service.log()
            await service.launch(0)
            await reader.until(lambda: reader.connections > len(reader.codes), what="a new connection")
            await reader.turn_ended()
            assert reader.codes[0] == FAREWELL[server], journal.story()
            # Daphne accepts connections until its process is gone: a reader that is quick is cut off there once more.
            assert set(reader.codes[1:]) <= ({1006, 4408} if server == "daphne" else set()), journal.story()
            stored = (await messages(service.url, someone.access, session_id))[1]
            assert stored["status"] == "interrupted"
            assert reader.view.texts() == [stored["content"]]
            assert counted(100_000).startswith(stored["content"])
        log = CANCELLED.sub("", service.log())
    assert "Traceback" not in log and "Exception" not in log, log[-6000:]


async def test_a_server_without_lifespan_lets_an_answer_finish(tmp_path: Path, journal: Journal) -> None:
    """Daphne says nothing of its end: the service takes the signal first, and starts nothing new meanwhile."""
    async with under("daphne", tmp_path, PARLEY_DRAIN="15") as service:
        someone, session_id = await home(service.url)
        async with SocketReader(journal, "reader", service.url, session_id, token=someone.access) as reader:
            await reader.say("/count 250")
            await reader.tokens(20)
            service.terminate()
            await until(lambda: refuses_new_turns(service, someone), what="a service that drains")
            service.terminate()  # a platform may say it twice
            await reader.turn_ended()
            assert reader.view.texts() == [counted(250)]
            assert await service.ended(within=25) == 0


async def refuses_new_turns(service: Service, someone: Guest) -> bool:
    ready = await call(service.url, "GET", "/readyz")
    if ready.status_code == 200:
        return False
    made = await new_session(service.url, someone.access, model_a_id="calm")
    refused = await call(
        service.url, "POST", "/api/messages/stream/", someone.access, json=short_body(made["id"], "more")
    )
    assert (refused.status_code, refused.json()["error"]) == (503, "draining")
    return True


async def test_a_server_without_lifespan_sends_its_readers_elsewhere(
    postgres_server: Postgres, redis_server: Redis, journal: Journal
) -> None:
    """An event stream of a turn that another worker answers ends without its last event, and goes on there."""
    environment = ENVIRONMENT | {"DATABASE_URL": postgres_server.create_database(), "REDIS_URL": redis_server.url}
    async with Service(environment, workers=2, server="daphne", command=COMMANDS["daphne"].split()) as service:
        someone, session_id = await home(service.urls[0])
        bases = service.urls
        async with SocketReader(journal, "socket", bases[0], session_id, token=someone.access) as socket:
            await socket.say("/count 300")
            await socket.tokens(20)
            async with SSEReader(journal, "sse", bases[::-1], session_id, token=someone.access) as sse:
                await sse.tokens(5)
                service.terminate(1)
                assert await service.ended(1, within=10) == 0
                await asyncio.gather(socket.turn_ended(), sse.ended(within=20))
                assert socket.view.texts() == sse.view.texts() == [counted(300)]
                assert sse.statuses == [200, 200]
                assert [entry.data["code"] for entry in journal.of("sse", "closed")] == ["eof", "done"]
    assert "Traceback" not in service.log()
