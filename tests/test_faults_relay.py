"""What the relay, the database and the readers' networks may do to a running answer, and what readers see of it.

Each test is a row of the fault list: what is given, what is done to it, what is to be seen. Afterwards the invariants
(`tests/harness/checker.py`) hold on what every reader recorded, on the database and on the service's log.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis as RedisClient
from websockets.exceptions import ConnectionClosed

from tests.conftest import seeded
from tests.harness import until
from tests.harness.api import call, guest, new_session, post_turn
from tests.harness.checker import i8_bystander, i9_no_leak, tempo
from tests.harness.client import SocketReader
from tests.harness.evidence import counts
from tests.harness.noise import Noise, prompt
from tests.harness.processes import Process, temporary_directory
from tests.harness.proxy import Narrow, Proxy
from tests.harness.scene import (
    ENVIRONMENT,
    Scene,
    Stage,
    all_of,
    counted,
    longest_silence,
    measured,
    now,
    text_of,
)
from tests.harness.servers import Postgres, Redis
from tests.harness.service import Service

CATCH_UP = 3.0  # seconds after Redis is back
STALL = 1.0  # seconds a reader on the owner's worker may wait while Redis is away


async def caught_up(reader: SocketReader, text: str, since: float, within: float = CATCH_UP) -> float:
    """Wait until the reader has at least this text; how long after `since` that was."""
    await reader.until(lambda: len(text_of(reader)) >= len(text), within, "the text others have")
    return now() - since


# Joining and coming back


@pytest.mark.parametrize("workers", [(0,), (1,), (0, 1)])
async def test_refresh_in_the_middle_of_an_answer(scene: Scene, workers: tuple[int, ...]) -> None:
    """1. Closed at token 20 of 200, back with its cursor: the missing part, then live; one answer."""
    reader = await scene.socket("refreshing", workers)
    await reader.say("/count 200")
    await reader.tokens(20)
    last = reader.cursor
    reader.drop()
    await reader.turn_ended()
    assert reader.view.texts() == [counted(200)]
    assert [event["cursor"] for event in scene.journal.events("refreshing", "resumed")] == [last]
    await scene.check(codes={1006})


async def test_join_at_sixty_random_moments(scene: Scene) -> None:
    """3. Joined at a random moment, sixty times, by socket and by SSE: the full text, no gap, no repeat."""
    dice = seeded(3)
    first = await scene.socket("first")
    await first.say("/count 100")
    await first.tokens(1)

    async def join(n: int) -> None:
        await asyncio.sleep(dice.uniform(0, 2.0))
        if n % 3:
            await scene.socket(f"socket{n}", n % 2)
        else:
            await scene.sse(f"sse{n}", n % 2)

    await asyncio.gather(*[join(n) for n in range(60)])
    await asyncio.gather(*[reader.replies_ended() for reader in scene.readers])
    assert {text for reader in scene.readers for text in reader.view.texts()} == {counted(100)}
    await scene.check()


async def test_sole_reader_on_an_idle_worker(postgres_server: Postgres, redis_server: Redis) -> None:
    """4. One socket, one session, the turn on the other worker: the first delta within 1 s."""
    url = postgres_server.create_database()
    async with Service(ENVIRONMENT | {"DATABASE_URL": url, "REDIS_URL": redis_server.url}, workers=2) as service:
        async with await Stage(service, url, redis_server).scene() as scene:
            reader = await scene.socket("alone", 1)
            posting = asyncio.create_task(post_turn(service.url, scene.someone.access, scene.id, "/count 20"))
            async with prompt(1, *service.pids):
                await reader.tokens(1)
            await reader.turn_ended()
            await posting
            assert reader.view.texts() == [counted(20)]
            await scene.check()


# Redis


async def test_redis_is_killed_and_comes_back(scene: Scene) -> None:
    """5. Killed mid-stream, back and empty after 1 s: the same worker's reader waits less than 1 s, the other's has
    everything within 3 s of the return; what the owner says again then is nobody's twice, nor a newcomer's."""
    near, far = await scene.socket("near", 0), await scene.socket("far", 1)
    await near.say("/count 250")
    await far.tokens(20)
    killed = scene.journal.fault("redis killed")
    scene.stage.redis.kill()
    await asyncio.sleep(1)
    await scene.stage.redis.start()
    back, text = scene.journal.fault("redis back"), text_of(near)
    measured("redis killed: the other worker's reader caught up after", await caught_up(far, text, back))
    late = await scene.socket("late", 1)
    assert text_of(late) and counted(250).startswith(text_of(late))
    await asyncio.gather(*[reader.turn_ended() for reader in (near, far, late)])
    stall = longest_silence(scene.journal, "near", killed, back)
    measured("redis killed: longest stall on the same worker", stall)
    assert stall < STALL
    assert near.view.texts() == far.view.texts() == [counted(250)]
    await scene.check()


async def test_the_answer_ends_while_redis_is_away(scene: Scene) -> None:
    """5, the turn's end lost: the other worker's reader has the end, too, within 3 s of the return."""
    near, far = await scene.socket("near", 0), await scene.socket("far", 1)
    await near.say("/count 60")
    await far.tokens(10)
    scene.journal.fault("redis killed")
    scene.stage.redis.kill()
    await near.turn_ended(within=5)
    await scene.stage.redis.start()
    back = scene.journal.fault("redis back")
    await far.turn_ended(within=CATCH_UP)
    measured("turn ended while redis was away: the other worker's reader has it after", now() - back)
    assert near.view.texts() == far.view.texts() == [counted(60)]
    await scene.check()


@pytest.mark.slow
async def test_redis_is_frozen_for_ten_seconds(scene: Scene) -> None:
    """6. SIGSTOP for 10 s: as when killed; what was sent and arrives late is swallowed; nothing answers 500."""
    near, far = await scene.socket("near", 0), await scene.socket("far", 1)
    await near.say("/count 650")
    await far.tokens(20)
    frozen = scene.journal.fault("redis frozen")
    scene.stage.redis.pause()
    try:
        await near.until(lambda: now() - frozen > 5, what="half of the freeze")
        for worker in scene.stage.service.urls:  # what else the service does goes on
            someone = await guest(worker)
            assert (await new_session(worker, someone.access, model_a_id="fluent"))["id"]
        await near.until(lambda: now() - frozen > 10, what="the rest of the freeze")
    finally:
        scene.stage.redis.resume()
    thawed, text = scene.journal.fault("redis goes on"), text_of(near)
    measured("redis frozen: the other worker's reader caught up after", await caught_up(far, text, thawed))
    await asyncio.gather(near.turn_ended(), far.turn_ended())
    stall = longest_silence(scene.journal, "near", frozen, thawed)
    measured("redis frozen: longest stall on the same worker", stall)
    assert stall < STALL
    assert near.view.texts() == far.view.texts() == [counted(650)]
    await scene.check()


async def test_redis_drops_its_listeners_five_times(scene: Scene) -> None:
    """7. `CLIENT KILL TYPE pubsub`, five times: each gap is filled, no event lost."""
    near, far = await scene.socket("near", 0), await scene.socket("far", 1)
    await near.say("/count 250")
    async with RedisClient.from_url(scene.stage.redis.url) as redis:
        for n in range(5):
            await far.until(lambda n=n: len(text_of(far)) >= 100 * (n + 1), what="more text")
            scene.journal.fault("listeners dropped")
            assert await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub") > 0
    await asyncio.gather(near.turn_ended(), far.turn_ended())
    assert near.view.texts() == far.view.texts() == [counted(250)]
    await scene.check()


async def test_redis_is_down_at_the_start(postgres_server: Postgres) -> None:
    """8. Started without it: health says so, chat works on one worker; readers elsewhere heal within 3 s of its
    coming."""
    url = postgres_server.create_database()
    async with Redis() as redis:
        redis.kill()
        environment = ENVIRONMENT | {"DATABASE_URL": url, "REDIS_URL": redis.url}
        async with Service(environment, workers=2, ready_path="/livez") as service:
            health = await call(service.url, "GET", "/api/health/")
            assert (health.status_code, health.json()["checks"]["cache"]) == (503, "failed")
            someone = await guest(service.url)
            session = await new_session(service.url, someone.access, model_a_id="fluent")
            async with Scene(Stage(service, url, redis), someone, session) as scene:
                near, far = await scene.socket("near", 0), await scene.socket("far", 1)
                await near.say("/count 20")
                await near.turn_ended(within=3)
                await near.say("/count 250")
                await near.tokens(40)
                await redis.start()
                back, text = scene.journal.fault("redis comes"), text_of(near)
                measured("redis came late: the other worker caught up after", await caught_up(far, text, back))
                await asyncio.gather(near.turn_ended(2), far.replies_ended(2))
                assert near.view.texts() == far.view.texts() == [counted(20), counted(250)]
                await scene.check()
                health = await call(service.url, "GET", "/api/health/")
                assert health.status_code == 200, health.text


@pytest.mark.slow
async def test_a_message_after_a_long_silence(scene: Scene) -> None:
    """9. Idle (12 s: more than every ping and timeout on the way to Redis), then a message: delivered within 1 s."""
    near, far = await scene.socket("near", 0), await scene.socket("far", 1)
    silent_since = now()
    await near.until(lambda: now() - silent_since > 12, 15, "silence")
    async with prompt(1, *scene.stage.service.pids):
        await near.say("/count 10")
        await far.tokens(1)
    await asyncio.gather(near.turn_ended(), far.turn_ended())
    await scene.check()


async def test_poison_on_the_session_channel(scene: Scene) -> None:
    """10. Random bytes, no JSON, JSON of other shapes, events of no turn: ignored; the stream goes on and is whole."""
    dice = seeded(10)
    near, far = await scene.socket("near", 0), await scene.socket("far", 1)
    await near.say("/count 150")
    await far.tokens(5)
    turn = far.view.turn.id
    no_side = b'{"id":"m","role":"assistant","content":"","status":"pending","participant":[]}'
    poison = [
        *[dice.randbytes(dice.randrange(1, 400)) for _ in range(50)],
        *[b"", b"not json", b"[", b"{}", b"[]", b"null", b"1e999", b'{"type":"message_chunk"}', b"alive"],
        *[b'["words"]', b'["words",5,[]]', b'["words","none",[]]', b'["words","none",[["a",7,"evil"]]]'],
        *[b'["begun","none",0,"",[]]', b'["begun","none",0,"",[{"message":5}]]', b'["begun","none",-1,"",[null]]'],
        b'["begun","none",0,"",[%b,%b]]' % (no_side, no_side),
        *[b'["ended","none","a",{}]', b'["ended","none","a",{"id":"m","content":5}]', b'["ended","none"]'],
        *[b'["surprise"]', b'["notice",5]', b'["stop","none"]', b'["stop"]', b'["again"]', b'["rights"]'],
        *[b'["words","%b",[["a",900000,"evil"]]]' % turn.encode(), b'["words","%b",[["z",0,"evil"]]]' % turn.encode()],
        b"[" * 100_000,
    ]
    async with RedisClient.from_url(scene.stage.redis.url) as redis:
        [channel] = await redis.pubsub_channels(f"*:session:{scene.id}:*")
        for payload in poison:
            assert await redis.publish(channel, payload) == 2
        await asyncio.gather(near.turn_ended(), far.turn_ended())
        await far.say("/count 20")
        await asyncio.gather(near.turn_ended(2), far.turn_ended(2))
    assert near.view.texts() == far.view.texts() == [counted(150), counted(20)]
    await scene.check()


async def test_redis_is_away_when_the_turn_starts(scene: Scene) -> None:
    """A turn begun without Redis is said at once on its worker, and on the other within 3 s of Redis's return."""
    near, far = await scene.socket("near", 0), await scene.socket("far", 1)
    scene.journal.fault("redis killed")
    scene.stage.redis.kill()
    async with prompt(2, *scene.stage.service.pids):
        await near.say("/count 200")
        await near.tokens(1)
    await near.tokens(20)
    await scene.stage.redis.start()
    back, text = scene.journal.fault("redis back"), text_of(near)
    measured("redis away at the start: the other worker caught up after", await caught_up(far, text, back))
    await asyncio.gather(near.turn_ended(), far.turn_ended())
    assert near.view.texts() == far.view.texts() == [counted(200)]
    await scene.check()


