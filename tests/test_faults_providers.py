"""Vendors that misbehave, end to end: what is stored, what every reader is told, what the vendor was asked."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CLOSED, STORES, store
from tests.harness.api import call, guest, messages, new_session, post_turn, stop
from tests.harness.chaos import KEY, models
from tests.harness.checker import check, gather
from tests.harness.client import SocketReader, SSEReader
from tests.harness.journal import Journal
from tests.harness.service import Service
from tests.vendors import CANARY, HUGE, Call, Vendors

APIS = ("openai", "anthropic")
MODEL = {"openai": "alpha", "anthropic": "beta"}
CUT = "provider_truncated"
GARBLED = "provider_protocol"
AWAY = "provider_unavailable"

# mode → status, failure_reason, tokens kept, calls. Those that fail after five tokens keep them and are never retried.
ENDS: dict[str, tuple[str, str | None, int, int]] = {
    "ok": ("success", None, 20, 1),
    "no-usage": ("success", None, 20, 1),
    "length": ("success", None, 20, 1),
    "reasoning": ("success", None, 20, 1),
    "429": ("failed", "provider_rate_limited", 0, 2),
    "429-retry-date": ("failed", "provider_rate_limited", 0, 1),
    "quota": ("failed", AWAY, 0, 1),
    "400": ("failed", "provider_refused", 0, 1),
    "401": ("failed", AWAY, 0, 1),
    "404": ("failed", AWAY, 0, 1),
    "500": ("failed", AWAY, 0, 2),
    "503": ("failed", AWAY, 0, 2),
    "529": ("failed", AWAY, 0, 2),
    "no-header": ("failed", "provider_timeout", 0, 1),
    "stall": ("failed", "provider_timeout", 5, 1),
    "ping-stall": ("failed", "provider_timeout", 5, 1),
    "rst": ("failed", CUT, 5, 1),
    "rst-first": ("failed", AWAY, 0, 2),
    "cut": ("failed", CUT, 5, 1),
    "clean-eof": ("failed", CUT, 5, 1),
    "empty200": ("failed", CUT, 0, 2),
    "garbage": ("failed", GARBLED, 5, 1),
    "non-utf8": ("failed", GARBLED, 5, 1),
    "huge": ("failed", GARBLED, 5, 1),
    "odd-types": ("failed", GARBLED, 5, 1),
    "odd-finish": ("failed", GARBLED, 5, 1),
    "refuse": ("failed", "provider_refused", 5, 1),
    "error-event": ("failed", AWAY, 5, 1),
}


@pytest.fixture(scope="module")
def vendors() -> Iterator[Vendors]:
    with Vendors() as running:
        yield running


@pytest.fixture(scope="module", params=STORES)
def talking(
    request: pytest.FixtureRequest, vendors: Vendors, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """A service whose models are the vendors; neither their words nor its key may turn up in its log."""
    environment = CLOSED | store(request.param, request, tmp_path_factory.mktemp("talking"))
    alpha, beta = models(vendors)
    failing = [alpha | {"id": f"fake-{mode}", "model_code": f"fake-{mode}"} for mode in SIDES]
    offered = json.dumps([alpha, beta, *failing])
    environment |= {"PARLEY_MODELS": offered, "VENDOR_KEY": KEY, "PARLEY_PACE": "0.01"}
    with Service(environment, workers=1 if request.param == "sqlite" else 2) as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-6000:]
    assert "sk-CANARY" not in log


class Talk:
    """A session with two readers on different workers, and everything about its turns that can be compared."""

    def __init__(self, service: Service, vendors: Vendors) -> None:
        self.service, self.vendors, self.journal = service, vendors, Journal()
        self.token = self.session = self.prompt = ""
        self.readers: list[SocketReader | SSEReader] = []

    async def open(self, **wish: Any) -> Talk:
        self.token = (await guest(self.service.url)).access
        self.session = (await new_session(self.service.url, self.token, **wish))["id"]
        for n, base in enumerate([self.service.urls[0], self.service.urls[-1]]):
            self.readers.append(
                await SocketReader(self.journal, f"r{n}", base, self.session, token=self.token).start()
            )
        return self

    async def ask(self, directive: str) -> list[dict[str, Any]]:
        """Say it, wait until both readers have heard its end, and return the stored replies."""
        await self.say(directive)
        await self.ended()
        return await self.replies()

    async def say(self, directive: str) -> None:
        self.prompt = f"[[{directive}]] of session {self.session}"
        await self.readers[0].say(self.prompt)  # type: ignore[union-attr]

    async def ended(self) -> None:
        await asyncio.gather(*[reader.turn_ended() for reader in self.readers])

    async def replies(self) -> list[dict[str, Any]]:
        rows = await messages(self.service.url, self.token, self.session)
        return [row for row in rows if row["role"] == "assistant"]

    def calls(self) -> list[Call]:
        return [call for call in self.vendors.calls if call.prompt == self.prompt]

    async def check(self) -> None:
        url = str(self.service.processes[0].env["DATABASE_URL"])  # type: ignore[index]
        evidence = await gather(
            self.journal, self.readers, None, calls=self.calls(), logs=self.service.log(), canaries=[CANARY, KEY]
        )
        assert url
        check(evidence)

    async def close(self) -> None:
        for reader in self.readers:
            await reader.leave()


@pytest.fixture
async def talk(talking: Service, vendors: Vendors) -> AsyncIterator[Talk]:
    started = Talk(talking, vendors)
    yield started
    await started.close()


@pytest.mark.parametrize("mode", ENDS)
@pytest.mark.parametrize("api", APIS)
async def test_every_way_a_vendor_can_end(talk: Talk, api: str, mode: str) -> None:
    """Status and reason as stored and as told, the text so far, one retry at most and only before the first token."""
    status, reason, tokens, calls = ENDS[mode]
    await talk.open(model_a_id=MODEL[api])
    started = time.monotonic()
    [reply] = await talk.ask(f"mode:{mode} id:m")
    expected = "".join(f"⟨m:{n}⟩ " for n in range(tokens))
    assert (reply["status"], reply["failure_reason"], reply["content"]) == (status, reason, expected)
    for reader in talk.readers:
        [told] = talk.journal.events(reader.name, "message_complete")
        assert (told["status"], told["failure_reason"], told["message"]["content"]) == (status, reason, expected)
        assert reader.view.texts() == [expected]
    assert len(talk.calls()) == calls
    assert time.monotonic() - started < 4
    await talk.check()


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("mode", ["html200", "json200"])
async def test_a_good_status_without_a_stream_is_no_answer(talk: Talk, api: str, mode: str) -> None:
    """A page or an error with status 200: failed, without a word of it."""
    await talk.open(model_a_id=MODEL[api])
    [reply] = await talk.ask(f"mode:{mode}")
    assert (reply["status"], reply["content"]) == ("failed", "")
    assert reply["failure_reason"] in {CUT, GARBLED, AWAY}
    assert len(talk.calls()) <= 2
    await talk.check()


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("mode", ["429", "429-retry-after", "500", "529", "rst-first", "empty200"])
async def test_one_retry_before_the_first_token_may_save_the_answer(talk: Talk, api: str, mode: str) -> None:
    """It misbehaves once: the second call answers, and readers see nothing of the first."""
    await talk.open(model_a_id=MODEL[api])
    started = time.monotonic()
    [reply] = await talk.ask(f"mode:{mode} times:1 id:m")
    assert (reply["status"], reply["content"]) == ("success", "".join(f"⟨m:{n}⟩ " for n in range(20)))
    assert len(talk.calls()) == 2
    assert (time.monotonic() - started >= 2) == (mode == "429-retry-after")
    await talk.check()


@pytest.mark.parametrize("api", APIS)
async def test_no_second_call_after_the_first_token(talk: Talk, api: str) -> None:
    """The vendor would answer well if asked again; it is not."""
    await talk.open(model_a_id=MODEL[api])
    [reply] = await talk.ask("mode:rst times:1 after:1 id:m")
    assert (reply["status"], reply["failure_reason"], reply["content"]) == ("failed", CUT, "⟨m:0⟩ ")
    assert len(talk.calls()) == 1


@pytest.mark.parametrize("api", APIS)
async def test_thinking_is_not_said(talk: Talk, api: str) -> None:
    """No frame and no row has a word of the model's reasoning."""
    await talk.open(model_a_id=MODEL[api])
    [reply] = await talk.ask("mode:reasoning id:m")
    seen = [reply["content"], *(str(entry.data) for entry in talk.journal.of(None, "event"))]
    assert not [text for text in seen if re.search(r"thinking \d", text)]


