"""A person in the place of a session's model: on another worker than the visitor, in every dialect, and back again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from chat.settings import read_settings
from chat.state import open_state
from chat.store import accounts, operator, sessions
from chat.store.database import new_id
from chat.store.turns import Ask
from tests.conftest import STORES, store
from tests.harness import until
from tests.harness.api import Guest, call, guest, messages, new_session, post_turn
from tests.harness.client import SocketReader
from tests.harness.journal import Journal
from tests.harness.service import Service

from . import BATTLE, ENVIRONMENT, UVICORN, bearer, fate, hear, home, plain, share

ADMIN = "the-operators-token-of-these-tests"
WAIT = "Anna will answer you here."


@pytest.fixture(scope="module", params=STORES)
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    environment = ENVIRONMENT | store(request.param, request, tmp_path_factory.mktemp("operator")) | {"ADMIN_TOKEN": ADMIN}
    environment |= {"PARLEY_SOCKETS_PER_SESSION": "3"}
    with Service(environment, workers=1 if request.param == "sqlite" else 2, options=UVICORN) as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-6000:]


async def put(service: Service, session_id: str, name: str | None) -> dict[str, Any]:
    path = f"/api/admin/sessions/{session_id}/"
    answer = await call(service.urls[-1], "PATCH", path, ADMIN, json={"operator": name})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def key(service: Service, session_id: str) -> str:
    """A token that opens the session's socket to the operator."""
    answer = await call(service.urls[-1], "GET", f"/api/admin/sessions/{session_id}/", ADMIN)
    return str(answer.json()["token"])


async def said(service: Service, someone: Guest, session_id: str) -> list[tuple[str, str, str]]:
    """What is stored: each message's role, its author's name and its text."""
    found = await messages(service.url, someone.access, session_id)
    return [(each["role"], (each["model"] or {}).get("display_name", ""), each["content"]) for each in found]


async def test_a_person_speaks_and_the_model_is_silent(service: Service, journal: Journal) -> None:
    """The visitor's tabs read a person's words as any reply; the operator reads what the visitor writes, live."""
    someone, id = await home(service.url)
    assert await put(service, id, "Anna") == {"id": id, "operator": "Anna"}
    visitor = SocketReader(journal, "visitor", service.url, id, token=someone.access)
    person = SocketReader(
        journal, "person", service.urls[-1], id, token=await key(service, id), credentials="subprotocol"
    )
    async with visitor, person:
        await visitor.say("Is anybody there?", "question")
        await visitor.turn_ended()
        await person.until(lambda: person.view.texts("user") == ["Is anybody there?"], 5, "the question")
        for n, words in enumerate(("Yes, I am.", "How can I help?")):
            await person.say(words, f"words-{n}")
            await visitor.until(lambda words=words: visitor.view.texts()[-1] == words, 5, words)
        path = f"/api/sessions/{id}/"
        before = (await call(service.url, "GET", path, someone.access)).json()["session"]
        await person.say("How can I help?", "words-1")  # sent again by a client in doubt: nothing new
        for n, taken in enumerate(("words-1", "question")):  # other words are not lost without a word
            await person.say("Are you there?", taken)
            refused = await person.event("error", after=n)
            assert (refused["code"], refused["message_id"]) == ("conflict", taken)
        assert (await call(service.url, "GET", path, someone.access)).json()["session"] == before
        await visitor.say("/count 500")
        await visitor.until(lambda: visitor.view.texts() == [WAIT, "Yes, I am.", "How can I help?", WAIT], 5, "all")
        assert visitor.view.texts() == (await person.until(lambda: person.view.texts()[3:] and person.view.texts(), 5, "all"))
        complete = await visitor.event("message_complete", after=1)
        assert complete["message"]["model"]["display_name"] == "Anna" and complete["message"]["id"] == "words-0"
    assert [text for *_, text in await said(service, someone, id)] == [
        "Is anybody there?", WAIT, "Yes, I am.", "How can I help?", "/count 500", WAIT,
    ]  # fmt: skip


async def test_whoever_comes_back_has_missed_nothing_a_person_said(service: Service, journal: Journal) -> None:
    """With any cursor from before, and from a restart of all workers: the flag and the words are in the database."""
    someone, id = await home(service.url)
    answer = await post_turn(service.url, someone.access, id, "/count 5")
    cursors = [answer.events[0]["cursor"], answer.events[-1]["cursor"]]  # before the first word, behind the last
    await put(service, id, "Anna")
    operator = SocketReader(journal, "person", service.urls[-1], id, token=await key(service, id), resume=True)
    async with operator:
        for text in ("one", "two"):
            await operator.say(text)
            await operator.until(lambda text=text: operator.view.texts()[-1] == text, 5, text)
        await service.restart(0)
    for n, cursor in enumerate(cursors):
        async with SocketReader(journal, f"back-{n}", service.url, id, token=someone.access, cursor=cursor) as back:
            await back.until(lambda back=back: back.view.texts()[-2:] == ["one", "two"], 5, cursor)
            assert (await back.event("resumed"))["cursor"] == cursor
    assert (await post_turn(service.url, someone.access, id, "/count 50")).sides() == {"a": WAIT}