async def test_readers_join_elsewhere_while_redis_is_away(scene: Scene) -> None:
    """Joined on the other worker without Redis: what is stored so far, and everything within 3 s of the return."""
    near = await scene.socket("near", 0)
    await near.say("/count 250")
    await near.tokens(40)
    scene.journal.fault("redis killed")
    scene.stage.redis.kill()
    await near.tokens(60)
    far, later = await asyncio.gather(scene.socket("far", 1), scene.sse("later", 1))
    assert text_of(far)
    await scene.stage.redis.start()
    back, text = scene.journal.fault("redis back"), text_of(near)
    await asyncio.gather(caught_up(far, text, back), caught_up(later, text, back))
    await asyncio.gather(near.turn_ended(), far.turn_ended(), later.turn_ended())
    assert near.view.texts() == far.view.texts() == later.view.texts() == [counted(250)]
    await scene.check()


# Readers


async def test_half_open_client(stage: Stage) -> None:
    """21. A client frozen with SIGSTOP is cut (4 s of pings in tests, 45 s else); the others notice nothing."""
    async with await stage.scene() as scene, Noise(stage.service.worker(0).pid) as noise:
        near = await scene.socket("near", 0)
        await near.say("/count 100")
        await near.turn_ended()
        client = Process([sys.executable, "-c", FROZEN], temporary_directory("frozen") / "log.txt", dict(os.environ))
        url = f"ws{stage.service.url.removeprefix('http')}/ws/chat/session/{scene.id}/"
        client.command += [url, scene.someone.access]
        client.start()
        try:
            await until(lambda: "open" in client.output(), 10, "the client's connection")
            port = psutil.Process(client.pid).net_connections("tcp")[0].laddr.port
            assert port in _callers(stage.service)
            baseline = tempo(near, noise)
            await near.say("/count 200")
            await near.tokens(110)
            frozen = scene.journal.fault("client frozen")
            client.send(signal.SIGSTOP)
            await until(lambda: port not in _callers(stage.service), 7, "the connection's end")
            measured("a frozen client is cut after", now() - frozen)
        finally:
            client.kill()
        await near.turn_ended(2)
        assert not i8_bystander(baseline, tempo(near, noise, since=frozen))
        await scene.check()


