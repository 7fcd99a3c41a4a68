"""Rooms of a worker: which turns their followers are told, in which order, when news comes late or not at all."""

from __future__ import annotations

import ast
import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

import chat.live
from chat.formats.events import socket_dialect
from chat.live import relay as relays
from chat.live.answers import Cursor, start_of
from chat.live.bus import GAP
from chat.live.events import TurnBegun, encode
from chat.live.relay import Relay
from chat.live.rooms import Follower
from chat.settings import HERE, read_settings
from chat.state import State, open_state
from chat.store import accounts, sessions, turns
from chat.store.rights import Right
from tests.conftest import CLOSED
from tests.harness import until
from tests.harness.api import Guest, guest, new_session, post_turn, stop
from tests.harness.servers import Postgres, Redis
from tests.harness.service import Service
from tests.harness.view import put_together

Event = dict[str, Any]


@dataclass
class House:
    """A service that writes turns, and a worker's state in this process that hears of them through Redis."""

    service: Service
    someone: Guest
    session: sessions.Session
    state: State

    @property
    def relay(self) -> Relay:
        return self.state.relay

    async def turn(self, content: str = "/count 3") -> str:
        answer = await post_turn(self.service.url, self.someone.access, self.session.id, content)
        assert answer.turn_id
        return answer.turn_id

    async def latest(self) -> Any:
        row = await turns.select_latest_turn(self.state.database, self.session)
        assert row is not None
        return row

    async def follower(self) -> Follower:
        account = await accounts.select_account(self.state.database, self.someone.id, 1)
        session = await sessions.select_unchecked(self.state.database, self.session.id)  # as it is at the admission
        return await self.relay.join(Right(self.state.database, session, account), socket_dialect)


@asynccontextmanager
async def house(postgres: Postgres, redis: Redis) -> AsyncIterator[House]:
    environment = CLOSED | {"DATABASE_URL": postgres.create_database(), "REDIS_URL": redis.url}
    async with Service(environment) as service, AsyncExitStack() as stack:
        state = await open_state(read_settings(environ=environment), stack)
        someone = await guest(service.url)
        made = await new_session(service.url, someone.access)
        yield House(service, someone, await sessions.select_unchecked(state.database, made["id"]), state)


def deafen(follower: Follower) -> None:
    """Its room hears nothing from now on, as if its listener had been cut off."""
    assert follower.room.listening is not None
    follower.room.listening.cancel()


async def told(follower: Follower, last: str) -> list[Event]:
    """What the follower is told, up to the end of turn `last`."""
    events: list[Event] = []
    async with asyncio.timeout(10):
        while not events or (events[-1]["type"], events[-1].get("turn_id")) != ("turn_complete", last):
            events += [json.loads(frame) for frame in await follower.next()]
    return events


def turns_of(events: list[Event]) -> list[str]:
    """The turns a reader was told from their start to their end, in order; nothing may be told twice or left out."""
    view = put_together(events)
    assert all(turn.ended for turn in view.turns.values())
    return list(view.turns)


async def test_gaps_while_a_room_opens_tell_no_old_turn(postgres_server: Postgres, redis_server: Redis) -> None:
    """Turns that were over long ago are no news to a reader that joins, however often its room learns again."""
    async with house(postgres_server, redis_server) as here:
        for _ in range(3):
            await here.turn()
        posting = asyncio.create_task(here.turn("/count 2000"))
        async with asyncio.timeout(10):
            while (running := await here.latest())["status"] != "running":
                await asyncio.sleep(0.01)
        joining = asyncio.create_task(here.follower())
        while not joining.done():
            for room in here.relay.rooms.values():
                room.hear(GAP)
            await asyncio.sleep(0)
        follower = await joining
        await stop(here.service.url, here.someone.access, here.session.id)
        events = await told(follower, running["id"])
        assert {event["turn_id"] for event in events} == {running["id"]}
        here.relay.part(follower)
        await posting


async def test_a_turn_that_was_missed_comes_before_the_next(postgres_server: Postgres, redis_server: Redis) -> None:
    """The next turn's beginning arrives, the whole turn before it never did."""
    async with house(postgres_server, redis_server) as here:
        await here.turn()
        follower = await here.follower()
        deafen(follower)
        missed, last = await here.turn(), await here.turn()
        _, answer = await here.relay.latest(here.session)
        assert answer is not None and answer.turn_id == last
        begun = TurnBegun(last, answer.position, answer.previous, answer.messages)
        follower.room.hear(encode(begun).decode())
        assert turns_of(await told(follower, last)) == [missed, last]
        here.relay.part(follower)


