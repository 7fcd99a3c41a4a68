"""Frames: how large, how many, and the broken ones."""

from __future__ import annotations

import asyncio
import json

import pytest

from chat.errors import ChatError
from consumers.frames import parse
from tests.harness.api import Guest
from tests.harness.client import SocketReader
from tests.harness.journal import Journal
from tests.harness.service import Service

from . import counted, hear, home, plain
from .conftest import traceback_in
from .raw import Raw, frame


async def _admitted_raw(base: str, session_id: str, someone: Guest, *headers: str) -> Raw:
    raw = await Raw.open(base, session_id, f"Authorization: Bearer {someone.access}", *headers)
    await raw.event("session_state")
    return raw


async def test_frames_have_a_size(service: Service) -> None:
    """64 KiB and not a byte more; of 17 MB not even the beginning is kept."""
    someone, session_id = await home(service.url)
    before = service.resources()["rss"]
    async with plain(service.url, session_id, someone.access) as opened:
        head, tail = '{"type": "test", "message": "', '"}'
        await hear(opened, "session_state")
        await opened.send(head + "x" * (65_536 - len(head) - len(tail)) + tail)
        assert len((await hear(opened, "test"))[-1]["message"]) == 65_536 - len(head) - len(tail)
        await opened.send(head + "x" * (65_537 - len(head) - len(tail)) + tail)
        await opened.wait_closed()
        assert opened.close_code == 1009
    for size, parts in ((65_537, 1), (1_000_000, 1), (17_000_000, 1), (40_000, 2)):
        raw = await _admitted_raw(service.url, session_id, someone)
        raw.send(1, b"x" * 40_000, first=0x80 if parts == 1 else 0, claim=size)
        if parts == 2:
            raw.send(0, b"x" * 40_000)
        assert await raw.code() == 1009, size
    assert service.resources()["rss"] - before < 5_000_000


async def test_compression_is_not_negotiated(service: Service) -> None:
    """A few bytes on the wire could be megabytes here."""
    someone, session_id = await home(service.url)
    raw = await _admitted_raw(service.url, session_id, someone, "Sec-WebSocket-Extensions: permessage-deflate")
    assert raw.status == 101 and "sec-websocket-extensions" not in raw.head.lower()
    raw.send(1, b"\xaa\x56\x2a", first=0xC0)
    assert await raw.code() == 1002


TEXT = b'{"type": "ping"}'
BROKEN = [
    (1003, frame(2, b"\x00\x01")),
    (1003, frame(2)),
    (1007, frame(1, b"\xff\xfe")),
    (1007, frame(1, b'"\xed\xa0\x80"')),
    (1007, frame(1, b"\xc3", first=0) + frame(0, b"(")),
    (1002, frame(1, TEXT, mask=False)),
    (1002, frame(3, TEXT)),
    (1002, frame(15)),
    (1002, frame(1, TEXT, first=0xA0)),
    (1002, frame(0, TEXT)),
    (1002, frame(1, TEXT, first=0) + frame(1, TEXT)),
    (1002, frame(9, b"x" * 126)),
    (1002, frame(9, first=0)),
    (1002, frame(8, b"x")),
]


async def test_broken_frames_close_with_the_protocol_s_own_codes(service: Service, journal: Journal) -> None:
    """A reader beside them goes on, and the log has no traceback: the service is asked for it at its end."""
    someone, session_id = await home(service.url)
    async with SocketReader(journal, "bystander", service.url, session_id, token=someone.access) as reader:
        await reader.say("/count 200")
        for code, broken in BROKEN:
            raw = await _admitted_raw(service.url, session_id, someone)
            raw.writer.write(broken)
            assert await raw.code() == code, broken
        await reader.turn_ended()
        assert reader.view.texts() == [counted(200)] and reader.codes == []
    assert "Traceback" not in service.log(), traceback_in(service.log())


