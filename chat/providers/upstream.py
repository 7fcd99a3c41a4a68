"""A vendor behind its SDK: how every remote provider is asked, read and timed, once.

An adapter says how to ask and how to read one event; `failures` says what becomes of whatever goes wrong.
"""

from __future__ import annotations

import asyncio
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec

from ..settings import Model
from . import ChatMessage, Finish, Limits, ProviderError, Say, Think
from .body import Body
from .clean import Cleaner
from .failures import OPERATOR_FAULTS, advice, status_of, translated, words
from .sse import Splitter

log = logging.getLogger(__name__)

CONNECT = 5.0  # seconds to reach a vendor; beyond them another try is the better bet
AFTERMATH = 2.0  # seconds a finished stream may take for its token counts; the answer is complete without them

FINISHED = {"stop": "stop", "end_turn": "stop", "stop_sequence": "stop", "eos": "stop"}
FINISHED |= {"length": "length", "max_tokens": "length", "model_context_window_exceeded": "length"}
REFUSED = {"content_filter": "provider_refused", "refusal": "provider_refused", "error": "provider_unavailable"}


class Piece(msgspec.Struct, frozen=True):
    """The text that one event of a vendor adds to an answer. `thinking`, even an empty one, is a sign of life."""

    text: str = ""
    thinking: str | None = None
    reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


class Upstream(ABC):
    """A vendor behind its SDK: an adapter says how to ask and how to read one event, the rules are here, once."""

    sdk: ClassVar[Any]  # the vendor's module
    client: ClassVar[Any]  # its client's class
    official: ClassVar[str]  # the vendor's own address

    def __init__(self, models: Iterable[Model], environ: Mapping[str, str]) -> None:
        """Connect nothing yet, but make the clients: importing all they need takes longer than a loop may be held."""
        for name in ("openai", "anthropic", "httpx2", "httpcore2", "aiohttp"):
            logging.getLogger(name).setLevel(logging.WARNING)  # below it they print prompts and error bodies
        self._environ = environ
        self._clients: dict[tuple[str, str], Any] = {}
        self._clocks: set[Clock] = set()  # of the answers that run
        self._starting = asyncio.Lock()
        for model in models:
            try:
                self._client(model)
            except Exception as problem:  # an address that is none: that model fails when it is asked, no other does
                self._failed(model, problem, False)

    @abstractmethod
    async def ask(self, client: Any, model: Model, messages: Sequence[ChatMessage], limits: Limits) -> Body:
        """Send the request; return the answer's body once the vendor has answered with good headers."""

    @abstractmethod
    def read(self, event: bytes) -> Piece:
        """Read one event's data. May raise anything: an event is the vendor's word, not ours."""

    async def answer(
        self, model: Model, messages: Sequence[ChatMessage], limits: Limits, say: Say, think: Think
    ) -> Finish:
        answered, failure = False, None
        clock = Clock(limits.first_token_timeout, self._clocks)  # pings reset those of the SDKs
        reading = Reading(self.read, say, think, clock, limits.idle_timeout)
        try:
            with clock:
                # A request costs a millisecond: begun all at once, many would hold up every answer that runs.
                async with self._starting:
                    await asyncio.sleep(0)
                body = await self.ask(self._client(model), model, messages, limits)
                answered = True
                async with aclosing(body):
                    await body.pour(reading.feed)
        except Exception as problem:
            # Everything: the SDK's errors, httpx's and aiohttp's, JSON's and Unicode's.
            if problem is reading.unsaid:
                raise
            if reading.reason is None:
                failure = self._failed(model, problem, answered)
        if failure is not None:
            raise failure  # outside the `except`, or the vendor's text would travel along as its context
        finish = Finish(self._finished(model, reading.reason), reading.input_tokens, reading.output_tokens)
        if text := reading.cleaner.end():
            say(text)
        return finish

    async def post(self, client: Any, path: str, request: dict[str, Any]) -> Body:
        """Send one request, once: a retry bills again. The SDKs' own way is slower by a third of a turn's beginning."""
        asked = client.build_request("POST", path, content=msgspec.json.encode(request))
        response = await client.send(asked, stream=True)
        if not response.is_success:
            async with aclosing(response):
                said = (await response.aread()).decode(errors="replace")
            raise self.sdk.APIStatusError(f"{response.status_code}: {said}", response=response, body=None)
        return Body(response)

    def _client(self, model: Model) -> Any:
        """Return the SDK's HTTP client, with the address and the headers of the SDK's own client."""
        place = (model.base_url or self.official, self._key(model))
        if place not in self._clients:
            timeout = self.sdk.Timeout(None, connect=CONNECT, pool=CONNECT)  # a clock times the rest
            client = self.sdk.DefaultAioHttpClient(timeout=timeout)
            known = self.client(base_url=place[0], api_key=place[1], http_client=client)
            client.base_url = known.base_url
            headers = {**known.default_headers, **known.auth_headers}
            client.headers.update({name: text for name, text in headers.items() if isinstance(text, str)})
            self._clients[place] = client
        return self._clients[place]

    def _key(self, model: Model) -> str:
        """A model without a key gets a word instead: given nothing, an SDK would send the key it finds by itself."""
        return (self._environ.get(model.api_key_env, "").strip() if model.api_key_env else "") or "none"

    def _failed(self, model: Model, problem: Exception, answered: bool) -> ProviderError:
        failure = translated(problem, answered)
        level = logging.ERROR if status_of(problem) in OPERATOR_FAULTS else logging.WARNING
        address = re.sub(r"//.*@", "//", model.base_url or self.official)  # without a name and a password
        told = words(problem, self._key(model))  # logged with %r: no line breaks of theirs
        log.log(level, "model %s: %s at %s: %s; %r", model.id, failure.code, address, advice(problem, model), told)
        return failure

    def _finished(self, model: Model, reason: str | None) -> str:
        """Return our finish reason for a vendor's. Without one the stream just ended, which the SDKs call success."""
        if reason in FINISHED:
            return FINISHED[reason]
        code = "provider_truncated" if reason is None else REFUSED.get(reason, "provider_protocol")
        log.warning("model %s: %s after finish reason %.40r", model.id, code, reason)
        raise ProviderError(code, retryable=reason is None)

    async def close(self) -> None:
        for clock in self._clocks:  # aiohttp closes its connections without a word to who reads them
            clock.end()
        clients, self._clients = list(self._clients.values()), {}
        await asyncio.gather(*(client.aclose() for client in clients), return_exceptions=True)


