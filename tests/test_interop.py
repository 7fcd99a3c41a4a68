"""Clients that other people wrote, unmodified: curl, httpx, websockets, `ws`, wscat, `eventsource`, Node's own.

What they say is compared to the byte. An answer without end is stopped once a client has shown it in so many pieces: one
that gathers what it should pass on, or a proxy on the way, never gets there.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import websockets.sync.client

from tests.conftest import CLOSED, absent, store
from tests.harness import until
from tests.harness.api import ACCEPT, Guest, guest, messages, new_session, post_turn, short_body, stop, unescape
from tests.harness.node import HERE, packages
from tests.harness.proxy import Proxy
from tests.harness.service import ROOT, Service
from tests.harness.sse import SSEParser
from tests.harness.view import put_together

PACED = json.dumps(
    [
        {"id": name, "provider": "demo", "personality": personality, "pace": 0.01}
        for name, personality in (("calm", "scholar"), ("other", "poet"))
    ]
)
BATTLE = {"mode": "compare", "model_a_id": "calm", "model_b_id": "other"}

if not all(map(shutil.which, ("curl", "node", "npm"))):
    absent("the tests of other people's clients need curl, Node.js and npm (apt-get install curl nodejs npm)")


@pytest.fixture(scope="module")
def node() -> list[str]:
    """The command that runs one of `clients.mjs`; its packages are installed once per change of their lock file."""
    if problem := packages():
        absent(problem)
    major = int(subprocess.run(["node", "--version"], capture_output=True, text=True).stdout[1:].split(".")[0])
    return ["node", *(["--experimental-websocket"] if major < 22 else []), str(HERE / "clients.mjs")]


@pytest.fixture(scope="module", params=["serve", "uvicorn"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Parley's own start, and uvicorn as its manual starts it, with compression offered to sockets."""
    environment = CLOSED | store("sqlite", request, tmp_path_factory.mktemp("service")) | {"PARLEY_MODELS": PACED}
    command = "-m uvicorn {app} --port {port}".split() if request.param == "uvicorn" else None
    with Service(environment, server=request.param, command=command) as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-6000:]


def counted(number: int) -> str:
    return " ".join(f"⟨{n}⟩" for n in range(number))


async def home(base: str, **choice: str) -> tuple[Guest, dict[str, str]]:
    """A guest with a session, and what their client has to know."""
    someone = await guest(base)
    session_id = (await new_session(base, someone.access, **choice))["id"]
    return someone, {"token": someone.access, "session": session_id} | addresses(base, session_id)


def addresses(base: str, session_id: str) -> dict[str, str]:
    return {"base": base, "socket": f"ws{base.removeprefix('http')}/ws/chat/session/{session_id}/"}


ENDLESS = "/count 100000"
PIECES = 20  # after which an answer is stopped


async def end(given: dict[str, str]) -> None:
    """Stop the session's answer, which runs."""
    assert await stop(given["base"], given["token"], given["session"])


async def stored(given: dict[str, str]) -> str:
    """What the service has of the answer that was stopped."""
    reply = (await messages(given["base"], given["token"], given["session"]))[-1]
    assert reply["status"] == "stopped" and counted(3000).startswith(reply["content"].strip())
    return str(reply["content"])


def arena_text(said: bytes) -> str:
    """What the arena's lines say, which are that and nothing else; its clients end them at LF alone."""
    *lines, end, rest = said.split(b"\n")
    assert (end, rest) == (b'ad:{"finishReason":"stop"}', b"")
    assert all(line.startswith(b'a0:"') and line.endswith(b'"') for line in lines)
    return unescape(b"".join(line[4:-1] for line in lines).decode())


@contextlib.asynccontextmanager
async def output(*command: str) -> AsyncIterator[asyncio.StreamReader]:
    """What a command prints, as it prints it; at the end it has gone, content."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    try:
        async with asyncio.timeout(20):
            yield process.stdout
            process.stdin.close()
            code = await process.wait()
            assert code == 0, (await process.stderr.read()).decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def seen_by(command: list[str], client: str, **given: str) -> AsyncIterator[dict[str, Any]]:
    async with output(*command, client, json.dumps(given)) as printed:
        async for line in printed:
            yield json.loads(line)


# -- curl


def curl(given: dict[str, str], accept: str, content: str) -> list[str]:
    body = json.dumps(short_body(given["session"], content))
    headers = [f"Authorization: Bearer {given['token']}", f"Accept: {accept}", "Content-Type: application/json"]
    shown = [word for header in headers for word in ("-H", header)]
    return ["curl", "-sS", "--noproxy", "*", "-N", f"{given['base']}/api/messages/stream/", *shown, "-d", body]


@pytest.mark.parametrize("accept", ["lines", "ndjson", "sse", "text"])
async def test_curl_prints_each_token_when_it_is_made(service: Service, accept: str) -> None:
    _, given = await home(service.url)
    pieces = []
    async with output(*curl(given, ACCEPT[accept], ENDLESS)) as printed:
        while piece := await printed.read(65_536):
            pieces.append(piece)
            if len(pieces) == PIECES:
                await end(given)
    said, text = b"".join(pieces).decode(), await stored(given)
    match accept:
        case "lines":
            assert arena_text(said.encode()) == text
        case "text":
            assert said == text + "\n"
        case "sse":
            assert said.startswith(": ok\nretry: 1000\n\nid: ") and said.endswith("event: done\ndata: {}\n\n")
        case "ndjson":
            assert [json.loads(line)["type"] for line in said.splitlines()][-1] == "turn_complete"


async def test_curl_gets_the_first_bytes_before_there_is_a_token(service: Service) -> None:
    """An event stream opens at once, so that no proxy's clock for the first byte runs out."""
    _, given = await home(service.url)
    async with output(*curl(given, ACCEPT["sse"], "/silent")) as printed:
        assert await printed.readline() == b": ok\n"
        await end(given)
        rest = await printed.read()
    assert rest.endswith(b"event: done\ndata: {}\n\n")


