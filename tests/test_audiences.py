"""What each audience may read of a session: its owner, the voter of a battle, whoever has the link, anyone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from chat.settings import read_settings
from chat.store import mask
from tests.conftest import CLOSED
from tests.harness.api import Guest, call, guest, messages, new_session, post_turn
from tests.harness.client import SocketReader
from tests.harness.journal import Journal
from tests.harness.service import Service

# Written down a second time: a field that is added to a list of the mask reaches a reader only by a look at this one.
READER = {
    "id", "mode", "title", "model_a", "model_b", "created_at", "updated_at", "message_count", "last_message_at",
    "version", "voted",
}  # fmt: skip
OWNER = READER | {"user", "is_public", "share_token", "share_url", "metadata", "expires_at", "is_pinned"}
SAID = {
    "id", "session", "role", "content", "model", "parent_message_ids", "child_ids", "position", "participant",
    "status", "failure_reason", "attachments", "created_at",
}  # fmt: skip
OWNERS_SAID = SAID | {"metadata", "feedback", "has_feedback", "latency_ms", "first_token_ms"}
SLOT = {"id", "display_name", "provider", "is_thinking_model"}
CANARIES = {"metadata": "canary-of-metadata", "comment": "canary-of-a-report", "categories": "canary-of-a-category"}


def test_the_lists_of_the_mask_are_these() -> None:
    assert (set(mask.READABLE), set(mask.SAID)) == (READER, SAID)


async def told(base: str, someone: Guest) -> tuple[dict[str, Any], dict[str, str]]:
    """A session with canaries in all that is its owner's: public, shared, voted on and reported. And its share."""
    compare = {"mode": "compare", "model_a_id": "demo-scholar", "model_b_id": "demo-poet"}
    session = await new_session(base, someone.access, **compare, metadata={"page": CANARIES["metadata"]})
    path = f"/api/sessions/{session['id']}/"
    await post_turn(base, someone.access, session["id"], "/echo said")
    user, reply, _ = await messages(base, someone.access, session["id"])
    words = {"comment": CANARIES["comment"], "categories": [CANARIES["categories"]]}
    for body in (
        {"message_id": user["id"], "feedback_type": "preference", "preference": "both_bad"},
        {"message_id": reply["id"], "feedback_type": "report"} | words,
    ):
        answer = await call(base, "POST", "/api/feedback/", someone.access, json={"session_id": session["id"]} | body)
        assert answer.status_code == 201, answer.text
    await call(base, "PATCH", path, someone.access, json={"is_public": True})
    share = (await call(base, "POST", f"{path}share/", someone.access)).json()
    return session, share


async def test_readers_get_what_is_said_and_nothing_of_who_said_it(service: Service) -> None:
    """No account id, metadata, share token, vote or report on any road a reader without the account has."""
    owner, stranger = await guest(service.url, "Zoë of the canaries"), await guest(service.url)
    session, share = await told(service.url, owner)
    path = f"/api/sessions/{session['id']}/"
    journal, query = Journal(), {"share_token": share["share_token"]}
    async with SocketReader(journal, "viewer", service.urls[-1], session["id"], query=query) as viewer:
        state = await viewer.event("session_state")
        renamed = await call(service.url, "PATCH", path, owner.access, json={"title": "renamed"})
        update = await viewer.event("session_update")
    assert {frozenset(message) for message in state["messages"]} == {frozenset(SAID)}
    replay = await call(service.url, "GET", f"{path}stream/", headers={"Accept": "text/event-stream"})
    assert b"said" in replay.content
    assert update["session"] == {name: renamed.json()[name] for name in READER}
    read = [
        await call(service.urls[-1], "GET", f"/api/shared/{share['share_token']}/"),
        await call(service.url, "GET", path),
        await call(service.urls[-1], "GET", path, stranger.access),
    ]
    for answer in read:
        assert answer.json()["session"].keys() == READER
        assert {frozenset(message) for message in answer.json()["messages"]} == {frozenset(SAID)}
    secrets = [owner.id, owner.answer["user"]["display_name"], share["share_token"], "both_bad", *CANARIES.values()]
    for text in [*(answer.text for answer in read), replay.text, json.dumps(state), json.dumps(update)]:
        assert [secret for secret in secrets if secret in text] == []
    whole = (await call(service.url, "GET", path, owner.access)).json()
    assert whole["session"].keys() == OWNER
    assert {frozenset(message) for message in whole["messages"]} == {frozenset(OWNERS_SAID)}