class Clock:
    """The time limit of the many waits of one answer: `with Clock(…) as clock:` around them all, in one task.

    A single timer serves all waits and is checked when it fires: to start and cancel a timer for each token is a tenth
    of a token's cost. Raises `TimeoutError` in the task that waits.
    """

    def __init__(self, seconds: float, running: set[Clock]) -> None:
        """Belong to `running` from the first wait to the last."""
        self._seconds = seconds
        self._running = running
        self._ended = False
        self._expired = False

    def start(self, seconds: float) -> None:
        """Give the next waits so many seconds from now; nothing more once the clock has ended."""
        if self._ended:
            return
        self._deadline = self._loop.time() + seconds
        if self._deadline < self._look_at:
            self._timer.cancel()
            self._set(self._deadline)

    def end(self) -> None:
        """Have the present wait, or the next one, time out: a token that was read already cannot prolong it."""
        self.start(0)
        self._ended = True

    def _set(self, at: float) -> None:
        self._look_at = at
        self._timer = self._loop.call_at(at, self._look)

    def _look(self) -> None:
        if self._loop.time() >= self._deadline:
            self._expired = True
            self._task.cancel()
        else:
            self._set(self._deadline)

    def __enter__(self) -> Clock:
        task, self._loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        self._task, self._cancels = task, task.cancelling()  # how often it had been cancelled by others before
        self._deadline = self._loop.time() + self._seconds
        self._set(self._deadline)
        self._running.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, _: object) -> None:
        self._running.discard(self)
        self._timer.cancel()
        if self._expired and self._task.uncancel() <= self._cancels and isinstance(problem, asyncio.CancelledError):
            raise TimeoutError from problem


@dataclass(slots=True)
class Reading:
    """An answer as it is read: bytes in, text out to `say`."""

    read: Callable[[bytes], Piece]
    say: Say
    think: Think
    clock: Clock
    idle_timeout: float
    splitter: Splitter = field(default_factory=Splitter)
    cleaner: Cleaner = field(default_factory=Cleaner)
    reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    unsaid: Exception | None = None  # what `say` raised: no fault of the vendor's

    def feed(self, data: bytes) -> bool:
        """Read the next bytes, b"" at the end; return whether the answer is over. May raise anything."""
        for event in self.splitter.feed(data, final=not data):
            if event.startswith(b"[DONE]"):
                return True
            piece = self.read(event)
            self.reason = piece.reason or self.reason
            if piece.input_tokens is not None:
                self.input_tokens = piece.input_tokens
            if piece.output_tokens is not None:
                self.output_tokens = piece.output_tokens
            if piece.thinking:
                self.think(len(piece.thinking.encode("utf-8", "surrogatepass")))
            if piece.text and (text := self.cleaner.feed(piece.text)):
                try:
                    self.say(text)
                except Exception as problem:
                    self.unsaid = problem
                    raise
            if piece.reason:
                self.clock.start(AFTERMATH)
            elif piece.text or piece.thinking is not None:
                self.clock.start(self.idle_timeout)
        return False