@pytest.mark.parametrize("api", APIS)
async def test_one_huge_event_reaches_nobody(talk: Talk, api: str) -> None:
    """Five million characters in one event: refused whole, and the worker's memory is given back."""
    await talk.open(model_a_id=MODEL[api])
    [reply] = await talk.ask("mode:huge id:m")
    assert len(reply["content"]) < 100
    assert max(len(str(entry.data)) for entry in talk.journal.entries) < HUGE / 100


@pytest.mark.parametrize("api", APIS)
async def test_stop_hangs_up_on_the_vendor(talk: Talk, api: str) -> None:
    """Asked of the worker that does not have the turn: stored `stopped`, the connection closed within a second."""
    await talk.open(model_a_id=MODEL[api])
    await talk.say("mode:ok tokens:2000 pace:0.01 id:m")
    await talk.readers[0].tokens(5)
    asked = time.monotonic()
    assert await stop(talk.service.urls[-1], talk.token, talk.session)
    [made] = talk.calls()
    await asyncio.to_thread(talk.vendors.wait, lambda call: call is made and call.hung_up)
    assert made.hung_up is not None and made.hung_up - asked < 1
    await talk.ended()
    [reply] = await talk.replies()
    assert (reply["status"], reply["failure_reason"]) == ("stopped", None)
    assert reply["content"] and "".join(made.sent).startswith(reply["content"])
    await talk.check()


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("mode", ["no-header", "stall"])
async def test_stop_hangs_up_on_a_silent_vendor(talk: Talk, api: str, mode: str) -> None:
    """Before its headers and in the middle of its answer."""
    await talk.open(model_a_id=MODEL[api])
    await talk.say(f"mode:{mode} id:m")
    made = await asyncio.to_thread(talk.vendors.wait, lambda call: call.prompt == talk.prompt)
    if mode == "stall":
        await talk.readers[0].until(lambda: "⟨m:4⟩" in "".join(talk.readers[0].view.texts()), what="the fifth token")
    asked = time.monotonic()
    assert await stop(talk.service.url, talk.token, talk.session)
    await asyncio.to_thread(talk.vendors.wait, lambda call: call is made and call.hung_up)
    assert made.hung_up is not None and made.hung_up - asked < 0.8  # its own clock would take a whole second
    await talk.ended()
    assert [row["status"] for row in await talk.replies()] == ["stopped"]


