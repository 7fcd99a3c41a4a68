"""From bytes to text: server-sent events at any cut, emoji in halves, counts that are none, through both adapters."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import random
import re
import threading
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chat.providers import Finish, Limits, ProviderError, Providers, body, sse
from chat.providers.clean import Cleaner
from chat.providers.sse import Splitter, decoder
from chat.settings import Model, Settings
from tests.test_providers import APIS, KEY, Answer, ask
from tests.vendors import Anthropic, Call, OpenAI, Reply, Vendors, mode

# --- the reference: the standard's own words, one character at a time


def reference(stream: bytes) -> list[str]:
    """Return the data of every event as https://html.spec.whatwg.org/#event-stream-interpretation has it."""
    text = stream.decode("utf-8-sig", "replace")
    lines = re.split(r"\r\n|\n|\r", text)[:-1]  # the last line has no end
    events: list[str] = []
    buffer = ""
    for line in lines:
        if line == "":
            if buffer:
                events.append(buffer.removesuffix("\n"))
            buffer = ""
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            if name == "data":
                buffer += value.removeprefix(" ") + "\n"
    return [event for event in events if event]


PIECES = [b"data: ", b"data:", b"data", b"datax: 1", b"event: ping", b": note", b"id: 7", b"retry: 3", b" ", b":", b"x"]
PIECES += [b"\n", b"\n\n", b"\r", b"\r\n", b"\r\n\r\n", b"\r\r", b"\n\n\n", b"\xef\xbb\xbf", b"\xe2\x82\xac", b"\xf0\x9f"]
PIECES += [b"\x98\x80", b"\xff", b"\x00", b'{"a": 1}', b"[DONE]", b"data: {}\n\n", b"event: e\ndata: y\n\n"]


def test_twenty_thousand_random_streams_at_random_cuts_are_read_as_the_standard_says() -> None:
    for seed in range(20_000):
        dice = random.Random(seed)
        stream = (b"\xef\xbb\xbf" if dice.random() < 0.2 else b"") + b"".join(dice.choices(PIECES, k=dice.randint(0, 24)))
        cuts = sorted(dice.choices(range(len(stream) + 1), k=dice.randint(0, 6)))
        splitter = Splitter()
        found = [event for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True) for event in splitter.feed(stream[a:b])]
        found += splitter.feed(b"", final=True)
        assert [event.decode(errors="replace") for event in found] == reference(stream), (seed, stream, cuts)


def test_an_event_leaves_with_its_last_byte() -> None:
    splitter = Splitter()
    assert splitter.feed(b"data: a\n") == []
    assert splitter.feed(b"\ndata: b\r\n\r") == [b"a"]
    assert splitter.feed(b"\n") == [b"b"]


def test_an_endless_event_is_bounded_and_costs_no_more_than_its_length() -> None:
    splitter, fed = Splitter(), 0
    with pytest.raises(ProviderError, match="provider_protocol"):
        while True:
            splitter.feed(b"x" * 1000)
            fed += 1000
    assert sse.EVENT_MAX - 2000 < fed <= sse.EVENT_MAX
    assert len(splitter._parts) > 1000, "the parts were joined again and again"


class Counted(msgspec.Struct):
    n: sse.Count | None = None
    text: str | None = None


@pytest.mark.parametrize("count", ['"12"', "NaN", "Infinity", "1.5", "-1", "true", "[]", str(2**60), "1e400"])
def test_a_count_is_a_whole_number_or_the_event_is_refused(count: str) -> None:
    with pytest.raises(ValueError):
        decoder(Counted)(f'{{"n": {count}}}'.encode())


def test_what_nobody_reads_may_be_odd() -> None:
    read = decoder(Counted)(b'{"logprob": NaN, "other": "\\ud83d", "n": 3, "text": "\\ud83d"}')
    assert (read.n, read.text) == (3, "\ud83d")


# --- cleaning


def expected(text: str) -> str:
    """Return the text with halves that touch joined, and NUL and lone halves replaced: by another road than the code."""
    joined = re.sub("[\ud800-\udbff][\udc00-\udfff]", lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)
    return re.sub("[\ud800-\udfff\0]", "\ufffd", joined)


half = st.integers(0xD800, 0xDFFF).map(chr)
broken = st.lists(st.one_of(st.text(), half, st.sampled_from(["\0", "\ud83d", "\ude00", "\ud83d\ude00", "a"])), max_size=12)


@given(broken)
def test_text_is_whole_however_it_was_cut(pieces: list[str]) -> None:
    cleaner = Cleaner()
    shown = [cleaner.feed(piece) for piece in pieces]
    shown.append(cleaner.end())
    assert "".join(shown) == expected("".join(pieces))
    for text in shown:
        text.encode()
        assert "\0" not in text


@given(broken)
def test_no_more_than_one_half_waits(pieces: list[str]) -> None:
    cleaner = Cleaner()
    for n, piece in enumerate(pieces):
        cleaner.feed(piece)
        assert len(cleaner._half) <= 1, n


# --- end to end

