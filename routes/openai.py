"""OpenAI's API, as far as its clients need it to talk to the models on offer: completions without memory."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator
from hashlib import sha256
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from chat import callers
from chat.direct import direct_of
from chat.errors import REPLY_SENTENCES, ChatError, invalid
from chat.formats import EventFormat
from chat.formats import completions as spoken
from chat.live.completions import PEOPLE, Caller, Completion
from chat.live.streams import CHARS_PER_TOKEN
from chat.providers import ChatMessage, Limits, ProviderError
from chat.settings import Settings

from . import inputs
from .inputs import ContentPart, text_of
from .messages import STREAMED, ReleasedResponse

TOKENS_MAX = 8000  # of one answer, as of a turn's reply; clients that ask for more by default get these
LOOK_EVERY = 1.0  # seconds between two looks whether a client that waits for the whole answer is still there
# failure → HTTP status; 502 for the others
STATUS = {"provider_timeout": 504, "provider_rate_limited": 429, "provider_refused": 400, "interrupted": 503}


class Entry(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class ResponseFormat(msgspec.Struct):
    type: Literal["text", "json_object"] = "text"


class CompletionRequest(msgspec.Struct):
    """A request for a completion. Clients send many more fields than these, and mean them as hints.

    A tool that must be called, or a schema that the text must follow, is no hint: the client could not read the answer.
    """

    model: str
    messages: Annotated[list[Entry], Meta(min_length=1, max_length=500)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=16)] | None = None
    n: Annotated[int, Meta(ge=1, le=1)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    response_format: ResponseFormat | None = None


async def models(request: Request) -> Response:
    await _caller(request)
    offered = inputs.state(request).providers.models.values()
    return inputs.answer({"object": "list", "data": [_card(model.id, model.vendor) for model in offered]})


async def model(request: Request) -> Response:
    await _caller(request)
    found = inputs.state(request).providers.models.get(request.path_params["model_id"])
    if found is None:
        raise ChatError("not_found", f"There is no model {request.path_params['model_id'][:80]!r} here.")
    return inputs.answer(_card(found.id, found.vendor))


def _card(id: str, vendor: str) -> dict[str, Any]:
    return {"id": id, "object": "model", "created": 0, "owned_by": vendor or "parley"}


async def completions(request: Request) -> Response:
    """Answer a conversation that the client keeps. A client that hangs up ends the answer."""
    chat = inputs.state(request)
    caller = await _caller(request)
    wish = await inputs.body(request, CompletionRequest)
    offered = chat.providers.models.get(wish.model)
    if offered is None:
        raise ChatError("not_found", f"There is no model {wish.model[:80]!r} here. GET /v1/models lists them.")
    messages = [ChatMessage("system", offered.system)] if offered.system else []
    messages += _read(wish.messages, chat.settings)
    most = wish.max_completion_tokens or wish.max_tokens or chat.settings.max_tokens
    limits = Limits(
        min(most, TOKENS_MAX), wish.temperature, chat.settings.first_token_timeout, chat.settings.idle_timeout
    )
    completion = Completion(chat.generation, caller, wish.model, messages, limits)
    answer = Exchange(request, completion, wish)
    try:
        await completion.admit()
        return await answer.whole() if not wish.stream else answer.streamed()
    except BaseException:
        answer.release()
        raise


async def _caller(request: Request) -> Caller:
    """The account of an access token, or one of the operator's keys."""
    found = callers.credential(request.headers)
    text = found[1].encode() if found else b""
    for key in inputs.state(request).settings.api_keys:
        if secrets.compare_digest(text, key.encode()):
            return Caller(f"key:{sha256(text).hexdigest()[:16]}", PEOPLE, inputs.address(request))
    return Caller((await inputs.account(request)).id, address=inputs.address(request))


