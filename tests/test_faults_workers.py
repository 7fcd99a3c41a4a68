"""What becomes of answers whose worker is killed, frozen or told to go, and what readers see of it.

Each test is a row of the fault list: what is given, what is done to it, what is to be seen. Afterwards the invariants
(`tests/harness/checker.py`) hold on what every reader recorded, on the database and on the service's log.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis as RedisClient

from tests.harness import until
from tests.harness.api import call
from tests.harness.evidence import read_rows
from tests.harness.noise import Noise, prompt
from tests.harness.proxy import Narrow, Proxy
from tests.harness.reader import Reader
from tests.harness.scene import DRAIN, ENVIRONMENT, LEASE, SWEEP, Scene, Stage, counted, measured, now, text_of
from tests.harness.servers import Postgres, Redis
from tests.harness.service import Service

TAKEN = LEASE + SWEEP + 1.0  # seconds until a dead worker's turns have ended: its lease, a sweep, and the writing down
EXIT = 25.0  # seconds from SIGTERM to the end
CHECKPOINT = 0.5  # seconds of text that are lost with the only worker that knew it
KILLED = {1006}  # how a socket ends whose worker is killed
OPERATOR = "the-operator"


@pytest.fixture(scope="module")
def stage(postgres_server: Postgres) -> Iterator[Stage]:
    """Two workers, on a Redis of their own; the tests here harm all three."""
    with Redis() as redis:
        url = postgres_server.create_database()
        environment = ENVIRONMENT | {"DATABASE_URL": url, "REDIS_URL": redis.url, "ADMIN_TOKEN": OPERATOR}
        with Service(environment, workers=2) as service:
            yield Stage(service, url, redis, postgres_server)


@pytest.fixture
async def whole(stage: Stage) -> AsyncIterator[Stage]:
    """The stage, in order again when the test is over."""
    try:
        yield stage
    finally:
        await mend(stage)


@pytest.fixture
async def scene(whole: Stage) -> AsyncIterator[Scene]:
    async with await whole.scene() as scene:
        yield scene


async def mend(stage: Stage) -> None:
    if stage.redis is not None:
        stage.redis.resume() if stage.redis.running else await stage.redis.start()
    for process in stage.service.processes:
        if process.running:
            process.resume()
    await asyncio.gather(
        *[stage.service.launch(n) for n, process in enumerate(stage.service.processes) if not process.running]
    )


async def ended(readers: list[Reader], turns: int = 1, within: float = 20.0) -> None:
    await asyncio.gather(*[reader.turn_ended(turns, within) for reader in readers])


async def metric(base: str, name: str) -> float:
    text = (await call(base, "GET", "/metrics", OPERATOR)).text
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert found is not None, text
    return float(found[1])


async def idle(stage: Stage) -> None:
    """No worker believes that it answers anything."""

    async def nothing_runs() -> bool:
        return sum([await metric(base, "chat_turns_running") for base in stage.service.urls]) == 0

    await until(nothing_runs, 5, "workers that have nothing to say")


def statuses(scene: Scene, reader: Reader) -> list[str]:
    """How replies ended, in the order this reader was told."""
    return [event["status"] for event in scene.journal.events(reader.name, "message_complete")]


# The owner is killed


async def test_the_owner_is_killed_in_the_middle_of_an_answer(scene: Scene) -> None:
    """17. Readers on the other worker have the text up to the last write, then `interrupted` within lease and sweep;
    so has who was on the dead one; what is stored is what they saw; the answer can be made again."""
    service = scene.stage.service
    near, far = await scene.socket("near", (0, 1)), await scene.socket("far", 1)
    await near.say("/count 120")
    await far.tokens(30)
    killed = scene.journal.fault("the owner is killed")
    service.kill(0)
    await near.until(lambda: near.codes, what="the end of its connection")
    shown = text_of(near)
    await ended([near, far], within=TAKEN)
    measured("owner killed: readers are told after", now() - killed)
    reply = await scene.reply()
    measured("owner killed: text lost", len(shown) - len(reply.content), "characters")
    assert (reply.status, reply.failure_reason) == ("interrupted", "interrupted")
    assert reply.content.startswith(shown) and counted(120).startswith(reply.content)
    assert near.view.texts() == far.view.texts() == [reply.content]
    await scene.check(codes=KILLED)
    answer = await call(service.urls[1], "POST", f"/api/messages/{reply.id}/regenerate/", scene.someone.access)
    assert answer.status_code == 200, answer.text
    await ended([near, far], 2)
    assert near.view.texts() == far.view.texts() == [counted(120)], "made again under its own id"
    await scene.check(codes=KILLED, forgotten={reply.id})


@pytest.mark.parametrize("mode", ["compare", "random"])
async def test_the_owner_is_killed_after_one_side_has_ended(whole: Stage, mode: str) -> None:
    """17 in an arena: the side that had ended keeps its end, the other is `interrupted`; each is told once."""
    wish = {"mode": mode} | ({"model_a_id": "fluent", "model_b_id": "hasty"} if mode == "compare" else {"model_a_id": None})
    async with await whole.scene(**wish) as scene:
        near, far = await scene.socket("near", (0, 1)), await scene.socket("far", 1)
        await near.say("/count 400 scholar")  # the poet answers in a few lines
        await far.event("message_complete")
        scene.journal.fault("the owner is killed")
        whole.service.kill(0)
        await ended([near, far], within=TAKEN)
        for reader in (near, far):
            assert statuses(scene, reader) == ["success", "interrupted"]
        rows = await read_rows(whole.database_url, scene.id)
        assert sorted(row.status for row in rows.messages if row.role == "assistant") == ["interrupted", "success"]
        await scene.check(codes=KILLED)


async def test_who_joins_after_one_side_has_ended_without_redis_misses_no_word_of_the_other(whole: Stage) -> None:
    """Storage has one side's end and, from a moment before, the other side's text: what is told from it must not stand
    for the words between. Found by a soak."""
    async with await whole.scene(mode="compare", model_a_id="fluent", model_b_id="hasty") as scene:
        near = await scene.socket("near", 0)
        assert whole.redis is not None
        scene.journal.fault("redis killed")
        whole.redis.kill()
        await near.say("/count 150 scholar")
        await near.event("message_complete")
        far, later = await asyncio.gather(scene.socket("far", 1), scene.sse("later", 1))
        await near.tokens(60)
        await whole.redis.start()
        scene.journal.fault("redis back")
        await ended([near, far, later])
        assert near.view.texts() == far.view.texts() == later.view.texts()
        await scene.check()


async def test_the_owner_is_killed_before_it_said_a_word(scene: Scene) -> None:
    """17, earlier: the turn is stored and nothing of it is said. Readers hear it begin and end `interrupted`, and who
    posted it is answered with that turn."""
    stage = scene.stage
    far = await scene.socket("far", 1)
    stage.redis.pause()  # the turn begins, its model thinks, and nothing of either is told
    asking = asyncio.create_task(scene.sse("poster", (0, 1), content="/silent"))
    await until(lambda: turn_stored(scene), 5, "the turn's row")
    scene.journal.fault("the owner is killed, redis goes on")
    stage.service.kill(0)
    stage.redis.resume()
    poster = await asking
    await ended([far, poster], within=TAKEN)
    for reader in (far, poster):
        assert [event["message"]["role"] for event in scene.journal.events(reader.name, "message_update")] == [
            "user", "assistant",
        ]  # fmt: skip
        assert statuses(scene, reader) == ["interrupted"]
        assert reader.view.texts() == [""]
    assert len((await read_rows(stage.database_url, scene.id)).turns) == 1
    await scene.check(codes=KILLED)


async def turn_stored(scene: Scene) -> bool:
    return bool((await read_rows(scene.stage.database_url, scene.id)).turns)


@pytest.mark.parametrize("watched", [True, False])
async def test_redis_and_the_owner_are_killed_together(scene: Scene, watched: bool) -> None:
    """All that is left is what the taker's room heard, or, where it has none, the checkpoint: one ending, and all
    readers agree with the database."""
    stage = scene.stage
    near = await scene.socket("near", (0, 1))
    readers: list[Reader] = [near, *([await scene.socket("far", 1)] if watched else [])]
    await near.say("/count 300")
    await near.tokens(60)
    heard = text_of(readers[-1])
    scene.journal.fault("redis and the owner are killed")
    stage.redis.kill()
    stage.service.kill(0)
    await stage.redis.start()
    await near.until(lambda: near.codes, what="the end of its connection")
    shown = text_of(near)
    await scene.over(TAKEN)
    stored = (await scene.reply()).content
    await near.until(lambda: all(reader.view.texts() == [stored] for reader in readers), 3, "what is stored")
    measured(f"redis and owner killed, watched={watched}: text lost", max(0, len(shown) - len(stored)), "characters")
    assert stored and counted(300).startswith(stored)
    if watched:
        assert stored.startswith(heard)
    assert {message.status for reader in readers for message in reader.view.messages.values()} == {
        "success", "interrupted",
    }  # fmt: skip
    await scene.check(codes=KILLED, lost=True)


@pytest.mark.parametrize("when", ["has the turn", "has stored the end"])
async def test_the_taker_dies_as_well(scene: Scene, when: str) -> None:
    """Killed while it ends a dead worker's turn, wherever it is in that: the next one ends it, told once."""
    stage = scene.stage
    near, far = await scene.socket("near", (0, 1)), await scene.socket("far", (1, 0))
    await near.say("/count 400")
    await far.tokens(30)
    rows = await read_rows(stage.database_url, scene.id)
    owner = rows.turns[0].owner
    scene.journal.fault("the owner is killed, redis frozen")
    stage.service.kill(0)
    stage.redis.pause()  # who takes the turn waits a second for what Redis has of it
    await until(lambda: _owner_is_not(scene, owner), TAKEN, "a new owner")
    if when == "has stored the end":
        await until(lambda: _stored(scene, "interrupted", "ended"), 5, "the turn's end")
    scene.journal.fault("the taker is killed, redis goes on")
    stage.service.kill(1)
    stage.redis.resume()
    await asyncio.gather(stage.service.launch(0), stage.service.launch(1))
    scene.journal.fault("both are started")
    await ended([near, far], within=TAKEN)
    reply = await scene.reply()
    assert reply.status == "interrupted" and len(reply.content) >= len(counted(30))
    assert near.view.texts() == far.view.texts() == [reply.content]
    for reader in (near, far):
        assert statuses(scene, reader) in (["interrupted"], [])  # [] where a snapshot told it
    await scene.check(codes=KILLED)