FROZEN = """
import sys
from websockets.sync.client import connect
with connect(sys.argv[1], additional_headers={"Authorization": "Bearer " + sys.argv[2]}, proxy=None) as socket:
    print("open", flush=True)
    for frame in socket:
        pass
"""


@pytest.mark.slow
async def test_slow_reader_and_silent_reader(postgres_server: Postgres, redis_server: Redis) -> None:
    """22. At 20 kB/s: fewer, larger frames and all of the text. Taking nothing at all: cut after the send deadline,
    all of the text when it is back. The bystander notices neither, memory stays."""
    url = postgres_server.create_database()
    pings = {"PARLEY_PING_INTERVAL": "60", "PARLEY_PING_TIMEOUT": "60", "PARLEY_TCP_USER_TIMEOUT": "3"}
    environment = ENVIRONMENT | pings | {"DATABASE_URL": url, "REDIS_URL": redis_server.url}
    async with Service(environment, server="serve") as service, Narrow.before(service.url, buffer=4096) as slow_way:
        async with Narrow.before(service.url, buffer=4096) as silent_way:
            async with await Stage(service, url).scene(model_a_id="hasty") as scene, Noise(service.worker().pid) as noise:
                quick = await scene.socket("quick")
                await quick.say("/count 3000")
                await quick.turn_ended()
                before, baseline = service.resources(), tempo(quick, noise)
                slow = await scene.socket("slow", bases=slow_way.through(service.url))
                silent = await scene.socket("silent", bases=silent_way.through(service.url))
                started = now()
                await quick.say("/count 8000")
                slow_way.limit(20_000)
                silent_way.stall("to_client")
                port = silent_way.links[0].server.getsockname()[1]
                scene.journal.fault("slow and silent")
                await until(lambda: port not in _callers(service), 30, "the silent one's end")
                measured("a reader that takes nothing is cut after", now() - started)
                silent_way.rst()
                silent_way.ok()
                await quick.turn_ended(2, within=60)
                assert not i9_no_leak({"rss": before["rss"]}, {"rss": service.resources()["rss"]})
                slow_way.ok()
                await asyncio.gather(slow.turn_ended(within=60), silent.turn_ended(within=30))
                assert not i8_bystander(baseline, tempo(quick, noise, since=started))
                assert quick.view.texts()[1:] == [counted(8000)]
                assert [text_of(slow)[-100:], text_of(silent)[-100:]] == [counted(8000)[-100:]] * 2
                frames = {name: len(scene.journal.events(name, "message_chunk")) for name in ("quick", "slow")}
                assert frames["slow"] < frames["quick"] / 2, frames
                await scene.check(codes={1006})


