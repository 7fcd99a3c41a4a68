"""A Redis that refuses, forgets, holds strange values or is away for a moment: every reader has everything in the end.

Two workers on a Redis of their own; readers on both. Each test is named after what was lost once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis as RedisClient

from tests.harness import until
from tests.harness.api import call, post_turn, stop
from tests.harness.client import SocketReader
from tests.harness.noise import prompt
from tests.harness.scene import ENVIRONMENT, Scene, Stage, counted, text_of
from tests.harness.servers import Postgres, Redis
from tests.harness.service import Service


@pytest.fixture
async def redis(stage: Stage) -> AsyncIterator[RedisClient]:
    assert stage.redis is not None
    async with RedisClient.from_url(stage.redis.url) as client:
        yield client


async def received(redis: RedisClient) -> int:
    """Bytes that Redis has received since it was started."""
    return int((await redis.info("stats"))["total_net_input_bytes"])


@pytest.mark.parametrize("refusal", ["full", "read-only disk"])
async def test_a_redis_that_refuses_is_not_sent_the_text_again(scene: Scene, redis: RedisClient, refusal: str) -> None:
    """Every token sent the whole turn again: 93 MB for 1,000 tokens."""
    near, far = await scene.socket("near", 0), await scene.socket("far", 1)
    settings = {"full": {"maxmemory": "1"}, "read-only disk": {"min-replicas-to-write": "3"}}[refusal]
    normal = {"maxmemory": "0", "min-replicas-to-write": "0"}
    await near.say("/count 250")
    await far.tokens(20)
    before = await received(redis)
    for name, value in settings.items():
        await redis.config_set(name, value)
    try:
        await asyncio.gather(near.turn_ended(), far.turn_ended())
        spent = await received(redis) - before
    finally:
        for name, value in normal.items():
            await redis.config_set(name, value)
    assert near.view.texts() == far.view.texts()
    size = len(text_of(near).encode())
    assert spent < 60 * size, f"{spent} bytes for a text of {size}"
    await scene.check()


async def test_a_redis_that_forgets_is_given_each_text_again_once_a_second(scene: Scene, redis: RedisClient) -> None:
    """The first reader after FLUSHALL got text in steps of three seconds, at a hundred transactions a second."""
    near = await scene.socket("near", 0)
    await near.say("/count 320")
    for n in range(6):
        await near.tokens(30 * (n + 1))
        await redis.flushall()
        far = await scene.socket(f"far{n}", 1)
        have = text_of(near)
        async with prompt(1.5, *scene.stage.service.pids):
            await far.until(lambda far=far, have=have: len(text_of(far)) >= len(have), what="the text others have")
    await asyncio.gather(*[reader.replies_ended() for reader in scene.readers])
    assert len({text_of(reader) for reader in scene.readers}) == 1
    await scene.check()


async def test_foreign_values_under_a_turns_keys_harm_nobody(scene: Scene, redis: RedisClient) -> None:
    """One value of another type under a turn's key ended every join."""
    near = await scene.socket("near", 0)
    await near.say("/count 200")
    await near.tokens(20)
    for n, write in enumerate(["lpush", "set"]):
        [key] = [key async for key in redis.scan_iter(f"*:pieces:{near.view.turn.id}:*")]
        async with redis.pipeline(transaction=True) as whole:  # the owner may append between the two
            whole.delete(key)
            getattr(whole, write)(key, b"\xff evil " * 5_000)
            await whole.execute()
        await scene.socket(f"far{n}", 1)
        await near.tokens(50 * (n + 1))
    await asyncio.gather(*[reader.replies_ended() for reader in scene.readers])
    assert {text_of(reader) for reader in scene.readers} == {counted(200)}
    await scene.check()


@pytest.mark.parametrize("worker", [0, 1])
async def test_session_events_survive_a_lost_listener(scene: Scene, redis: RedisClient, worker: int) -> None:
    """A title given while the listening connections were down was told to nobody, six times of six."""
    readers = [await scene.socket("near", 0), await scene.socket("far", 1)]
    for n in range(3):  # each time the next try comes later
        await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        path = f"/api/sessions/{scene.id}/"
        title = f"title {worker} {n}"
        base = scene.stage.service.urls[worker]
        assert (await call(base, "PATCH", path, scene.someone.access, json={"title": title})).status_code == 200
        for reader in readers:
            await reader.until(lambda reader=reader, title=title: title in _titles(scene, reader), 3, "the new title")
    await scene.check()


def _titles(scene: Scene, reader: SocketReader) -> list[Any]:
    return [event["session"].get("title") for event in scene.journal.events(reader.name, "session_update")]


