"""OpenAI's API as its own client speaks it: completions without memory, under the limits that everyone has."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from chat.formats.completions import Stops
from tests.conftest import CLOSED, store
from tests.harness import minute_with_room, until
from tests.harness.api import call, guest, messages, new_session
from tests.harness.chaos import KEY, models
from tests.harness.service import Service
from tests.vendors import Vendors

if TYPE_CHECKING:
    from openai import AsyncOpenAI  # imported where it is used: it would cost every test process a second

OPERATOR = "operator-key-0123456789"
HELLO = {"role": "user", "content": "/count 30"}
COUNTED = " ".join(f"⟨{n}⟩" for n in range(30))


@pytest.fixture(scope="module")
def vendors() -> Iterator[Vendors]:
    with Vendors() as running:
        yield running


@pytest.fixture(scope="module", params=["sqlite", "postgres+redis"])
def service(
    request: pytest.FixtureRequest, vendors: Vendors, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    demo = {"id": "demo", "provider": "demo", "vendor": "Parley", "personality": "scholar", "pace": 0.001}
    offered = json.dumps([demo | {"system": "Be brief."}, *models(vendors), demo | {"id": "lab/demo"}])
    environment = CLOSED | store(request.param, request, tmp_path_factory.mktemp("service"))
    environment |= {"PARLEY_MODELS": offered, "VENDOR_KEY": KEY, "API_KEYS": OPERATOR, "PARLEY_SSE_PING": "0.3"}
    with Service(environment, workers=1 if request.param == "sqlite" else 2) as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-6000:]


def client_of(service: Service, key: str = OPERATOR, worker: int = -1) -> AsyncOpenAI:
    from openai import AsyncOpenAI

    transport = httpx.AsyncClient(trust_env=False, timeout=30)
    return AsyncOpenAI(base_url=f"{service.urls[worker]}/v1", api_key=key, max_retries=0, http_client=transport)


@pytest.fixture
async def client(service: Service) -> AsyncIterator[AsyncOpenAI]:
    async with client_of(service) as opened:
        yield opened


async def streamed(client: AsyncOpenAI, **wish: Any) -> tuple[str, list[Any]]:
    """The text of a streamed completion, and its chunks."""
    wish = {"model": "demo", "messages": [HELLO]} | wish
    chunks = [chunk async for chunk in await client.chat.completions.create(stream=True, **wish)]
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    return "".join(delta.content or "" for delta in deltas), chunks


async def test_a_completion_is_the_same_whole_and_streamed(client: AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model="demo", messages=[HELLO])
    text, chunks = await streamed(client, stream_options={"include_usage": True})
    assert text == whole.choices[0].message.content == COUNTED
    assert whole.choices[0].finish_reason == chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert whole.usage is not None and chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert whole.usage.completion_tokens == 30
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 30
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.model for chunk in chunks} == {"demo"}
    _, without = await streamed(client)
    assert all(chunk.usage is None for chunk in without)


async def test_the_models_on_offer_are_listed(client: AsyncOpenAI) -> None:
    import openai

    assert [model.id async for model in client.models.list()] == ["alpha", "beta", "demo", "lab/demo"]
    for name in ("demo", "lab/demo"):
        assert (await client.models.retrieve(name)).id == name
    with pytest.raises(openai.NotFoundError, match="no model 'none'"):
        await client.models.retrieve("none")


async def test_an_access_token_is_a_key(service: Service) -> None:
    someone = await guest(service.url)
    async with client_of(service, someone.access) as client:
        text, _ = await streamed(client)
    assert text == COUNTED


async def test_nothing_of_a_completion_is_stored(service: Service) -> None:
    someone = await guest(service.url)
    session = await new_session(service.url, someone.access)
    async with client_of(service, someone.access) as client:
        await streamed(client)
    assert await messages(service.url, someone.access, session["id"]) == []
    listed = await call(service.url, "GET", "/api/sessions/", someone.access)
    assert [each["id"] for each in listed.json()] == [session["id"]]


@pytest.mark.parametrize("stop", ["⟨5⟩", ["nothing", " ⟨5⟩ "], "⟨5⟩ ⟨6⟩ ⟨7⟩"])
async def test_a_stop_sequence_ends_the_text_before_it(client: AsyncOpenAI, stop: str | list[str]) -> None:
    """A sequence may be spread over several tokens."""
    text, chunks = await streamed(client, stop=stop)
    whole = await client.chat.completions.create(model="demo", messages=[HELLO], stop=stop)
    assert (
        text == whole.choices[0].message.content == COUNTED[: COUNTED.index(stop if isinstance(stop, str) else stop[1])]
    )
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_a_limit_of_tokens_is_kept_and_told(client: AsyncOpenAI, name: str) -> None:
    text, chunks = await streamed(client, **{name: 3})
    assert text == "⟨0⟩ ⟨1⟩ ⟨2⟩ " and chunks[-1].choices[0].finish_reason == "length"


async def test_what_clients_send_besides_is_tolerated(client: AsyncOpenAI) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    hints: dict[str, Any] = {"tools": [tool], "user": "someone", "seed": 7, "top_p": 0.5, "logprobs": False, "n": 1}
    hints |= {"frequency_penalty": 0.1, "presence_penalty": 0.1, "metadata": {"a": "b"}, "max_tokens": 1_000_000}
    hints |= {"tool_choice": "auto", "response_format": {"type": "text"}}
    text, _ = await streamed(client, extra_body={"unheard_of": {"of": 1}}, **hints)
    assert text == COUNTED


async def test_a_conversation_reaches_the_model_as_it_is(client: AsyncOpenAI, vendors: Vendors) -> None:
    vendors.reset()
    said: list[Any] = [
        {"role": "developer", "content": "Answer in rhymes."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": " and two"}]},
        {"role": "assistant", "content": "Three", "tool_calls": None},
        {"role": "user", "content": "And? [[tokens:4]]"},
    ]
    whole = await client.chat.completions.create(model="alpha", messages=said, temperature=0.25, max_tokens=50)
    asked = vendors.calls[-1].body
    assert [(line["role"], line["content"]) for line in asked["messages"]] == [
        ("system", "Answer in rhymes."),
        ("user", "One and two"),
        ("assistant", "Three"),
        ("user", "And? [[tokens:4]]"),
    ]
    assert asked["temperature"] == 0.25 and 50 in (asked.get("max_tokens"), asked.get("max_completion_tokens"))
    assert whole.usage is not None and whole.usage.prompt_tokens == 11  # the vendor's own count


async def test_refusals_are_errors_of_theirs(service: Service, client: AsyncOpenAI) -> None:
    import openai

    ask = client.chat.completions.create
    image: Any = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-9'"):
        await ask(model="gpt-9", messages=[HELLO])
    with pytest.raises(openai.BadRequestError, match="only text is understood"):
        await ask(model="demo", messages=[{"role": "user", "content": [image]}])
    with pytest.raises(openai.BadRequestError) as refused:
        await ask(model="demo", messages=[HELLO], n=2)
    assert refused.value.param == "n" and refused.value.code == "invalid"
    schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {}}}
    forms: list[Any] = [{"response_format": schema}, {"tool_choice": "required"}, {"tool_choice": {"type": "function"}}]
    for form in forms:
        with pytest.raises(openai.BadRequestError) as refused:
            await ask(model="demo", messages=[HELLO], **form)
        assert refused.value.param is not None and refused.value.param.startswith(next(iter(form)))
    for nothing in ([], [{"role": "user", "content": " "}], [{"role": "oracle", "content": "x"}]):
        with pytest.raises(openai.BadRequestError):
            await ask(model="demo", messages=nothing)
    with pytest.raises(openai.BadRequestError, match="longer than"):
        await ask(model="demo", messages=[{"role": "user", "content": "x" * 100_000}])
    for key in ("nonsense", OPERATOR + "x", OPERATOR[:-1]):
        async with client_of(service, key) as stranger:
            with pytest.raises(openai.AuthenticationError):
                await stranger.chat.completions.create(model="demo", messages=[HELLO])
    answer = await call(service.url, "POST", "/v1/chat/completions", json={"model": "demo", "messages": [HELLO]})
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "authentication_required"


async def test_a_model_that_fails_is_an_error_and_no_ending(client: AsyncOpenAI) -> None:
    import openai

    failing: Any = {"model": "demo", "messages": [{"role": "user", "content": "/fail 3"}]}
    with pytest.raises(openai.InternalServerError, match="The model could not be reached") as problem:
        await client.chat.completions.create(**failing)
    assert problem.value.status_code == 502 and problem.value.code == "provider_unavailable"
    said = []
    with pytest.raises(openai.APIError, match="The model could not be reached"):
        async for chunk in await client.chat.completions.create(stream=True, **failing):
            said.append(chunk.choices[0].delta.content)
    assert len(said) == 4
    with pytest.raises(openai.RateLimitError):
        await client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "/rate 60"}])


async def test_a_silent_model_is_given_up_while_the_stream_shows_life(service: Service) -> None:
    """The first bytes come at once, and signs of life after them: no proxy's clock runs out."""
    silent = {"model": "demo", "messages": [{"role": "user", "content": "/silent"}]}
    answer = await call(service.url, "POST", "/v1/chat/completions", OPERATOR, json=silent)
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "provider_timeout"
    answer = await call(service.url, "POST", "/v1/chat/completions", OPERATOR, json=silent | {"stream": True})
    assert answer.status_code == 200 and answer.text.startswith(": ok\n\n")
    assert ": ping\n\n" in answer.text and '"provider_timeout"' in answer.text and "[DONE]" not in answer.text


