"""What comes out of a provider, whatever a vendor does: text, one finish or one of our errors, and nothing of theirs.

The vendors are `vendors.py` over real TCP: the same table is asked of both SDKs.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import socket
import subprocess
import sys
import time
import traceback
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from chat.errors import REPLY_SENTENCES
from chat.providers import (
    ChatMessage,
    Finish,
    Limits,
    ProviderError,
    Providers,
    demo,
)
from chat.providers.failures import redacted, retry_after, status_of, translated
from chat.providers.upstream import Clock
from chat.settings import Model, Settings
from tests.vendors import CANARY, MODES, Call, Vendors

ROOT = Path(__file__).resolve().parent.parent
APIS = {"openai": "openai_chat", "anthropic": "anthropic_messages"}
KEY = "the-owners-own-key-0123456789"
PATIENT = Limits(max_tokens=1000)
HASTY = Limits(max_tokens=1000, first_token_timeout=0.6)
IMPATIENT = Limits(max_tokens=1000, idle_timeout=0.4)
SILENT = {"no-header": HASTY, "stall": IMPATIENT, "ping-stall": IMPATIENT}  # others have time: a machine may be busy


def adapter_of(api: str) -> Any:
    """The module that speaks this API. Imported late: each SDK would cost every test process a second or two."""
    return importlib.import_module(f"chat.providers.{APIS[api]}")


@dataclass
class Answer:
    """What one question got."""

    deltas: list[str] = field(default_factory=list)
    thoughts: list[int] = field(default_factory=list)
    finish: Finish | None = None
    error: ProviderError | None = None
    seconds: float = 0

    @property
    def text(self) -> str:
        return "".join(self.deltas)

    @property
    def code(self) -> str | None:
        return self.error.code if self.error else None


async def ask(providers: Providers, model: str | Model, text: str, limits: Limits = PATIENT) -> Answer:
    answer, began = Answer(), time.monotonic()
    try:
        asked = [ChatMessage("user", text)]
        answer.finish = await providers.answer(model, asked, limits, answer.deltas.append, answer.thoughts.append)
    except ProviderError as error:
        answer.error = error
    answer.seconds = time.monotonic() - began
    return answer


def fakes(api: str, url: str) -> tuple[Model, ...]:
    base = f"{url}/v1" if api == "openai" else url
    return tuple(
        Model(id=mode, provider=APIS[api], model_code=f"fake-{mode}", base_url=base, api_key_env="VENDOR_KEY")
        for mode in MODES
    )


@pytest.fixture(scope="module")
def vendors() -> Iterator[Vendors]:
    with Vendors() as running:
        yield running


@pytest.fixture(params=APIS)
def api(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest_asyncio.fixture
async def providers(api: str, vendors: Vendors) -> AsyncIterator[Providers]:
    vendors.reset()
    opened = Providers(Settings(models=fakes(api, vendors.url)), {"VENDOR_KEY": KEY})
    yield opened
    await opened.close()


# --- good answers


async def test_an_answer_is_the_vendors_tokens_in_order_then_a_finish(providers: Providers, vendors: Vendors) -> None:
    answer = await ask(providers, "ok", "hello [[tokens:50 id:m]]")
    assert answer.text == "".join(vendors.calls[0].sent) == "".join(f"⟨m:{n}⟩ " for n in range(50))
    assert answer.finish == Finish("stop", 11, 50)


async def test_a_vendor_that_does_not_count_tokens_finishes_all_the_same(providers: Providers) -> None:
    answer = await ask(providers, "no-usage", "hello")
    assert answer.finish is not None
    assert answer.finish.reason == "stop"
    assert answer.finish.output_tokens is None


async def test_an_answer_at_its_limit_says_so(providers: Providers) -> None:
    answer = await ask(providers, "length", "hello")
    assert answer.finish == Finish("length", 11, 20)


async def test_thinking_aloud_is_not_part_of_the_answer(providers: Providers, vendors: Vendors) -> None:
    answer = await ask(providers, "reasoning", "hello")
    assert answer.text == "".join(vendors.calls[0].sent)


async def test_thinking_aloud_keeps_the_clock_from_running_out(providers: Providers) -> None:
    limits = Limits(max_tokens=100, first_token_timeout=0.8, idle_timeout=0.8)
    answer = await ask(providers, "reasoning", "hello [[pace:0.2 tokens:1]]", limits)
    assert answer.error is None
    assert answer.seconds > 0.9  # five thoughts, longer than either clock


async def test_two_answers_at_once_do_not_mix(providers: Providers) -> None:
    answers = await asyncio.gather(*(ask(providers, "ok", f"[[id:m{n} tokens:40 pace:0.002]]") for n in range(10)))
    for n, answer in enumerate(answers):
        assert answer.text == "".join(f"⟨m{n}:{i}⟩ " for i in range(40))


async def test_a_whole_answer_that_lingers_is_whole(providers: Providers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finish reason came, the end of the stream does not: the reader has everything, nobody waits for the idle."""
    monkeypatch.setattr("chat.providers.upstream.AFTERMATH", 0.1)
    answer = await ask(providers, "finish-stall", "hello")
    assert answer.finish is not None
    assert answer.seconds < 5