def _callers(service: Service) -> list[int]:
    """The ports of those whose connections the first worker holds, as the kernel knows them."""
    held = service.worker().net_connections("tcp")
    return [each.raddr.port for each in held if each.raddr and each.laddr.port == service.ports[0]]


async def test_client_talks_while_an_answer_streams(scene: Scene) -> None:
    """23. Five messages during one answer: `busy` for each, the socket stays, the answer is whole."""
    reader = await scene.socket("talker")
    await reader.say("/count 100")
    await reader.tokens(5)
    for n in range(5):
        await reader.say(f"and another thing {n}", id=f"more-{n}")
    await reader.turn_ended()
    errors = scene.journal.events("talker", "error")
    assert [(event["code"], event["message_id"]) for event in errors] == [("busy", f"more-{n}") for n in range(5)]
    assert (reader.view.texts(), reader.codes) == ([counted(100)], [])
    await scene.check()


@pytest.mark.slow
async def test_six_hundred_tabs_close_during_writes(stage: Stage) -> None:
    """16. Sockets and SSE readers that leave at a random millisecond of their own message: the pool works, nothing is
    left idle in a transaction, descriptors and channels are back where they were."""
    dice = seeded(16)
    async with await stage.scene(model_a_id="hasty") as scene:
        token = scene.someone.access
        sessions = [await new_session(stage.service.url, token, model_a_id="hasty") for _ in range(30)]
        await asyncio.sleep(0)
        before = [stage.service.resources(n) for n in range(2)]
        open_before = await counts(stage.redis.url, stage.database_url)
        await all_of([_tab(stage, token, sessions[n % 30]["id"], n, dice.uniform(0, 0.06)) for n in range(600)], 20)
        scene.journal.fault("600 tabs closed")
        answers = await asyncio.gather(
            *[new_session(stage.service.urls[n % 2], token, model_a_id="hasty") for n in range(20)]
        )
        assert len({answer["id"] for answer in answers}) == 20

        async def back() -> bool:
            left = await counts(stage.redis.url, stage.database_url)
            return left["channels"] <= open_before["channels"] and left["idle_in_transaction"] == 0

        await until(back, 5, "channels and transactions back")
        # the pool may have grown to its 5 connections, and each keeps its descriptor
        await until(lambda: all(_fds(stage, n) <= before[n]["fds"] + 4 for n in range(2)), 5, "descriptors back")
        for n in range(2):
            after = stage.service.resources(n)
            measured(f"600 tabs: descriptors left on worker {n}", after["fds"] - before[n]["fds"], "")
            measured(f"600 tabs: memory grown on worker {n}", (after["rss"] - before[n]["rss"]) / 1e6, "MB")
            assert not i9_no_leak({"rss": before[n]["rss"]}, {"rss": after["rss"]})
        # Only now: a message whose sender had gone may have begun its turn a moment after the last of them had left.
        for session in sessions:
            other = Scene(stage, scene.someone, session, scene.logged)
            await other.over()
            await other.check()


