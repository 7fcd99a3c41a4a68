"""What a page can do with the service: its JavaScript, run by a real Chromium.

Pages come from this machine under three names: the service's own, `good.example`, which it is told to allow, and
`evil.example`, which it is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from tests.browser import chromium, website
from tests.conftest import CLOSED, store
from tests.harness.api import Guest, guest, messages, new_session, stop, ticket
from tests.harness.proxy import Proxy
from tests.harness.service import ROOT, Service
from tests.harness.view import put_together

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="module")]

PACED = json.dumps([{"id": "calm", "provider": "demo", "personality": "scholar", "pace": 0.01}])


def counted(number: int) -> str:
    return " ".join(f"⟨{n}⟩" for n in range(number))


# -- the browser and the pages it shows


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Any]:
    async with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    """The port of a web server with one empty page, whatever it is called."""
    with website(lambda path: ({}, "<!doctype html><title>a page</title>")) as port:
        yield port


@pytest.fixture(scope="module")
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, site: int, browser: Any
) -> Iterator[Service]:
    environment = CLOSED | store("sqlite", request, tmp_path_factory.mktemp("browser"))
    environment |= {"ALLOWED_ORIGINS": f"http://good.example:{site}", "PARLEY_MODELS": PACED}
    with Service(environment, server="serve") as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-6000:]


@pytest.fixture(scope="module")
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, browser: Any) -> Iterator[Service]:
    """Started as a developer starts it, with nothing set."""
    with Service(store("sqlite", request, tmp_path_factory.mktemp("open")), server="serve") as running:
        yield running


class Page:
    """A tab at some address. What its scripts need is handed to them as `given`; what they resolve to comes back."""

    def __init__(self, tab: Any) -> None:
        self.tab = tab

    async def run(self, script: str, **given: Any) -> Any:
        return await self.tab.evaluate(f"async (given) => {{ {TOOLS}\n{script} }}", given)


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Any) -> AsyncIterator[Any]:
    """Opens a tab at an address; at its end none of them has failed by itself."""
    context = await browser.new_context()
    problems: list[str] = []

    async def open_at(address: str) -> Page:
        tab = await context.new_page()
        tab.on("pageerror", lambda problem: problems.append(str(problem)))
        await tab.goto(address)
        return Page(tab)

    yield open_at
    await context.close()
    assert problems == []


TOOLS = r"""
const bearer = given.token ? {Authorization: `Bearer ${given.token}`} : {};
const json = {'Content-Type': 'application/json', ...bearer};
const within = (promise, what) => Promise.race([promise,
    new Promise((_, fail) => setTimeout(() => fail(new Error(`not within 10 s: ${what}`)), 10000))]);

// Opens a socket and keeps what it says, until `last` is said or it ends.
const hear = (url, protocols, last, say) => within(new Promise((done) => {
    const socket = new WebSocket(url, protocols), events = [];
    socket.onopen = () => say && socket.send(JSON.stringify(say));
    socket.onmessage = ({data}) => {
        events.push(JSON.parse(data));
        if (events.at(-1).type === last) socket.close(1000);
    };
    socket.onclose = ({code, reason, wasClean}) => done({events, code, reason, wasClean, protocol: socket.protocol});
}), 'the end of a socket');