# --- bad answers: the table of what vendors do


@dataclass(frozen=True)
class Row:
    """A mode of the vendor, what becomes of it, and how many tokens come first."""

    mode: str
    code: str
    retryable: bool
    tokens: int = 0

    @property
    def limits(self) -> Limits:
        return SILENT.get(self.mode, PATIENT)


TABLE = [
    Row("429", "provider_rate_limited", True),
    Row("429-retry-after", "provider_rate_limited", True),
    Row("quota", "provider_unavailable", False),
    Row("400", "provider_refused", False),
    Row("413", "provider_refused", False),
    Row("401", "provider_unavailable", False),
    Row("403", "provider_unavailable", False),
    Row("404", "provider_unavailable", False),
    Row("500", "provider_unavailable", True),
    Row("503", "provider_unavailable", True),
    Row("529", "provider_unavailable", True),
    Row("redirects", "provider_unavailable", True),
    Row("no-header", "provider_timeout", False),
    Row("stall", "provider_timeout", False, 5),
    Row("ping-stall", "provider_timeout", False, 5),
    Row("rst-first", "provider_unavailable", True),
    Row("rst", "provider_truncated", True, 5),
    Row("cut", "provider_truncated", True, 5),
    Row("clean-eof", "provider_truncated", True, 5),
    Row("html200", "provider_truncated", True),
    Row("json200", "provider_truncated", True),
    Row("empty200", "provider_truncated", True),
    Row("garbage", "provider_protocol", False, 5),
    Row("non-utf8", "provider_protocol", False, 5),
    Row("odd-types", "provider_protocol", False, 5),
    Row("odd-finish", "provider_protocol", False, 5),
    Row("huge", "provider_protocol", False, 5),
    Row("error-event", "provider_unavailable", True, 5),
    Row("refuse", "provider_refused", False, 5),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.mode)
async def test_a_bad_answer_ends_in_our_error_after_the_text_it_had(row: Row, providers: Providers) -> None:
    answer = await ask(providers, row.mode, f"hello {row.mode} [[id:m]]", row.limits)
    assert answer.deltas == [f"⟨m:{n}⟩ " for n in range(row.tokens)]
    assert answer.finish is None
    assert answer.error is not None
    assert (answer.error.code, answer.error.retryable) == (row.code, row.retryable)