def _fds(stage: Stage, worker: int) -> float:
    return stage.service.resources(worker)["fds"]


async def _tab(stage: Stage, token: str, session_id: str, n: int, patience: float) -> None:
    """Open a socket or a stream, ask something, and be gone after so many seconds."""
    base = stage.service.urls[n % 2]
    if n % 2:
        asking = asyncio.create_task(post_turn(base, token, session_id, "/count 30"))
    else:
        asking = asyncio.create_task(_speak(base, token, session_id))
    await asyncio.wait({asking}, timeout=patience)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


async def _speak(base: str, token: str, session_id: str) -> None:
    from websockets.asyncio.client import connect

    url = f"ws{base.removeprefix('http')}/ws/chat/session/{session_id}/"
    socket = await connect(url, additional_headers={"Authorization": f"Bearer {token}"}, proxy=None)
    try:
        await socket.send('{"type":"message","content":"/count 30"}')
        async for _ in socket:
            pass
    except ConnectionClosed:
        pass
    finally:
        socket.transport.abort()


# PostgreSQL


@pytest.fixture(scope="module")
def frail() -> Iterator[Postgres]:
    """A PostgreSQL that may be restarted: nobody else's data are in it."""
    with Postgres() as postgres:
        yield postgres


async def test_postgres_restarts_in_the_middle_of_an_answer(frail: Postgres, redis_server: Redis) -> None:
    """12. An immediate restart: the answer goes on from memory, what is stored in the end is complete."""
    url = frail.create_database()
    async with Service(ENVIRONMENT | {"DATABASE_URL": url, "REDIS_URL": redis_server.url}, workers=2) as service:
        async with await Stage(service, url).scene() as scene:
            near, far = await scene.socket("near", 0), await scene.socket("far", 1)
            await near.say("/count 200")
            await far.tokens(20)
            begun = scene.journal.fault("postgres restarts")
            await frail.restart("immediate")
            done = scene.journal.fault("postgres is back")
            await asyncio.gather(near.turn_ended(), far.turn_ended())
            assert near.view.texts() == far.view.texts() == [counted(200)]
            assert max(longest_silence(scene.journal, name, begun, done) for name in ("near", "far")) < STALL
            assert (await scene.reply()).content == counted(200)
            await scene.check()


