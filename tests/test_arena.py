"""The arena: blind battles stay blind, votes are facts, the leaderboard follows from them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest

import routes
from tests.conftest import CLOSED, STORES, store
from tests.harness import until
from tests.harness.api import call, guest, messages, new_session, post_turn
from tests.harness.client import SocketReader
from tests.harness.journal import Journal
from tests.harness.scene import all_of
from tests.harness.service import Service
from tests.harness.view import OF_A_TURN

MODELS = [
    {"id": "quick-fox", "provider": "demo", "vendor": "Vulpes", "display_name": "Quick Fox", "pace": 0.002},
    {"id": "slow-owl", "provider": "demo", "vendor": "Strix", "display_name": "Slow Owl", "pace": 0.02},
]
NAMES = ("quick-fox", "Quick Fox", "Vulpes", "slow-owl", "Slow Owl", "Strix")


@pytest.fixture(scope="module", params=STORES)
def arena(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    environment = CLOSED | store(request.param, request, tmp_path_factory.mktemp("arena"))
    environment |= {"PARLEY_MODELS": json.dumps(MODELS), "PARLEY_LEADERBOARD_CACHE": "0", "PARLEY_PACE": "0.01"}
    with Service(environment, workers=1 if request.param == "sqlite" else 2) as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-6000:]


async def battle(arena: Service, token: str, content: str = "/count 30", **wish: Any) -> tuple[str, dict[str, Any]]:
    """A finished turn of a new session: the session's id and the turn's messages by side."""
    session = await new_session(arena.url, token, **{"mode": "random"} | wish)
    answer = await post_turn(arena.url, token, session["id"], content)
    assert answer.status == 200 and answer.ended
    rows = await messages(arena.url, token, session["id"])
    return session["id"], {row["participant"] or "user": row for row in rows}


async def vote(base: str, token: str, session_id: str, message_id: str, preference: str = "model_a") -> Any:
    body = {
        "session_id": session_id,
        "message_id": message_id,
        "feedback_type": "preference",
        "preference": preference,
    }
    return await call(base, "POST", "/api/feedback/", token, json=body)


async def test_nothing_names_a_model_before_the_vote(arena: Service) -> None:
    """Every byte of every route and frame of a battle: no name, vendor or id; afterwards the names are there."""
    journal, someone = Journal(), await guest(arena.url)
    session = await new_session(arena.url, someone.access, mode="random")
    async with SocketReader(journal, "voter", arena.urls[-1], session["id"], token=someone.access) as voter:
        await voter.event("session_state")
        await voter.say("/count 30")
        await voter.turn_ended()
        await voter.send({"type": "request_state"})
        await voter.event("session_state", after=1)
        seen = [json.dumps(entry.data) for entry in journal.of("voter")]
        seen += [json.dumps(session)]
        for path in (
            f"/api/sessions/{session['id']}/",
            f"/api/messages/?session_id={session['id']}",
            "/api/sessions/",
            *(f"/api/sessions/{session['id']}/export/?format={kind}" for kind in ("json", "markdown", "txt")),
            "/api/leaderboard/",
            "/api/arena/votes.jsonl",
        ):
            answer = await call(arena.url, "GET", path, someone.access)
            seen += [answer.text, str(answer.headers)]
        for name in NAMES:
            assert not [text for text in seen if name.lower() in text.lower()], name
        replies = await messages(arena.url, someone.access, session["id"])
        assert {row["latency_ms"] for row in replies} == {None}
        assert (await vote(arena.url, someone.access, session["id"], replies[0]["id"])).status_code == 201
        revealed = await voter.event("session_update")
        assert revealed["action"] == "revealed"
        names = {revealed["session"][f"model_{side}"]["display_name"] for side in "ab"}
        assert names == {"Quick Fox", "Slow Owl"}


async def test_both_sides_move_in_step(arena: Service) -> None:
    """A model ten times as fast as the other leaves the same pieces at the same moments, and ends with it."""
    journal, someone = Journal(), await guest(arena.url)
    session = await new_session(arena.url, someone.access, mode="random")
    async with SocketReader(journal, "voter", arena.url, session["id"], token=someone.access) as voter:
        await voter.event("session_state")
        await voter.say("/count 60")
        await voter.turn_ended()
    chunks = journal.events("voter", "message_chunk")
    pieces = {side: [chunk["chunk"] for chunk in chunks if chunk["participant"] == side] for side in "ab"}
    assert pieces["a"] == pieces["b"] and len(pieces["a"]) > 3
    assert [chunk["participant"] for chunk in chunks] == ["a", "b"] * len(pieces["a"])
    *_, first, second, end = journal.events("voter", *OF_A_TURN)
    assert [each["type"] for each in (first, second, end)] == ["message_complete"] * 2 + ["turn_complete"]
    assert [each["participant"] for each in (first, second)] == ["a", "b"]


@pytest.mark.parametrize("content", ["/fail", "/silent", "/truncate"])
async def test_a_failing_side_fails_without_a_name(arena: Service, content: str) -> None:
    """Both sides end, typed alike whatever the vendor did, and the battle cannot be voted on."""
    someone = await guest(arena.url)
    session_id, sides = await battle(arena, someone.access, content)
    assert {sides[side]["status"] for side in "ab"} == {"failed"}
    assert {sides[side]["failure_reason"] for side in "ab"} == {"provider_unavailable"}
    answer = await vote(arena.url, someone.access, session_id, sides["a"]["id"])
    assert (answer.status_code, answer.json()["error"]) == (409, "conflict")


async def test_a_vote_is_cast_once(arena: Service) -> None:
    """Twenty votes at once, on all workers: one is stored, the others are told so, and it stays as it was cast."""
    someone = await guest(arena.url)
    session_id, sides = await battle(arena, someone.access)
    votes = await asyncio.gather(
        *[
            vote(arena.urls[n % len(arena.urls)], someone.access, session_id, sides["user"]["id"], choice)
            for n, choice in enumerate(["model_a", "model_b", "tie", "both_bad"] * 5)
        ]
    )
    codes = sorted(answer.status_code for answer in votes)
    assert codes == [201] + [409] * 19
    assert {answer.json().get("error") for answer in votes if answer.status_code == 409} == {"already_voted"}


async def test_only_the_owner_votes(arena: Service) -> None:
    """A stranger's vote, an unknown message, another session's message: all the same 404."""
    someone, stranger = await guest(arena.url), await guest(arena.url)
    session_id, sides = await battle(arena, someone.access)
    other_id, _ = await battle(arena, someone.access)
    for token, session, message in (
        (stranger.access, session_id, sides["a"]["id"]),
        (someone.access, other_id, sides["a"]["id"]),
        (someone.access, session_id, "no-such-message"),
    ):
        answer = await vote(arena.url, token, session, message)
        assert (answer.status_code, answer.json()["error"]) == (404, "not_found")


async def test_a_vote_waits_for_both_sides(arena: Service) -> None:
    """While the answers run a vote is refused; a direct session has nothing to vote on."""
    journal, someone = Journal(), await guest(arena.url)
    session = await new_session(arena.url, someone.access, mode="random")
    async with SocketReader(journal, "voter", arena.url, session["id"], token=someone.access) as voter:
        await voter.event("session_state")
        await voter.say("/count 400")
        await voter.tokens(2)
        replies = await messages(arena.url, someone.access, session["id"])
        answer = await vote(arena.url, someone.access, session["id"], replies[0]["id"])
        assert (answer.status_code, answer.json()["error"]) == (409, "conflict")
        await voter.send({"type": "stop"})
        await voter.turn_ended()
    session_id, sides = await battle(arena, someone.access, mode="direct")
    answer = await vote(arena.url, someone.access, session_id, sides["a"]["id"])
    assert (answer.status_code, answer.json()["error"]) == (409, "conflict")


async def test_votes_after_the_reveal_and_of_named_models_do_not_count(arena: Service) -> None:
    """They are kept with their reason and change no rating."""
    someone = await guest(arena.url)
    before = await battles(arena)
    session_id, sides = await battle(arena, someone.access)
    await vote(arena.url, someone.access, session_id, sides["a"]["id"])
    await post_turn(arena.url, someone.access, session_id, "/count 5")
    later = await messages(arena.url, someone.access, session_id)
    assert (await vote(arena.url, someone.access, session_id, later[-1]["id"])).status_code == 201
    named_id, named = await battle(arena, someone.access, "/echo I am Quick Fox, made by Vulpes.")
    assert (await vote(arena.url, someone.access, named_id, named["a"]["id"])).status_code == 201
    assert await battles(arena) == before + 1


async def battles(arena: Service) -> int:
    rows = (await call(arena.url, "GET", "/api/leaderboard/")).json()
    return max([row["battles"] for row in rows], default=0)


async def test_the_leaderboard_follows_the_votes(arena: Service) -> None:
    """A winner is ahead of the loser it lost to once as well; the export has the same battles."""
    someone = await guest(arena.url)
    for n in range(4):
        session_id, sides = await battle(arena, someone.access, "/count 2")
        answer = await vote(arena.url, someone.access, session_id, sides["a"]["id"], "tie")
        shown = answer.json()["session_update"]
        assert {shown["model_a"]["id"], shown["model_b"]["id"]} == {"quick-fox", "slow-owl"}, n
    board = (await call(arena.urls[-1], "GET", "/api/leaderboard/?mode=all")).json()
    assert [row["rank"] for row in board] == sorted(row["rank"] for row in board)
    assert {"rank", "id", "name", "elo_rating", "ci_lower", "ci_upper", "rating_change", "preliminary"} <= set(board[0])
    points = [row[name] for row in board for name in ("elo_rating", "ci_lower", "ci_upper", "rating_change")]
    assert points == [None if each is None else round(each, 2) for each in points]
    lines = (await call(arena.url, "GET", "/api/arena/votes.jsonl")).text.splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == sum(row["battles"] for row in board) // 2
    assert {record["winner"] for record in records} <= {"model_a", "model_b", "tie", "tie (bothbad)"}


async def test_ratings_and_reports_are_kept_per_reply(arena: Service) -> None:
    """The last word of the session's owner stands; it is no vote."""
    someone = await guest(arena.url)
    session_id, sides = await battle(arena, someone.access)
    body = {"session_id": session_id, "message_id": sides["a"]["id"], "feedback_type": "rating", "rating": 2}
    for stars in (2, 5):
        answer = await call(arena.url, "POST", "/api/feedback/", someone.access, json=body | {"rating": stars})
        assert answer.status_code == 201
        assert answer.json()["session_update"]["voted"] is False
    rows = await messages(arena.url, someone.access, session_id)
    kept = {row["participant"]: row for row in rows}["a"]
    assert kept["has_feedback"] and kept["feedback"] is None  # stars are no like
    said = (await call(arena.url, "GET", f"/api/feedback/?session_id={session_id}", someone.access)).json()
    assert [each["rating"] for each in said] == [5]