async def test_a_title_given_while_redis_is_away_is_told_when_it_is_back(scene: Scene) -> None:
    near, far = await scene.socket("near", 0), await scene.socket("far", 1)
    assert scene.stage.redis is not None
    scene.stage.redis.kill()
    path = f"/api/sessions/{scene.id}/"
    await call(scene.stage.service.urls[0], "PATCH", path, scene.someone.access, json={"title": "while away"})
    async with prompt(1, *scene.stage.service.pids):
        await near.until(lambda: "while away" in _titles(scene, near), what="the title on the same worker")
    await scene.stage.redis.start()
    await far.until(lambda: "while away" in _titles(scene, far), 3, "the title on the other worker")
    await scene.check()


@contextlib.asynccontextmanager
async def redis_paused(scene: Scene) -> AsyncIterator[None]:
    redis = scene.stage.redis
    assert redis is not None
    redis.pause()
    try:
        yield
    finally:
        redis.resume()


async def test_no_turn_is_skipped_while_redis_stalls(scene: Scene) -> None:
    """A short turn on one worker while Redis stalls, the next one on the other: its readers were never told the first."""
    near, far = await scene.socket("near", 0), await scene.socket("far", 1)
    urls, token = scene.stage.service.urls, scene.someone.access
    await post_turn(urls[0], token, scene.id, "/count 5")
    await asyncio.gather(near.turn_ended(), far.turn_ended())
    async with redis_paused(scene):
        await post_turn(urls[0], token, scene.id, "/count 6")
        await post_turn(urls[1], token, scene.id, "/count 7")
    await asyncio.gather(near.turn_ended(3), far.turn_ended(3))
    assert near.view.texts() == far.view.texts() == [counted(5), counted(6), counted(7)]
    await scene.check()


async def test_an_answer_made_again_while_a_worker_is_cut_off_ends_there_as_well(scene: Scene) -> None:
    near, far = await scene.socket("near", 0), await scene.socket("far", 1)
    urls, token = scene.stage.service.urls, scene.someone.access
    await near.say("/count 60")
    await far.tokens(10)
    async with redis_paused(scene):
        await near.turn_ended()
        reply = await scene.reply()
        answer = await call(urls[0], "POST", f"/api/messages/{reply.id}/regenerate/", token)
        assert answer.status_code == 200
    await asyncio.gather(near.turn_ended(2), far.until(lambda: _whole(far), 8, "the end of the new answer"))
    assert near.view.texts() == far.view.texts() == [counted(60)]
    await scene.check(*[near], forgotten={reply.id})


def _whole(reader: SocketReader) -> bool:
    return all(message.over for message in reader.view.messages.values()) and text_of(reader) == counted(60)


async def test_a_stop_through_another_worker_needs_no_redis(scene: Scene) -> None:
    """Stopped within a second, as promised, while Redis carries nothing."""
    near = await scene.socket("near", 0)
    await near.say("/count 2000")
    await near.tokens(10)
    async with redis_paused(scene):
        async with prompt(1.5, *scene.stage.service.pids):
            assert await stop(scene.stage.service.urls[1], scene.someone.access, scene.id)
            await near.turn_ended()
    await scene.check()


async def test_a_stream_of_a_session_that_is_deleted_while_its_owner_is_dead_ends(postgres_server: Postgres) -> None:
    with Redis() as redis:
        url = postgres_server.create_database()
        async with (
            Service(ENVIRONMENT | {"DATABASE_URL": url, "REDIS_URL": redis.url}, workers=2) as service,
            await Stage(service, url, redis).scene() as scene,
        ):
            near = await scene.socket("near", 0, resume=False)
            await near.say("/count 2000")
            await near.tokens(5)
            far = await scene.sse("far", 1)
            await far.tokens(10)
            service.pause(0)
            deleted = await call(service.urls[1], "DELETE", f"/api/sessions/{scene.id}/", scene.someone.access)
            assert deleted.status_code == 204
            await far.ended(8)
            service.resume(0)
            await until(lambda: near.finished, 8, "the end of the other reader")


async def test_a_redis_that_refuses_now_and_then_tells_no_text_with_a_hole(scene: Scene, redis: RedisClient) -> None:
    """Who joined between a refused piece and its repair was told a text that nobody had said, 20 times of 30."""
    near = await scene.socket("near", 0)
    await near.say("/count 100")
    for n in range(10):
        await near.tokens(6 * n + 5)
        await redis.config_set("maxmemory", "1")
        await near.tokens(6 * n + 7)
        await redis.config_set("maxmemory", "0")
        await near.tokens(6 * n + 9)
        await (await scene.socket(f"far{n}", 1)).leave()
    await near.turn_ended()
    assert [text_of(far) for far in scene.readers if not counted(100).startswith(text_of(far))] == []