async def _owner_is_not(scene: Scene, owner: str) -> bool:
    return (await read_rows(scene.stage.database_url, scene.id)).turns[0].owner != owner


async def _stored(scene: Scene, reply: str, turn: str) -> bool:
    rows = await read_rows(scene.stage.database_url, scene.id)
    return (rows.messages[-1].status, rows.turns[0].status) == (reply, turn)


async def test_the_only_worker_is_killed_without_redis(tmp_path: Path) -> None:
    """17 on SQLite: after the restart the text is there up to the last checkpoint, and it is `interrupted`."""
    url = f"sqlite:///{tmp_path / 'parley.db'}"
    async with (
        Service(ENVIRONMENT | {"DATABASE_URL": url}) as service,
        Noise(*service.pids) as noise,
        await Stage(service, url).scene() as scene,
    ):
        reader = await scene.socket("reader")
        await reader.say("/count 500")
        await reader.tokens(90)
        killed = scene.journal.fault("the worker is killed")
        service.kill()
        await reader.until(lambda: reader.codes, what="the end of its connection")
        shown = text_of(reader)
        await service.launch(0)
        started = scene.journal.fault("it is started again")
        await reader.until(lambda: [m.status for m in reader.view.messages.values()][1:] == ["interrupted"], TAKEN, "its end")
        measured("only worker killed: readers are told after the start, after", now() - started)
        reply = await scene.reply()
        lost = (len(shown.split()) - len(reply.content.split())) * 0.02
        measured("only worker killed: text lost", lost)
        assert reply.status == "interrupted" and shown.startswith(reply.content)
        assert reader.view.texts() == [reply.content]
        assert 0 <= lost <= CHECKPOINT + 0.1 + noise.between(killed - 1, killed)  # and what it takes to write one
        await scene.check(codes=KILLED, lost=True)


