"""A turn's owner at rude moments: storage that goes away or waits, inside this process, so that each moment is exact."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from chat.errors import ChatError
from chat.formats.events import socket_dialect
from chat.live.answers import TOLD, Answer, Cursor
from chat.live.bus import GAP, Gather
from chat.live.leases import Leases
from chat.live.rooms import NOTICES_MAX, Follower, Room
from chat.live.voice import Voice, piece, text_key
from chat.settings import read_settings
from chat.state import State, open_state
from chat.store import accounts, operator, sessions, turns
from chat.store.accounts import Account
from chat.store.budgets import budgets_of
from chat.store.database import StorageUnavailable, new_id
from chat.store.pages import select_page
from chat.store.rights import Right
from chat.store.sessions import Session
from chat.store.turns import Ask, Terms
from tests.conftest import CLOSED, store
from tests.harness import until
from tests.harness.scene import counted

QUIET = {"PARLEY_LEASE": "7200", "PARLEY_LEASE_RENEW": "3600", "PARLEY_SWEEP_EVERY": "3600", "PARLEY_STORE_FOR": "0.1"}


class Owner:
    """A worker's state whose beats do not come by themselves, and somebody who writes to it."""

    def __init__(self, state: State, owner: Leases, someone: Account) -> None:
        self.state = state
        self.leases = owner
        self.someone = someone

    async def session(self, mode: str = "direct") -> Session:
        id, models = new_id(), ("demo-scholar", None if mode == "direct" else "demo-poet")
        await sessions.insert_session(self.state.database, self.someone.id, mode, models, id=id)
        return await sessions.select_unchecked(self.state.database, id)

    async def used_again(self, session: Session) -> Session:
        """Delete a session and make another one of the same id."""
        database = self.state.database
        await sessions.delete_session(database, session, self.someone.id)
        await database.set_clock()
        await until(lambda: database.now() > session.created_at, what="another millisecond")
        await sessions.insert_session(database, self.someone.id, "direct", ("demo-poet", None), id=session.id)
        return await sessions.select_unchecked(database, session.id)

    async def begin(self, session: Session, content: str, id: str = "") -> str:
        stored = await self.state.generation.begin(session, self.someone, Ask(id or new_id(), content, {}))
        return stored.id

    async def replies(self, turn_id: str) -> dict[str, tuple[str, str | None, str]]:
        rows = await turns.select_turn_messages(self.state.database, turn_id)
        return {row["participant"]: (row["status"], row["failure_reason"], row["content"]) for row in rows[1:]}

    async def over(self, turn_id: str) -> dict[str, tuple[str, str | None, str]]:
        async def ended() -> bool:
            return turn_id not in self.state.generation.turns

        await until(ended, 5, "the turn's end")
        return await self.replies(turn_id)

    async def idle(self) -> bool:
        """Whether no turn's task runs."""
        names = ("Generation._run", "adopt")
        return not [task for task in self.state.generation.tasks._tasks if any(name in repr(task) for name in names)]

    async def orphan(self, session: Session, ask: Ask, worker: str = "dead", lease: int = -1000) -> str:
        """Write a turn nobody here knows of; by default its worker died before a checkpoint, and its lease is over."""
        turn_id, database = new_id(), self.state.database
        terms = Terms(worker, lease, 0, budgets_of(self.someone.id, [], (0, 0, 0)), 0, 10, "")
        await turns.insert_turn(database, session, self.someone.id, ask, terms, turn_id)
        return turn_id


@pytest.fixture
async def owner(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Owner]:
    """On SQLite, or on the storage that the test names."""
    made: list[Leases] = []
    monkeypatch.setattr(Leases, "start", lambda self: made.append(self))
    environment = CLOSED | QUIET | store(getattr(request, "param", "sqlite"), request, tmp_path)
    async with AsyncExitStack() as stack:
        state = await open_state(read_settings(environ=environment), stack)
        yield Owner(state, made[0], await accounts.insert_guest(state.database, None))