async def test_a_load_test_that_drops_every_stream_gets_every_answer(arena: Service) -> None:
    """What the arena's own does: a random session, ids of both models, a message, gone right after the headers."""
    people = await asyncio.gather(*[guest(arena.url) for _ in range(20)])

    async def visit(token: str) -> tuple[str, str]:
        session = await new_session(arena.url, token, mode="random")
        assert session["model_a"]["id"] and session["model_b"]["id"]
        body = {"session_id": session["id"], "content": "/count 40"}
        headers = {"Authorization": f"Bearer {token}"}
        async with httpx.AsyncClient(base_url=arena.urls[-1], headers=headers, timeout=20) as client:
            async with client.stream("POST", "/api/messages/stream/", json=body) as response:
                assert response.status_code == 200
        return token, session["id"]

    async def answered(token: str, session_id: str) -> bool:
        replies = [row for row in await messages(arena.url, token, session_id) if row["role"] == "assistant"]
        return [row["status"] for row in replies] == ["success"] * 2 and all(row["content"] for row in replies)

    visits = await asyncio.gather(*[visit(each.access) for each in people])
    for token, session_id in visits:
        await until(lambda t=token, s=session_id: answered(t, s), 20, "both answers")


async def test_sides_are_shuffled(arena: Service) -> None:
    """Either model comes up on either side."""
    someone = await guest(arena.url)
    firsts = set()
    for _ in range(TOSSES):
        session_id, sides = await battle(arena, someone.access, "/count 1")
        shown = (await vote(arena.url, someone.access, session_id, sides["a"]["id"], "tie")).json()["session_update"]
        firsts.add(shown["model_a"]["id"])
        if len(firsts) == 2:
            break
    assert firsts == {"quick-fox", "slow-owl"}