@pytest.mark.parametrize("api", APIS)
async def test_leaving_does_not_hang_up(talk: Talk, api: str) -> None:
    """All readers go at the fifth token: the vendor says all it has, and all of it is stored."""
    await talk.open(model_a_id=MODEL[api])
    await talk.say("mode:ok tokens:100 pace:0.01 id:m")
    await talk.readers[0].tokens(5)
    await talk.close()
    [made] = talk.calls()
    await asyncio.to_thread(talk.vendors.wait, lambda call: call is made and (call.ended or call.hung_up))
    assert made.hung_up is None
    async with SocketReader(talk.journal, "later", talk.service.urls[-1], talk.session, token=talk.token) as later:
        whole = "".join(f"⟨m:{n}⟩ " for n in range(100))
        await later.until(lambda: [m.status for m in later.view.messages.values()] == ["success"] * 2, what="the end")
        assert later.view.texts() == [whole]


@pytest.mark.parametrize("api", APIS)
async def test_the_history_is_what_was_said(talk: Talk, api: str) -> None:
    """The second call carries the first turn's text, cut as it was; a reply that said nothing is left out."""
    await talk.open(model_a_id=MODEL[api])
    await talk.ask("mode:stall id:one")
    first = talk.prompt
    await talk.say("mode:ok id:two")
    await asyncio.gather(*[reader.turn_ended(2) for reader in talk.readers])
    [second] = talk.calls()
    said = [(line["role"], line["content"]) for line in second.body["messages"]]
    assert ("user", first) in said and said[-1] == ("user", talk.prompt)
    assert second.key == KEY and second.body["max_tokens"] == 2048