@pytest.mark.parametrize("mode", ["429", "429-retry-after", "500", "529", "no-header", "rst-first"])
async def test_a_bad_answer_is_asked_for_once(mode: str, providers: Providers, vendors: Vendors) -> None:
    """Retries bill again, so the SDKs make none of their own."""
    await ask(providers, mode, "just once", SILENT.get(mode, PATIENT))
    assert vendors.count("just once") == 1


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.mode)
async def test_a_vendors_words_stay_out_of_the_error_and_its_keys_out_of_the_log(
    row: Row, providers: Providers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    answer = await ask(providers, row.mode, f"where is {KEY}", row.limits)
    assert answer.error is not None
    assert str(answer.error) == f"{row.code}: {REPLY_SENTENCES[row.code]}"
    assert "CANARY" not in "".join(traceback.format_exception(answer.error))
    assert answer.error.__context__ is None
    logged = "\n".join([caplog.text, *(repr(record.__dict__) for record in caplog.records)])
    assert CANARY not in logged
    assert KEY not in logged


@pytest.mark.parametrize("mode", ["429", "rst", "clean-eof", "refuse", "odd-finish", "garbage", "error-event"])
async def test_a_bad_end_leaves_one_line_for_the_operator(
    mode: str, providers: Providers, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await ask(providers, mode, "hello")
    assert [(record.name, record.levelname) for record in caplog.records] == [("chat.providers.upstream", "WARNING")]
    assert f"model {mode}: {answer.code}" in caplog.text


@pytest.mark.parametrize("mode", ["401", "403", "404", "quota"])
async def test_what_only_the_operator_can_mend_is_logged_as_an_error(
    mode: str, providers: Providers, caplog: pytest.LogCaptureFixture
) -> None:
    await ask(providers, mode, "hello")
    assert [record.levelname for record in caplog.records] == ["ERROR"]


async def test_silence_before_the_first_token_ends_at_its_limit(providers: Providers) -> None:
    answer = await ask(providers, "no-header", "hello", HASTY)
    assert 0.5 < answer.seconds < 3


@pytest.mark.parametrize("mode", ["stall", "ping-stall"])
async def test_silence_between_tokens_ends_at_its_limit(mode: str, providers: Providers) -> None:
    """Pings are no tokens: a vendor cannot keep a reader waiting by saying that it is there."""
    answer = await ask(providers, mode, "hello", IMPATIENT)
    assert answer.code == "provider_timeout"
    assert 0.3 < answer.seconds < 3


async def test_pings_do_not_stretch_the_wait_for_the_first_token(providers: Providers) -> None:
    answer = await ask(providers, "ping-stall", "hello [[after:0]]", HASTY)
    assert answer.code == "provider_timeout"
    assert answer.seconds < 3


async def test_nobody_listening_there_is_unavailable(api: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        nowhere = Providers(Settings(models=fakes(api, url)), {"VENDOR_KEY": KEY})
        answer = await ask(nowhere, "ok", "hello")
        await nowhere.close()
    assert answer.error is not None
    assert (answer.error.code, answer.error.retryable) == ("provider_unavailable", True)


async def test_a_vendor_that_recovers_answers_the_second_call(providers: Providers) -> None:
    prompt = "again [[mode:500 times:1]]"
    assert (await ask(providers, "ok", prompt)).code == "provider_unavailable"
    assert (await ask(providers, "ok", prompt)).finish is not None


# --- what an operator can act on


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("401", "the key in VENDOR_KEY was not accepted"),
        ("403", "the key in VENDOR_KEY was not accepted"),
        ("404", "there is no model 'fake-404': look at `model_code` and `base_url`"),
        ("quota", "the account of the key in VENDOR_KEY has no credit or quota left"),
        ("no-header", "there was no answer in time: look at the network, `first_token_timeout`"),
        ("rst-first", "the connection failed: look at `base_url`"),
    ],
)
async def test_the_log_names_the_setting_to_look_at(
    mode: str, words: str, providers: Providers, vendors: Vendors, caplog: pytest.LogCaptureFixture
) -> None:
    await ask(providers, mode, "hello", SILENT.get(mode, PATIENT))
    [line] = [record.getMessage() for record in caplog.records]
    assert words in line
    assert vendors.url in line


async def test_a_dead_host_is_logged_with_its_address_and_cause(api: str, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        nowhere = Providers(Settings(models=fakes(api, url)), {"VENDOR_KEY": KEY})
        await ask(nowhere, "ok", "hello")
        await nowhere.close()
    [line] = [record.getMessage() for record in caplog.records]
    assert f"at {url}" in line
    assert "ConnectionRefusedError" in line


async def test_a_password_in_an_address_is_not_logged(api: str, caplog: pytest.LogCaptureFixture) -> None:
    hidden = Providers(Settings(models=fakes(api, "http://user:pa@ss@127.0.0.1:9")), {"VENDOR_KEY": KEY})
    assert (await ask(hidden, "ok", "hello")).error is not None
    await hidden.close()
    assert "http://127.0.0.1:9" in caplog.text
    assert "pa@ss" not in caplog.text and "pa%40ss" not in caplog.text


async def test_a_host_without_a_name_is_logged_with_its_cause(api: str, caplog: pytest.LogCaptureFixture) -> None:
    nowhere = Providers(Settings(models=fakes(api, "http://no-such-host.invalid")), {"VENDOR_KEY": KEY})
    assert (await ask(nowhere, "ok", "hello")).code == "provider_unavailable"
    await nowhere.close()
    [line] = [record.getMessage() for record in caplog.records]
    assert "no-such-host.invalid" in line
    assert "gaierror" in line or "DNSError" in line


async def test_an_address_that_is_none_fails_its_own_model_alone(api: str, vendors: Vendors) -> None:
    good = fakes(api, vendors.url)[0]
    bad = Model(id="bad", provider=APIS[api], base_url="http://[bad")
    opened = Providers(Settings(models=(bad, good)), {"VENDOR_KEY": KEY})
    await opened.load()
    assert opened.ready
    assert (await ask(opened, "bad", "hello")).error is not None
    assert (await ask(opened, good, "hello")).finish is not None
    await opened.close()


# --- reading a refusal


async def test_the_wait_a_vendor_asks_for_is_passed_on(providers: Providers) -> None:
    answer = await ask(providers, "429-retry-after", "hello")
    assert answer.error is not None
    assert answer.error.retry_after == 2.0


async def test_the_wait_may_be_a_date(providers: Providers) -> None:
    answer = await ask(providers, "429-retry-date", "hello")
    assert answer.error is not None
    assert answer.error.retry_after is not None
    assert answer.error.retry_after > 1e9


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1.5", 1.5),
        ("-3", 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("inf", None),
        ("nan", None),
        ("soon", None),
        ("", None),
        ("Wed, 21 Oct 99999999999999999999 07:28:00 GMT", None),
    ],
)
def test_a_wait_is_seconds_from_now_or_nothing(text: str, seconds: float | None) -> None:
    assert retry_after(refusal(response=SimpleNamespace(headers={"retry-after": text}))) == seconds


@given(st.text(max_size=40))
def test_no_header_makes_reading_it_fail(text: str) -> None:
    retry_after(refusal(response=SimpleNamespace(headers={"retry-after": text})))


class APIError(Exception):
    """Named like the SDKs' own, which is how they are told apart."""


def refusal(**attributes: object) -> Exception:
    error = APIError("no")
    error.__dict__.update(attributes)
    return error


@pytest.mark.parametrize(
    ("attributes", "status"),
    [
        ({"status_code": 418}, 418),
        ({"status_code": 429, "code": "insufficient_quota"}, 402),
        ({"status_code": 200, "type": "overloaded_error"}, 500),
        ({"status_code": 200, "type": "rate_limit_error"}, 429),
        ({"code": "502"}, 500),
        ({"code": 429}, 429),
        ({"type": "invalid_request_error"}, 400),
        ({"type": {"no": "text"}}, 500),
        ({}, 500),
    ],
)
def test_an_error_inside_a_stream_stands_for_a_status(attributes: Mapping[str, object], status: int) -> None:
    assert status_of(refusal(**attributes)) == status


def test_an_error_of_the_older_httpx_is_read_like_the_newer_ones() -> None:
    httpx = pytest.importorskip("httpx")
    assert translated(httpx.ReadTimeout("slow"), True).code == "provider_timeout"
    assert translated(httpx.RemoteProtocolError("cut"), True).code == "provider_truncated"
    assert translated(httpx.ConnectError("refused"), False).code == "provider_unavailable"


@pytest.mark.parametrize(
    "words",
    [
        f"Incorrect API key provided: {CANARY}.",
        f"header 'authorization: Bearer {CANARY[3:]}'",
        f"Illegal header value b'Bearer {KEY}'",
        f"unknown key {KEY}!",
        f"{'x' * 480} {CANARY}",
    ],
)
def test_the_log_never_has_a_key(words: str) -> None:
    logged = redacted(words, KEY)
    assert "CANARY" not in logged
    assert "owners" not in logged


# --- hanging up


async def said(vendors: Vendors, id: str) -> Call:
    """Wait until the vendor is in the middle of its answer."""
    return await asyncio.to_thread(vendors.wait, lambda call: call.id == id)


async def hung_up(vendors: Vendors, id: str) -> float:
    call = await asyncio.to_thread(vendors.wait, lambda call: call.id == id and call.hung_up)
    assert call.hung_up is not None
    return call.hung_up


ENDLESS = "[[id:{id} tokens:100000 pace:0.01]]"


async def test_who_refuses_a_text_ends_the_answer(
    providers: Providers, vendors: Vendors, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is the caller's, as it is; the vendor is hung up on and not blamed."""
    heard: list[str] = []

    def say(text: str) -> None:
        heard.append(text)
        if len(heard) == 3:
            raise LookupError("no room left")

    with pytest.raises(LookupError, match="no room left"):
        await providers.answer("ok", [ChatMessage("user", ENDLESS.format(id="r"))], PATIENT, say, print)
    left = time.monotonic()
    assert await hung_up(vendors, "r") - left < 1
    assert len(heard) == 3
    assert "model ok" not in caplog.text


async def test_nothing_is_said_after_a_stop(providers: Providers, vendors: Vendors) -> None:
    """The tokens that the socket holds at the stop come in the same pass of the loop as the cancellation."""
    answer: list[str] = []
    asked = [ChatMessage("user", ENDLESS.format(id="n"))]
    reader = asyncio.create_task(providers.answer("ok", asked, PATIENT, answer.append, print))
    await said(vendors, "n")
    while len(answer) < 5:
        await asyncio.sleep(0)
    time.sleep(0.1)  # noqa: ASYNC251  the loop stands still while tokens arrive
    await asyncio.sleep(0)  # this pass of the loop has found them, and reads them after what follows
    reader.cancel()
    told = len(answer)
    await asyncio.wait({reader})
    assert reader.cancelled() and len(answer) == told


@pytest.mark.parametrize("mode", ["ok", "stall", "no-header"])
async def test_cancelling_the_reader_hangs_up_at_once(mode: str, providers: Providers, vendors: Vendors) -> None:
    reader = asyncio.create_task(ask(providers, mode, ENDLESS.format(id="t")))
    await said(vendors, "t")
    left = time.monotonic()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await hung_up(vendors, "t") - left < 1


async def test_a_cancelled_scope_hangs_up_too(providers: Providers, vendors: Vendors) -> None:
    """anyio cancels every await until the scope is left, the one that closes the connection as well."""
    async with anyio.create_task_group() as group:
        group.start_soon(ask, providers, "stall", "[[id:a]]")
        await said(vendors, "a")
        left = time.monotonic()
        group.cancel_scope.cancel()
    assert await hung_up(vendors, "a") - left < 1


async def test_closing_the_providers_hangs_up_on_everyone(providers: Providers, vendors: Vendors) -> None:
    reader = asyncio.create_task(ask(providers, "stall", "[[id:p]]"))
    await said(vendors, "p")
    left = time.monotonic()
    await providers.close()
    assert await hung_up(vendors, "p") - left < 1
    assert (await reader).error is not None
    assert time.monotonic() - left < 1, "the reader was left waiting for its own clock"


async def test_a_token_that_was_read_does_not_prolong_an_ended_clock() -> None:
    """The service ends while a token is read: the next wait would last as long as a vendor may be silent."""
    with pytest.raises(TimeoutError):
        with Clock(60, set()) as clock:
            clock.end()
            clock.start(60)
            await asyncio.sleep(5)


async def test_a_finished_answer_is_not_a_hang_up(providers: Providers, vendors: Vendors) -> None:
    await ask(providers, "ok", "hello")
    call = await asyncio.to_thread(vendors.wait, lambda call: call.ended)
    assert call.hung_up is None


# --- many at once


async def test_a_running_answer_goes_on_while_many_begin(
    api: str, vendors: Vendors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many requests in one pass of the loop would hold up every answer, each for a millisecond."""
    adapter, runs = adapter_of(api), Model(id="runs", provider="demo", pace=0)
    request = adapter.request
    events: list[str] = []

    def begin(*asked: Any) -> dict[str, Any]:
        events.append("a request")
        return request(*asked)

    def say(_: str) -> None:
        events.append("a token")

    monkeypatch.setattr(adapter, "request", begin)
    providers = Providers(Settings(models=(*fakes(api, vendors.url), runs)), {"VENDOR_KEY": KEY})
    await providers.load()
    asked = [ChatMessage("user", "/count 100000")]
    reader = asyncio.create_task(providers.answer("runs", asked, Limits(max_tokens=100_000), say, print))
    answers = await asyncio.gather(*(ask(providers, "ok", "[[tokens:1]]") for _ in range(50)))
    reader.cancel()
    await providers.close()
    assert all(answer.finish for answer in answers)
    assert events.count("a request") == 50
    assert ("a request", "a request") not in pairwise(events)


async def test_neither_a_silent_vendor_nor_a_cancelled_reader_holds_up_the_next(providers: Providers) -> None:
    silent = asyncio.create_task(ask(providers, "no-header", "hello"))
    readers = [asyncio.create_task(ask(providers, "ok", "[[tokens:1]]")) for _ in range(40)]
    for passes, reader in enumerate(readers[::2]):  # at every moment: waiting, its turn, asking
        for _ in range(passes):
            await asyncio.sleep(0)
        reader.cancel()
    answers = await asyncio.gather(*readers[1::2])
    assert all(answer.finish for answer in answers)
    assert not silent.done()
    silent.cancel()


# --- what is asked


def asked(vendors: Vendors) -> dict[str, object]:
    body: dict[str, object] = vendors.calls[-1].body
    return body


async def test_the_limit_is_passed_on(providers: Providers, vendors: Vendors) -> None:
    await ask(providers, "ok", "hello", Limits(max_tokens=77))
    assert asked(vendors)["max_tokens"] == 77


async def test_no_temperature_is_asked_for_unless_given(providers: Providers, vendors: Vendors) -> None:
    """Several models refuse the parameter, even at its default."""
    await ask(providers, "ok", "hello")
    assert "temperature" not in asked(vendors)


async def test_the_key_is_the_one_the_model_names(providers: Providers, vendors: Vendors) -> None:
    await ask(providers, "ok", "hello")
    assert vendors.calls[0].key == KEY


async def test_a_model_without_a_key_is_not_sent_one_that_lies_about(
    api: str, vendors: Vendors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDKs look into the environment by themselves; a neighbour's server must not get the owner's OpenAI key."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    base = f"{vendors.url}/v1" if api == "openai" else vendors.url
    local = Model(id="local", provider=APIS[api], base_url=base)
    opened = Providers(Settings(models=(local,)))
    vendors.reset()
    await ask(opened, "local", "hello")
    await opened.close()
    assert vendors.calls[0].key == "none"


TALK = [
    ChatMessage("system", "You are a pirate."),
    ChatMessage("system", "Be brief."),
    ChatMessage("assistant", "Welcome!"),
    ChatMessage("user", "one"),
    ChatMessage("assistant", ""),
    ChatMessage("user", "two"),
]
REMOTE = Model(id="m", provider="", model_code="code")


def test_openai_is_given_the_conversation_as_it_is() -> None:
    messages = adapter_of("openai").request(REMOTE, TALK, PATIENT)["messages"]
    assert [(message["role"], message["content"]) for message in messages] == [(m.role, m.content) for m in TALK]


def test_openai_is_told_the_temperature() -> None:
    assert adapter_of("openai").request(REMOTE, TALK, Limits(max_tokens=9, temperature=1.7))["temperature"] == 1.7


def test_openai_itself_wants_another_name_for_the_limit_than_those_who_speak_like_it() -> None:
    assert "max_tokens" not in adapter_of("openai").request(REMOTE, TALK, PATIENT)
    assert adapter_of("openai").request(REMOTE, TALK, PATIENT)["max_completion_tokens"] == 1000
    ollama = Model(id="m", provider="", base_url="http://127.0.0.1:11434/v1")
    assert adapter_of("openai").request(ollama, TALK, PATIENT)["max_tokens"] == 1000


def test_anthropic_is_given_what_it_accepts() -> None:
    """The user speaks first, nobody says nothing, the system stands apart, and no temperature (a 400 since 2026)."""
    request = adapter_of("anthropic").request(REMOTE, TALK, Limits(max_tokens=9, temperature=1.7))
    assert request["messages"] == [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    assert request["system"] == "You are a pirate.\n\nBe brief."
    assert "temperature" not in request


# --- the choice


def demo_models(pace: float = 0) -> tuple[Model, ...]:
    return tuple(Model(id=who, provider="demo", personality=who, pace=pace) for who in demo.LINES)


def test_a_model_whose_key_is_not_there_is_not_offered() -> None:
    keyed = Model(id="keyed", provider="openai_chat", api_key_env="VENDOR_KEY")
    settings = Settings(models=(*demo_models(), keyed))
    assert list(Providers(settings, {}).models) == ["scholar", "poet"]
    assert list(Providers(settings, {"VENDOR_KEY": " "}).models) == ["scholar", "poet"]
    assert list(Providers(settings, {"VENDOR_KEY": KEY}).models) == ["keyed", "scholar", "poet"]


async def test_a_model_that_is_not_offered_is_unavailable() -> None:
    with pytest.raises(ProviderError, match="provider_unavailable"):
        await Providers(Settings(models=demo_models()), {}).answer("gone", [], PATIENT, print, print)


async def test_a_models_own_limit_caps_what_is_asked_for() -> None:
    short = Model(id="short", provider="demo", pace=0, max_tokens=7)
    answer = await ask(Providers(Settings(models=(short,)), {}), short, "/count 20")
    assert answer.finish == Finish("length", 2, 7)


def test_every_failure_has_a_sentence_for_its_reader() -> None:
    assert {row.code for row in TABLE} <= REPLY_SENTENCES.keys()


LAZY = """
import asyncio
import sys
from chat.providers import Providers
from chat.settings import Model, Settings
from tests.vendors import CANARY, MODES, Call, Vendors
names = sys.argv[1:]
asyncio.run(Providers(Settings(models=tuple(Model(id=name, provider=name) for name in names)), {}).load())
print(*sorted({"openai", "anthropic", "httpx2"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("configured", "imported"),
    [
        (["demo"], ""),
        (["demo", "openai_chat"], "httpx2 openai"),
        (["demo", "anthropic_messages"], "anthropic httpx2"),
    ],
)
def test_an_sdk_is_imported_only_for_a_model_that_needs_it(configured: list[str], imported: str) -> None:
    """Each costs tens of megabytes on the smallest machine there is."""
    python = [sys.executable, "-c", LAZY, *configured]
    assert subprocess.run(python, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == imported


LOADING = """
import asyncio
from chat.providers import ChatMessage, Limits, Providers
from chat.settings import Model, Settings
kinds = {"d": "demo", "a": "openai_chat", "b": "anthropic_messages"}
async def main():
    beats, providers = 0, Providers(Settings(models=tuple(Model(id=i, provider=k) for i, k in kinds.items())), {})
    assert not providers.ready
    loading = asyncio.create_task(providers.load())
    said = []
    await providers.answer("d", [ChatMessage("user", "/count 3")], Limits(max_tokens=9), said.append, print)
    assert len(said) == 3 and not loading.done() and not providers.ready
    while not loading.done():
        await asyncio.sleep(0.005)
        beats += 1
    assert providers.ready and beats > 20, beats
    await providers.close()
asyncio.run(main())
"""


def test_the_sdks_are_imported_beside_the_loop() -> None:
    """A demo model answers meanwhile; ready is said when all can be asked."""
    subprocess.run([sys.executable, "-c", LOADING], cwd=ROOT, check=True)


# --- the demo models


@pytest.fixture(params=demo.LINES)
def who(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def demos() -> Providers:
    return Providers(Settings(models=demo_models()), {})


async def test_a_demo_model_says_the_same_to_the_same_words(who: str, demos: Providers) -> None:
    first, second = [await ask(demos, who, "Tell me about lighthouses") for _ in range(2)]
    assert first.deltas == second.deltas


async def test_a_demo_model_picks_up_what_was_said(who: str, demos: Providers) -> None:
    assert "lighthouses" in (await ask(demos, who, "Tell me about lighthouses")).text


async def test_the_two_demo_models_do_not_sound_alike(demos: Providers) -> None:
    scholar, poet = [await ask(demos, who, "Tell me about lighthouses") for who in ("scholar", "poet")]
    assert len(set(scholar.text.split()) & set(poet.text.split())) < len(set(poet.text.split())) / 2


@pytest.mark.parametrize("markdown", ["\n|---|", "\n```\n", "\n{item} "], ids=["table", "code", "list"])
async def test_a_demo_answer_shows_what_markdown_can_do(markdown: str, who: str, demos: Providers) -> None:
    item = "1." if who == "scholar" else "-"
    assert markdown.format(item=item) in (await ask(demos, who, "Tell me about lighthouses")).text


async def test_saying_hello_names_the_variable_that_adds_a_real_model(who: str, demos: Providers) -> None:
    text = (await ask(demos, who, "Hello there!")).text
    assert "OPENAI_API_KEY" in text
    assert "ANTHROPIC_API_KEY" in text


async def test_help_lists_every_command(demos: Providers) -> None:
    text = (await ask(demos, "poet", "/help")).text
    assert all(f"`{command}" in text for command in demo.COMMANDS)


async def test_count_gives_one_numbered_token_a_delta(who: str, demos: Providers) -> None:
    answer = await ask(demos, who, "/count 200")
    assert [delta.strip() for delta in answer.deltas] == [f"⟨{n}⟩" for n in range(200)]
    assert answer.text.endswith("⟨198⟩ ⟨199⟩")
    assert answer.finish == Finish("stop", 2, 200)


async def test_a_demo_model_stops_at_its_limit(demos: Providers) -> None:
    answer = await ask(demos, "poet", "/long 500", Limits(max_tokens=100))
    assert len(answer.deltas) == 100
    assert answer.finish is not None
    assert answer.finish.reason == "length"


async def test_long_is_as_long_as_asked(demos: Providers) -> None:
    assert len((await ask(demos, "poet", "/long 500")).deltas) == 500


async def test_echo_gives_the_words_back_exactly(demos: Providers) -> None:
    words = " two  spaces,\n\ta tab and a poet  "
    assert (await ask(demos, "scholar", "/echo " + words)).text == words


async def test_fail_breaks_off_with_an_error(demos: Providers) -> None:
    answer = await ask(demos, "poet", "/fail 8")
    assert len(answer.deltas) == 8
    assert answer.code == "provider_unavailable"


async def test_truncate_just_ends(demos: Providers) -> None:
    answer = await ask(demos, "poet", "/truncate 8")
    assert len(answer.deltas) == 8
    assert answer.code == "provider_truncated"


async def test_silence_lasts_as_long_as_the_listener(demos: Providers) -> None:
    answer = await ask(demos, "poet", "/silent", Limits(max_tokens=9, first_token_timeout=0.2))
    assert answer.code == "provider_timeout"
    assert answer.deltas == []


async def test_slow_is_as_slow_as_asked(demos: Providers) -> None:
    answer = await ask(demos, "poet", "/slow 0.05 Tell me about lighthouses", Limits(max_tokens=5))
    assert answer.seconds > 0.2
    assert len(answer.deltas) == 5


async def test_slower_than_the_clock_is_a_timeout(demos: Providers) -> None:
    answer = await ask(demos, "poet", "/slow 60", Limits(max_tokens=5, idle_timeout=0.1))
    assert answer.code == "provider_timeout"
    assert len(answer.deltas) == 1


async def test_rate_is_a_429(demos: Providers) -> None:
    error = (await ask(demos, "poet", "/rate 3")).error
    assert error is not None
    assert (error.code, error.retryable, error.retry_after) == ("provider_rate_limited", True, 3.0)


async def test_a_command_may_be_meant_for_one_of_the_two(demos: Providers) -> None:
    """So that one side of an arena fails while the other goes on."""
    assert (await ask(demos, "poet", "/fail 3 poet")).code == "provider_unavailable"
    assert (await ask(demos, "scholar", "/fail 3 poet")).finish is not None


async def test_a_demo_without_pace_leaves_room_for_others(demos: Providers) -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await ask(demos, "poet", "/count 100")
    task.cancel()
    assert turns > 50


@given(text=st.text(), turn=st.integers(1, 9))
def test_whatever_is_said_has_an_answer_in_whole_tokens(text: str, turn: int) -> None:
    model = Model(id="m", provider="demo", personality="poet")
    said = [ChatMessage("user", text)] * turn
    assert demo.scripted(model, said).tokens is not None
    assert "".join(demo.tokens_of(text)) == text


# --- the fake vendor itself


def test_the_vendor_can_be_asked_from_another_process(api: str) -> None:
    command = [sys.executable, "tests/vendors.py", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        path = "/v1/chat/completions" if api == "openai" else "/v1/messages"
        body = {"model": "fake", "stream": True, "messages": [{"role": "user", "content": "[[id:x tokens:3]]"}]}
        urllib.request.urlopen(url + path, json.dumps(body).encode()).read()
        told = json.load(urllib.request.urlopen(url + "/calls"))
        process.kill()
    assert told["calls"][0]["sent"] == ["⟨x:0⟩ ", "⟨x:1⟩ ", "⟨x:2⟩ "]
    assert told["counts"] == {"[[id:x tokens:3]]": 1}
