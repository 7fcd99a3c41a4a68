"""Chats that other people wrote, unmodified, each with its own idea of a stream: the AI SDK's, AG-UI's, TanStack's.

Each has a turn, an arena turn and an error; is cut off again and again and goes on, with one call of the model; and is
stopped from another tab, which is on another worker where there are two.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from tests.conftest import CLOSED, STORES, absent, store
from tests.harness import until
from tests.harness.api import Guest, call, guest, messages, new_session
from tests.harness.chaos import KEY, models
from tests.harness.client import Journal, SocketReader
from tests.harness.node import Client, Node, packages
from tests.harness.proxy import Proxy
from tests.harness.service import Service
from tests.vendors import Vendors

if not all(map(shutil.which, ("node", "npm"))):
    absent("the tests of other people's chats need Node.js and npm (apt-get install nodejs npm)")

pytestmark = pytest.mark.asyncio(loop_scope="module")
SDKS = ("ai5", "ai6", "ai", "socket")  # the versions of `ai` over SSE, and its newest over a socket
CHATS = (*SDKS, "tanstack", "agui")
ENDLESS = "[[tokens:100000 pace:0.02 id:e]]"
ONE_STORE = pytest.mark.parametrize("service", ["sqlite"], indirect=True)  # for what no storage has a part in
COMPARE = {"mode": "compare", "model_a_id": "alpha", "model_b_id": "beta"}
CUTS = 6


@pytest.fixture(scope="module")
def vendors() -> Iterator[Vendors]:
    if problem := packages():
        absent(problem)
    with Vendors() as running:
        yield running


@pytest.fixture(scope="module", params=STORES)
def service(
    request: pytest.FixtureRequest, vendors: Vendors, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """Its models are of one API: to import another SDK takes a second in each worker."""
    alpha = models(vendors)[0]
    offered = json.dumps([alpha, alpha | {"id": "beta", "model_code": "fake-beta", "display_name": "Beta", "vendor": "B"}])
    environment = CLOSED | store(request.param, request, tmp_path_factory.mktemp("service"))
    environment |= {"PARLEY_MODELS": offered, "VENDOR_KEY": KEY}
    environment |= {"PARLEY_FIRST_TOKEN_TIMEOUT": "20", "PARLEY_IDLE_TIMEOUT": "20"}  # the vendor is in the tests' process
    with Service(environment, workers=1 if request.param == "sqlite" else 2) as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-6000:]


NODES: dict[str, Node] = {}  # the process that each client's tabs are in: all versions of `ai` share one


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def nodes(vendors: Vendors) -> AsyncIterator[None]:
    """vendors: with them the packages are there, without which a process ends at once."""
    async with node_of("ai") as sdks, node_of("tanstack") as tanstack, node_of("agui") as agui:
        NODES.update(dict.fromkeys(SDKS, sdks) | {"tanstack": tanstack, "agui": agui})
        yield


def node_of(name: str) -> Node:
    return Node("ag_ui.mjs", name) if name in ("tanstack", "agui") else Node("ai.mjs")


@contextlib.asynccontextmanager
async def chat(
    base: str, someone: Guest, id: str, name: str, node: Node | None = None, **choice: str
) -> AsyncIterator[Client]:
    """One of the chats, in a tab of its own."""
    given: dict[str, Any] = {"base": base, "token": someone.access, "id": id, "body": choice}
    given["package"] = name.replace("socket", "ai")
    if name == "socket":
        given["socket"] = f"ws{base.removeprefix('http')}/ws/chat/session/{id}/"
    tab = await (node or NODES[name]).open(**given)
    yield tab
    if name == "socket" and node is None:
        await tab.does("leave")


async def newcomer(service: Service, name: str, **choice: str) -> tuple[Guest, str]:
    """A guest, and the id of a chat: a socket's session has to be there, the others' are made by the first message."""
    someone = await guest(service.url)
    if name == "socket":
        return someone, (await new_session(service.url, someone.access, **choice))["id"]
    return someone, f"chat-{uuid.uuid4()}"


def said(vendors: Vendors, place: int = -1) -> str:
    return "".join(vendors.calls[place].sent)


@pytest.mark.parametrize("name", CHATS)
async def test_a_turn_and_another(service: Service, vendors: Vendors, name: str) -> None:
    vendors.reset()
    someone, id = await newcomer(service, name)
    async with chat(service.url, someone, id, name) as tab:
        await tab.does("send", text="[[tokens:30 id:one]]", id="m1")
        assert tab.texts() == [said(vendors)]
        await tab.does("send", text="[[tokens:5 id:two]]", id="m2")
        assert tab.texts() == [said(vendors)]
        assert [message["role"] for message in tab.messages] == ["user", "assistant"] * 2
        assert tab.problems == [] and len(vendors.calls) == 2
        stored = await messages(service.urls[-1], someone.access, id)
        assert [(each["id"], each["content"]) for each in stored] == [
            (each["id"], each["texts"][0]) for each in tab.messages
        ]


@ONE_STORE
@pytest.mark.parametrize("name", CHATS)
async def test_a_turn_of_two_models(service: Service, vendors: Vendors, name: str) -> None:
    vendors.reset()
    someone, id = await newcomer(service, name, **COMPARE)
    async with chat(service.url, someone, id, name, **COMPARE) as tab:
        await tab.does("send", text="[[tokens:30 pace:0.005 id:both]]", id="m1")
        sides = {vendors.calls[n].model: said(vendors, n) for n in (0, 1)}
        assert sorted(tab.texts()) == sorted(sides.values()) and tab.problems == []


@ONE_STORE
@pytest.mark.parametrize("name", CHATS)
async def test_a_model_that_fails_is_said_in_a_sentence(service: Service, vendors: Vendors, name: str) -> None:
    vendors.reset()
    someone, id = await newcomer(service, name)
    async with chat(service.url, someone, id, name) as tab:
        await tab.does("send", text="[[mode:rst after:3]]", id="m1")
        assert tab.problems == ["The model's answer broke off before its end."]
        assert tab.texts() == [said(vendors)]


@pytest.mark.parametrize("name", [name for name in CHATS if name != "agui"])
async def test_cut_off_again_and_again_and_stopped_elsewhere(service: Service, vendors: Vendors, name: str) -> None:
    """After every cut the chat goes on with equal text and the one call; at last another tab ends the answer."""
    vendors.reset()
    someone, id = await newcomer(service, name)
    async with Proxy.before(service.url) as proxy, chat(proxy.through(service.url), someone, id, name) as tab:
        await tab.do("send", text=ENDLESS)
        for _ in range(CUTS):
            await tab.sees_more()  # what comes after the cut: a connection that is not there yet cannot be cut
            proxy.close_all()
            if name == "tanstack":
                await tab.sees(lambda seen: seen.get("after"), "the chat to ask again by itself")
            else:
                await tab.sees(lambda seen: seen.get("status") == "error", "the chat to notice")
                await tab.do("resume")
                await tab.sees(lambda seen: seen.get("status") == "streaming", "the chat to go on")
        stopping = await call(service.urls[-1], "POST", f"/api/chat/{id}/stop", someone.access)
        assert stopping.json() == {"stopped": True}
        await tab.sees(lambda seen: seen.get("done") in ("resume", "send"), "the end")
        stored = await messages(service.url, someone.access, id)
        assert [each["status"] for each in stored] == ["success", "stopped"]
        assert tab.texts() == [stored[-1]["content"]] and said(vendors).startswith(stored[-1]["content"])
        assert len(tab.messages) == 2 and len(vendors.calls) == 1


async def test_ag_ui_asks_again_after_a_cut_and_is_stopped_elsewhere(service: Service, vendors: Vendors) -> None:
    """Its client does not resume: a run of a message that is being answered tells that answer from its start."""
    vendors.reset()
    someone, id = await newcomer(service, "agui")
    async with Proxy.before(service.url) as proxy, chat(proxy.through(service.url), someone, id, "agui") as tab:
        await tab.do("send", text=ENDLESS, id="m1")
        for _ in range(3):
            await tab.sees_more()
            proxy.close_all()
            await tab.sees(lambda seen: "failed" in seen, "the client to notice")
            await tab.do("again")
        await tab.sees_more()
        assert (await call(service.urls[-1], "POST", f"/api/chat/{id}/stop", someone.access)).json() == {"stopped": True}
        await tab.sees(lambda seen: seen.get("done") == "again", "the end")
        stored = await messages(service.url, someone.access, id)
        assert [each["status"] for each in stored] == ["success", "stopped"]
        assert tab.texts() == [stored[-1]["content"]] and len(vendors.calls) == 1


@pytest.mark.parametrize("name", SDKS)
async def test_a_page_that_was_loaded_again_is_told_the_whole_answer(
    service: Service, vendors: Vendors, name: str
) -> None:
    vendors.reset()
    someone, id = await newcomer(service, name)
    async with node_of(name) as node, chat(service.url, someone, id, name, node) as first:
        await first.do("send", text=ENDLESS)  # in a process of its own: with it the page has gone, without a word
        await first.sees(lambda _: "".join(first.texts()), "the first token")
    async with chat(service.urls[-1], someone, id, name) as again:
        await again.do("resume")
        await again.sees(lambda _: "".join(again.texts()), "the answer")
        await call(service.url, "POST", f"/api/chat/{id}/stop", someone.access)
        await again.sees(lambda seen: seen.get("done"), "its end")
        stored = await messages(service.url, someone.access, id)
        assert again.texts() == [stored[-1]["content"]]
        await again.does("resume")  # nothing runs any more: it is told so, and is content
        assert again.problems == [] and again.texts() == [stored[-1]["content"]] and len(vendors.calls) == 1


@pytest.mark.parametrize("name", SDKS)
async def test_what_was_said_is_edited_and_answered_again(service: Service, vendors: Vendors, name: str) -> None:
    """A message that is edited, or answered again, takes the place of the old one and of all that followed it."""
    vendors.reset()
    someone, id = await newcomer(service, name)
    async with chat(service.url, someone, id, name) as tab:

        async def holds(*texts: str) -> None:
            shown = [(each["id"], each["texts"][0]) for each in tab.messages]
            stored = [(each["id"], each["content"]) for each in await messages(service.urls[-1], someone.access, id)]
            assert [text for _, text in shown] == [*texts, said(vendors)] and shown == stored and tab.problems == []

        for number in range(3):
            await tab.does("send", text=f"[[tokens:9 id:n{number}]]")
        first, answer, second = [each["id"] for each in tab.messages[:3]]
        await tab.does("again")
        await holds("[[tokens:9 id:n0]]", said(vendors, 0), "[[tokens:9 id:n1]]", said(vendors, 1), "[[tokens:9 id:n2]]")
        await tab.does("edit", text="[[tokens:5 id:other]]", messageId=second)
        await holds("[[tokens:9 id:n0]]", said(vendors, 0), "[[tokens:5 id:other]]")
        async with SocketReader(Journal(), "other tab", service.urls[-1], id, token=someone.access) as other:
            await other.event("session_state")
            await tab.does("again", messageId=answer)
            await holds("[[tokens:9 id:n0]]")
            await other.until(lambda: other.view.texts()[-1:] == [said(vendors)], what="the new answer")
            state = await other.event("session_state", after=1)
            assert [each["id"] for each in state["messages"]] == [each["id"] for each in tab.messages]
            assert tab.messages[0]["id"] == first and other.view.texts()[-1] == said(vendors)
        assert len(vendors.calls) == 6
        assert "n1" not in json.dumps(vendors.calls[-1].body) and "n1" not in json.dumps(vendors.calls[-2].body)


@ONE_STORE
@pytest.mark.parametrize("name", SDKS)
async def test_what_is_refused_is_said_in_a_sentence(service: Service, vendors: Vendors, name: str) -> None:
    vendors.reset()
    someone, id = await newcomer(service, name)
    async with chat(service.url, someone, id, name) as tab, chat(service.url, someone, id, name) as other:
        await tab.do("send", text=ENDLESS)
        await tab.sees(lambda _: "".join(tab.texts()), "the first token")
        await other.does("send", text="and me")
        assert other.problems == ["An answer is still being written in this session."]
        await call(service.url, "POST", f"/api/chat/{id}/stop", someone.access)
        await tab.sees(lambda seen: seen.get("done"), "its end")


async def test_the_sockets_own_stop_ends_the_answer(service: Service, vendors: Vendors) -> None:
    """Its `abort` is a user's stop; a page that only gives up a first attempt to resume stops nothing."""
    vendors.reset()
    someone, id = await newcomer(service, "socket")
    async with chat(service.url, someone, id, "socket") as tab, chat(service.urls[-1], someone, id, "socket") as other:
        await tab.do("send", text=ENDLESS)
        await tab.sees(lambda _: "".join(tab.texts()), "the first token")
        await other.do("resume")
        await other.do("resume")  # the second one takes the place of the first
        await other.sees(lambda _: len("".join(other.texts())) > 400, "the answer to go on")
        await other.do("stop")
        stored = lambda: messages(service.url, someone.access, id)  # noqa: E731
        await until(lambda: _ended(stored), what="the end")
        await tab.sees(lambda seen: seen.get("done") == "send", "the end in the first tab")
        assert tab.texts() == [(await stored())[-1]["content"]]