async def test_every_road_answers_a_message_to_a_person(service: Service) -> None:
    """Each of the dialects, whole and at once; the reply has the id its client chose."""
    someone, id = await home(service.url)
    await put(service, id, "Anna")
    assert (await post_turn(service.url, someone.access, id, "hello", accept="text")).text.strip() == WAIT
    lines = await post_turn(service.url, someone.access, id, "hello", accept="lines")
    assert (lines.sides(), lines.finishes()) == ({"a": WAIT}, {"a": {"finishReason": "stop"}})
    events = await post_turn(service.url, someone.access, id, "hello", accept="ndjson")
    assert events.events[-1]["type"] == "turn_complete"
    body = {"id": id, "messages": [{"role": "user", "id": "ui-1", "parts": [{"type": "text", "text": "hello"}]}]}
    chunks = (await call(service.url, "POST", "/api/chat/", someone.access, json=body)).text
    assert WAIT in chunks and '"type":"finish"' in chunks
    body = {"threadId": id, "runId": "run-1", "messages": [{"role": "user", "id": "ag-1", "content": "hello"}]}
    run = (await call(service.url, "POST", "/api/ag-ui/", someone.access, json=body)).text
    assert WAIT in run and f'"type":"RUN_FINISHED","threadId":"{id}","runId":"run-1"' in run
    sent = [text for role, _, text in await said(service, someone, id) if role == "user"]
    assert sent == ["hello"] * 5


async def test_taking_over_ends_the_running_answer_and_handing_back_goes_on(service: Service, journal: Journal) -> None:
    someone, id = await home(service.url)
    async with SocketReader(journal, "visitor", service.url, id, token=someone.access) as visitor:
        await visitor.say("/count 100000")
        await visitor.until(lambda: len("".join(visitor.view.texts())) > 20, 5, "some of it")
        await put(service, id, "Anna")
        await visitor.turn_ended()
        assert [each["status"] for each in await messages(service.url, someone.access, id)] == ["success", "stopped"]
        async with SocketReader(journal, "person", service.urls[-1], id, token=await key(service, id)) as person:
            await person.say("I count better.")
            await visitor.until(lambda: visitor.view.texts()[-1] == "I count better.", 5, "the words")
        last = (await messages(service.url, someone.access, id))[-1]
        again = await call(service.url, "POST", f"/api/messages/{last['id']}/regenerate/", someone.access)
        assert (again.status_code, again.json()["error"]) == (409, "conflict")
        await put(service, id, None)
        again = await call(service.url, "POST", f"/api/messages/{last['id']}/regenerate/", someone.access)
        assert (again.status_code, again.json()["error"]) == (409, "conflict")
        await visitor.say("/count 3")
        await visitor.until(lambda: len(visitor.view.texts()) == 3 and visitor.view.turns_ended == 3, 5, "the model")
    assert (await said(service, someone, id))[2][1:] == ("Anna", "I count better.")


async def test_no_dialect_makes_a_person_s_words_again(service: Service, journal: Journal) -> None:
    """An edit, an answer asked for again and another run would each delete what the person said."""
    someone, id = await home(service.url)
    await post_turn(service.url, someone.access, id, "/echo one", id="m")
    await put(service, id, "Anna")
    async with SocketReader(journal, "person", service.urls[-1], id, token=await key(service, id)) as person:
        await person.say("I am here.")
        await person.until(lambda: person.view.texts()[-1] == "I am here.", 5, "the words")
    await put(service, id, None)
    before = await said(service, someone, id)
    ui = {"id": id, "messages": [{"role": "user", "id": "m", "parts": [{"type": "text", "text": "/echo two"}]}]}
    run = {"threadId": id, "runId": "run-2", "messages": [{"role": "user", "id": "m", "content": "/echo one"}]}
    for path, body in (
        ("chat", ui | {"messageId": "m"}), ("chat", ui | {"trigger": "regenerate-message"}), ("ag-ui", run),
    ):  # fmt: skip
        answer = await call(service.urls[-1], "POST", f"/api/{path}/", someone.access, json=body)
        assert answer.status_code == 409 and "A person's answer cannot be made again." in answer.text, path
    assert await said(service, someone, id) == before


