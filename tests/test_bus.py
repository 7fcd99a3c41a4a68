"""Redis as a bus, by itself: it hears the first message, comes back, says where it was away, and speaks TLS."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from broadcaster import Broadcast

from chat.errors import ChatError, RelayRefused, RelayUnavailable, StartupError
from chat.limits import RateLimits
from chat.live.answers import Answer
from chat.live.bus import BURST, GAP, Gather, RedisBus
from chat.live.events import decode_bus
from chat.live.voice import Voice, joined, text_key
from chat.live.wire import Address, Wire
from tests.harness.proxy import Proxy
from tests.harness.servers import Redis, make_certificate
from tests.harness.service import Service


@asynccontextmanager
async def opened(url: str, **options: object) -> AsyncIterator[tuple[RedisBus, Broadcast]]:
    bus = RedisBus(url, **options)  # type: ignore[arg-type]
    async with Broadcast(backend=bus) as broadcast:
        yield bus, broadcast


@asynccontextmanager
async def subscribed(broadcast: Broadcast, channel: str) -> AsyncIterator[Any]:
    """A subscriber of a channel that Redis has confirmed: the marker that says so has been read."""
    async with broadcast.subscribe(channel) as subscriber:
        async with asyncio.timeout(5):
            assert (await subscriber.get()).message == GAP
        yield subscriber


async def test_a_sole_subscriber_hears_the_first_message(redis_server: Redis) -> None:
    """broadcaster's own backend loses it on Python 3.11: forty tries of a new bus each."""
    for n in range(40):
        async with opened(redis_server.url) as (_, broadcast), subscribed(broadcast, f"room-{n}") as subscriber:
            await broadcast.publish(f"room-{n}", "hello")
            async with asyncio.timeout(2):
                assert (await subscriber.get()).message == "hello"


async def said(subscriber: Any) -> str:
    """The next message; a gap marker may come before it whenever the listening connection is new."""
    while (message := (await subscriber.get()).message) == GAP:
        pass
    return str(message)


async def test_it_comes_back_and_says_that_it_was_away() -> None:
    """Redis killed and started again: a gap marker on every channel, then messages as before, old and new channels."""
    with Redis() as server:
        async with opened(server.url) as (bus, broadcast), subscribed(broadcast, "old") as old:
            await broadcast.publish("old", "one")
            assert await said(old) == "one"
            server.kill()
            with pytest.raises(RelayUnavailable):
                while True:  # what is on its way while the connection breaks may still be taken
                    await broadcast.publish("old", "lost")
            await server.start()
            async with asyncio.timeout(5):
                while (await old.get()).message != GAP:
                    pass
            async with subscribed(broadcast, "new") as new, asyncio.timeout(5):
                while not bus.connected:
                    await asyncio.sleep(0.01)
                for channel, subscriber in (("old", old), ("new", new)):
                    await broadcast.publish(channel, "two")
                    assert await said(subscriber) == "two"


async def until(true: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)


async def test_who_leaves_while_redis_is_away_counts_no_longer() -> None:
    """Redis kept the number of a worker that could not say that its reader had left, for a day."""
    with Redis(appendonly=True) as server:
        async with opened(server.url) as (near, _), opened(server.url) as (far, _):
            here, there = RateLimits("near", near), RateLimits("far", far)
            assert await here.enter([("reader", 1)], "full") == ["reader"]
            with pytest.raises(ChatError):
                await there.enter([("reader", 1)], "full")
            server.kill()
            await until(lambda: not near.connected)
            here.leave(["reader"])
            await server.start()
            await until(lambda: near.connected and far.connected)
            await here.beat()
            assert await near.command("PING") == b"PONG"
            assert await there.enter([("reader", 1)], "full") == ["reader"]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries so close together that each of a fault's moments meets one."""
    monkeypatch.setattr("chat.live.bus.BACKOFF", (0.01, 0.05))