# The owner is told to go


@pytest.mark.parametrize("server", ["uvicorn", "serve"])
async def test_sigterm_with_an_answer_shorter_than_the_drain(
    server: str, postgres_server: Postgres, redis_server: Redis
) -> None:
    """19. The reader gets 1012 and resumes on the other worker, the answer is a `success`, and the process ends as
    uvicorn does: by the signal it was sent."""
    url = postgres_server.create_database()
    environment = ENVIRONMENT | {"DATABASE_URL": url, "REDIS_URL": redis_server.url, "PARLEY_DRAIN": "10"}
    async with Service(environment, workers=2, server=server) as service, await Stage(service, url).scene() as scene:
        near, far = await scene.socket("near", (0, 1)), await scene.socket("far", 1)
        await near.say("/count 120")
        await far.tokens(20)
        asked = scene.journal.fault("SIGTERM")
        service.terminate(0)
        code = await service.ended(0, EXIT)
        measured(f"SIGTERM, short answer, {server}: exit after", now() - asked)
        await ended([near, far])
        assert code == -signal.SIGTERM
        assert (near.codes, near.view.resumptions, near.view.snapshots) == ([1012], 1, 1)
        assert near.view.texts() == far.view.texts() == [counted(120)]
        assert statuses(scene, near) == statuses(scene, far) == ["success"]
        await scene.check()