async def _ended(stored: Any) -> bool:
    return (await stored())[-1]["status"] == "stopped"


async def test_tanstack_joins_and_reads_a_thread_it_did_not_start(service: Service, vendors: Vendors) -> None:
    vendors.reset()
    someone, id = await newcomer(service, "tanstack")
    async with (
        chat(service.url, someone, id, "tanstack") as first,
        chat(service.urls[-1], someone, id, "tanstack") as second,
    ):
        await first.does("send", text="[[tokens:4 id:before]]")
        await first.do("send", text=ENDLESS)
        await first.sees(lambda _: "e:0" in "".join(first.texts()), "the first token")
        await second.do("hydrate")
        found = (await second.sees(lambda seen: "hydrated" in seen, "the thread"))["hydrated"]
        assert [message["parts"][0]["content"] for message in found["messages"]] == [
            "[[tokens:4 id:before]]",
            said(vendors, 0),
            ENDLESS,
        ]
        await second.do("join", runId=found["activeRun"]["runId"])
        await second.sees(lambda seen: "delta" in seen.get("joined", {}), "the answer")
        await call(service.url, "POST", f"/api/chat/{id}/stop", someone.access)
        await asyncio.gather(*[tab.sees(lambda seen: seen.get("done"), "the end") for tab in (first, second)])
        joined = [seen["joined"] for seen in second.seen if "joined" in seen]
        stored = await messages(service.url, someone.access, id)
        assert "".join(event.get("delta", "") for event in joined) == stored[-1]["content"]
        assert joined[-1]["type"] == "RUN_FINISHED" and len(vendors.calls) == 2


async def test_tanstack_joins_an_answer_made_again(service: Service, vendors: Vendors) -> None:
    """Each run is found by the id its client gave it, the second one of a message as well as the first."""
    vendors.reset()
    someone, id = await newcomer(service, "tanstack")
    async with chat(service.url, someone, id, "tanstack") as tab, chat(service.urls[-1], someone, id, "tanstack") as two:
        await tab.does("send", text="[[tokens:9 id:run]]")
        await tab.does("again")
        runs = [seen["runId"] for seen in tab.seen if seen.get("asked") == "POST"]
        await two.does("join", runId=runs[1])
        joined = [seen["joined"] for seen in two.seen if "joined" in seen]
        assert "".join(event.get("delta", "") for event in joined) == said(vendors) and len(vendors.calls) == 2
        assert {each["id"] for each in await messages(service.url, someone.access, id)} >= {runs[1]}
        assert tab.texts() == [said(vendors)] and tab.problems == []