SCRIPT: list[bytes] = []  # what the vendor writes next, a chunk each


@mode("scripted")
async def write_the_script(reply: Reply) -> None:
    await reply.head()
    for data in SCRIPT:
        await reply.chunk(data)
    await reply.end()


@mode("gzipped")
async def write_the_script_compressed(reply: Reply) -> None:
    await reply.head(content_encoding="gzip")
    await reply.chunk(gzip.compress(b"".join(SCRIPT)))
    await reply.end()


@pytest.fixture(scope="module")
def vendors() -> Iterator[Vendors]:
    with Vendors() as running:
        yield running


@pytest.fixture(params=APIS)
def api(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def model(api: str, url: str) -> Model:
    base = f"{url}/v1" if api == "openai" else url
    return Model(id="m", provider=APIS[api], model_code="fake-scripted", base_url=base, api_key_env="VENDOR_KEY")


@pytest_asyncio.fixture
async def providers(api: str, vendors: Vendors) -> AsyncIterator[Providers]:
    opened = Providers(Settings(models=(model(api, vendors.url),)), {"VENDOR_KEY": KEY})
    yield opened
    await opened.close()


def written(api: str, pieces: list[str], *, whole: bool = True) -> bytes:
    """Return an answer as its vendor writes it, one event a piece; halves of emoji as JSON escapes them."""
    call = Call(0, api, "m", "", "x", "ok", 0, 0, 0.0, "", {"stream_options": {"include_usage": True}}, 0.0)
    vendor = OpenAI() if api == "openai" else Anthropic()
    events = [*vendor.start(call), *(said(vendor, call, piece) for piece in pieces)]
    return b"".join([*events, *(vendor.end(call, "stop", True) if whole else [])])


def said(vendor: OpenAI | Anthropic, call: Call, text: str) -> bytes:
    """The vendor's own event, with halves as escapes: UTF-8 has no bytes for them."""
    mark = "@@"
    escaped = "".join(f"\\u{ord(c):04x}" if "\ud800" <= c <= "\udfff" else msgspec.json.encode(c).decode()[1:-1] for c in text)
    return vendor.text(call, mark).replace(mark.encode(), escaped.encode())


def cut(stream: bytes, dice: random.Random) -> list[bytes]:
    places = sorted({dice.randrange(1, len(stream)) for _ in range(dice.randint(0, 12))})
    return [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)]


class Loop:
    """A loop in a thread: hypothesis calls plain functions, and a client belongs to one loop."""

    def __enter__(self) -> Loop:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        return self

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)


def test_all_of_unicode_broken_and_in_pieces_arrives_whole(api: str, vendors: Vendors) -> None:
    """Any text, cut anywhere into deltas and those anywhere into packets, comes out clean, and in the vendor's count."""
    with Loop() as loop:
        opened = Providers(Settings(models=(model(api, vendors.url),)), {"VENDOR_KEY": KEY})

        @settings(max_examples=60, suppress_health_check=list(HealthCheck))
        @given(broken, st.randoms(use_true_random=False))
        def check(pieces: list[str], dice: random.Random) -> None:
            SCRIPT[:] = cut(written(api, pieces), dice)
            answer: Answer = loop.run(ask(opened, "m", "hello"))
            assert answer.error is None
            assert answer.text == expected("".join(pieces))
            assert answer.finish == Finish("stop", 11, 0)
            assert all(delta for delta in answer.deltas)

        try:
            check()
        finally:
            loop.run(opened.close())


@given(broken)
@settings(max_examples=30)
def test_a_demo_model_that_echoes_halves_is_cleaned_as_well(pieces: list[str]) -> None:
    text = "".join(pieces)
    demo = Providers(Settings(models=(Model(id="m", provider="demo", pace=0),)), {})
    answer = asyncio.run(ask(demo, "m", f"/echo {text}", Limits(max_tokens=10_000)))
    assert answer.text == expected(text)


async def test_a_byte_order_mark_loses_nothing(api: str, providers: Providers) -> None:
    SCRIPT[:] = [b"\xef\xbb\xbf" + written(api, ["one ", "two"])]
    answer = await ask(providers, "m", "hello")
    assert answer.text == "one two"
    assert answer.finish == Finish("stop", 11, 0)


@pytest.mark.parametrize("end", [b"\r\n", b"\r"])
async def test_lines_may_end_as_they_like(end: bytes, api: str, providers: Providers) -> None:
    SCRIPT[:] = [written(api, ["one ", "two"]).replace(b"\n", end)]
    assert (await ask(providers, "m", "hello")).text == "one two"


async def test_a_byte_at_a_time_is_as_good_as_all_at_once(api: str, providers: Providers) -> None:
    SCRIPT[:] = [bytes([byte]) for byte in written(api, ["€ ", "😀"])]
    assert (await ask(providers, "m", "hello")).text == "€ 😀"


async def test_a_compressed_answer_is_read(api: str, providers: Providers) -> None:
    SCRIPT[:] = [written(api, ["one ", "two"])]
    assert (await ask(providers, "m", "hello [[mode:gzipped]]")).text == "one two"