// Posts a message and reads the answer piece by piece; at the first one it asks how far the answer is. `most`: after so
// many pieces it stops the answer.
const post = async (accept, content, most) => {
    const answer = await fetch(`${given.base}/api/messages/stream/`, {method: 'POST', headers: {...json, Accept: accept},
        body: JSON.stringify({session_id: given.session, content})});
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader(), pieces = [];
    let then = null;
    for (;;) {
        const {done, value} = await reader.read();
        if (done) break;
        pieces.push(value);
        if (!then && pieces.join('').includes('⟨0⟩'))
            then = await (await fetch(`${given.base}/api/messages/?session_id=${given.session}`, {headers: bearer})).json();
        if (pieces.length === most)
            await fetch(`${given.base}/api/sessions/${given.session}/stop/`, {method: 'POST', headers: bearer});
    }
    return {status: answer.status, type: answer.headers.get('content-type'), turn: answer.headers.get('x-turn-id'),
        pieces, then: then.at(-1).status};
};
"""


async def home(base: str) -> tuple[Guest, dict[str, str]]:
    """A guest with a session, and what their page has to know."""
    someone = await guest(base)
    session_id = (await new_session(base, someone.access))["id"]
    socket = f"ws{base.removeprefix('http')}/ws/chat/session/{session_id}/"
    return someone, {"base": base, "token": someone.access, "session": session_id, "socket": socket}


def own(service: Service) -> str:
    """A page of the service itself: any answer will do."""
    return f"{service.url}/livez"


# -- the four lines


async def test_the_four_lines_of_the_contract_work(opened: Service, page: Any) -> None:
    """Without an account or a session, on a service that was started a second ago."""
    tab = await page(own(opened))
    heard = await tab.run(
        """
        const url = given.base.replace('http', 'ws') + '/ws/chat/session/test123/';
        return await hear(url, [], 'test', {type: 'test', message: 'Hello'});
        """,
        base=opened.url,
    )
    assert [event["type"] for event in heard["events"]] == ["connection_established", "session_state", "test"]
    assert heard["events"][-1] == {"type": "test", "requestId": "session", "message": "Hello"}
    assert (heard["code"], heard["wasClean"]) == (1000, True)


async def test_the_readme_s_lines_work_as_they_stand(opened: Service, page: Any) -> None:
    """Pasted into a page of a developer's own, at another port, they print the answer to Hello."""
    lines = re.search(r"```js\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert lines is not None
    lines = lines[1].replace("localhost:8001", f"localhost:{opened.ports[0]}")
    tab = await page(own(opened))
    printed = await tab.run(
        """
        const console = {log: (event) => { events.push(event); event.type === 'turn_complete' && finished(); }};
        const events = [];
        let finished;
        const end = new Promise((done) => { finished = done; });
        new Function('console', given.lines)(console);
        await within(end, 'the answer');
        return events;
        """,
        lines=lines,
    )
    assert printed[0]["type"] == "connection_established"
    answer = "".join(event["chunk"] for event in printed if event["type"] == "message_chunk")
    assert "demo model" in answer and "/help" in answer
    assert printed[-2]["message"]["content"] == answer


# -- sockets


@pytest.mark.parametrize("way", ["subprotocol", "ticket", "query", "frame"])
async def test_a_page_shows_its_token_in_any_way_a_page_can(service: Service, page: Any, way: str) -> None:
    someone, given = await home(service.url)
    if way == "ticket":
        given["ticket"] = await ticket(service.url, someone.access)
    heard = await (await page(own(service))).run(
        {
            "subprotocol": "return hear(given.socket, ['parley.v1', `t.${given.token}`], 'session_state')",
            "ticket": "return hear(`${given.socket}?ticket=${given.ticket}`, [], 'session_state')",
            "query": "return hear(`${given.socket}?token=${given.token}`, [], 'session_state')",
            "frame": "return hear(given.socket, [], 'session_state', {type: 'auth', token: given.token})",
        }[way],
        **given,
    )
    assert heard["events"][0]["user"]["id"] == someone.id
    assert heard["protocol"] == ("parley.v1" if way == "subprotocol" else "")


async def test_a_page_sees_why_it_was_refused(service: Service, page: Any) -> None:
    """A refusal of the handshake would be a bare 1006 to it."""
    _, given = await home(service.url)
    tab = await page(own(service))
    bad = await tab.run("return hear(given.socket, ['parley.v1', 't.nonsense'])", **given)
    assert (bad["code"], bad["reason"], bad["events"]) == (4401, "authentication required", [])
    elsewhere = given | {"socket": given["socket"].replace(given["session"], "nowhere")}
    lost = await tab.run("return hear(given.socket, ['parley.v1', `t.${given.token}`])", **elsewhere)
    assert (lost["code"], lost["reason"], lost["events"]) == (4404, "no such session", [])


async def test_two_tabs_see_every_token_once_and_one_resumes(service: Service, page: Any) -> None:
    """The second tab loses its connection in the middle and comes back with the cursor of its last event."""
    someone, given = await home(service.url)
    async with Proxy.before(service.url) as proxy:
        first, second = await page(own(service)), await page(own(service))
        follow = """
            const events = window.events = [];
            let cursor = '';
            const open = () => {
                const socket = window.socket = new WebSocket(given.socket + cursor, ['parley.v1', `t.${given.token}`]);
                socket.onmessage = ({data}) => {
                    const event = JSON.parse(data);
                    events.push(event);
                    if (event.cursor) cursor = `?cursor=${event.cursor}`;
                };
                socket.onclose = ({code}) => { events.push({type: 'closed', code}); open(); };
                return new Promise((done) => { socket.onopen = done; });
            };
            await open();
        """
        through = given["socket"].replace(str(service.ports[0]), str(proxy.port))
        await first.run(follow, **given)
        await second.run(follow, **given | {"socket": through})
        await first.run("window.socket.send(JSON.stringify({type: 'message', content: '/count 150'}))")
        await second.tab.wait_for_function(
            "window.events.filter((event) => event.type === 'message_chunk').length > 20"
        )
        proxy.close_all()
        for tab in (first, second):
            await tab.tab.wait_for_function("window.events.at(-1)?.type === 'turn_complete'")
        seen = [await tab.run("return window.events") for tab in (first, second)]
    for events in seen:
        assert put_together(event for event in events if event["type"] != "closed").texts() == [counted(150)]
    assert [event["type"] for event in seen[1]].count("resumed") == 1
    assert [event["type"] for event in seen[1]].count("session_state") == 1
    assert len(await messages(service.url, someone.access, given["session"])) == 2


# -- streams over HTTP


DIALECTS = {
    "text/event-stream": "text/event-stream; charset=utf-8",
    "application/x-ndjson": "application/x-ndjson",
    "*/*": "text/plain; charset=utf-8",
}


@pytest.mark.parametrize("accept", DIALECTS)
async def test_fetch_reads_an_answer_token_by_token(service: Service, page: Any, accept: str) -> None:
    someone, given = await home(service.url)
    answer = await (await page(own(service))).run("return post(given.accept, '/count 2000', 20)", accept=accept, **given)
    assert (answer["status"], answer["type"]) == (200, DIALECTS[accept])
    assert answer["turn"]
    assert answer["then"] in ("pending", "streaming"), "the first token is there long before the last is made"
    whole = (await messages(service.url, someone.access, given["session"]))[1]["content"]
    assert len(answer["pieces"]) >= 20 and counted(2000).startswith(whole.strip())
    said = "".join(answer["pieces"])
    if accept == "*/*":
        lines = said.splitlines()
        assert lines.pop() == 'ad:{"finishReason":"stop"}'
        assert "".join(line.removeprefix('a0:"').removesuffix('"') for line in lines) == whole
    else:
        found = re.findall(r"^(?:data: )?(\{.*\})$", said, re.MULTILINE)
        chunks = [event["chunk"] for event in map(json.loads, found) if event.get("type") == "message_chunk"]
        assert "".join(chunks) == whole


async def test_an_event_source_resumes_by_itself_and_ends_by_itself(service: Service, page: Any) -> None:
    """It comes back with `Last-Event-ID` when its connection breaks, and once more at the end: 204 tells it to stop."""
    someone, given = await home(service.url)
    tab = await page(own(service))
    await tab.run(
        """
        await fetch(`${given.base}/api/messages/stream/`, {method: 'POST', headers: json,
            body: JSON.stringify({session_id: given.session, content: '/count 2000'})});
        """,
        **given,
    )
    async with Proxy.before(service.url) as proxy:
        await tab.run(
            """
            const source = new EventSource(`${given.through}/api/sessions/${given.session}/stream/?token=${given.token}`);
            const said = window.said = {ids: [], opened: 0, done: 0, events: [], source};
            source.onopen = () => { said.opened += 1; };
            for (const kind of ['message_update', 'message_chunk', 'message_complete', 'turn_complete'])
                source.addEventListener(kind, ({data, lastEventId}) => {
                    said.events.push(JSON.parse(data));
                    said.ids.push(lastEventId);
                });
            source.addEventListener('done', () => { said.done += 1; });
            """,
            through=proxy.through(service.url),
            **given,
        )
        await tab.tab.wait_for_function("window.said.events.length > 20")
        proxy.close_all()
        await tab.tab.wait_for_function("window.said.opened === 2")
        assert await stop(service.url, someone.access, given["session"])
        await tab.tab.wait_for_function("window.said.source.readyState === EventSource.CLOSED")
        said = await tab.run("return {...window.said, source: null}")
    events = said["events"]
    assert put_together(events).texts() == [(await messages(service.url, someone.access, given["session"]))[1]["content"]]
    assert said["ids"] == [event["cursor"] for event in events]
    assert (said["opened"], said["done"]) == (2, 1)


# -- pages from elsewhere


CALL = """
    const headers = {...json, 'X-Anonymous-Token': given.anonymous || ''};
    const made = await fetch(`${given.base}/api/sessions/`, {method: 'POST', headers: json, body: '{"mode": "direct"}'});
    const session = await made.json();
    given.session = session.id;
    const answer = await post('text/event-stream', '/count 10');
    const url = given.base.replace('http', 'ws') + `/ws/chat/session/${session.id}/`;
    const heard = await hear(url, ['parley.v1', `t.${given.token}`], 'session_state');
    const source = new EventSource(`${given.base}/api/sessions/${session.id}/stream/?token=${given.token}`);
    const first = await within(new Promise((done, fail) => {
        source.addEventListener('message_update', ({lastEventId}) => done(lastEventId));
        source.onerror = fail;
    }), 'an event');
    source.close();
    return {made: made.status, turn: answer.turn, text: answer.pieces.join(''), code: heard.code,
        state: heard.events.at(-1).type, first};
"""


async def test_a_page_that_is_allowed_may_do_everything(service: Service, page: Any, site: int) -> None:
    """Its requests carry a token, so that Chromium asks first whether they may be sent at all."""
    someone = await guest(service.url)
    tab = await page(f"http://good.example:{site}/")
    done = await tab.run(CALL, base=service.url, token=someone.access)
    assert done["made"] == 201
    assert done["first"] == f"{done['turn']}.start", "a page may read X-Turn-Id"
    assert "⟨9⟩" in done["text"] and "event: done" in done["text"]
    assert (done["state"], done["code"]) == ("session_state", 1000)


FROM_ELSEWHERE = """
    const attempt = (work) => work.then(() => 'went through', (problem) => problem.name);
    const list = `${given.base}/api/sessions/`;
    const source = new EventSource(`${given.base}/api/sessions/${given.session}/stream/?token=${given.token}`);
    const heard = await hear(given.socket, ['parley.v1', `t.${given.token}`], 'session_state');
    return {
        read: await attempt(fetch(list, {headers: bearer})),
        simple: await attempt(fetch(`${given.base}/api/models/`)),
        write: await attempt(fetch(list, {method: 'POST', headers: json, body: '{}'})),
        socket: [heard.code, heard.events],
        source: await within(new Promise((done) => {
            if (source.readyState === EventSource.CLOSED) done('closed');
            source.onerror = () => done('closed');
            source.onopen = () => done('open');
        }), 'an event source'),
    };
"""
NOTHING = {
    "read": "TypeError",
    "simple": "TypeError",
    "write": "TypeError",
    "socket": [1006, []],
    "source": "closed",
}


async def test_a_page_that_is_not_allowed_can_do_nothing(service: Service, page: Any, site: int) -> None:
    """Not even with somebody's token: no answer, no socket, no stream."""
    _, given = await home(service.url)
    for address in (f"http://evil.example:{site}/", f"http://good.example.evil.example:{site}/"):
        assert await (await page(address)).run(FROM_ELSEWHERE, **given) == NOTHING


async def test_a_sandboxed_frame_of_an_allowed_page_can_do_nothing(service: Service, page: Any, site: int) -> None:
    """Its origin is `null`, which anybody's frame could have."""
    _, given = await home(service.url)
    tab = (await page(f"http://good.example:{site}/")).tab
    await tab.set_content("<iframe sandbox='allow-scripts' src='/frame'></iframe>")
    frame = await (await tab.wait_for_selector("iframe")).content_frame()
    await frame.wait_for_load_state()
    assert await frame.evaluate("origin") == "null"
    assert await Page(frame).run(FROM_ELSEWHERE, **given) == NOTHING
