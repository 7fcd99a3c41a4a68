"""The rude moments: a turn's first milliseconds, an id used again, a right that has ended, a refusal that was too early.

Each test is named after what must not happen; afterwards every reply has an ending and the session takes a next turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.conftest import CLOSED, store
from tests.harness import until
from tests.harness.api import Guest, call, guest, messages, new_session, post_turn, stop
from tests.harness.client import SocketReader
from tests.harness.evidence import read_rows
from tests.harness.journal import Journal
from tests.harness.service import Service
from tests.harness.view import TERMINAL

MOMENTS = [n / 1000 for n in range(0, 21, 2)]  # seconds after a message was sent


async def ended(base: str, someone: Guest, session_id: str, count: int) -> list[str]:
    """Wait until `count` replies have an ending; return how they ended."""

    async def statuses() -> list[str]:
        rows = await messages(base, someone.access, session_id)
        found = [row["status"] for row in rows if row["role"] == "assistant"]
        return found if len(found) == count and TERMINAL.issuperset(found) else []

    return list(await until(statuses, 10, f"the endings of {count} replies"))


@pytest.mark.parametrize("mode", ["direct", "compare"])
async def test_a_stop_in_the_first_moments_leaves_nothing_pending(service: Service, mode: str) -> None:
    """Stopped 0 to 20 ms after the second message, on whichever worker: an ending for each reply, and a next turn."""

    async def stopped_after(moment: float, n: int) -> None:
        someone = await guest(service.url)
        session = await new_session(
            service.url, someone.access, mode=mode, model_a_id="demo-scholar", **({"model_b_id": "demo-poet"} if mode == "compare" else {})
        )
        sides = 1 if mode == "direct" else 2
        await post_turn(service.url, someone.access, session["id"], "/echo first")
        posting = asyncio.create_task(post_turn(service.url, someone.access, session["id"], "/slow 0.05 a long answer"))
        await asyncio.sleep(moment)
        base = service.urls[n % len(service.urls)]
        await until(lambda: stop(base, someone.access, session["id"]), 5, "a turn to stop")
        answer = await asyncio.wait_for(posting, 10)
        assert answer.status == 200
        statuses = await ended(service.url, someone, session["id"], 2 * sides)
        assert set(statuses[sides:]) == {"stopped"}, statuses
        again = await post_turn(service.url, someone.access, session["id"], "/echo next")
        assert again.sides()["a"] == "next", "the session takes a next turn"

    for n, moment in enumerate(MOMENTS):
        await stopped_after(moment, n)


@pytest.mark.parametrize("name", ["sqlite", "postgres+redis"])
async def test_a_deploy_in_the_first_moments_leaves_nothing_pending(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """SIGTERM 0 to 20 ms after the second message: the next process finds every reply ended."""

    async def deployed_after(moment: float) -> None:
        folder = tmp_path / f"{moment}"
        folder.mkdir()
        environment = CLOSED | store(name, request, folder) | {"PARLEY_DRAIN": "0.01"}
        # Uvicorn waits so long for the readers' connections before it lets the service end their turns.
        async with Service(environment, options=["--timeout-graceful-shutdown", "1"]) as service:
            someone = await guest(service.url)
            session = await new_session(service.url, someone.access)
            await post_turn(service.url, someone.access, session["id"], "/echo first")
            posting = asyncio.create_task(
                post_turn(service.url, someone.access, session["id"], "/slow 0.05 a long answer", id="second")
            )
            await asyncio.sleep(moment)
            service.terminate()
            await service.ended()
            with contextlib.suppress(Exception):  # refused, cut or answered: whatever the moment gave
                await posting
            rows = await read_rows(environment["DATABASE_URL"], session["id"])
            assert {row.status for row in rows.messages} <= TERMINAL, rows
            assert {turn.status for turn in rows.turns} == {"ended"}, rows

    await asyncio.gather(*[deployed_after(moment) for moment in (0.0, 0.003, 0.006, 0.01, 0.02)])


@pytest.fixture
async def two_owners(service: Service) -> AsyncIterator[tuple[Guest, Guest]]:
    yield await guest(service.url), await guest(service.url)


async def test_an_id_used_again_is_another_session(service: Service, two_owners: tuple[Guest, Guest]) -> None:
    """Deleted and made again by another account: nothing of one reaches the readers of the other."""
    ann, ben = two_owners
    journal, id = Journal(), f"again-{ann.id[-8:]}"
    await new_session(service.url, ann.access, id=id)
    async with contextlib.AsyncExitStack() as stack:
        old = [
            await stack.enter_async_context(SocketReader(journal, f"ann{n}", base, id, token=ann.access))
            for n, base in enumerate(service.urls)
        ]
        await post_turn(service.url, ann.access, id, "/echo the secret of ann")
        await call(service.urls[-1], "DELETE", f"/api/sessions/{id}/", ann.access)
        await new_session(service.url, ben.access, id=id)
        new = await stack.enter_async_context(SocketReader(journal, "ben", service.urls[-1], id, token=ben.access))
        await post_turn(service.url, ben.access, id, "/echo the secret of ben")
        await new.turn_ended()
        for reader in old:
            await reader.ended()
            assert reader.codes == [4404]
        assert not [text for reader in old for text in reader.view.texts() if "ben" in text]
        assert not [text for text in new.view.texts() if "ann" in text]
        cursor = old[0].cursor
        back = await stack.enter_async_context(
            SocketReader(journal, "back", service.url, id, token=ben.access, cursor=cursor)
        )
        assert journal.events("back", "session_state") and not [t for t in back.view.texts() if "ann" in t]


@pytest.mark.parametrize("end", ["unshare", "delete the account", "revoke", "private"])
async def test_a_right_that_ends_ends_open_readers(service: Service, end: str) -> None:
    """Unshared, made private, revoked: open sockets are closed within seconds, on every worker, in a quiet session."""
    someone, journal = await guest(service.url), Journal()
    session_id = (await new_session(service.url, someone.access))["id"]
    path = f"/api/sessions/{session_id}"
    options: dict[str, object] = {"token": someone.access}
    shared = end in ("unshare", "delete the account")
    if shared:
        token = (await call(service.url, "POST", f"{path}/share/", someone.access)).json()["share_token"]
        options = {"query": {"share_token": token}}
    async with contextlib.AsyncExitStack() as stack:
        readers = [
            await stack.enter_async_context(SocketReader(journal, f"r{n}", base, session_id, **options))
            for n, base in enumerate(service.urls)
        ]
        if end == "unshare":
            await call(service.url, "POST", f"{path}/unshare/", someone.access)
        elif end == "delete the account":
            assert (await call(service.url, "DELETE", "/api/users/me/", someone.access)).status_code == 204
        elif end == "revoke":
            answer = await call(service.url, "POST", "/api/auth/revoke/", someone.access)
            assert answer.status_code == 204
        else:
            await call(service.url, "PATCH", f"{path}/", someone.access, json={"is_public": False})
            await asyncio.sleep(0)
            for reader in readers:
                await reader.send({"type": "ping"})
                await reader.event("pong")
            return
        for reader in readers:
            await reader.ended()
            assert reader.codes == [4404 if shared else 4401]


async def test_an_event_source_is_not_refused_while_its_turn_is_made_again(service: Service) -> None:
    """Another tab asks again, and again: who opens the stream in between is told one turn or the next."""
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access)
    await post_turn(service.url, someone.access, session["id"], "/echo hello")
    reply = (await messages(service.url, someone.access, session["id"]))[-1]

    async def made_again() -> None:
        for _ in range(30):
            path = f"/api/messages/{reply['id']}/regenerate/"
            assert (await post_turn(service.url, someone.access, None, "", body={}, path=path)).status == 200

    async def read(base: str) -> None:
        while not making.done():
            answer = await call(base, "GET", f"/api/sessions/{session['id']}/stream/", someone.access)
            assert answer.status_code == 200, answer.text

    making = asyncio.create_task(made_again())
    await asyncio.gather(making, *[read(base) for base in 2 * service.urls])


async def test_a_retry_after_a_refusal_is_answered(tmp_path: Path) -> None:
    """A write lock held longer than a caller waits: 503, and the same message again is answered, with one call."""
    path = tmp_path / "parley.db"
    environment = CLOSED | {"DATABASE_URL": f"sqlite:///{path}", "PARLEY_STORAGE_TIMEOUT": "1"}
    async with Service(environment) as service:
        someone = await guest(service.url)
        session = await new_session(service.url, someone.access)
        blocker = sqlite3.connect(path, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        refused = await call(
            service.url, "POST", "/api/messages/stream/", someone.access,
            json={"session_id": session["id"], "content": "/echo at last", "id": "one"},
        )  # fmt: skip
        assert (refused.status_code, refused.json()["error"]) == (503, "storage_unavailable")
        blocker.execute("COMMIT")
        blocker.close()
        answer = await until(
            lambda: _answered(service.url, someone, session["id"]), 10, "an answer to the same message"
        )
        assert answer == "at last"
        assert await ended(service.url, someone, session["id"], 1) == ["success"]


async def _answered(base: str, someone: Guest, session_id: str) -> str | None:
    answer = await post_turn(base, someone.access, session_id, "/echo at last", id="one")
    return answer.sides()["a"] if answer.status == 200 else None