async def test_an_event_without_end_is_refused(api: str, providers: Providers) -> None:
    SCRIPT[:] = [written(api, ["one "], whole=False), b"data: ", *([b"x" * 60_000] * 60)]
    answer = await ask(providers, "m", "hello")
    assert (answer.text, answer.code) == ("one ", "provider_protocol")


@pytest.mark.parametrize("count", [b'"11"', b"NaN", b"11.5", b"-11"])
async def test_a_count_that_is_none_is_never_passed_on(count: bytes, api: str, providers: Providers) -> None:
    """OpenAI's comes behind the finish reason: the answer is whole, and uncounted. Anthropic's comes first."""
    name = b"prompt_tokens" if api == "openai" else b"input_tokens"
    SCRIPT[:] = [written(api, ["one"]).replace(b'"%b": 11' % name, b'"%b": %b' % (name, count))]
    answer = await ask(providers, "m", "hello")
    if api == "openai":
        assert answer.finish == Finish("stop", None, None)
    else:
        assert answer.code == "provider_protocol"


async def test_cached_tokens_are_paid_for(vendors: Vendors) -> None:
    """Anthropic counts them apart from its input tokens."""
    anthropic = Providers(Settings(models=(model("anthropic", vendors.url),)), {"VENDOR_KEY": KEY})
    cached = b'"cache_creation_input_tokens": 100, "cache_read_input_tokens": 1000, "input_tokens": 11'
    SCRIPT[:] = [written("anthropic", ["one"]).replace(b'"input_tokens": 11', cached)]
    answer = await ask(anthropic, "m", "hello")
    await anthropic.close()
    assert answer.finish == Finish("stop", 1111, 0)


async def test_an_answer_of_very_many_pieces_is_read_to_its_end(api: str, providers: Providers) -> None:
    """aiohttp's reader stops at 16,000 chunks that nobody counted, and at a burst of more than it holds."""
    words = [f"{n} " for n in range(20_000)]
    stream = written(api, words)
    SCRIPT[:] = [stream[at : at + 2] for at in range(0, 60_000, 2)] + [stream[60_000:]]
    assert (await ask(providers, "m", "hello", Limits(10**6))).text == "".join(words)


@mode("empty")
async def write_no_body(reply: Reply) -> None:
    await reply.raw(b"HTTP/1.1 204 Nothing\r\nconnection: close\r\n\r\n")


async def test_an_answer_without_a_body_broke_off(providers: Providers) -> None:
    answer = await ask(providers, "m", "hello [[mode:empty]]")
    assert answer.error is not None
    assert (answer.code, answer.error.retryable) == ("provider_truncated", True)


@pytest.mark.parametrize("compressed", [False, True])
async def test_the_connection_of_a_whole_answer_is_used_again(compressed: bool) -> None:
    """The body ends a moment after [DONE], in more than one piece."""
    connections, squeeze = 0, zlib.compressobj(wbits=31 if compressed else -15)
    stream = written("openai", ["one"])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]))
                whole, coding = squeeze.copy(), b"content-encoding: gzip\r\n" if compressed else b""
                data, parts = stream, [b": good\n\n", b": bye\n\n"]
                if compressed:
                    data, *parts = [whole.compress(each) + whole.flush(zlib.Z_SYNC_FLUSH) for each in (data, *parts)]
                    parts.append(whole.flush())
                writer.write(b"HTTP/1.1 200 OK\r\n%btransfer-encoding: chunked\r\n\r\n" % coding)
                for piece in (data, *parts):
                    writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                    await writer.drain()
                    await asyncio.sleep(0.02)
                writer.write(b"0\r\n\r\n")

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        opened = Providers(Settings(models=(model("openai", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"),)), {"VENDOR_KEY": KEY})
        for _ in range(3):
            assert (await ask(opened, "m", "hello")).text == "one"
        await opened.close()
    assert connections == 1


@pytest.mark.parametrize("direct", [True, False], ids=["aiohttp's reader", "the SDK's iterators"])
async def test_both_roads_from_the_socket_end_alike(
    direct: bool, api: str, vendors: Vendors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An SDK may get another transport; with the one it has, a plain answer is read below its iterators."""
    roads: list[Any] = []

    def road(response: Any) -> Any:
        roads.append(find(response))
        return roads[-1] if direct else None

    find = body.plain_reader
    monkeypatch.setattr(body, "plain_reader", road)
    opened = Providers(Settings(models=(model(api, vendors.url),)), {"VENDOR_KEY": KEY})
    whole, broken = written(api, ["€ ", "😀"]), written(api, ["one "], whole=False)
    for script, expected in ([whole], ("€ 😀", None)), ([broken], ("one ", "provider_truncated")):
        SCRIPT[:] = script
        answer = await ask(opened, "m", "hello")
        assert (answer.text, answer.code) == expected
    SCRIPT[:] = [whole]
    assert (await ask(opened, "m", "hello [[mode:gzipped]]")).text == "€ 😀"
    await opened.close()
    assert [road is None for road in roads] == [False, False, True]