async def test_a_cursor_in_a_missed_turn_leaves_nobody_behind(postgres_server: Postgres, redis_server: Redis) -> None:
    """A reader resumes from a turn this room has missed; the one that waited here since before is told of it too."""
    async with house(postgres_server, redis_server) as here:
        await here.turn()
        waiting = await here.follower()
        deafen(waiting)
        missed, last = await here.turn(), await here.turn()
        coming = await here.follower()
        assert await here.relay.resume(coming, Cursor(missed, (2,)))
        rest = await told(coming, last)
        assert (rest[0]["turn_id"], rest[0]["offset"]) == (missed, 2)
        assert turns_of([event for event in rest if event["turn_id"] == last]) == [last]
        waiting.room.hear(GAP)
        assert turns_of(await told(waiting, last)) == [missed, last]
        for follower in (waiting, coming):
            here.relay.part(follower)


async def test_an_older_cursor_tells_nobody_else_old_turns(postgres_server: Postgres, redis_server: Redis) -> None:
    """A reader that comes back from three turns ago gets them; one that waits for the next turn does not."""
    async with house(postgres_server, redis_server) as here:
        ids = [await here.turn() for _ in range(4)]
        waiting, coming = await here.follower(), await here.follower()
        assert await here.relay.resume(coming, start_of(ids[1]))
        assert turns_of(await told(coming, ids[3])) == ids[1:]
        following = await here.turn()
        assert turns_of(await told(waiting, following)) == [following]
        for follower in (waiting, coming):
            here.relay.part(follower)


async def test_a_turn_ends_and_the_next_begins_during_a_snapshot(
    postgres_server: Postgres, redis_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the rows still call streaming has ended: the snapshot says so, for its end will not come any more."""
    async with house(postgres_server, redis_server) as here:
        select = relays.select_page
        read, go_on = asyncio.Event(), asyncio.Event()

        async def slowly(*arguments: Any, **options: Any) -> Any:
            rows = await select(*arguments, **options)
            read.set()
            await go_on.wait()
            return rows

        follower = await here.follower()
        posting = asyncio.create_task(here.turn("/count 2000"))
        async with asyncio.timeout(10):
            while follower.room.answer is None:
                await asyncio.sleep(0.01)
        monkeypatch.setattr(relays, "select_page", slowly)
        reading = asyncio.create_task(here.relay.snapshot(follower, here.session))
        await read.wait()
        await stop(here.service.url, here.someone.access, here.session.id)
        await posting
        following = await here.turn()
        async with asyncio.timeout(10):
            while follower.room.answer.turn_id != following:
                await asyncio.sleep(0.01)
        go_on.set()
        snapshot = await reading
        replies = [each["status"] for each in snapshot["messages"] if each["role"] == "assistant"]
        assert replies == ["stopped", "success"]
        here.relay.part(follower)


async def test_news_that_redis_did_not_take_is_told_without_a_new_connection(
    postgres_server: Postgres, redis_server: Redis
) -> None:
    """Redis takes nothing for a moment, its connection stays: a right that ended then ends elsewhere, too."""
    async with house(postgres_server, redis_server) as here, AsyncExitStack() as stack:
        other = await open_state(here.state.settings, stack)
        account = await accounts.select_account(other.database, here.someone.id, 1)
        follower = await other.relay.join(Right(other.database, here.session, account), socket_dialect)
        await accounts.revoke_tokens(other.database, account.id)
        assert here.state.relay.bus is not None and here.state.relay.bus._wire is not None
        here.state.relay.bus._wire.pause_writing()
        here.relay.check_rights(here.session)
        here.state.relay.bus._wire.resume_writing()

        async def sent_away() -> bool:
            return follower.ended is not None

        await until(sent_away, 5, "the follower to be sent away")
        other.relay.part(follower)


async def test_an_older_notice_that_comes_last_takes_nothing_back(
    postgres_server: Postgres, redis_server: Redis
) -> None:
    """Two tabs rename a session on two workers. Its deletion is told whatever version the deleting worker knew."""
    async with house(postgres_server, redis_server) as here:
        follower, database = await here.follower(), here.state.database
        renamed = [
            await sessions.update_session(database, here.session.id, here.someone.id, title=title)
            for title in ("first", "second")
        ]
        for session in reversed(renamed):
            follower.room.hear(encode(here.relay.notice_of(session, "updated")).decode())
        here.relay.tell_deleted(here.session)
        events = [json.loads(frame) for frame in await follower.next()]
        assert [event["session"].get("title") for event in events] == ["second", None]
        assert events[-1]["action"] == "deleted"
        here.relay.part(follower)


def test_the_way_of_a_token_names_functions_that_exist() -> None:
    """The docstring of the core is what newcomers read first."""
    known = set[str]()
    for path in (HERE / "servers.py", *(HERE / "chat").rglob("*.py"), *(HERE / "consumers").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef):
                owner = node.name if isinstance(node, ast.ClassDef) else path.stem
                known |= {f"{owner}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}
    named = set(re.findall(r"\b\w+\.\w+", chat.live.__doc__ or ""))
    assert len(named) > 20 and named - known == set()
