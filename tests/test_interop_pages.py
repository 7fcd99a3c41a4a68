"""Chats in a page, by a real Chromium: React's `useChat` with nothing but its defaults, and deep-chat.

The service is as it starts on a developer's machine: a page of its own address needs no token.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from tests.browser import chromium
from tests.conftest import absent, store
from tests.harness import until
from tests.harness.api import call
from tests.harness.node import HERE, packages
from tests.harness.proxy import Proxy
from tests.harness.service import Service
from tests.test_browser import counted

if not all(map(shutil.which, ("node", "npm"))):
    absent("the tests of other people's chats need Node.js and npm (apt-get install nodejs npm)")

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="module")]
MODELS = [
    {"id": name, "provider": "demo", "personality": personality, "pace": 0.02}
    for name, personality in (("calm", "scholar"), ("other", "poet"))
]

BUILD = """
const options = {entryPoints: [process.argv[1]], bundle: true, format: 'iife', write: false, logLevel: 'error',
                 define: {'process.env.NODE_ENV': '"development"'}}
process.stdout.write(require('esbuild').buildSync(options).outputFiles[0].text)
"""


@pytest.fixture(scope="module")
def bundles() -> dict[str, str]:
    """The scripts as a page loads them: each with its packages in one text."""
    if problem := packages():
        absent(problem)
    built = {}
    for name in ("use_chat", "deep_chat"):
        command = ["node", "-e", BUILD, f"./{name}.mjs"]
        built[name] = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout
    return built


@pytest.fixture(scope="module")
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    environment = store("sqlite", request, tmp_path_factory.mktemp("service"))
    with Service(environment | {"PARLEY_MODELS": json.dumps(MODELS)}, server="serve") as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-6000:]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Any]:
    async with chromium() as running:
        yield running


class Tab:
    """A page of the service's own address with one of the scripts in it."""

    def __init__(self, page: Any, base: str, script: str, given: dict[str, Any]) -> None:
        self.page, self.base, self.script, self.given = page, base, script, given

    async def load(self) -> None:
        await self.page.goto(f"{self.base}/livez")
        await self.page.evaluate("given => { window.given = given; document.body.replaceChildren() }", self.given)
        await self.page.evaluate(self.script)
        await self.shows("window.chat && true", "the chat")

    async def shows(self, condition: str, what: str) -> Any:
        """Wait until an expression about the page's `chat` and what it has `shown` holds; its value."""
        return await (await self.page.wait_for_function(condition, timeout=20_000)).json_value()

    async def shown(self) -> list[dict[str, Any]]:
        said: list[dict[str, Any]] = await self.page.evaluate("window.shown")
        return said


async def tab(browser: Any, base: str, script: str, **given: Any) -> Tab:
    opened = Tab(await browser.new_page(), base, script, given)
    await opened.load()
    return opened


async def test_use_chat_with_its_defaults(service: Service, browser: Any, bundles: dict[str, str]) -> None:
    page = await tab(browser, service.url, bundles["use_chat"], id=f"chat-{uuid.uuid4()}", resume=True)
    await page.shows("window.chat?.status === 'ready'", "an empty chat to be content")
    for turn, count in enumerate((20, 5), 1):
        await page.page.evaluate(f"void window.chat.sendMessage({{text: '/count {count}'}})")
        await page.shows(f"window.shown.length === {2 * turn} && window.chat.status === 'ready'", "the answer's end")
        assert (await page.shown())[-1]["texts"] == [counted(count)]
    assert [message["role"] for message in await page.shown()] == ["user", "assistant"] * 2


async def test_use_chat_with_two_models(service: Service, browser: Any, bundles: dict[str, str]) -> None:
    choice = {"body": {"mode": "compare", "model_a_id": "calm", "model_b_id": "other"}}
    page = await tab(browser, service.url, bundles["use_chat"], id=f"chat-{uuid.uuid4()}", options=choice)
    await page.page.evaluate("void window.chat.sendMessage({text: '/count 10'})")
    await page.shows("window.shown.length === 2 && window.chat.status === 'ready'", "the answer")
    assert (await page.shown())[-1]["texts"] == [counted(10), counted(10)]


