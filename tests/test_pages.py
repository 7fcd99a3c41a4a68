"""The pages: their headers, that they work under their own policy, and what they show of a real service."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from tests.browser import chromium
from tests.conftest import CLOSED, store
from tests.harness.api import call, guest, messages, new_session, post_turn, stop
from tests.harness.service import ROOT, Service
from tests.test_widget import Visit, accessibility, axe, counted

__all__ = ["accessibility"]  # a fixture
pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="module")]

MODELS = [
    {"id": name, "provider": "demo", "vendor": "Parley", "display_name": name.title(), "pace": 0.005}
    for name in ("owl", "fox", "hen")
]
ADMIN = "the-operators-token-of-these-tests"
PAGES = ("/", "/arena", "/leaderboard", "/shared/some-token", "/debug", "/admin")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Any]:
    async with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, browser: Any) -> Iterator[Service]:
    """As a developer starts it, with three models."""
    environment = store("sqlite", request, tmp_path_factory.mktemp("pages"))
    environment |= {"PARLEY_MODELS": json.dumps(MODELS), "PARLEY_LEADERBOARD_CACHE": "0", "PARLEY_PACE": "0.001", "ADMIN_TOKEN": ADMIN}
    with Service(environment, server="serve") as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-6000:]


@pytest_asyncio.fixture(loop_scope="module")
async def visit(browser: Any, service: Service) -> AsyncIterator[Any]:
    context = await browser.new_context(viewport={"width": 1200, "height": 900})
    made: list[Visit] = []

    async def go(path: str) -> Visit:
        made.append(Visit(await context.new_page()))
        await made[-1].tab.goto(service.url + path)
        return made[-1]

    yield go
    await context.close()
    assert [problem for each in made for problem in each.problems] == []
    assert [url for each in made for url in each.requests if not re.match(rf"(http|ws)://[^/]*:{service.ports[0]}/", url)] == []


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_lets_nothing_run_but_its_own(service: Service, path: str) -> None:
    answer = await call(service.url, "GET", path)
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    for part in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'self'", "trusted-types 'none'"):
        assert part in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    before, style, after = re.split(r"<style>|</style>", answer.text)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}';" in policy
    assert ("cross-origin-opener-policy" in answer.headers) == path.startswith(("/shared", "/debug", "/admin"))
    assert not re.search(r"<link rel=.?stylesheet|style=|<script>|\son\w+=|https?://(?!HOST)", before + after)


async def test_files_are_sent_small_and_once(service: Service) -> None:
    """Compressed where that is understood, as they are elsewhere; who has the newest version gets nothing."""
    plain = await call(service.url, "GET", "/widget.js", headers={"Accept-Encoding": "identity"})
    packed = await call(service.url, "GET", "/widget.js", headers={"Accept-Encoding": "gzip"})
    assert plain.content == packed.content == (ROOT / "widget" / "widget.js").read_bytes()
    assert "content-encoding" not in plain.headers and packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) < int(plain.headers["content-length"]) / 2
    assert plain.headers["cross-origin-resource-policy"] == "cross-origin"
    for coding, sent in (("GZIP", True), ("br, gzip;q=0.5", True), ("gzip;q=0", False), ("br, gzip ; q=0.00", False), ("gzipped", False)):
        answer = await call(service.url, "GET", "/widget.js", headers={"Accept-Encoding": coding})
        assert ("content-encoding" in answer.headers) == sent, coding
    tag = plain.headers["etag"]
    for known, status in ((tag, 304), (f'"x", W/{tag}', 304), ("*", 304), ('"x"', 200), (tag[:-2] + '"', 200)):
        again = await call(service.url, "GET", "/widget.js", headers={"If-None-Match": known})
        assert (again.status_code, again.content == b"") == (status, status == 304), known
    for path in ("/widget/nothing.js", "/widget/..%2fsettings.toml", "/widget/%2e%2e/models.sql"):
        assert (await call(service.url, "GET", path)).status_code == 404


async def test_events_are_shown_on_a_local_start_only(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    environment = CLOSED | store("sqlite", request, tmp_path_factory.mktemp("closed")) | {"PARLEY_ENV": "production"}
    with Service(environment | {"ALLOWED_HOSTS": "*"}, server="serve") as running:
        assert (await call(running.url, "GET", "/debug")).status_code == 404
        assert (await call(running.url, "GET", "/")).status_code == 200


async def test_the_first_page_answers_at_once(visit: Any, service: Service) -> None:
    """It names the host it is on, and the widget in it talks."""
    home = await (await visit("/")).there()
    assert f'<script src="{service.url}/widget.js" async></script>' in await home.tab.locator("pre").first.text_content()
    await home.say("/count 20")
    assert await home.answered() == counted(20)


async def test_a_shared_chat_is_read_live_and_only_read(visit: Any, service: Service, accessibility: None) -> None:
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access)
    await post_turn(service.url, someone.access, session["id"], "/count 5")
    share = (await call(service.url, "POST", f"/api/sessions/{session['id']}/share/", someone.access)).json()
    reader = await (await visit(share["share_url"])).there()
    await reader.see("talk.list.length === 2 && !chat.frame")
    assert await reader.shown() == counted(5)
    assert await reader.ask("return [...chat.root.querySelectorAll('textarea, .alert, [title=\"Try again\"]')].length") == 0
    assert await axe(reader) == []
    turn = asyncio.create_task(post_turn(service.url, someone.access, session["id"], "/count 2000"))
    await reader.see("talk.running && [...chat.root.querySelectorAll('.prose')].at(-1).textContent.length > 400")
    assert await axe(reader) == []
    assert await stop(service.url, someone.access, session["id"])
    await turn
    whole = (await messages(service.url, someone.access, session["id"]))[-1]["content"]
    await reader.see("$('.log').textContent.includes(given)", given=whole.strip())
    await reader.tab.set_viewport_size({"width": 500, "height": 300})
    await reader.tab.emulate_media(media="print")
    assert await reader.ask("return $('.log').clientHeight === $('.log').scrollHeight && document.body.clientHeight > innerHeight"), "all is printed"
    lost = await (await visit("/shared/nothing")).there()
    await lost.see("$('.alert')?.textContent.includes('There is no such shared session.')")


async def test_the_leaderboard_shows_what_was_voted(visit: Any, service: Service, accessibility: None) -> None:
    """The table, the picture and the matrix are of the votes that count; what did not count is there with its reason."""
    empty = await visit("/leaderboard")
    await empty.see("document.getElementById('state').textContent.includes('No vote')")
    assert await axe(empty) == []
    someone = await guest(service.url)
    for n in range(8):
        session = await new_session(service.url, someone.access, mode="random")
        for preference in ("model_a", "tie")[: 1 + (n == 0)]:  # the second in a session comes after the reveal
            await post_turn(service.url, someone.access, session["id"], "/count 3")
            last = (await messages(service.url, someone.access, session["id"]))[-1]
            body = {"session_id": session["id"], "message_id": last["id"], "feedback_type": "preference", "preference": preference}
            assert (await call(service.url, "POST", "/api/feedback/", someone.access, json=body)).status_code == 201
    details = (await call(service.url, "GET", "/api/leaderboard/details/")).json()
    assert details["counted"] == 8 and sum(pair["votes"] for pair in details["pairs"]) == 8
    assert details["left_out"] == [{"reason": "revealed", "votes": 1}]
    board = await visit("/leaderboard")
    await board.see("!document.getElementById('board').hidden")
    assert await axe(board) == []
    listed = (await call(service.url, "GET", "/api/leaderboard/")).json()
    assert await board.ask("return [...document.querySelectorAll('#rows th')].map((each) => each.firstChild.data)") == [line["name"] for line in listed]
    rated = [line for line in listed if line["elo_rating"] is not None and line["ci_lower"] is not None]
    assert await board.ask("return document.querySelectorAll('#chart circle').length") == len(rated)
    met = {tuple(sorted((pair["model_a"], pair["model_b"]))) for pair in details["pairs"]}
    assert await board.ask("return document.querySelectorAll('#matrix td[class^=w]').length") == 2 * len(met)
    assert "revealed" in await board.ask("return document.getElementById('left').textContent")


async def test_a_developer_sees_every_event_and_its_cursor(visit: Any, accessibility: None) -> None:
    page = await visit("/debug")
    await page.tab.get_by_label("Message").fill("/count 200")
    await page.tab.get_by_role("button", name="Send").click()
    await page.see("[...document.querySelectorAll('.message_chunk')].length > 5")
    await page.tab.get_by_role("button", name="Cut the socket").click()
    await page.see("document.querySelector('tr.turn_complete')")
    assert await axe(page) == []
    said = await page.ask("""
        return [...document.querySelectorAll('tr.message_chunk .json')].map((each) => JSON.parse(each.textContent).chunk).join('');
    """)
    assert said == counted(200)


async def test_a_person_answers_a_visitor(visit: Any, browser: Any, service: Service, accessibility: None) -> None:
    """From the list of sessions to the visitor's tab, which shows the words under a name, now and after a reload."""
    shop = await (await visit("/")).there()
    await shop.say("Is anybody there?")
    await shop.answered()
    desk = await visit("/admin")
    await desk.tab.get_by_label("token").fill(ADMIN + "x")
    await desk.tab.get_by_label("Your name").fill("Anna")
    await desk.button("Show the sessions").click()
    await desk.see("document.getElementById('state').textContent === \"This needs the operator's token.\"")
    await desk.tab.get_by_label("token").fill(ADMIN)
    await desk.button("Show the sessions").click()
    await desk.tab.get_by_role("button", name="Is anybody there?").click()
    await desk.see("$('.you')?.textContent === 'Is anybody there?'")
    await desk.say("Yes!")
    await desk.see("$('.note.bad')?.textContent.includes('Take this session over')")
    assert await axe(desk) == []
    await desk.button("Take over").click()
    await desk.see("document.getElementById('who').textContent.startsWith('Anna answers')")
    await desk.button("Try again").click()
    await shop.see("[...chat.root.querySelectorAll('.by')].at(-1)?.textContent === 'Anna'")
    await shop.see("[...chat.root.querySelectorAll('.prose')].at(-1)?.textContent === 'Yes!'")
    await shop.say("Good.")
    await shop.see("[...chat.root.querySelectorAll('.note')].at(-1)?.textContent === 'Anna will answer you here.'")
    await desk.see("[...chat.root.querySelectorAll('.you')].at(-1)?.textContent === 'Good.'")
    await desk.say("*Ask* me.")
    await shop.see("[...chat.root.querySelectorAll('.prose')].at(-1)?.textContent === 'Ask me.'")
    assert await shop.ask("return chat.root.querySelectorAll('.note').length") == 0  # the question is answered
    for page in (shop, desk):
        assert await axe(page) == []
    await shop.reload()
    await shop.see("[...chat.root.querySelectorAll('.by')].map((each) => each.textContent).join() === 'Anna,Anna'")
    await desk.button("Hand back to the model").click()
    await desk.see("document.getElementById('who').textContent === 'The model answers.'")
    await shop.say("/count 4")
    await shop.see("[...chat.root.querySelectorAll('.prose')].at(-1)?.textContent === given", given=counted(4))


@pytest.mark.parametrize("path", ["/", "/arena", "/leaderboard", "/debug", "/admin"])
async def test_at_four_times_the_size_nothing_is_cut_off(visit: Any, path: str) -> None:
    """400 % zoom of a window of 1280 × 1024 is one of 320 × 256: no page scrolls sideways, and a chat has room."""
    page = await visit(path)
    await page.tab.set_viewport_size({"width": 320, "height": 256})
    assert await page.ask("return document.documentElement.scrollWidth") == 320
    if path in ("/", "/arena"):
        await page.there()
        await page.see("$('.log').clientHeight > 150")
