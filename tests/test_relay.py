"""A room by itself: which turns it tells, in which order, when it hears of them late, twice or out of order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from chat.live.bus import GAP
from chat.live.events import Said, socket_json
from chat.live.relay import Relay
from chat.live.rooms import Room
from chat.settings import read_settings
from chat.state import State, open_state
from chat.store import sessions, turns
from chat.store.turns import Ask, Terms
from tests.conftest import CLOSED
from tests.harness.api import Guest, guest, new_session, post_turn, stop
from tests.harness.servers import Postgres, Redis
from tests.harness.service import Service


@dataclass
class House:
    """A service that writes turns, and a worker's state in this process that hears of them through Redis."""

    service: Service
    someone: Guest
    session: str
    state: State

    @property
    def relay(self) -> Relay:
        return self.state.relay

    async def turn(self, content: str = "/count 3") -> str:
        answer = await post_turn(self.service.url, self.someone.access, self.session, content)
        assert answer.turn_id
        return answer.turn_id

    async def latest(self) -> Any:
        row = await turns.select_latest_turn(self.state.database, self.session)
        assert row is not None
        return row


@asynccontextmanager
async def house(postgres: Postgres, redis: Redis) -> AsyncIterator[House]:
    environment = CLOSED | {"DATABASE_URL": postgres.create_database(), "REDIS_URL": redis.url}
    async with Service(environment) as service, AsyncExitStack() as stack:
        state = await open_state(read_settings(environ=environment), stack)
        someone = await guest(service.url)
        session = await new_session(service.url, someone.access)
        yield House(service, someone, session["id"], state)


def deafen(room: Room) -> None:
    """It hears nothing from now on, as if its listener had been cut off."""
    assert room._pump is not None
    room._pump.cancel()


async def test_a_gap_while_a_room_opens_brings_no_old_turn(postgres_server: Postgres, redis_server: Redis) -> None:
    """Turns that were over long ago must not come behind the running one: readers would be told all of them again."""
    async with house(postgres_server, redis_server) as here:
        for _ in range(3):
            await here.turn()
        posting = asyncio.create_task(here.turn("/count 2000"))
        async with asyncio.timeout(10):
            while (running := await here.latest())["status"] != "running":
                await asyncio.sleep(0.01)
        room = Room(here.relay, here.session)
        opening = asyncio.create_task(room.open())
        while not opening.done():
            room._hear(GAP)
            await asyncio.sleep(0)
        await opening
        await room.read_again()
        assert [each.id for each in room.logs] == [running["id"]]
        assert room.logs[0].next is None
        await room.close()
        await stop(here.service.url, here.someone.access, here.session)
        await posting


async def test_a_turn_that_was_missed_comes_before_the_next(postgres_server: Postgres, redis_server: Redis) -> None:
    """The next turn's first word arrives before the gap behind it has been read."""
    async with house(postgres_server, redis_server) as here:
        first = await here.turn()
        follower = await here.relay.join(here.session, socket_json)
        room = follower.room
        deafen(room)
        missed, last = await here.turn(), await here.turn()
        kept = await here.relay._kept(last)
        assert kept is not None and room.newest == first
        room.repair()
        room._said(Said(last, kept.entries))
        async with asyncio.timeout(10):
            while room.newest != last:
                await asyncio.sleep(0.01)
        assert [each.id for each in room.logs] == [missed, last]
        said = b"".join(await follower.next())
        assert 0 < said.index(missed.encode()) < said.index(last.encode())
        await here.relay.leave(follower)


async def test_a_cursor_in_a_missed_turn_leaves_nobody_behind(postgres_server: Postgres, redis_server: Redis) -> None:
    """A reader resumes from a turn this room has missed; the one that stands before it is told of it too."""
    async with house(postgres_server, redis_server) as here:
        await here.turn()
        standing = await here.relay.join(here.session, socket_json)
        deafen(standing.room)
        missed, last = await here.turn(), await here.turn()
        coming = await here.relay.join(here.session, socket_json)
        assert await here.relay.resume(coming, (missed, 0))
        said = b"".join(await coming.next())
        assert missed.encode() in said and last.encode() in said
        said = b"".join(await standing.next())
        assert 0 < said.index(missed.encode()) < said.index(last.encode())
        for follower in (standing, coming):
            await here.relay.leave(follower)