@pytest.mark.parametrize("server", ["uvicorn", "serve"])
async def test_sigterm_with_an_answer_longer_than_the_drain(
    server: str, postgres_server: Postgres, redis_server: Redis
) -> None:
    """20. An SSE reader and a socket that reads nothing are there, too: the answer ends `interrupted`, the process
    within 25 s, by itself and without a traceback; the readers have all of it elsewhere."""
    url = postgres_server.create_database()
    environment = ENVIRONMENT | {"DATABASE_URL": url, "REDIS_URL": redis_server.url}
    environment |= {"PARLEY_PING_TIMEOUT": "20"}  # four readers of a thousand tokens a second keep one process busy
    options = ["--ws-ping-timeout", "20"] if server == "uvicorn" else []
    async with (
        Service(environment, workers=2, server=server, options=options) as service,
        Narrow.before(service.url, buffer=4096) as way,
    ):
        async with await Stage(service, url).scene(model_a_id="hasty") as scene:
            near, far = await scene.socket("near", (0, 1)), await scene.socket("far", 1)
            deaf = await scene.socket("deaf", bases=[way.through(service.url), service.urls[1]])
            await near.say("/count 100000")
            await far.tokens(20)
            sse = await scene.sse("sse", (0, 1))
            way.stall("to_client")
            asked = scene.journal.fault("SIGTERM")
            service.terminate(0)
            code = await service.ended(0, EXIT)
            took = now() - asked
            measured(f"SIGTERM, long answer, {server}: exit after", took)
            way.rst()
            await ended([near, far, deaf, sse])
            assert code == -signal.SIGTERM
            assert took > DRAIN
            reply = await scene.reply()
            assert (reply.status, reply.failure_reason) == ("interrupted", "interrupted")
            assert near.view.texts() == far.view.texts() == deaf.view.texts() == sse.view.texts() == [reply.content]
            await scene.check(codes={1006})  # of the deaf one


# The owner is frozen


async def test_the_owner_is_frozen_longer_than_its_lease(scene: Scene) -> None:
    """The other worker takes the turn and ends it. The owner that goes on falls silent; its own readers, also one that
    comes with an end only the new owner has said, hear the new owner's end; a turn begun meanwhile is whole."""
    stage = scene.stage
    fenced = await metric(stage.service.urls[0], "chat_turns_fenced_total")
    near, far = await scene.socket("near", 0), await scene.socket("far", 1)
    await near.say("/count 600")
    await far.tokens(30)
    frozen = scene.journal.fault("the owner is frozen")
    stage.service.pause(0)
    await far.turn_ended(within=TAKEN)
    measured("owner frozen: others are told after", now() - frozen)
    end = scene.journal.events("far", "message_complete")[-1]
    arriving = asyncio.create_task(scene.socket("late", 0, cursor=end["cursor"]))
    await until(lambda: scene.journal.of("late", "connect"), 5, "the late one's attempt")
    await far.say("/count 60")
    await far.tokens(40)
    scene.journal.fault("it goes on")
    stage.service.resume(0)
    late = await arriving
    await ended([near, far], 2)
    await late.until(lambda: late.view.texts() == [counted(60)], what="the second turn")
    reply = await scene.reply(0)
    assert reply.status == "interrupted"
    assert near.view.texts() == far.view.texts() == [reply.content, counted(60)]
    assert statuses(scene, far) == ["interrupted", "success"]
    assert await metric(stage.service.urls[0], "chat_turns_fenced_total") == fenced + 1
    await idle(stage)
    await scene.check(codes={1006, 1011})  # what a server does to a socket whose ping went out before the freeze