SEND = {"type": "send", "requestId": "r", "id": "s", "messages": []}
JUNK = [
    "",
    "hello",
    "[]",
    "5",
    "null",
    "{}",
    '{"type": null}',
    '{"type": "nonsense"}',
    '{"type": "session_state"}',
    '{"type": "message"}',
    '{"type": "message", "content": 5}',
    '{"type": "message", "content": null}',
    '{"type": "message", "content": "hi", "id": 5}',
    '{"type": "message", "content": "hi", "id": ""}',
    '{"type": "message", "content": "hi", "id": "a b"}',
    '{"type": "message", "content": "hi", "id": "a\\n"}',
    '{"type": "message", "content": "\\ud800"}',
    '{"type": "typing_indicator"}',
    '{"type": "typing_indicator", "is_typing": "yes"}',
    '{"type": "resume"}',
    '{"type": "resume", "cursor": 5}',
    '{"type": "resume", "cursor": "' + "x" * 101 + '"}',
    '{"type": "ping", "timestamp": NaN}',
    '{"type": "ping", "timestamp": ' + "[" * 20_000 + "]" * 20_000 + "}",
    '{"type": "ping"',
]


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ({"type": "dance"}, "type: expected one of ping, test, message, stop,"),
        ({"type": "message", "content": "hi", "mode": "loud"}, "mode: expected one of direct, compare, random."),
        (SEND | {"trigger": "again"}, "trigger: expected one of submit-message, regenerate-message."),
        (SEND | {"messages": [{"role": "judge"}]}, "messages[0].role: expected one of system, user, assistant."),
        (SEND | {"body": {"mode": "loud"}}, "body.mode: expected one of direct, compare, random."),
        (SEND | {"id": None}, "id: Expected `str`, got `null`."),
        ({"type": "message"}, "content: this is needed."),
        ([], "frame: Expected `object`, got `array`."),
    ],
)
def test_a_wrong_word_is_answered_with_the_right_ones(frame: object, words: str) -> None:
    with pytest.raises(ChatError) as refused:
        parse(json.dumps(frame))
    assert words in refused.value.message


async def test_what_is_not_understood_is_answered(service: Service) -> None:
    """Twice a typed error and the socket stays; at the third within a minute it is closed with 4400."""
    someone, session_id = await home(service.url)
    for start in range(0, len(JUNK), 2):
        async with plain(service.url, session_id, someone.access) as opened:
            await hear(opened, "session_state")
            for text in (JUNK + JUNK)[start : start + 2]:
                await opened.send(text)
                refusal = (await hear(opened, "error"))[-1]
                assert (refusal["code"], refusal["retryable"]) == ("bad_request", False), text
            await opened.send('{"type": "ping", "timestamp": 1}')
            assert (await hear(opened, "pong"))[-1]["timestamp"] == 1
            if start < 4:
                await opened.send("hello")
                assert (await hear(opened, "error"))[-1]["code"] == "bad_request"
                await opened.wait_closed()
                assert (opened.close_code, opened.close_reason) == (4400, "bad frames")


async def test_ten_thousand_junk_frames_disturb_nobody(service: Service, journal: Journal) -> None:
    """Three of them are read. A reader beside them has all of its text, and next to nothing is spent on the rest."""
    someone, session_id = await home(service.url)
    other, others_session = await home(service.url)
    async with SocketReader(journal, "bystander", service.url, session_id, token=someone.access) as reader:
        await reader.say("/count 300")
        await reader.tokens(10)
        before, spent = service.resources()["rss"], _cpu(service)
        for _ in range(3):
            raw = await _admitted_raw(service.url, others_session, other)
            raw.writer.write(frame(1, b"junk") * 10_000)
            assert await raw.code() == 4400
        assert _cpu(service) - spent < 1.5, "seconds, with the bystander's text"
        assert service.resources()["rss"] - before < 20_000_000
        await reader.turn_ended()
        assert reader.view.texts() == [counted(300)] and reader.codes == []


def _cpu(service: Service) -> float:
    used = service.worker().cpu_times()
    return used.user + used.system


async def test_twenty_frames_a_second_are_heard_and_no_more(service: Service) -> None:
    someone, session_id = await home(service.url)
    raw = await _admitted_raw(service.url, session_id, someone)
    raw.writer.write(b"".join(_ping(n) for n in range(20)))
    assert [(await raw.event("pong"))["timestamp"] for _ in range(20)] == list(range(20))
    await asyncio.sleep(1.0)
    raw.writer.write(b"".join(_ping(n) for n in range(21)))
    assert await raw.end() == (4429, "too many frames")


def _ping(n: int) -> bytes:
    return frame(1, b'{"type": "ping", "timestamp": %d}' % n)