async def comes_back(bus: RedisBus, broadcast: Broadcast, channel: str, subscriber: Any) -> None:
    """Both connections work again, and none of those that failed was left open."""
    async with asyncio.timeout(15):
        while (await subscriber.get()).message != GAP:
            pass
        await until(lambda: bus.connected)
        await broadcast.publish(channel, "back")
        assert await said(subscriber) == "back"
        while (await bus.command("CLIENT", "LIST")).count(b" name= ") != 2:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def admin(server: Redis) -> AsyncIterator[Callable[..., Any]]:
    """Commands over one connection of its own, opened before the fault."""
    wire = await Wire.open(Address(server.url))
    await wire.send("CLIENT", "SETNAME", "admin")
    try:
        yield wire.send
    finally:
        wire.close()


KILL_ALL = ("NORMAL", "PUBSUB")


async def test_a_password_that_changes_and_comes_back(hasty: None, caplog: pytest.LogCaptureFixture) -> None:
    """The refused greeting used to end both keepers for ever, and left its connections open."""
    with Redis(password="first") as server:
        async with opened(server.url) as (bus, broadcast), subscribed(broadcast, "room") as room, admin(server) as ask:
            await ask("CONFIG", "SET", "requirepass", "second")
            for kind in KILL_ALL:
                await ask("CLIENT", "KILL", "TYPE", kind)
            await until(lambda: bus.failures >= 6)
            assert caplog.text.count("WRONGPASS") == 1
            assert "first" not in caplog.text
            await ask("CONFIG", "SET", "requirepass", "first")
            await comes_back(bus, broadcast, "room", room)


async def test_a_redis_with_no_room_for_another_client(hasty: None, caplog: pytest.LogCaptureFixture) -> None:
    with Redis() as server:
        async with opened(server.url) as (bus, broadcast), subscribed(broadcast, "room") as room, admin(server) as ask:
            await ask("CONFIG", "SET", "maxclients", "1")
            for kind in KILL_ALL:
                await ask("CLIENT", "KILL", "TYPE", kind)
            await until(lambda: bus.failures >= 6)
            await ask("CONFIG", "SET", "maxclients", "100")
            await comes_back(bus, broadcast, "room", room)


async def test_a_user_who_may_not_listen(hasty: None, caplog: pytest.LogCaptureFixture) -> None:
    """Redis refuses SUBSCRIBE and says nothing of which channels; all are asked for again once they are allowed."""
    with Redis() as server:
        async with opened(server.url) as (bus, broadcast), subscribed(broadcast, "room") as room, admin(server) as ask:
            await ask("ACL", "SETUSER", "default", "resetchannels")
            await until(lambda: bus.failures >= 6)
            assert caplog.text.count("NOPERM") == 1
            await ask("ACL", "SETUSER", "default", "allchannels")
            await comes_back(bus, broadcast, "room", room)


async def test_a_redis_that_loads_its_data(hasty: None, caplog: pytest.LogCaptureFixture) -> None:
    """After a restart Redis accepts, and answers `LOADING` until it has read all of its data."""
    slow = ["--key-load-delay", "200"]  # microseconds; every 1024 keys Redis looks at its connections
    with Redis(appendonly=True, options=slow) as server:
        async with opened(server.url) as (bus, broadcast), subscribed(broadcast, "room") as room:
            await asyncio.gather(*[bus.command("SET", f"key-{n}", "x") for n in range(5_000)])
            await server.stop()
            await server.start()
            await comes_back(bus, broadcast, "room", room)
            assert "LOADING" in caplog.text


async def test_a_redis_that_hangs_and_is_killed(hasty: None) -> None:
    """Connections wait for the answer to their greeting when they are reset."""
    with Redis() as server:
        async with Proxy.before(server.url) as proxy, opened(proxy.through(server.url)) as (bus, broadcast):
            async with subscribed(broadcast, "room") as room:
                server.pause()
                proxy.rst()
                await until(lambda: not bus.connected and proxy.open == 2)
                failures = bus.failures
                server.kill()
                await until(lambda: bus.failures >= failures + 2)
                await server.start()
                await comes_back(bus, broadcast, "room", room)