async def test_an_older_cursor_tells_nobody_old_turns(postgres_server: Postgres, redis_server: Redis) -> None:
    """A reader that comes back from three turns ago gets them; those that wait for the next one do not."""
    async with house(postgres_server, redis_server) as here:
        ids = [await here.turn() for _ in range(4)]
        waiting = await here.relay.join(here.session, socket_json)
        coming = await here.relay.join(here.session, socket_json)
        assert await here.relay.resume(coming, (ids[1], 0))
        said = b"".join(await coming.next())
        assert [each.id for each in waiting.room.logs] == ids[1:] and ids[3].encode() in said
        assert not waiting.take()
        following = await here.turn()
        said = b"".join(await waiting.next())
        assert following.encode() in said and ids[3].encode() not in said
        for follower in (waiting, coming):
            await here.relay.leave(follower)


async def test_a_turn_ends_and_the_next_begins_during_a_snapshot(
    postgres_server: Postgres, redis_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the rows still call streaming has ended: the snapshot says so, for its end will not come any more."""
    async with house(postgres_server, redis_server) as here:
        select = turns.select_messages
        read, go_on = asyncio.Event(), asyncio.Event()

        async def slowly(*arguments: Any, **options: Any) -> Any:
            rows = await select(*arguments, **options)
            read.set()
            await go_on.wait()
            return rows

        follower = await here.relay.join(here.session, socket_json)
        posting = asyncio.create_task(here.turn("/count 2000"))
        async with asyncio.timeout(10):
            while follower.room.running is None:
                await asyncio.sleep(0.01)
        monkeypatch.setattr(turns, "select_messages", slowly)
        session = await sessions.select_unchecked(here.state.database, here.session)
        reading = asyncio.create_task(here.relay.snapshot(follower, session))
        await read.wait()
        await stop(here.service.url, here.someone.access, here.session)
        await posting
        following = await here.turn()
        async with asyncio.timeout(10):
            while follower.room.newest != following:
                await asyncio.sleep(0.01)
        go_on.set()
        snapshot = await reading
        replies = [each["status"] for each in snapshot["messages"] if each["role"] == "assistant"]
        assert replies == ["stopped", "success"]
        await here.relay.leave(follower)


async def test_a_gap_before_an_own_turn_begins_brings_no_old_turn(postgres_server: Postgres, redis_server: Redis) -> None:
    """A room that opens for a turn of its own has read nothing: a gap heard then is no reason to read all there was."""
    async with house(postgres_server, redis_server) as here:
        for _ in range(3):
            await here.turn()
        await here.turn("/count 5")
        own = (await here.latest())["id"]  # as good as fresh: nobody else says anything of it any more
        room = Room(here.relay, here.session)
        opening = asyncio.create_task(room.open(own))
        while not opening.done():
            room._hear(GAP)
            await asyncio.sleep(0)
        await opening
        room._hear(GAP)
        turn_log = await room.begin(own)
        assert room.logs == [turn_log]
        await room.read_again()  # somebody else has gone on with it
        assert room.logs == [turn_log] and turn_log.closed
        await room.close()


async def test_a_turn_found_while_it_begins_has_one_log(postgres_server: Postgres, redis_server: Redis) -> None:
    """Its row is there before its log is: who reads again what was missed must not put a second one into its place.

    Readers went into that one, where nobody said anything, until the writer was forgotten. Found by a soak.
    """
    async with house(postgres_server, redis_server) as here:
        await here.turn()
        follower = await here.relay.join(here.session, socket_json)
        room, database = follower.room, here.state.database
        session = await sessions.select_unchecked(database, here.session)
        terms = Terms(here.state.worker, 10_000, 1, (0, 0), 0, 3)
        turn = await turns.insert_turn(database, session, session.account_id, Ask("m", "hello", {}), terms)
        reading = asyncio.create_task(room.read_again())
        await asyncio.sleep(0)
        writer = await here.relay.write(session, turn.id)
        await reading
        assert [each for each in room.logs if each.id == turn.id] == [writer.log]
        saying = asyncio.create_task(writer.run())
        for message in here.relay.mask.messages(session, list(turn.rows)):
            writer.create(message)
        writer.end()
        said = b"".join(await follower.next())
        assert turn.id.encode() in said
        await saying
        await here.relay.finish(here.session)
        await here.relay.leave(follower)