@pytest.mark.slow
async def test_postgres_stalls_for_five_seconds(frail: Postgres, redis_server: Redis) -> None:
    """13. 5 s without an answer from storage: no reader sees anything of it, an ending waits for it."""
    url = frail.create_database()
    async with Proxy.before(url) as way:
        environment = ENVIRONMENT | {"DATABASE_URL": way.through(url), "REDIS_URL": redis_server.url}
        async with Service(environment, workers=2) as service, await Stage(service, url).scene() as scene:
            near, far = await scene.socket("near", 0), await scene.socket("far", 1)
            await near.say("/count 400")
            await far.tokens(20)
            begun = scene.journal.fault("postgres stalls")
            way.stall()
            await near.until(lambda: now() - begun > 5, what="the stall's end")
            way.ok()
            done = scene.journal.fault("postgres answers")
            await asyncio.gather(near.turn_ended(), far.turn_ended())
            assert max(longest_silence(scene.journal, name, begun, done) for name in ("near", "far")) < STALL
            assert near.view.texts() == far.view.texts() == [counted(400)]
            await scene.check()


@pytest.mark.slow
async def test_postgres_stalls_longer_than_endings_wait(frail: Postgres, redis_server: Redis) -> None:
    """13. Longer than an ending is offered to storage (3 s in this test): `failed/storage_unavailable` with the text;
    new turns are refused within 5 s; afterwards everything works and the database agrees with what was shown."""
    url = frail.create_database()
    clocks = {"PARLEY_STORE_FOR": "3", "PARLEY_STORAGE_TIMEOUT": "1"}
    async with Proxy.before(url) as way:
        environment = ENVIRONMENT | clocks | {"DATABASE_URL": way.through(url), "REDIS_URL": redis_server.url}
        async with Service(environment, workers=2) as service, await Stage(service, url).scene() as scene:
            near, far = await scene.socket("near", 0), await scene.socket("far", 1)
            await near.say("/count 100")
            await far.tokens(20)
            scene.journal.fault("postgres stalls")
            way.stall()
            await asyncio.gather(near.turn_ended(within=12), far.turn_ended(within=12))
            asked = now()
            refused = await post_turn(service.url, scene.someone.access, scene.id, "hello?")
            measured("storage stalled: a new turn is refused after", now() - asked)
            assert (refused.status, refused.error["error"]) == (503, "storage_unavailable")
            assert now() - asked < 5
            way.ok()
            scene.journal.fault("postgres answers")
            ends = [event["failure_reason"] for event in scene.journal.events(None, "message_complete")]
            assert ends == ["storage_unavailable"] * 2
            assert near.view.texts() == far.view.texts() == [counted(100)]
            await scene.over()
            await near.say("/count 10")
            await asyncio.gather(near.turn_ended(2), far.turn_ended(2))
            assert near.view.texts() == far.view.texts() == [counted(100), counted(10)]
            await scene.check()


# SQLite


@pytest.mark.slow
async def test_two_workers_write_to_one_sqlite_file(tmp_path: Path, redis_server: Redis) -> None:
    """15. Two processes, fifty turns each at once on one file: nobody ever hears that the database is locked."""
    url = f"sqlite:///{tmp_path / 'parley.db'}"
    async with Service(ENVIRONMENT | {"DATABASE_URL": url, "REDIS_URL": redis_server.url}, workers=2) as service:
        async with await Stage(service, url).scene(model_a_id="hasty") as scene:
            sessions = [await new_session(service.url, scene.someone.access, model_a_id="hasty") for _ in range(20)]

            async def talk(n: int) -> list[str]:
                answers = [
                    await post_turn(service.urls[n % 2], scene.someone.access, sessions[n]["id"], "/count 30")
                    for _ in range(5)
                ]
                return [answer.sides().get("a", str(answer.error)) for answer in answers]

            answers = await asyncio.gather(*[talk(n) for n in range(20)])
            assert {text for texts in answers for text in texts} == {counted(30)}
            assert "locked" not in service.log()
            for session in sessions:
                await Scene(scene.stage, scene.someone, session, scene.logged).check()