async def test_a_redis_that_hangs_while_a_worker_starts() -> None:
    with Redis() as server:
        server.pause()
        async with opened(server.url) as (bus, broadcast), broadcast.subscribe("room") as room:
            assert not bus.connected
            server.resume()
            await comes_back(bus, broadcast, "room", room)


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"-ERR go away\r\n", b"$-7\r\n"])
async def test_something_that_is_no_redis(greeting: bytes, hasty: None) -> None:
    """A proxy accepts and closes, or answers in its own language, and is Redis again after that."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    with Redis() as server:
        async with (
            Proxy("127.0.0.1", server.port) as proxy,
            await asyncio.start_server(answer, "127.0.0.1", 0) as other,
        ):
            async with opened(proxy.through(server.url)) as (bus, broadcast), subscribed(broadcast, "room") as room:
                proxy.target_port = other.sockets[0].getsockname()[1]
                proxy.rst()
                await until(lambda: bus.failures >= 6)
                proxy.target_port = server.port
                await comes_back(bus, broadcast, "room", room)


async def test_a_listening_connection_that_is_silent(monkeypatch: pytest.MonkeyPatch, redis_server: Redis) -> None:
    """Our own PING does not count as a sign of life."""
    monkeypatch.setattr("chat.live.bus.IDLE_PING", 0.1)
    async with Proxy.before(redis_server.url) as proxy:
        async with opened(proxy.through(redis_server.url)) as (bus, broadcast), subscribed(broadcast, "room") as room:
            proxy.stall(to="open")
            async with asyncio.timeout(5):
                assert (await room.get()).message == GAP
            assert bus.failures >= 1


async def test_a_gap_is_said_once_and_after_the_subscription(redis_server: Redis) -> None:
    """The room that reads upon the marker must not miss what is published right after: Redis sends already."""
    async with (
        Proxy.before(redis_server.url) as proxy,
        opened(proxy.through(redis_server.url)) as (_, broadcast),
        subscribed(broadcast, "a-gap") as a,
        subscribed(broadcast, "b-gap") as b,
        admin(redis_server) as ask,
    ):
        proxy.delay(0.1, to="new")  # whoever says the marker before the confirmation is early by this much
        proxy.rst()
        for channel, subscriber in (("a-gap", a), ("b-gap", b)):
            async with asyncio.timeout(10):
                assert (await subscriber.get()).message == GAP
            assert await ask("PUBSUB", "NUMSUB", channel) == [channel.encode(), 1]
            await ask("PUBLISH", channel, "next")
            async with asyncio.timeout(10):
                assert (await subscriber.get()).message == "next"


async def test_a_marker_follows_a_confirmation_that_comes_late(redis_server: Redis) -> None:
    """Redis stalls while someone joins: the marker says that all from there on is heard, and nothing before it."""
    async with Proxy.before(redis_server.url) as proxy, admin(redis_server) as ask:
        async with opened(proxy.through(redis_server.url)) as (_, broadcast):
            proxy.stall()
            async with broadcast.subscribe("late") as late:
                await ask("PUBLISH", "late", "unheard")
                proxy.ok()
                async with asyncio.timeout(5):
                    assert (await late.get()).message == GAP
                    await ask("PUBLISH", "late", "heard")
                    assert (await late.get()).message == "heard"


async def test_a_channel_that_is_left_and_joined_again_is_marked_after_the_last_confirmation(redis_server: Redis) -> None:
    """A reader leaves before Redis has confirmed, another joins: all three commands are on their way at once."""
    async with opened(redis_server.url) as (_, broadcast), admin(redis_server) as ask:
        for _ in range(5):  # broadcaster leaves a channel as it is entered: in one step
            async with broadcast.subscribe("fickle"):
                pass
        async with broadcast.subscribe("fickle") as last:
            async with asyncio.timeout(5):
                assert [(await last.get()).message for _ in range(6)] == [GAP] * 6
                assert await ask("PUBSUB", "NUMSUB", "fickle") == [b"fickle", 1]
                await ask("PUBLISH", "fickle", "heard")
                assert (await last.get()).message == "heard"


async def test_a_flood_does_not_pile_up_before_a_slow_room(redis_server: Redis) -> None:
    """All that the loop reads at once is heard before it reads again; the rest waits in Redis, which has a bound."""
    async with opened(redis_server.url) as (_, broadcast), subscribed(broadcast, "flood") as room, admin(redis_server) as ask:
        sent = [ask("PUBLISH", "flood", "x" * 1_000) for _ in range(5_000)]
        waiting = 0
        async with asyncio.timeout(30):
            for _ in sent:
                await room.get()
                time.sleep(0.0001)  # noqa: ASYNC251 - a room's work blocks the loop as well
                waiting = max(waiting, room._queue.qsize())
        assert waiting < 1_000
        await asyncio.gather(*sent)


async def appended(bus: RedisBus, *texts: tuple[str, bytes]) -> list[int | Exception]:
    """What Redis answers to these texts, given in one turn of the loop."""
    done: list[asyncio.Future[int | Exception]] = []
    for key, text in texts:
        done.append(asyncio.get_running_loop().create_future())
        bus.ask(done[-1].set_result, "APPEND", key, text)  # a second call would raise, and be logged
    async with asyncio.timeout(5):
        return await asyncio.gather(*done)


async def test_texts_grow_and_others_are_told(redis_server: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """Two texts and a message in one round trip: the lengths come back in order, in bytes, and the echo is not heard."""
    async with (
        opened(redis_server.url, origin="aaaaaaaa") as (bus, ours),
        opened(redis_server.url, origin="bbbbbbbb") as (_, theirs),
        subscribed(ours, "grow") as here,
        subscribed(theirs, "grow") as there,
    ):
        a, b = bus.name("text", "grow", "a"), bus.name("text", "grow", "b")
        assert await appended(bus, (a, "é".encode()), (b, b"xyz")) == [2, 3]
        bus.tell("grow", b"1")
        assert await appended(bus, (b, b"!")) == [4]
        bus.tell("grow", b"2")
        await ours.publish("grow", "for all")
        async with asyncio.timeout(2):
            told = [(await there.get()).message for _ in range(3)]
            assert told == ["aaaaaaaa1", "aaaaaaaa2", "for all"]
            assert (await here.get()).message == "for all"
        assert await bus.command("MGET", a, b) == ["é".encode(), b"xyz!"]
    assert not caplog.records or "call back" not in caplog.text


async def test_a_redis_that_is_full_refuses_and_still_tells() -> None:
    """Out of memory, Redis appends nothing: the owner is told so, the readers on other workers get the words."""
    with Redis() as server:
        async with opened(server.url) as (bus, broadcast), subscribed(broadcast, "full") as there:
            await bus.command("CONFIG", "SET", "maxmemory", "1")
            (answer,) = await appended(bus, (bus.name("text"), b"words"))
            bus.tell("full", b"words")
            assert isinstance(answer, RelayRefused)
            assert "OOM" in str(answer)
            async with asyncio.timeout(2):
                assert (await there.get()).message == "words"
            with pytest.raises(RelayRefused):
                await bus.command("SET", "x", "y")
            server.kill()
            async with asyncio.timeout(5):
                while bus.connected:
                    await asyncio.sleep(0.01)
            for answer in await appended(bus, *[(bus.name("text"), b"words")] * 2):
                assert isinstance(answer, RelayUnavailable)
                assert not isinstance(answer, RelayRefused)


async def test_a_text_is_safe_once_redis_has_all_that_was_shown() -> None:
    """Text on its way, which nobody has seen, counted as lost; text that a full Redis had refused counted as safe."""
    with Redis() as server:
        async with opened(server.url) as (bus, _):
            answer = Answer("turn", 1, "", [{"id": "r", "participant": "a", "status": "pending", "content": ""}])
            voice = Voice(answer, lambda: None, lambda message: None, lambda: True, bus.gather, bus=bus, channel="c")
            reply = answer.replies["a"]

            async def shown(text: str) -> None:
                voice.say("a", text)
                async with asyncio.timeout(5):
                    await voice.settled("a")

            voice.say("a", "one ")
            while not reply.text:
                assert voice.safe
                await asyncio.sleep(0)
            assert voice.safe
            await bus.command("CONFIG", "SET", "maxmemory", "1")
            await shown("two ")
            assert reply.text == "one two " and not voice.safe
            await bus.command("CONFIG", "SET", "maxmemory", "0")
            await shown("three ")  # Redis lacks the piece between: it is given the whole
            await shown("four ")
            assert reply.text == "one two three four " and voice.safe
            server.pause()
            voice.say("a", "five")
            await asyncio.sleep(0.01)
            voice.show_late(0)
            assert reply.text.endswith("five") and not voice.safe
            server.resume()
            async with asyncio.timeout(5):
                while not voice.safe:
                    await asyncio.sleep(0.01)


async def test_redis_is_given_both_texts_that_it_has_forgotten() -> None:
    """Both texts of a battle are evicted at once: one of them was repaired, and the other a second later at best."""
    with Redis() as server:
        async with opened(server.url) as (bus, _):
            rows = [{"id": side, "participant": side, "status": "pending", "content": ""} for side in "ab"]
            answer = Answer("turn", 1, "", rows)
            voice = Voice(answer, lambda: None, lambda message: None, lambda: True, bus.gather, bus=bus, channel="c")
            for text in ("one ", "two "):
                for side in "ab":
                    voice.say(side, text)
                async with asyncio.timeout(5):
                    await asyncio.gather(*[voice.settled(side) for side in "ab"])
                if text == "one ":
                    await bus.command("FLUSHALL")
            values = await asyncio.gather(*[bus.command("GET", text_key(bus, "turn", side)) for side in "ab"])
            assert [joined("", value) for value in values] == ["one two "] * 2


@pytest.mark.parametrize("address, name", [("/0", "parley:0:session:x"), ("/3", "parley:3:session:x")])
def test_names_carry_the_database_number(address: str, name: str) -> None:
    assert RedisBus(f"redis://localhost{address}").name("session", "x") == name


@pytest.mark.parametrize("address, options", [("/3", {}), ("/0", {"prefix": "other"})])
async def test_deployments_that_share_a_redis_do_not_hear_each_other(
    address: str, options: dict[str, str], redis_server: Redis
) -> None:
    """Of another database, although pub/sub ignores SELECT, or of the same with another prefix."""
    async with (
        opened(redis_server.url) as (ours, our_broadcast),
        opened(redis_server.url.removesuffix("/0") + address, **options) as (theirs, their_broadcast),
        subscribed(our_broadcast, ours.name("session", "same")) as here,
        subscribed(their_broadcast, theirs.name("session", "same")) as there,
    ):
        for bus, text, length in ((ours, b"ours", 4), (theirs, b"their", 5)):
            assert await appended(bus, (bus.name("text", "same"), text)) == [length]
            bus.tell(bus.name("session", "same"), text)
        await our_broadcast.publish(ours.name("session", "same"), "end")
        await their_broadcast.publish(theirs.name("session", "same"), "end")
        async with asyncio.timeout(2):
            assert [(await here.get()).message for _ in range(2)] == ["ours", "end"]
            assert [(await there.get()).message for _ in range(2)] == ["their", "end"]
        assert await ours.command("DEL", ours.name("text", "same")) == 1
        assert await theirs.command("GET", theirs.name("text", "same")) == b"their"
        await theirs.command("DEL", theirs.name("text", "same"))


async def test_a_service_names_nothing_past_the_bus(tmp_path: Path) -> None:
    """All keys and channels of a service that answers carry its prefix and its database number."""
    with Redis() as server:
        environment = {"DATABASE_URL": f"sqlite:///{tmp_path / 'parley.db'}", "REDIS_URL": f"{server.url[:-1]}2"}
        async with (
            Service(environment | {"PARLEY_RELAY_PREFIX": "blue"}) as service,
            admin(server) as ask,
            httpx.AsyncClient() as client,
            client.stream(
                "POST", f"{service.url}/api/messages/stream/?format=text", json={"content": "/slow 5"}
            ) as answer,
        ):
            assert answer.status_code == 200
            await ask("SELECT", 2)
            names: list[bytes] = []
            async with asyncio.timeout(10):
                while not any(b":pieces:" in name for name in names):
                    names = await ask("PUBSUB", "CHANNELS") + await ask("KEYS", "*")
            assert {name.split(b":")[2] for name in names} >= {b"session", b"pieces", b"rate", b"worker", b"workers"}
            assert [name for name in names if not name.startswith(b"blue:2:")] == []
            assert (await ask("INFO", "keyspace")).count(b"\ndb") == 1


async def test_a_payload_that_is_no_text_hurts_nobody(redis_server: Redis) -> None:
    """A room refuses and counts it, as it does all that no worker sends."""
    async with opened(redis_server.url) as (bus, broadcast), subscribed(broadcast, "poison") as subscriber:
        await bus.command("PUBLISH", "poison", b"\xff\xfe\x00")
        await broadcast.publish("poison", "good")
        async with asyncio.timeout(2):
            with pytest.raises(msgspec.DecodeError):
                decode_bus((await subscriber.get()).message)
            assert (await subscriber.get()).message == "good"


async def test_a_refused_command_is_an_error_of_its_own(redis_server: Redis) -> None:
    """The answers behind it still reach those who asked."""
    async with opened(redis_server.url) as (bus, _):
        bad, good = bus.command("INCRBY", "parley:x", "no-number"), bus.command("PING")
        with pytest.raises(RelayRefused):
            await bad
        assert await good == b"PONG"


async def test_password_and_database_number() -> None:
    with Redis(password="s3cret-pass") as server:
        async with opened(server.url.removesuffix("/0") + "/3") as (bus, _):
            await bus.command("SET", "here", "yes")
            assert b"db=3" in await bus.command("CLIENT", "LIST")
        wrong = RedisBus(server.url.replace("s3cret", "other"))
        await wrong.connect()
        assert not wrong.connected
        assert "other" not in repr(wrong.address)
        await wrong.disconnect()


async def test_rediss_verifies_unless_told_otherwise(redis_server: Redis, tmp_path: Path) -> None:
    """A self-signed certificate is refused, accepted with verification off, and accepted when it is the authority."""
    certificate = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", redis_server.port)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                sink.write(data)
            sink.close()

        await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)

    async with await asyncio.start_server(forward, "127.0.0.1", 0, ssl=context) as server:
        url = f"rediss://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        for options, works in (({}, False), ({"verify": False}, True)):
            bus = RedisBus(url, **options)  # type: ignore[arg-type]
            await bus.connect()
            assert bus.connected is works
            await bus.disconnect()
        trusted = RedisBus(f"{url}?ssl_ca_certs={certificate}")
        await trusted.connect()
        assert trusted.connected
        await trusted.disconnect()


@pytest.mark.parametrize("url", ["http://localhost", "redis://localhost:port/0", "redis://localhost/x"])
def test_a_bad_address_is_one_line(url: str) -> None:
    with pytest.raises(StartupError, match="REDIS_URL"):
        RedisBus(url)


async def test_a_few_things_are_done_at_once_and_many_together() -> None:
    """The first after a quiet moment never wait; what comes faster than that is gathered."""
    runs: list[list[int]] = []
    gather, done = Gather(0.2, lambda: runs.append(done.copy()) or done.clear()), list[int]()
    for n in range(BURST + 3):
        gather.soon(partial(done.append, n))
        for _ in range(3):
            await asyncio.sleep(0)
    assert runs == [[n] for n in range(BURST)]
    async with asyncio.timeout(5):
        while len(runs) == BURST:
            await asyncio.sleep(0.01)
    assert runs[BURST:] == [[BURST, BURST + 1, BURST + 2]]


async def test_a_stop_of_ours_does_not_say_that_redis_is_away(
    redis_server: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(redis_server.url) as (bus, _):
        await until(lambda: bus.connected)
    assert "is connected" in caplog.text and "away" not in caplog.text