SIDES = ["rst", "stall", "no-header", "500", "garbage", "clean-eof"]  # how one side fails; the other has much to say


async def one_side_fails(talk: Talk, mode: str) -> None:
    """Both sides end, each with its own status, on both readers; the vote may be cast."""
    many = 100 if mode in ("stall", "no-header") else 50  # more than the other side's clock or its retry takes
    try:
        replies = await talk.ask(f"tokens:{many} pace:0.015 id:m")
        by_status = {row["status"]: row for row in replies}
        assert set(by_status) == {"success", "failed"}, talk.journal.story()
        assert by_status["success"]["content"] == "".join(f"⟨m:{n}⟩ " for n in range(many))
        assert by_status["failed"]["failure_reason"] in {CUT, GARBLED, AWAY, "provider_timeout"}
        for reader in talk.readers:
            assert [m.terminals for m in reader.view.messages.values() if m.role == "assistant"] == [1, 1]
        await talk.check()
        vote = {"session_id": talk.session, "message_id": replies[0]["id"], "feedback_type": "preference"}
        answer = await call(talk.service.url, "POST", "/api/feedback/", talk.token, json=vote | {"preference": "tie"})
        assert answer.status_code in (201, 409), answer.text
    finally:
        await talk.close()


@pytest.mark.parametrize("mode", SIDES)
async def test_one_side_of_a_comparison_fails_and_the_other_goes_on(talk: Talk, mode: str) -> None:
    """The model misbehaves by its name."""
    await talk.open(mode="compare", model_a_id=f"fake-{mode}", model_b_id="beta")
    await one_side_fails(talk, mode)


@pytest.mark.parametrize(("mode", "kind"), [("rst", "sqlite"), ("stall", "postgres+redis"), ("500", "sqlite")])
async def test_one_side_of_a_blind_battle_fails_and_the_other_goes_on(
    vendors: Vendors, request: pytest.FixtureRequest, mode: str, kind: str, tmp_path: Path
) -> None:
    """On a service that has these two models alone, of one API: to import another SDK takes a second. The survivor
    does not wait for the one that stalled."""
    model = models(vendors)[0]
    offered = [model | {"model_code": f"fake-{mode}"}, model | {"id": "other"}]
    environment = CLOSED | store(kind, request, tmp_path)
    environment |= {"PARLEY_MODELS": json.dumps(offered), "VENDOR_KEY": KEY, "PARLEY_PACE": "0.01"}
    async with Service(environment) as service:
        talk = Talk(service, vendors)
        await talk.open(mode="random")
        await one_side_fails(talk, mode)


async def test_the_same_answer_in_every_dialect(talking: Service, vendors: Vendors) -> None:
    """A failed reply is told as such in each format of the answer to a POST."""
    token = (await guest(talking.url)).access
    for accept in ("sse", "ndjson", "lines", "text"):
        session = (await new_session(talking.url, token, model_a_id="alpha"))["id"]
        answer = await post_turn(talking.url, token, session, f"[[mode:rst id:m]] {accept}", accept=accept)
        assert answer.ended and "⟨m:4⟩" in f"{answer.sides()}{answer.text}"
        told = json.dumps(answer.events, ensure_ascii=False) + answer.text
        assert "provider_truncated" in told or "broke off" in told, (accept, told)
        assert CANARY not in told