@pytest.mark.parametrize("deaf", [False, True], ids=["hears", "deaf"])
async def test_the_owner_is_frozen_and_nobody_comes_before_it_goes_on(scene: Scene, deaf: bool) -> None:
    """Frozen until others were told, then thawed with a provider that goes on: none of it is said.

    deaf: Redis gives its listeners up meanwhile, so that the owner is not told that the answer has ended.
    """
    stage = scene.stage
    near, far = await scene.socket("near", 0), await scene.socket("far", 1)
    await near.say("/count 600")
    await far.tokens(30)
    scene.journal.fault("the owner is frozen")
    stage.service.pause(0)
    if deaf:  # now: a message that Redis sends before it hangs up would be read after the freeze
        async with RedisClient.from_url(stage.redis.url) as redis:
            await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    await scene.over(TAKEN)
    stored = (await scene.reply()).content
    scene.journal.fault("it goes on")
    stage.service.resume(0)
    await ended([near, far], within=5)
    await idle(stage)
    assert near.view.texts() == far.view.texts() == [stored] == [(await scene.reply()).content]
    await scene.check(codes={1006, 1011})


async def test_the_owner_is_frozen_while_its_answer_ends(scene: Scene) -> None:
    """Thawed with an ending to store and nothing more to say: readers were told another one by then, and it stays."""
    stage = scene.stage
    near, far = await scene.socket("near", 0), await scene.socket("far", 1)
    await near.say("/slow 5 a provider that falls silent after one word, and fails a second later")
    await far.tokens(1)
    scene.journal.fault("the owner is frozen")
    stage.service.pause(0)
    await scene.over(TAKEN)
    scene.journal.fault("it goes on")
    stage.service.resume(0)
    await ended([near, far], within=5)
    await idle(stage)
    assert statuses(scene, near) == statuses(scene, far) == [(await scene.reply()).status] == ["interrupted"]
    await scene.check(codes={1006, 1011})


async def test_a_turn_that_waits_for_its_room_is_not_buried(scene: Scene) -> None:
    """Begun while Redis is frozen, where nobody listens: stored long before there is a room to say it in. Its own
    worker does not take it for one that was forgotten."""
    stage = scene.stage
    scene.journal.fault("redis frozen")
    stage.redis.pause()
    poster = await scene.sse("poster", 0, content="/count 40")
    await poster.ended()
    scene.journal.fault("redis goes on")
    stage.redis.resume()
    assert statuses(scene, poster) == ["success"] and poster.view.texts() == [counted(40)]
    await idle(stage)
    await until(lambda: empty(stage), 5, "closed rooms")
    await scene.check()


async def empty(stage: Stage) -> bool:
    return sum([await metric(base, "chat_rooms") for base in stage.service.urls]) == 0


async def test_a_battle_is_stopped_when_its_models_have_ended(whole: Stage) -> None:
    """All text is here and most of it still to be said: `stopped` within a second, and nothing is left running."""
    async with await whole.scene(mode="random", model_a_id=None) as scene:
        near, far = await scene.socket("near", 0), await scene.socket("far", 1)
        await near.say("/echo " + f"{'long' * 250} " * 20)  # the models need 0.4 s for it, saying it takes 40
        await near.until(lambda: len(text_of(near)) > 200, what="some text")
        answer = await call(whole.service.urls[1], "POST", f"/api/sessions/{scene.id}/stop/", scene.someone.access)
        assert answer.json() == {"stopped": True}
        async with prompt(1, *whole.service.pids):
            await ended([near, far])
        assert statuses(scene, near) == statuses(scene, far) == ["stopped", "stopped"]
        await idle(whole)
        await scene.check()