async def test_a_voter_reads_no_clock_and_no_name(service: Service) -> None:
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access, mode="random")
    await post_turn(service.url, someone.access, session["id"], "/echo blind")
    whole = (await call(service.url, "GET", f"/api/sessions/{session['id']}/", someone.access)).json()
    assert whole["session"].keys() == OWNER
    assert {frozenset(whole["session"][f"model_{side}"]) for side in "ab"} == {frozenset(SLOT)}
    for message in whole["messages"][1:]:
        assert message.keys() == OWNERS_SAID and message["model"].keys() == SLOT
        assert message["latency_ms"] is message["first_token_ms"] is None


async def test_a_session_made_private_again_is_not_opened_by_its_old_link(service: Service) -> None:
    owner = await guest(service.url)
    session, share = await told(service.url, owner)
    path, shared = f"/api/sessions/{session['id']}/", f"/api/shared/{share['share_token']}/"
    for still in ({"title": "renamed"}, {"is_public": True}):
        await call(service.url, "PATCH", path, owner.access, json=still)
        assert (await call(service.urls[-1], "GET", shared)).status_code == 200
    private = (await call(service.url, "PATCH", path, owner.access, json={"is_public": False})).json()
    assert private["share_token"] is private["share_url"] is None
    assert (await call(service.urls[-1], "GET", shared)).status_code == 404


async def test_a_link_given_to_a_private_session_stays(service: Service) -> None:
    """A client that says again what is so already must not take the link away."""
    owner = await guest(service.url)
    session = await new_session(service.url, owner.access)
    path = f"/api/sessions/{session['id']}/"
    share = (await call(service.url, "POST", f"{path}share/", owner.access)).json()
    kept = (await call(service.url, "PATCH", path, owner.access, json={"is_public": False})).json()
    assert kept["share_token"] == share["share_token"]


async def test_a_vote_and_a_like_are_read_where_clients_look_for_them(service: Service) -> None:
    """On the turn's user message and on the reply; the words of a report where its author asks for them."""
    owner, stranger = await guest(service.url), await guest(service.url)
    session, _ = await told(service.url, owner)
    user, a, b = await messages(service.urls[-1], owner.access, session["id"])
    assert [(each["feedback"], each["has_feedback"]) for each in (user, a, b)] == [
        ("both_bad", True), (None, True), (None, False),
    ]  # fmt: skip
    like = {"session_id": session["id"], "message_id": b["id"], "feedback_type": "rating", "preference": "like"}
    await call(service.url, "POST", "/api/feedback/", owner.access, json=like)
    assert [each["feedback"] for each in await messages(service.url, owner.access, session["id"])] == [
        "both_bad", None, "like",
    ]  # fmt: skip
    path = f"/api/feedback/?session_id={session['id']}"
    vote, report, liked = (await call(service.urls[-1], "GET", path, owner.access)).json()
    assert vote == {"message_id": user["id"], "feedback_type": "preference", "preference": "both_bad"}
    assert (report["message_id"], report["comment"], report["categories"]) == (
        a["id"], CANARIES["comment"], [CANARIES["categories"]],
    )  # fmt: skip
    assert (liked["message_id"], liked["preference"]) == (b["id"], "like")
    assert (await call(service.url, "GET", path, stranger.access)).status_code == 404


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that was told where people meet it."""
    database = f"sqlite:///{tmp_path_factory.mktemp('named') / 'parley.db'}"
    environment = CLOSED | {"DATABASE_URL": database, "PARLEY_PUBLIC_URL": "https://chat.example.org/"}
    with Service(environment) as running:
        yield running


async def test_a_share_is_a_whole_address_where_it_is_known(named: Service) -> None:
    owner = await guest(named.url)
    session = await new_session(named.url, owner.access)
    share = (await call(named.url, "POST", f"/api/sessions/{session['id']}/share/", owner.access)).json()
    assert share["share_url"] == f"https://chat.example.org/shared/{share['share_token']}"
    whole = (await call(named.url, "GET", f"/api/sessions/{session['id']}/", owner.access)).json()
    assert whole["session"]["share_url"] == share["share_url"]


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({"PARLEY_ENV": "production", "ALLOWED_HOSTS": "*.example.net, chat.example.org"}, "https://chat.example.org"),
        ({"PARLEY_ENV": "production"}, ""),
        ({"ALLOWED_HOSTS": "chat.example.org"}, ""),
    ],
)
def test_the_address_is_the_operators_word_and_no_headers(environ: dict[str, str], url: str) -> None:
    assert read_settings(environ=environ | {"SECRET_KEY": "x" * 40}).base_url == url