def _read(lines: list[Entry], settings: Settings) -> list[ChatMessage]:
    """The conversation as providers take it."""
    roles = {"developer": "system", "tool": "user", "function": "user"}
    messages = [ChatMessage(roles.get(line.role, line.role), text_of(n, line.content)) for n, line in enumerate(lines)]
    most = settings.prompt_max + settings.history_tokens * CHARS_PER_TOKEN
    if sum(len(message.content) for message in messages) > most:
        raise invalid("messages", f"longer than {most} characters altogether")
    if not any(message.content.strip() for message in messages):
        raise invalid("messages", "there is no text")
    return messages


class Exchange:
    """A completion as one client receives it."""

    def __init__(self, request: Request, completion: Completion, wish: CompletionRequest) -> None:
        self._request = request
        self._chat = inputs.state(request)
        self._completion = completion
        self._head = spoken.Head(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), wish.model)
        self._stops = spoken.Stops([wish.stop] if isinstance(wish.stop, str) else wish.stop or [])
        self._usage_wanted = bool(wish.stream_options and wish.stream_options.include_usage)

    def release(self) -> None:
        self._completion.release()

    async def whole(self) -> Response:
        said: list[str] = []
        look_at = time.monotonic() + LOOK_EVERY
        try:
            async with contextlib.aclosing(self._texts(LOOK_EVERY)) as texts:
                async for text in texts:
                    said.append(text or "")
                    if time.monotonic() > look_at:
                        look_at = time.monotonic() + LOOK_EVERY
                        if await self._request.is_disconnected():
                            break
            return inputs.answer(spoken.whole(self._head, "".join(said), self._finish, self._usage), headers=STREAMED)
        except ProviderError as problem:
            return inputs.answer(_failure(problem), STATUS.get(problem.code, 502))
        finally:
            self.release()

    def streamed(self) -> Response:
        return ReleasedResponse(self._events(), self.release, EventFormat, {})

    async def _events(self) -> AsyncGenerator[bytes, None]:
        direct, settings = direct_of(self._request.scope), self._chat.settings
        yield EventFormat.opening + spoken.chunk(self._head, {"role": "assistant", "content": ""})
        try:
            async with contextlib.aclosing(self._texts(settings.sse_ping)) as texts:
                async for text in texts:
                    if direct is not None:  # a reader that takes nothing does not keep its place
                        await direct.drained(settings.send_timeout)
                    if text != "":
                        yield EventFormat.ping if text is None else spoken.chunk(self._head, {"content": text})
        except ProviderError as problem:
            yield spoken.event(_failure(problem))
            return
        except TimeoutError:
            direct.abort()
            return
        yield spoken.chunk(self._head, {}, self._finish)
        if self._usage_wanted:
            yield spoken.usage_chunk(self._head, self._usage)
        yield spoken.CLOSING

    async def _texts(self, every: float) -> AsyncGenerator[str | None, None]:
        """Yield what may be said as it comes, and None after every so many silent seconds. Raises `ProviderError`."""
        texts: asyncio.Queue[str] = asyncio.Queue()
        running = asyncio.create_task(self._completion.run(texts.put_nowait))
        running.add_done_callback(lambda _: texts.put_nowait(""))
        completions = self._chat.generation.completions
        completions.add(running)
        running.add_done_callback(completions.discard)
        try:
            while not (running.done() and texts.empty()) and not self._stops.met:
                text = None
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(every):
                        text = self._stops.feed(await texts.get())
                yield text
            if running.cancelled():  # by the drain
                raise ProviderError("interrupted")
            if not self._stops.met:
                await running
                yield self._stops.rest()
        finally:
            running.cancel()

    @property
    def _finish(self) -> str:
        finish = self._completion.result.finish
        return "stop" if finish is None or self._stops.met else finish.reason

    @property
    def _usage(self) -> spoken.Usage:
        asked, answered = self._completion.tokens
        return spoken.Usage(asked, answered, asked + answered)


def _failure(problem: ProviderError) -> dict[str, Any]:
    return spoken.failure(STATUS.get(problem.code, 502), problem.code, REPLY_SENTENCES[problem.code])