async def test_the_model_reads_afterwards_what_a_person_said(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        state = await open_state(read_settings(environ={"DATABASE_URL": f"sqlite:///{tmp_path / 'parley.db'}"}), stack)
        someone, id = await accounts.insert_guest(state.database, None), new_id()
        await sessions.insert_session(state.database, someone.id, "direct", ("demo-scholar", None), id=id)
        session = await operator.update_operator(state.database, id, "Anna")
        await state.generation.begin(session, someone, Ask("question", "Is anybody there?", {}))
        await operator.insert_words(state.database, session, "words", "Yes, I am.")
        history = await state.generation.streams.history(session, 100)
        prompt = state.generation.streams.prompt("demo-scholar", "a", history, "Good.")
        assert [(each.role, each.content) for each in prompt if each.role != "system"] == [
            ("user", "Is anybody there?"), ("assistant", WAIT), ("assistant", "Yes, I am."), ("user", "Good."),
        ]  # fmt: skip


async def test_a_person_costs_nothing_and_is_no_one_s_vote(service: Service) -> None:
    someone, id = await home(service.url)
    await put(service, id, "Anna")
    await post_turn(service.url, someone.access, id, "hello")
    body = {"session_id": id, "message_id": (await messages(service.url, someone.access, id))[0]["id"]}
    body |= {"feedback_type": "preference", "preference": "model_a"}
    assert (await call(service.url, "POST", "/api/feedback/", someone.access, json=body)).status_code == 409
    board = (await call(service.url, "GET", "/api/leaderboard/?mode=all")).text
    assert "Anna" not in board and "person" not in board


async def test_only_the_operator_takes_over_and_never_a_battle(service: Service) -> None:
    someone, id = await home(service.url)
    battle = await new_session(service.url, someone.access, **BATTLE)
    other = await new_session(service.url, someone.access)
    refused = await call(service.url, "PATCH", f"/api/admin/sessions/{battle['id']}/", ADMIN, json={"operator": "Anna"})
    assert (refused.status_code, refused.json()["error"]) == (409, "conflict")
    for token in (None, someone.access, ADMIN + "x"):
        for method, path in (("GET", ""), ("GET", f"/{id}"), ("PATCH", f"/{id}")):
            answer = await call(service.url, method, f"/api/admin/sessions{path}/", token, json={"operator": "Eve"})
            assert answer.status_code == 401, answer.text
    cookie = {"Cookie": f"admin={ADMIN}; token={ADMIN}"}
    assert (await call(service.url, "GET", "/api/admin/sessions/", headers=cookie)).status_code == 401
    for name in ("", " ", "x" * 41, "a\nb"):
        answer = await call(service.url, "PATCH", f"/api/admin/sessions/{id}/", ADMIN, json={"operator": name})
        assert answer.status_code == 400, name
    token = await key(service, id)
    assert (await call(service.url, "GET", f"/api/sessions/{id}/", token)).status_code == 401  # it opens sockets alone
    headers = {"additional_headers": {"Authorization": f"Bearer {token}"}}
    assert (await fate(service.url, other["id"], **headers))[0] == 4401  # … and of its own session
    listed = (await call(service.url, "GET", "/api/admin/sessions/", ADMIN)).json()
    assert {id, other["id"]} <= {each["id"] for each in listed} and battle["id"] not in {each["id"] for each in listed}
    stranger = await guest(service.url)
    assert (await fate(service.url, id, additional_headers={"Authorization": f"Bearer {stranger.access}"}))[0] == 4404


async def test_a_token_of_the_operator_ends_with_its_session(service: Service) -> None:
    """Somebody else may use the id after a deletion."""
    someone, stranger, id = await guest(service.url), await guest(service.url), f"used-twice-{new_id()}"
    await new_session(service.url, someone.access, id=id)
    before = await key(service, id)
    assert (await call(service.url, "DELETE", f"/api/sessions/{id}/", someone.access)).status_code == 204
    await new_session(service.url, stranger.access, id=id)
    assert await fate(service.urls[-1], id, **bearer(before)) == (4401, "authentication required")


async def test_readers_of_a_share_leave_a_place_for_the_operator(service: Service) -> None:
    someone, id = await home(service.url)
    link, token = await share(service.url, someone, id), await key(service, id)
    async with AsyncExitStack() as stack:
        for _ in range(3):
            viewer = await stack.enter_async_context(plain(service.url, id, None, share_token=link))
            await hear(viewer, "session_state")
        assert await fate(service.url, id, query={"share_token": link}) == (4429, "too many sockets")
        person = await stack.enter_async_context(plain(service.url, id, token))
        await hear(person, "session_state")


async def test_an_operator_speaks_only_where_nobody_else_does(service: Service, journal: Journal) -> None:
    _, id = await home(service.url)
    async with SocketReader(journal, "person", service.url, id, token=await key(service, id)) as person:
        await person.say("Hello?", "early")
        refused = await person.event("error")
        assert (refused["code"], refused["message_id"]) == ("conflict", "early")
        assert await until(lambda: person.view.texts() == [], 1, "silence")