@pytest.mark.parametrize("stream", [True, False])
async def test_whoever_hangs_up_ends_the_model_s_answer(service: Service, vendors: Vendors, stream: bool) -> None:
    vendors.reset()
    wish = {"model": "alpha", "stream": stream, "messages": [{"role": "user", "content": "[[tokens:2000 pace:0.01]]"}]}
    asking = asyncio.create_task(call(service.url, "POST", "/v1/chat/completions", OPERATOR, json=wish))
    await until(lambda: vendors.calls and vendors.calls[0].sent, what="the first token")
    asking.cancel()
    await until(lambda: vendors.calls[0].hung_up, what="the vendor to be left")
    assert len(vendors.calls[0].sent) < 1000


async def test_limits_and_budgets_apply(
    request: pytest.FixtureRequest, vendors: Vendors, tmp_path_factory: pytest.TempPathFactory
) -> None:
    environment = CLOSED | store("sqlite", request, tmp_path_factory.mktemp("limited"))
    environment |= {"PARLEY_MODELS": json.dumps(models(vendors)[:1]), "VENDOR_KEY": KEY}
    environment |= {"PARLEY_DAILY_TOKENS_ACCOUNT": "1000", "PARLEY_MESSAGES_PER_MINUTE": "4", "API_KEYS": OPERATOR}
    environment |= {"PARLEY_TURNS_PER_ACCOUNT": "1"}
    wish = {"model": "alpha", "messages": [{"role": "user", "content": "[[tokens:20]]"}], "max_tokens": 900}
    longer = [{"role": "user", "content": "[[tokens:20 pace:0.075 id:longer]]"}]
    async with Service(environment) as service:
        someone = await guest(service.url)

        async def asked(key: str, **changes: Any) -> tuple[int, str]:
            answer = await call(service.url, "POST", "/v1/chat/completions", key, json=wish | changes)
            problem = answer.json().get("error", {})
            assert answer.status_code < 400 or (problem["message"] and answer.headers.get("Retry-After"))
            return answer.status_code, problem.get("code", "")

        await minute_with_room()
        first = asyncio.create_task(asked(someone.access, messages=longer))
        await asyncio.to_thread(vendors.wait, lambda call: call.id == "longer")
        assert await asked(someone.access) == (429, "rate_limited")  # one at a time
        assert await first == (200, "")
        assert await asked(someone.access) == (200, "")  # what was reserved and not used was given back
        assert await asked(someone.access, max_tokens=2000) == (429, "budget_exhausted")
        assert await asked(someone.access) == (429, "rate_limited")  # the fifth in this minute
        many = await asyncio.gather(*[asked(OPERATOR) for _ in range(8)])
        assert set(many) == {(200, "")}  # a server's key stands for many people


def test_a_stop_sequence_is_found_however_the_text_is_cut() -> None:
    text, sequences = "one two twothree four", ["twothree", "xyz"]
    for width in range(1, len(text)):
        stops, said = Stops(sequences), ""
        for place in range(0, len(text), width):
            said += stops.feed(text[place : place + width])
            if stops.met:
                break
        assert (said, stops.met) == ("one two ", True)
    stops = Stops(sequences)
    assert stops.feed("a tw") + stops.feed("o twothre") == "a two "
    assert not stops.met and stops.rest() == "twothre"