TOSSES = 40  # of a coin: heads alone, or tails alone, come once in 550,000,000,000 times
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{32}")
CLOCK = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z|[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT")
PUBLIC = re.compile(r"^/api/(leaderboard|arena/votes\.jsonl)")  # what earlier, counted votes have revealed
OTHER = {"{token}": "none", "{model_id:path}": "none"}


async def everything(arena: Service, content: str) -> tuple[list[str], dict[str, str], list[str]]:
    """All a voter can get of one battle: each frame, and each GET route of the table, without ids and clocks.

    Returns that, the models by side as the vote reveals them, and all of it as it was.
    """
    journal, someone = Journal(), await guest(arena.url, "Voter")
    session = await new_session(arena.url, someone.access, mode="random", title="A battle")
    raw = [json.dumps(session)]
    async with SocketReader(journal, "voter", arena.url, session["id"], token=someone.access) as voter:
        await voter.event("session_state")
        await voter.say(content)
        await voter.turn_ended()
        await voter.send({"type": "request_state"})
        await voter.event("session_state", after=1)
        raw += [json.dumps(event) for event in journal.events("voter")]
    sides = {row["participant"] or "user": row for row in await messages(arena.url, someone.access, session["id"])}
    places = {"{session_id}": session["id"], "{message_id}": sides["a"]["id"]} | OTHER
    for route in routes.table:
        if "GET" in (route.methods or ()) and not route.path.startswith(("/api/models", "/v1/models", "/metrics")):
            path = route.path
            for name, value in places.items():
                path = path.replace(name, value)
            query = {"session_id": session["id"], "format": "txt"}
            answer = await call(arena.url, "GET", path, someone.access, params=query)
            raw.append(f"{path} {answer.status_code} {sorted(answer.headers.items())} {answer.text}")
    shown = (await vote(arena.url, someone.access, session["id"], sides["user"]["id"], "tie")).json()["session_update"]
    models = {side: shown[f"model_{side}"]["id"] for side in "ab"}
    return [CLOCK.sub("<time>", UUID.sub("<id>", text)) for text in raw], models, raw


async def test_the_blind_diff(arena: Service) -> None:
    """Everything a voter can get, recorded with the models one way round and the other: the same, and nameless."""
    seen: dict[str, list[str]] = {}
    for _ in range(TOSSES):
        normal, models, raw = await everything(arena, "/count 40")
        before_the_vote = [text for text in raw if not PUBLIC.search(text)]
        for name in NAMES:
            assert not [text for text in before_the_vote if name.lower() in text.lower()], name
        seen[models["a"]] = [text for text in normal if not PUBLIC.search(text)]
        if len(seen) == 2:
            break
    one, other = (seen[name] for name in ("quick-fox", "slow-owl"))
    assert len(one) > 30
    assert one == other


async def test_the_frames_rhythm_tells_nothing(arena: Service) -> None:
    """From the moments of the frames alone, guess which side is ten times as fast: no better than a coin.

    Both sides' pieces leave in pairs, so the only thing to go by is which of a pair is read first, and by how much.
    """
    rounds = 24
    right = sum(await all_of([guessed(arena) for _ in range(rounds)], at_once=4))
    assert 1 < right < rounds - 1  # a fair coin falls otherwise once in 330,000 times


async def guessed(arena: Service) -> bool:
    """Whether the moments of a battle's frames have told which side is the fast one."""
    journal, someone = Journal(), await guest(arena.url)
    session = await new_session(arena.url, someone.access, mode="random")
    async with SocketReader(journal, "voter", arena.urls[-1], session["id"], token=someone.access) as voter:
        await voter.event("session_state")
        await voter.say("/count 30")
        await voter.turn_ended()
    times: dict[str, list[float]] = {"a": [], "b": []}
    for entry in journal.of("voter"):
        if entry.data.get("type") == "message_chunk":
            times[entry.data["participant"]].append(entry.at)
    assert len(times["a"]) == len(times["b"])
    gaps = {side: sum(b - a for a, b in pairwise(at)) for side, at in times.items()}
    rows = await messages(arena.url, someone.access, session["id"])
    shown = (await vote(arena.url, someone.access, session["id"], rows[0]["id"], "tie")).json()["session_update"]
    guess = min(gaps, key=lambda side: gaps[side])
    return bool(shown[f"model_{guess}"]["id"] == "quick-fox")