@pytest.mark.parametrize("service", ["serve"], indirect=True)
async def test_curl_that_offers_http2_is_answered_in_http1(service: Service) -> None:
    _, given = await home(service.url)
    async with output(*curl(given, ACCEPT["text"], "/echo kept"), "--http2", "-w", "%{http_version}") as printed:
        assert await printed.read() == b"kept\n1.1"


async def test_the_readme_s_curl_lines_work_as_they_stand(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lines = re.findall(r"^curl .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(lines) >= 2
    environment = store("sqlite", request, tmp_path_factory.mktemp("open"))
    async with Service(environment, server="serve") as opened:
        printed = []
        for line in lines:
            words = shlex.split(line.replace("localhost:8001", f"localhost:{opened.ports[0]}"))
            async with output(*words[:1], "--noproxy", "*", *words[1:]) as said:
                printed.append((await said.read()).decode())
    assert json.loads(printed[0])["status"] == "healthy"
    assert "demo model" in printed[1] and not printed[1].startswith(("{", "a0:"))


# -- Python


AWKWARD = 'back\\slash \\n "quotes" नमस्ते 👋🏽 line\nline\r\n a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg end'


async def test_httpx_reads_lines_as_it_understands_them(service: Service) -> None:
    """It also ends lines at U+2028 and its like, which JSON may hold as they are: they are escaped here."""
    someone, given = await home(service.url)
    headers = {"Authorization": f"Bearer {someone.access}"}
    for accept in ("ndjson", "sse"):
        async with (
            httpx.AsyncClient(base_url=service.url, trust_env=False, headers=headers) as client,
            client.stream(
                "POST",
                "/api/messages/stream/",
                json=short_body(given["session"], f"/echo {AWKWARD}"),
                headers={"Accept": ACCEPT[accept]},
            ) as response,
        ):
            lines = [line.removeprefix("data: ") async for line in response.aiter_lines()]
        events = [json.loads(line) for line in lines if line.startswith('{"type"')]
        assert_whole_turn(events, AWKWARD)


async def test_websockets_in_a_thread_talks_to_a_session(service: Service) -> None:
    """Its simplest client, as a script would use it, with the compression it offers by default."""
    someone, given = await home(service.url)

    def talk() -> list[dict[str, Any]]:
        headers = {"Authorization": f"Bearer {someone.access}"}
        with websockets.sync.client.connect(given["socket"], additional_headers=headers, proxy=None) as socket:
            socket.send(json.dumps({"type": "message", "content": "/count 40"}))
            events = []
            while not events or events[-1]["type"] != "turn_complete":
                events.append(json.loads(socket.recv(timeout=10)))
        return events

    assert_whole_turn(await asyncio.to_thread(talk), counted(40))


def assert_whole_turn(events: list[dict[str, Any]], text: str) -> None:
    """Everything once and in order, and the text it makes."""
    view = put_together(events)
    assert (view.texts(), view.turns_ended) == ([text], 1)


# -- Node


@pytest.mark.parametrize("accept", ["lines", "sse"])
async def test_nodes_fetch_reads_to_the_byte(service: Service, node: list[str], accept: str) -> None:
    """Of an answer that was streamed to it, it has the bytes that everyone gets."""
    _, given = await home(service.url)
    said = []
    async for seen in seen_by(node, "fetch", accept=ACCEPT[accept], content=ENDLESS, **given):
        if "status" in seen:
            assert seen["status"] == 200
            continue
        said.append(base64.b64decode(seen["piece"]))
        if len(said) == PIECES:
            await end(given)
    whole, text = b"".join(said), await stored(given)
    if accept == "lines":
        assert arena_text(whole) == text
    else:
        events = [json.loads(event.data) for event in SSEParser().feed(whole) if event.event != "done"]
        assert_whole_turn(events, text)


async def test_nodes_fetch_reads_awkward_text_to_the_byte(service: Service, node: list[str]) -> None:
    someone, given = await home(service.url)
    given["content"] = f"/echo {AWKWARD}"
    seen = [each async for each in seen_by(node, "fetch", accept=ACCEPT["lines"], **given)]
    whole = b"".join(base64.b64decode(each["piece"]) for each in seen if "piece" in each)
    assert arena_text(whole) == AWKWARD.replace("\r", "")
    assert (await messages(service.url, someone.access, given["session"]))[-1]["content"] == AWKWARD


@pytest.mark.parametrize("client", ["WebSocket", "ws"])
async def test_nodes_sockets_talk_to_a_session(service: Service, node: list[str], client: str) -> None:
    _, given = await home(service.url)
    events, pieces = [], 0
    async for seen in seen_by(node, client, content=ENDLESS, **given):
        events.append(seen)
        pieces += seen.get("type") == "message_chunk"
        if (pieces, seen.get("type")) == (PIECES, "message_chunk"):
            await end(given)
    assert events.pop() == {"closed": 1000, "protocol": "parley.v1" if client == "WebSocket" else ""}
    assert [event["type"] for event in events[:2]] == ["connection_established", "session_state"]
    assert_whole_turn(events, await stored(given))


async def test_wscat_shows_a_turn_to_its_end(service: Service, node: list[str]) -> None:
    _, given = await home(service.url)
    wscat = [node[0], str(HERE / "node_modules" / "wscat" / "bin" / "wscat"), "-c", given["socket"]]
    asked = json.dumps({"type": "message", "content": "/count 40"})
    events: list[dict[str, Any]] = []
    async with output(*wscat, "-H", f"Authorization: Bearer {given['token']}", "-x", asked, "-w", "-1") as printed:
        while not events or events[-1]["type"] != "turn_complete":
            events.append(json.loads(await printed.readline()))
    assert_whole_turn(events, counted(40))


async def turn_seen_by(node: list[str], client: str, given: dict[str, str]) -> AsyncIterator[dict[str, Any]]:
    """What one of Node's clients sees of a turn; EventSource only hears, so somebody else asks."""
    asking = None
    if client == "eventsource":
        asking = asyncio.create_task(post_turn(given["asked"], given["token"], given["session"], given["content"]))
        await until(lambda: messages(given["asked"], given["token"], given["session"]), what="the turn")
    async for seen in seen_by(node, client, **given):
        yield seen
    if asking is not None:
        assert (await asking).ended


@pytest.mark.parametrize("service", ["serve"], indirect=True)
@pytest.mark.parametrize(("client", "cuts"), [("WebSocket", 6), ("ws", 6), ("eventsource", 2)])
async def test_nodes_clients_are_cut_off_and_stopped_elsewhere(
    service: Service, node: list[str], client: str, cuts: int
) -> None:
    """A turn of two models, cut off in every way: each word once, and another tab's stop is its end."""
    someone, given = await home(service.url, **BATTLE)
    heard: list[list[dict[str, Any]]] = [[]]
    others: list[dict[str, Any]] = []
    async with Proxy.before(service.url) as proxy:
        through = given | addresses(proxy.through(service.url), given["session"])
        through |= {"asked": service.url, "content": "/long 100000"}
        async for seen in turn_seen_by(node, client, through):
            event = seen.get("event", seen)
            if "type" not in event:
                others.append(seen)
                continue
            assert seen.get("id") in (None, event.get("cursor"))
            if event["type"] in ("connection_established", "resumed") and len(heard[-1]) > 1:
                heard.append([])
            heard[-1].append(event)
            if event["type"] == "message_chunk" and len(heard) <= cuts:
                proxy.close_all()
            elif event["type"] == "message_chunk" and len(heard[-1]) == 9:
                assert await stop(service.url, someone.access, given["session"])
    rows = await messages(service.url, someone.access, given["session"])
    assert [each["status"] for each in rows] == ["success", "stopped", "stopped"] and len(heard) > cuts
    assert put_together(*heard).texts() == [each["content"] for each in rows[1:]]
    if client == "eventsource":  # having it all, it asked once more, was told so and stopped
        assert others[-2:] == [{"asked": heard[-1][-1]["cursor"]}, {"closed": True}]
    else:
        assert [each["closed"] for each in others] == [1000]


@pytest.mark.parametrize("service", ["serve"], indirect=True)
@pytest.mark.parametrize("client", ["WebSocket", "ws", "eventsource"])
async def test_nodes_clients_hear_how_an_answer_failed(service: Service, node: list[str], client: str) -> None:
    _, given = await home(service.url)
    through = given | {"asked": service.url, "content": "/fail 3"}
    events = [seen.get("event", seen) async for seen in turn_seen_by(node, client, through)]
    *_, complete, over = [event for event in events if "type" in event]
    assert (complete["status"], complete["failure_reason"]) == ("failed", "provider_unavailable")
    assert over["type"] == "turn_complete"