async def test_use_chat_shows_an_error_as_a_sentence(service: Service, browser: Any, bundles: dict[str, str]) -> None:
    page = await tab(browser, service.url, bundles["use_chat"], id=f"chat-{uuid.uuid4()}")
    await page.page.evaluate("void window.chat.sendMessage({text: '/fail 2'})")
    assert await page.shows("window.chat.error?.message", "the error") == "The model could not be reached."
    wrong = await tab(
        browser, service.url, bundles["use_chat"], id=f"chat-{uuid.uuid4()}", options={"body": {"model": "x"}}
    )
    await wrong.page.evaluate("void window.chat.sendMessage({text: 'Hello'})")
    assert await wrong.shows("window.chat.error?.message", "the refusal") == "model: there is no such model"


async def test_use_chat_loaded_again_goes_on_and_stops(service: Service, browser: Any, bundles: dict[str, str]) -> None:
    """Loaded again in the middle, and cut off after that: the page has the whole answer, and any tab may stop it."""
    id = f"chat-{uuid.uuid4()}"
    async with Proxy.before(service.url) as proxy:
        page = await tab(browser, proxy.through(service.url), bundles["use_chat"], id=id, resume=True)
        await page.page.evaluate("void window.chat.sendMessage({text: '/long 100000'})")
        await page.shows("window.shown.at(-1)?.texts.join('').length > 20", "the answer")
        await page.load()
        await page.shows("window.shown.at(-1)?.texts.join('').length > 40", "the answer in the page loaded again")
        for _ in range(3):
            known = len((await page.shown())[-1]["texts"][0])
            proxy.close_all()
            await page.shows("window.chat.status === 'error'", "the cut to be noticed")
            await page.page.evaluate("void window.chat.resumeStream()")
            await page.shows(f"window.shown.at(-1).texts.join('').length > {known}", "the answer to go on")
        stopped = await call(service.url, "POST", f"/api/chat/{id}/stop")
        assert stopped.json() == {"stopped": True}
        await page.shows("window.chat.status === 'ready'", "the end")
    stored = (await call(service.url, "GET", f"/api/ag-ui?threadId={id}")).json()["messages"]
    assert [each["parts"][0]["content"] for each in stored][-1] == (await page.shown())[-1]["texts"][0]


async def test_deep_chat(service: Service, browser: Any, bundles: dict[str, str]) -> None:
    page = await tab(browser, service.url, bundles["deep_chat"], id=f"deep-{uuid.uuid4()}")
    for count in (15, 4):

        async def told(count: int = count) -> bool:
            messages = await page.page.evaluate("window.chat.getMessages()")
            return bool(messages) and messages[-1].get("text") == counted(count)

        await page.page.evaluate(f"window.chat.submitUserMessage({{text: '/count {count}'}})")
        await until(told, 20, "the answer")
        # Until its request has ended deep-chat takes no other message, and says nothing of that; its button shows it.
        ready = "window.chat.shadowRoot.querySelector('.submit-button, .disabled-button') !== null"
        await page.shows(ready, "the request's end")
    assert await page.page.evaluate("window.problem ?? null") is None


async def test_deep_chat_is_stopped_elsewhere_and_shows_a_refusal(
    service: Service, browser: Any, bundles: dict[str, str]
) -> None:
    id = f"deep-{uuid.uuid4()}"
    page = await tab(browser, service.url, bundles["deep_chat"], id=id)
    await page.page.evaluate("window.chat.submitUserMessage({text: '/long 100000'})")
    await page.shows("window.chat.getMessages().at(-1)?.text.length > 40", "the answer")
    other = await tab(browser, service.url, bundles["deep_chat"], id=id)
    await other.page.evaluate("window.chat.submitUserMessage({text: 'and me'})")
    await other.shows("window.problem", "the refusal")
    assert (await call(service.url, "POST", f"/api/chat/{id}/stop")).json() == {"stopped": True}

    async def same() -> bool:
        stored = (await call(service.url, "GET", f"/api/ag-ui?threadId={id}")).json()["messages"]
        shown = await page.page.evaluate("window.chat.getMessages().at(-1).text")
        return bool(stored[-1]["parts"][0]["content"] == shown)

    await until(same, 20, "the whole answer")