def away_for(times: int, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Storage is away for the first so many of these calls."""
    left = times

    async def asked(*given: Any, **named: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise StorageUnavailable
        return await call(*given, **named)

    return asked


async def test_a_battle_whose_history_cannot_be_read_ends(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage goes away between the turn's row and its history: a blind battle fails, and does not wait for its pace."""
    session = await owner.session("random")
    history, calls = owner.state.generation.streams.history, 0

    async def away(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first one counted the prompt's tokens
            raise StorageUnavailable
        return await history(*given)

    monkeypatch.setattr(owner.state.generation.streams, "history", away)
    turn_id = await owner.begin(session, "/echo hello")
    assert await owner.over(turn_id) == dict.fromkeys("ab", ("failed", "storage_unavailable", ""))


async def test_an_inherited_ending_that_storage_refused_is_stored_later(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage goes away between taking a turn over and ending it: the session must not stay busy for ever."""
    session = await owner.session()
    turn_id = await owner.orphan(session, Ask(new_id(), "/echo hello", {}))
    with monkeypatch.context() as patch:
        patch.setattr(turns, "update_endings", away_for(1000, turns.update_endings))
        await owner.leases._sweep()
        await until(owner.idle, 5, "the ending to be given up")
    await owner.leases._renew()
    assert await owner.over(turn_id) == {"a": ("failed", "storage_unavailable", "")}
    assert (await owner.over(await owner.begin(session, "/echo next")))["a"][2] == "next"


@pytest.mark.parametrize("owner", ["postgres+redis"], indirect=True)  # a writer of SQLite waits in the file's one line
async def test_a_late_attempt_changes_nothing_that_was_told(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt waits for the turn's row until readers have been told that it failed, and goes on then."""
    import asyncpg

    database, generation = owner.state.database, owner.state.generation
    update, locked = turns.update_endings, asyncio.Event()

    async def waiting(*given: Any, **named: Any) -> Any:  # the answer may be short, and is not over before its row is held
        await locked.wait()
        return await update(*given, **named)

    monkeypatch.setattr(turns, "update_endings", waiting)
    turn_id = await owner.begin(await owner.session(), "/count 10")
    other = await asyncpg.connect(database.url)
    try:
        await other.execute("BEGIN")
        await other.execute("SELECT * FROM turns WHERE id = $1 FOR UPDATE", turn_id)
        with monkeypatch.context() as impatient:
            impatient.setattr(database, "timeout", 0.2)
            locked.set()
            await until(owner.idle, 5, "the ending to be given up")
        assert [row["failure_reason"] for row in generation.turns[turn_id].unsaved] == ["storage_unavailable"]
    finally:
        await other.close()
    await until(lambda: not database._running, 5, "the late attempts to end")
    assert (await owner.replies(turn_id))["a"][0] in ("pending", "streaming")
    await owner.leases._renew()
    assert await owner.replies(turn_id) == {"a": ("failed", "storage_unavailable", counted(10))}


@pytest.mark.parametrize("moment", ["storage away", "retry"])
async def test_an_inherited_turn_is_never_answered_anew(
    owner: Owner, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Readers may have seen words that no checkpoint has: a second answer would go on in the middle of the first."""
    session, ask = await owner.session(), Ask(new_id(), "/echo hello", {})
    turn_id = await owner.orphan(session, ask)
    select = sessions.select_unchecked
    if moment == "retry":
        gate = asyncio.Event()

        async def slow(*given: Any) -> Session:
            session = await select(*given)
            if (task := asyncio.current_task()) is not None and "adopt" in repr(task):
                await gate.wait()
            return session

        monkeypatch.setattr(sessions, "select_unchecked", slow)
        await owner.leases._sweep()
        assert await owner.begin(session, ask.content, ask.message_id) == turn_id
        gate.set()
    else:
        monkeypatch.setattr(sessions, "select_unchecked", away_for(1, select))
        await owner.leases._sweep()
        for _ in range(3):
            await owner.leases._renew()
    await until(owner.idle, 5, "the turn's end")
    assert await owner.over(turn_id) == {"a": ("interrupted", "interrupted", "")}


async def test_leases_are_renewed_as_soon_as_storage_answers(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the pause of a beat they would have run out."""
    ask = Ask(new_id(), "/slow 60 one two three", {})
    turn_id = await owner.orphan(await owner.session(), ask, owner.leases.worker, 1000)
    monkeypatch.setattr(turns, "renew_leases", away_for(1, turns.renew_leases))
    await owner.leases._keep()
    assert not await turns.take_over(owner.state.database, "another", -1000)
    assert turn_id in await turns.renew_leases(owner.state.database, owner.leases.worker, 0)


async def test_a_thawed_worker_is_silent_while_storage_is_away(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its turn may have been taken while it was frozen, before storage went away."""
    turn_id = await owner.begin(await owner.session(), "/slow 60 one two three")
    turn = owner.state.generation.turns[turn_id]
    monkeypatch.setattr(turns, "renew_leases", away_for(1, turns.renew_leases))
    owner.leases._slept = True
    assert not owner.leases.surely_owned()
    renewed = owner.leases._renewed_at
    await until(lambda: owner.leases.surely_owned(), what="the lease to be confirmed")
    assert owner.leases._renewed_at > renewed, "nobody has confirmed it"
    turn.end_early("stopped")


async def test_a_renewal_that_had_to_wait_gives_a_whole_lease(owner: Owner) -> None:
    """Somebody has the file's lock when the leases are renewed."""
    database, worker = owner.state.database, owner.leases.worker
    await owner.orphan(await owner.session(), Ask(new_id(), "/echo hello", {}), worker, 1000)
    await until(lambda: database._lines[False]._free, what="the writer")
    with sqlite3.connect(urlsplit(database.url).path[1:], isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        asked = database.now()
        renewing = asyncio.create_task(turns.renew_leases(database, worker, 60_000))
        await until(lambda: not database._lines[False]._free, what="the renewal to wait")
        await until(lambda: database.now() > asked + 20, what="some time")
        released = database.now()
        other.execute("ROLLBACK")
    await renewing
    rows = await database.fetch_all("SELECT lease_until FROM turns")
    assert rows[0]["lease_until"] >= released + 60_000


async def test_a_turn_taken_over_without_an_answer_is_not_answered_anew(owner: Owner) -> None:
    """The database was away when it had done so: the new owner finds a turn of its own that it never heard of."""
    turn_id = await owner.orphan(await owner.session(), Ask(new_id(), "/echo hello", {}))
    assert await turns.take_over(owner.state.database, owner.leases.worker, 60_000)
    for _ in range(2):
        await owner.leases._renew()
    await until(owner.idle, 5, "the turn's end")
    assert await owner.over(turn_id) == {"a": ("interrupted", "interrupted", "")}


async def test_a_reply_made_again_without_an_answer_is_answered(owner: Owner) -> None:
    """One side of a battle was to be made again, and its caller was refused: the other side's text says nothing of it."""
    session = await owner.session("compare")
    before = await owner.over(await owner.begin(session, "/echo hello"))
    row = await turns.select_latest_turn(owner.state.database, session)
    assert row is not None
    replies = [each for each in await turns.select_turn_messages(owner.state.database, row["id"]) if each["participant"]]
    terms = Terms(owner.leases.worker, 60_000, 0, budgets_of(owner.someone.id, [], (0, 0, 0)), 0, 10, "")
    again = new_id()
    await turns.insert_regeneration(
        owner.state.database, session, owner.someone.id, replies[0]["id"], terms, again
    )
    for _ in range(2):
        await owner.leases._renew()
    await until(owner.idle, 5, "the turn's end")
    assert await owner.over(again) == before


async def test_a_message_is_found_while_its_turn_is_made_again(owner: Owner) -> None:
    """Another tab asks again, and again: whoever looks for the message's turn finds one turn or the next, whole."""
    session, generation = await owner.session(), owner.state.generation
    await owner.over(await owner.begin(session, "/echo hello", "said"))

    async def made_again() -> None:
        for _ in range(20):
            await owner.over((await generation.again(session, owner.someone, "said")).id)

    making = asyncio.create_task(made_again())
    while not making.done():
        found = await turns.select_turn_of_message(owner.state.database, session, "said")
        assert found is not None and [row["role"] for row in found.rows] == ["user", "assistant"]
    await making


async def test_a_stop_held_up_by_storage_does_not_stop_the_next_turn(owner: Owner) -> None:
    """Somebody has the file's lock, ends the turn and begins the next one, before the stop is carried out."""
    session, database = await owner.session(), owner.state.database
    first = await owner.orphan(session, Ask(new_id(), "one", {}), "other", 60_000)
    await until(lambda: database._lines[False]._free, what="the writer")
    columns = "session_id, account_id, user_message_id, owner, lease_until, stop_requested, created_at"
    with sqlite3.connect(urlsplit(database.url).path[1:], isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        stopping = asyncio.create_task(owner.state.generation.stop(session, owner.someone.id))
        await until(lambda: not database._lines[False]._free, what="the stop to wait")
        other.execute("UPDATE turns SET status = 'ended' WHERE id = ?", (first,))
        other.execute(
            f"""INSERT INTO turns (id, position, status, {columns})
                SELECT 'next', 9, 'running', {columns} FROM turns WHERE id = ?""",
            (first,),
        )
        other.execute("COMMIT")
    assert not await stopping
    rows = await database.fetch_all("SELECT id, stop_requested FROM turns ORDER BY position")
    assert rows == [{"id": first, "stop_requested": 0}, {"id": "next", "stop_requested": 0}]


async def test_a_stop_beside_a_message_that_will_be_refused_reaches_the_running_turn(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn runs on another worker, and a second message is on its way to storage here when the visitor stops."""
    session, insert, gate = await owner.session(), turns.insert_turn, asyncio.Event()
    running = await owner.orphan(session, Ask(new_id(), "one", {}), "other", 60_000)

    async def slow(*given: Any) -> Any:
        await gate.wait()
        return await insert(*given)

    monkeypatch.setattr(turns, "insert_turn", slow)
    second = asyncio.create_task(owner.begin(session, "/echo two"))
    await until(lambda: owner.state.generation.turns, 5, "the second turn to begin")
    assert await owner.state.generation.stop(session, owner.someone.id)
    gate.set()
    with pytest.raises(ChatError, match="still being written"):
        await second
    rows = await owner.state.database.fetch_all("SELECT id, stop_requested FROM turns")
    assert rows == [{"id": running, "stop_requested": 1}]


async def test_each_model_of_a_battle_has_the_whole_history_budget(owner: Owner) -> None:
    """The other side's replies, which a model is not shown, took their share of it."""
    streams = owner.state.generation.streams
    long = owner.state.settings.history_tokens * 4 - 10
    said = [("user", None, "first"), ("assistant", "a", "a" * long), ("assistant", "b", "b" * long)]
    said.append(("user", None, "second"))
    history: list[Any] = [dict(zip(("role", "participant", "content"), each, strict=True)) for each in reversed(said)]
    for side in "ab":
        prompt = streams.prompt("demo-scholar", side, history, "third")
        assert [message.content[:6] for message in prompt] == [side * 6, "second", "third"]


async def test_a_stop_does_not_clear_a_models_record(owner: Owner) -> None:
    """Visitors stop a model that says nothing: it would be drawn for battles all the time."""
    session, generation = await owner.session(), owner.state.generation
    for _ in range(3):
        await owner.over(await owner.begin(session, "/fail"))
    assert generation.outages() == {"demo-scholar"}
    turn_id = await owner.begin(session, "/slow 60 one two three")
    await generation.stop(session, owner.someone.id)
    assert (await owner.over(turn_id))["a"][0] == "stopped"
    assert generation.outages() == {"demo-scholar"}
    await owner.over(await owner.begin(session, "/echo well again"))
    assert generation.outages() == set()


async def test_a_room_keeps_the_newest_session_it_has_read(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two readings run at once, and the one that began first ends last."""
    session, relay = await owner.session(), owner.state.relay
    readings = [replace(session, version=session.version + n) for n in (1, 0)]

    async def latest(*given: Any) -> Any:
        return readings.pop(0), None

    monkeypatch.setattr(relay, "latest", latest)
    room = relay.enter(session)
    newest = readings[0]
    await room.learn()
    await room.learn()
    assert room.session is newest
    relay.leave(room)


async def test_the_relays_lag_is_that_of_the_sign_which_came_back(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sign of life takes longer than a second, and the next one has left meanwhile."""
    relay, signs = owner.state.relay, []

    async def publish(channel: str, sign: str) -> None:
        signs.append(sign)

    monkeypatch.setattr(relay.broadcast, "publish", publish)
    await relay.beat()
    await relay.beat()
    relay._hear_own(signs[0])
    assert relay.lag == relay.heard_at - float(signs[0]) > relay.heard_at - float(signs[1])


async def test_an_abort_of_one_turn_does_not_stop_another(owner: Owner) -> None:
    """The abort of a request takes effect after a moment, in which the turn may have ended and the next begun."""
    session, generation = await owner.session(), owner.state.generation
    turn_id = await owner.begin(session, "/slow 60 one two three")
    assert not await generation.stop(session, owner.someone.id, "another")
    assert generation.turns[turn_id].early is None
    assert await generation.stop(session, owner.someone.id, turn_id)
    assert (await owner.over(turn_id))["a"][0] == "stopped"


async def test_a_write_falls_on_no_later_session_of_the_same_id(owner: Owner) -> None:
    """A deletion and a message wait while the session is deleted and its id is used again."""
    database, someone = owner.state.database, owner.someone
    session = await owner.session()
    assert (await owner.used_again(session)).key != session.key
    for late in (sessions.delete_session(database, session, someone.id), owner.begin(session, "/echo hello")):
        with pytest.raises(ChatError) as refused:
            await late
        assert refused.value.code == "not_found"
    assert (await sessions.select_unchecked(database, session.id)).message_count == 0


async def test_a_reading_finds_no_turn_of_a_later_session_of_the_same_id(owner: Owner) -> None:
    """A worker stood still between the check of a reader and what the reader wants, and the id was used again."""
    database, session = owner.state.database, await owner.session()
    later = await owner.used_again(session)
    turn_id = await owner.begin(later, "/echo hello", "message")
    await owner.over(turn_id)
    for each, found in ((session, False), (later, True)):
        assert bool(await turns.select_latest_turn(database, each)) is found
        assert bool(await turns.select_turn_and_next(database, each, "")) is found
        assert bool(await turns.select_turn_and_next(database, each, turn_id)) is found
        assert bool(await turns.select_turn_of_message(database, each, "message")) is found
        assert bool(await turns.select_first_message(database, each)) is found


async def test_a_delayed_edit_deletes_no_later_message(owner: Owner) -> None:
    """An edited message deletes those behind it, but not one that was sent after the edit was."""
    session, id = await owner.session(), new_id()
    await owner.over(await owner.begin(session, "/echo one", id))
    seen = await sessions.select_unchecked(owner.state.database, session.id)
    await owner.over(await owner.begin(seen, "/echo two"))
    edit = Ask(id, "/echo three", {}, replaces=True)
    with pytest.raises(ChatError) as refused:
        await owner.state.generation.begin(seen, owner.someone, edit)
    assert refused.value.code == "conflict"
    seen = await sessions.select_unchecked(owner.state.database, session.id)
    assert seen.message_count == 4
    stored = await owner.state.generation.begin(seen, owner.someone, edit)
    assert (await owner.over(stored.id))["a"][2] == "three"
    assert (await sessions.select_unchecked(owner.state.database, session.id)).message_count == 2


async def test_readers_learn_of_a_deletion_without_an_answer(owner: Owner) -> None:
    session, relay = await owner.session(), owner.state.relay
    follower = await relay.join(Right(owner.state.database, session, owner.someone), socket_dialect)
    with pytest.raises(StorageUnavailable), relay.doubtful(session):
        await sessions.delete_session(owner.state.database, session, owner.someone.id)
        raise StorageUnavailable(in_doubt=True)
    await until(lambda: follower.ended, what="the reader to be sent away")


async def test_a_reader_before_the_first_reading_learns_of_a_change(owner: Owner) -> None:
    """Joined while the worker answers, for which nothing is read; then the news of a title is lost, and another joins."""
    session, relay, database = await owner.session(), owner.state.relay, owner.state.database
    turn_id = await owner.begin(session, "/slow 60 one two three")
    follower = await relay.join(Right(database, session, owner.someone), socket_dialect)
    owner.state.generation.turns[turn_id].end_early("stopped")
    await owner.over(turn_id)
    changed = await sessions.update_session(database, session.id, owner.someone.id, title="Rivers")
    await relay.join(Right(database, changed, owner.someone), socket_dialect)
    async with asyncio.timeout(5):
        assert b"Rivers" in b"".join(await follower.next())


async def test_readers_learn_of_a_message_to_a_person_that_a_dead_worker_wrote(owner: Owner) -> None:
    """Such a turn is over at once, and nobody takes it over: the visitor says it again, to another worker."""
    session, database = await owner.session(), owner.state.database
    follower = await owner.state.relay.join(Right(database, session, owner.someone), socket_dialect)
    await operator.update_operator(database, session.id, "Anna")
    turn_id = await owner.orphan(session, Ask("message", "Is anybody there?", {}))
    assert await owner.begin(session, "Is anybody there?", "message") == turn_id
    async with asyncio.timeout(5):
        assert "Is anybody there?" in b"".join(await follower.next()).decode()


async def test_a_message_to_a_person_is_written_once(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a turn is over as it is written: nothing of it is left to end, with storage away or not."""
    session, written = await owner.session(), list[Any]()
    await operator.update_operator(owner.state.database, session.id, "Anna")

    async def note(*given: Any, **named: Any) -> bool:
        written.append(given)
        return True

    monkeypatch.setattr(turns, "update_endings", note)
    await owner.over(await owner.begin(session, "Is anybody there?"))
    assert written == []


async def test_a_turn_that_begins_while_leases_are_renewed_is_not_lost(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The renewal waited for a lock and saw the table as it was before: its answer says nothing of a turn since then."""
    session, renew, asked, gate = await owner.session(), turns.renew_leases, asyncio.Event(), asyncio.Event()

    async def slow(*given: Any) -> Any:
        owned = await renew(*given)
        asked.set()
        await gate.wait()
        return owned

    monkeypatch.setattr(turns, "renew_leases", slow)
    history = owner.state.generation.streams.history
    starting = asyncio.Event()

    async def waiting(*given: Any) -> Any:  # the turn is known and not written
        starting.set()
        await asked.wait()
        return await history(*given)

    monkeypatch.setattr(owner.state.generation.streams, "history", waiting)
    beginning = asyncio.create_task(owner.begin(session, "/slow 60 one two three"))
    await starting.wait()
    renewing = asyncio.create_task(owner.leases._renew())
    turn_id = await beginning
    await until(lambda: _is(owner, turn_id, "answering"), 5, "the turn to be answered")
    gate.set()
    await renewing
    owner.state.generation.turns[turn_id].end_early("stopped")
    assert (await owner.over(turn_id))["a"][0] == "stopped"


async def test_a_mistake_with_one_side_ends_the_other_sides_stream(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other model must not be asked for words that nobody waits for."""
    generation, finish, mistakes = owner.state.generation, owner.state.generation.finish, ["one"]

    async def mistaken(*given: Any) -> None:
        if mistakes:
            raise RuntimeError(mistakes.pop())
        await finish(*given)

    monkeypatch.setattr(generation, "finish", mistaken)
    turn_id = await owner.begin(await owner.session("compare"), "/slow 60 one two three")
    await until(lambda: _is(owner, turn_id, "answering"), 5, "the turn to be answered")
    streams = generation.turns[turn_id].streams
    streams["a"].cancel()
    ended = await owner.over(turn_id)
    assert [ended[side][0] for side in "ab"] == ["failed", "interrupted"]
    assert streams["b"].cancelled()


@pytest.mark.parametrize("owner", ["postgres+redis"], indirect=True)
async def test_a_turn_of_which_readers_saw_text_is_not_asked_again(owner: Owner) -> None:
    """It has no checkpoint, as Redis has its text: a second answer would be told behind the first one's beginning."""
    session, bus = await owner.session(), owner.state.relay.bus
    assert bus is not None
    turn_id = await owner.orphan(session, Ask(new_id(), "/echo hello", {}), owner.state.generation.worker, 60_000)
    await bus.command("SET", text_key(bus, turn_id, "a"), piece(0, "shown "))
    row = await turns.select_latest_turn(owner.state.database, session)
    assert row is not None
    await owner.leases.adopt(row)
    assert await owner.over(turn_id) == {"a": ("interrupted", "interrupted", "shown ")}


async def test_a_worker_that_ends_adopts_nothing(owner: Owner) -> None:
    """A turn that was written behind a refused caller's back is left to the other workers."""
    turn_id = await owner.orphan(await owner.session(), Ask(new_id(), "/echo hello", {}), owner.leases.worker, 60_000)
    owner.state.generation.draining = True
    for _ in range(3):
        await owner.leases._renew()
    assert await owner.idle() and not owner.state.generation.turns
    owner.state.generation.draining = False
    for _ in range(2):
        await owner.leases._renew()
    await until(owner.idle, 5, "the turn's end")
    assert (await owner.over(turn_id))["a"][2] == "hello"


async def test_a_snapshot_of_long_messages_has_fewer_of_them(owner: Owner) -> None:
    """Ten tabs that open a session of the longest replies must not cost a hundred megabytes."""
    session, database = await owner.session(), owner.state.database
    for n in range(7):
        await owner.over(await owner.begin(session, f"/echo {n}"))
    await database.execute("UPDATE messages SET content = :text WHERE role = 'assistant'", {"text": "x" * 100_000})
    relay, right = owner.state.relay, Right(database, session, owner.someone)
    follower = await relay.join(right, socket_dialect)
    shown = (await relay.snapshot(follower, session))["messages"]
    relay.part(follower)
    assert 300_000 < sum(len(message["content"]) for message in shown) <= 500_000
    assert shown[-2]["content"] == "/echo 6"


async def _is(owner: Owner, turn_id: str, state: str) -> bool:
    turn = owner.state.generation.turns.get(turn_id)
    return turn is not None and turn.state == state


async def test_a_worker_that_was_frozen_asks_once_for_all_its_words(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models go on while the database is asked: their words wait, and do not ask again each."""
    renew, asked, gate = turns.renew_leases, 0, asyncio.Event()

    async def slow(*given: Any) -> Any:
        nonlocal asked
        asked += 1
        await gate.wait()
        return await renew(*given)

    monkeypatch.setattr(turns, "renew_leases", slow)
    owner.leases._slept = True  # before the first word: a turn may be over before the next one has begun
    began = [await owner.begin(await owner.session(), "/slow 0.001 a few words") for _ in range(3)]
    running = [owner.state.generation.turns[turn_id] for turn_id in began]
    await until(lambda: asked and all(turn.finished for turn in running), 5, "all words to come, and wait")
    gate.set()
    for turn_id in began:
        assert (await owner.over(turn_id))["a"][0] == "success"
    assert asked == 1


async def test_a_thawed_owner_of_a_taken_turn_says_nothing_more(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen until another worker owned its turn: readers here see no word that the model says after that."""
    renew, gate = turns.renew_leases, asyncio.Event()

    async def slow(*given: Any) -> Any:
        await gate.wait()
        return await renew(*given)

    turn_id = await owner.begin(await owner.session(), "/slow 0.02 " + "word " * 500)
    await until(lambda: _is(owner, turn_id, "answering"), 5, "the turn to be answered")
    turn = owner.state.generation.turns[turn_id]
    reply = turn.out.answer.replies["a"]
    await until(lambda: reply.text, 5, "its first word")
    monkeypatch.setattr(turns, "renew_leases", slow)
    owner.leases._awake_at = owner.leases._renewed_at = -1e9
    shown = reply.text
    await owner.state.database.execute("UPDATE turns SET owner = 'another' WHERE id = :id", {"id": turn_id})
    gate.set()
    await until(lambda: turn_id not in owner.state.generation.turns, 5, "the turn to be lost")
    assert turn.state == "lost"
    assert reply.text == shown


class Stalled:
    """A Redis that answers nothing."""

    connected = True

    def name(self, *parts: str) -> str:
        return ":".join(parts)

    def command(self, *command: Any) -> None:
        pass

    def append(self, *given: Any) -> None:
        pass

    def tell(self, *given: Any) -> None:
        pass


async def test_words_that_wait_for_redis_and_for_the_lease_are_not_shown() -> None:
    """Redis is late, and the process was frozen: readers here must not see what a taken turn would have said."""
    answer = Answer("turn", 1, "", [message("user", None), message("reply", "a")])
    bus: Any = Stalled()
    owned = True
    voice = Voice(answer, lambda: None, lambda message: None, lambda: owned, Gather(0), bus=bus, channel="channel")
    voice.say("a", "sent ")
    await asyncio.sleep(0)
    owned = False
    voice.say("a", "not sent")
    voice.show_late(0)
    assert answer.replies["a"].text == "sent "
    owned = True
    voice.hurry()
    assert answer.replies["a"].text == "sent not sent"


def message(id: str, side: str | None) -> dict[str, Any]:
    role = "user" if side is None else "assistant"
    return {"id": id, "participant": side, "role": role, "status": "pending", "content": ""}


async def test_a_right_that_ended_ends_whom_it_admitted(owner: Owner) -> None:
    """Revoked, and admitted again by a new token before the check runs: the old readers go, the new ones stay."""
    session, database = await owner.session(), owner.state.database

    async def readers() -> list[Follower]:
        account = await accounts.select_account(database, owner.someone.id, owner.someone.token_version)
        right = Right(database, session, account)
        return [await owner.state.relay.join(right, socket_dialect) for _ in range(3)]

    old = await readers()
    await accounts.revoke_tokens(database, owner.someone.id)
    owner.someone = replace(owner.someone, token_version=owner.someone.token_version + 1)
    new = await readers()
    owner.state.relay.check_rights(session)
    await until(lambda: _sent_away(old), 5, "the old readers to be sent away")
    assert not [follower for follower in new if follower.ended]


@pytest.mark.parametrize("end", ["unshared", "revoked"])
async def test_a_right_that_ends_before_its_reader_joins_admits_nobody(owner: Owner, end: str) -> None:
    """A reader waits for a place of Redis' or for storage, between its admission and the room."""
    session, database, relay = await owner.session(), owner.state.database, owner.state.relay
    session = await sessions.update_share(database, session.id, owner.someone.id, True)
    shared = Right(database, session, share_token=session.share_token or "", member=False)
    right = shared if end == "unshared" else Right(database, session, owner.someone)
    relay.part(await relay.join(right, socket_dialect))
    if end == "unshared":
        await sessions.update_share(database, session.id, owner.someone.id, False)  # on a worker that is not heard yet
    else:
        await accounts.revoke_tokens(database, owner.someone.id)
        relay.check_account(owner.someone.id)
    with pytest.raises(ChatError) as refused:
        await relay.join(right, socket_dialect)
    assert refused.value.code == ("not_found" if end == "unshared" else "token_invalid")
    assert not relay.rooms


async def test_a_right_that_ends_before_its_reader_joins_an_open_room(owner: Owner) -> None:
    session, database, relay = await owner.session(), owner.state.database, owner.state.relay
    session = await sessions.update_share(database, session.id, owner.someone.id, True)
    right = Right(database, session, share_token=session.share_token or "", member=False)
    other = await relay.join(Right(database, session, owner.someone), socket_dialect)
    relay.check_rights(await sessions.update_share(database, session.id, owner.someone.id, False))
    with pytest.raises(ChatError, match="no such"):
        await relay.join(right, socket_dialect)
    assert other.ended is None


async def test_a_change_before_its_reader_joins_is_told(owner: Owner) -> None:
    """Who resumes is sent no state of the session: after a change between its admission and the room it knew nothing."""
    session, database, relay = await owner.session(), owner.state.database, owner.state.relay
    right = Right(database, session, owner.someone)
    first = await relay.join(right, socket_dialect)
    relay.tell_update(await sessions.update_session(database, session.id, owner.someone.id, title="new"), "updated")
    late = await relay.join(right, socket_dialect)
    for follower in (first, late):
        follower.polls = True
        told = await follower.next()
        assert len(told) == 1 and b'"title":"new"' in told[0]


async def test_an_older_change_that_comes_late_is_told_to_nobody(owner: Owner) -> None:
    """A worker's notice is held up, and a reader comes that was admitted after the change behind it."""
    session, database, relay = await owner.session(), owner.state.database, owner.state.relay
    changed = await sessions.update_session(database, session.id, owner.someone.id, title="new")
    follower = await relay.join(Right(database, changed, owner.someone), socket_dialect)
    relay.tell_update(session, "updated")
    follower.polls = True
    assert await follower.next() == []


async def test_no_older_change_is_told_after_a_snapshot(owner: Owner) -> None:
    """One waits for the reader when it asks for a snapshot, one is held up until it has it."""
    session, database, relay = await owner.session(), owner.state.database, owner.state.relay
    follower = await relay.join(Right(database, session, owner.someone), socket_dialect)
    titles = ("waits", "held up", "shown", "newer")
    changes = [await sessions.update_session(database, session.id, owner.someone.id, title=each) for each in titles]
    relay.tell_update(changes[0], "updated")
    assert (await relay.snapshot(follower, changes[2]))["session"]["title"] == "shown"
    relay.tell_update(changes[1], "updated")
    relay.tell_update(changes[3], "updated")
    follower.polls = True
    told = await follower.next()
    assert len(told) == 1 and b'"title":"newer"' in told[0]


async def test_a_change_that_no_snapshot_told_is_told(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage goes away in the middle of a snapshot: the reader goes on where it was, with the events that wait."""
    session, database, relay = await owner.session(), owner.state.database, owner.state.relay
    follower = await relay.join(Right(database, session, owner.someone), socket_dialect)
    changed = await sessions.update_session(database, session.id, owner.someone.id, title="new")
    relay.tell_update(changed, "updated")
    monkeypatch.setattr("chat.live.relay.select_page", away_for(1, select_page))
    with pytest.raises(StorageUnavailable):
        await relay.snapshot(follower, changed)
    follower.polls = True
    told = await follower.next()
    assert len(told) == 1 and b'"title":"new"' in told[0]


async def test_too_many_changes_for_a_reader_that_resumes(owner: Owner) -> None:
    """It asks to go on from its cursor, so that no snapshot comes: the newest change is told all the same."""
    session, database, relay = await owner.session(), owner.state.database, owner.state.relay
    turn_id = await owner.begin(session, "/echo hello")
    await owner.over(turn_id)
    follower = await relay.join(Right(database, session, owner.someone), socket_dialect)
    for n in range(NOTICES_MAX + 1):
        changed = await sessions.update_session(database, session.id, owner.someone.id, title=f"title {n}")
        relay.tell_update(changed, "updated")
    assert follower.starts_over
    follower.starts_over = False
    assert await relay.resume(follower, Cursor(turn_id, (TOLD,), over=True))
    follower.polls = True
    told = await follower.next()
    assert len(told) == NOTICES_MAX and f"title {NOTICES_MAX}".encode() in told[-1]


async def _sent_away(followers: list[Follower]) -> bool:
    return all(follower.ended is not None for follower in followers)


async def test_who_joins_beside_a_reader_that_leaves_has_the_room_subscribed(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first reader leaves while its room subscribes: the second must not read before the room hears."""
    session, relay, load, gate = await owner.session(), owner.state.relay, Room.load, asyncio.Event()
    listen = relay._listen
    heard: list[bool] = []

    async def slow(*given: Any) -> None:
        await gate.wait()
        await listen(*given)

    async def loaded(self: Room) -> None:
        heard.append(self.subscribed.done())
        await load(self)

    monkeypatch.setattr(relay, "_listen", slow)
    monkeypatch.setattr(Room, "load", loaded)
    first = asyncio.create_task(relay.join(Right(owner.state.database, session, owner.someone), socket_dialect))
    await until(lambda: _has(relay.rooms), 5, "the room")
    first.cancel()
    second = asyncio.create_task(relay.join(Right(owner.state.database, session, owner.someone), socket_dialect))
    for _ in range(20):
        await asyncio.sleep(0)
    gate.set()
    follower = await second
    assert heard == [True]
    relay.part(follower)
    assert not relay.rooms


async def _has(rooms: dict[str, Room]) -> bool:
    return bool(rooms)


async def test_a_turn_that_comes_with_the_drain_is_refused(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drain begins while the limits are asked: it would neither wait for that turn nor end it."""
    generation = owner.state.generation

    async def slow(*given: Any) -> None:
        generation.draining = True

    monkeypatch.setattr(owner.state.limits, "hit", slow)
    with pytest.raises(ChatError) as refused:
        await owner.begin(await owner.session(), "/echo hello")
    assert refused.value.code == "draining"
    assert not generation.turns


@pytest.mark.parametrize("news", ["gap", "revoked"])
async def test_rights_are_checked_when_storage_is_back(
    owner: Owner, monkeypatch: pytest.MonkeyPatch, news: str
) -> None:
    """Storage is away when they have to be: a right that had ended ends when storage answers, without more news."""
    session = await owner.session()
    follower = await owner.state.relay.join(Right(owner.state.database, session, owner.someone), socket_dialect)
    await accounts.revoke_tokens(owner.state.database, owner.someone.id)
    select, away = sessions.select_unchecked, True

    async def unreachable(*given: Any) -> Any:
        if away:
            raise StorageUnavailable
        return await select(*given)

    check = Right.check

    async def checked(right: Right) -> None:
        if away:
            raise StorageUnavailable
        await check(right)

    monkeypatch.setattr(sessions, "select_unchecked", unreachable)
    monkeypatch.setattr(Right, "check", checked)
    if news == "gap":
        follower.room.hear(GAP)
    else:
        owner.state.relay.check_account(owner.someone.id)
    for _ in range(20):
        await asyncio.sleep(0)
    away = False
    await until(lambda: _sent_away([follower]), 5, "the reader to be sent away")


async def test_a_reader_whose_turn_is_gone_does_not_wait_for_news(owner: Owner) -> None:
    """Its turn was made again while it was behind, and the session is quiet: it hears so at once."""
    session = await owner.session()
    await owner.over(await owner.begin(session, "/echo hello"))
    right = Right(owner.state.database, session, owner.someone)
    follower = await owner.state.relay.join(right, socket_dialect, one_turn=True)
    follower.cursor = Cursor("made-again", (3,))
    async with asyncio.timeout(5):
        assert await follower.next() == []
    assert follower.starts_over