# Redis is frozen or away meanwhile


async def test_a_turn_begins_elsewhere_before_the_last_ones_end_is_heard(scene: Scene) -> None:
    """The end is published while Redis is frozen and the next turn begins on the other worker: readers there hear the
    first turn's end, then the second turn; so do those of the first worker."""
    near, far = await scene.socket("near", 0), await scene.socket("far", 1)
    watching = await scene.socket("watching", 1)
    await near.say("/count 40")
    await far.tokens(10)
    scene.journal.fault("redis frozen")
    scene.stage.redis.pause()
    await near.turn_ended()
    await far.say("/count 80")
    await far.until(lambda: far.view.texts()[1:] and far.view.texts()[1], what="the second turn")
    scene.journal.fault("redis goes on")
    scene.stage.redis.resume()
    await ended([near, far, watching], 2)
    for reader in (near, far, watching):
        assert reader.view.texts() == [counted(40), counted(80)]
        assert statuses(scene, reader) == ["success", "success"]
    await scene.check()


@pytest.mark.parametrize("fault", ["killed", "frozen"])
async def test_snapshots_while_redis_is_away_bring_nothing_twice(scene: Scene, fault: str) -> None:
    """Sockets arrive on the other worker again and again while Redis is away: each has what is stored, and after
    Redis is back what was said meanwhile, once."""
    redis = scene.stage.redis
    near = await scene.socket("near", 0)
    await near.say("/count 250")
    await near.tokens(20)
    scene.journal.fault(f"redis {fault}")
    redis.kill() if fault == "killed" else redis.pause()
    joining = []
    for n in range(6):
        await near.tokens(40 + 20 * n)
        joining.append(asyncio.create_task(scene.socket(f"far{n}", 1)))
    await joining[0]
    await (redis.start() if fault == "killed" else asyncio.to_thread(redis.resume))
    scene.journal.fault("redis back")
    await asyncio.gather(*joining)
    for reader in scene.readers:
        await reader.until(lambda view=reader.view: view.texts() == [counted(250)], what="the whole text")
    await near.turn_ended()
    await scene.check()


# A stream resumed inside an older turn


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("worker", [0, 1])
async def test_a_stream_resumed_inside_an_older_turn(scene: Scene, worker: int, forgotten: bool) -> None:
    """`GET …/stream/` with a number inside a turn that is not the newest any more brings that turn's rest, also when
    only the database remembers it, and from its end the one after it."""
    stage = scene.stage
    near = await scene.socket("near", (0, 1))
    async with Proxy.before(stage.service.urls[worker]) as way:
        await near.say("/count 60")
        await near.tokens(5)
        sse = await scene.sse("sse", bases=way.through(stage.service.urls[worker]))
        await sse.tokens(5)
        way.refuse()
        way.close_all()
        scene.journal.fault("the stream is cut")
        await near.turn_ended()
        await near.say("/count 20")
        await near.turn_ended(2)
        if forgotten:
            await near.leave()
            scene.journal.fault("redis forgets, both workers start again")
            stage.redis.kill()
            await asyncio.gather(stage.redis.start(), stage.service.restart(0), stage.service.restart(1))
        way.ok()
        await sse.ended()
        assert sse.view.texts() == [counted(60)]
        first, second = [turn.id for turn in (await read_rows(stage.database_url, scene.id)).turns]
        assert sse.cursor.startswith(first)
        following = await call(
            stage.service.urls[worker], "GET", f"/api/sessions/{scene.id}/stream/", scene.someone.access,
            headers={"Last-Event-ID": sse.cursor},
        )  # fmt: skip
        ids = re.findall(r"^id: ([^.\s]+)\.", following.text, re.MULTILINE)
        assert set(ids) == {second}
        assert text_in(following.text) == counted(20)
    await scene.check()


def text_in(stream: str) -> str:
    events: list[dict[str, Any]] = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
    chunks = "".join(event["chunk"] for event in events if event.get("type") == "message_chunk")
    return chunks or next(event["message"]["content"] for event in events if event.get("type") == "message_complete")
