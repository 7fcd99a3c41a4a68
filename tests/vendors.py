"""A model vendor on loopback that misbehaves on request: OpenAI chat completions and Anthropic messages, streaming.

It writes its HTTP by hand because the tests need every byte: a body cut in the middle, a reset, a page of HTML with
status 200. It knows nothing of the service. Run it (`python tests/vendors.py --port 0` prints its URL) or use it in
process: `with Vendors() as vendors: … vendors.url`.

What it does is said by the last user message, `[[mode:rst after:20 pace:0.01 tokens:200 id:m1 times:1]]`, or by the
model's name, `fake-rst`; the message wins. `mode` is a function of this file; the others:

    after   tokens sent before it misbehaves (5)       tokens   length of the answer (20)
    pace    seconds between tokens (0; `slow`: 0.1)    id       what the tokens are numbered under (a hash of the text)
    times   misbehave in the first so many calls with this very text, then answer well (always)

Tokens are `⟨id:n⟩ `. `GET /calls` tells what was asked and sent, `POST /reset` forgets it. Times are monotonic, so
another process on this machine can compare them with its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

CANARY = "sk-CANARY-0123456789abcdef0123456789abcdef"  # in every error body: it must not turn up anywhere else
HUGE = 5_000_000  # characters of the one event of `huge`
DIRECTIVE = re.compile(r"\[\[([^\]]*)\]\]")
BROKEN = (  # pieces, and what can be made of each: a pair of halves is one character wherever it was cut
    [("\0 ", "\ufffd ")],
    [("\ud83d", ""), ("\ude00 ", "😀 ")],
    [("\ud83d x ", "\ufffd x ")],
    [("\ude00\ud83d ", "\ufffd\ufffd ")],
    [("é \u0085\u2028\ufffe\U0010ffff ", "é \u0085\u2028\ufffe\U0010ffff ")],
)
RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close sends RST instead of FIN


@dataclass
class Call:
    """One request for an answer: what was asked, what was sent, how it ended."""

    number: int
    api: str
    model: str
    prompt: str
    id: str
    mode: str
    after: int
    tokens: int
    pace: float
    key: str
    body: dict[str, Any]
    started: float
    sent: list[str] = field(default_factory=list)
    ended: float | None = None  # when the vendor had said all it meant to say
    hung_up: float | None = None  # when the client left before that


class OpenAI:
    """`POST /v1/chat/completions`, streaming: nameless events, a finish reason, perhaps usage, `[DONE]`."""

    finish: ClassVar = {"stop": "stop", "length": "length", "refuse": "content_filter", "odd": "tool_calls"}

    def start(self, call: Call) -> list[bytes]:
        return [self._chunk(call, {"role": "assistant", "content": "", "refusal": None})]

    def text(self, call: Call, text: object) -> bytes:
        return self._chunk(call, {"content": text})

    def thought(self, call: Call, text: str) -> bytes:
        return self._chunk(call, {"content": None, "reasoning_content": text, "reasoning": text})

    def end(self, call: Call, reason: str, usage: bool) -> list[bytes]:
        events = [self._chunk(call, {}, self.finish[reason])]
        if usage and (call.body.get("stream_options") or {}).get("include_usage"):
            counts = {"prompt_tokens": 11, "completion_tokens": len(call.sent), "total_tokens": 11 + len(call.sent)}
            events.append(self._event({**self._frame(call), "choices": [], "usage": counts}))
        return [*events, b"data: [DONE]\n\n"]

    def broken(self, call: Call) -> bytes:
        return b'data: {"id": "chatcmpl-1", "choices": [{"delta": {"content": "half a\n\n'

    def ping(self) -> bytes:
        return b": keep-alive\n\n"

    def error_event(self, kind: str) -> bytes:
        return self._event(self.error(kind))

    def error(self, kind: str) -> dict[str, Any]:
        return {"error": {"message": f"{kind}: key {CANARY} said no", "type": kind, "param": None, "code": kind}}

    def _chunk(self, call: Call, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._event({**self._frame(call), "choices": [choice]})

    def _frame(self, call: Call) -> dict[str, Any]:
        frame = {"id": f"chatcmpl-{call.number}", "object": "chat.completion.chunk", "created": 1_790_000_000}
        return {**frame, "model": call.model, "service_tier": "default", "system_fingerprint": None}

    def _event(self, data: dict[str, Any]) -> bytes:
        text = json.dumps(data, ensure_ascii=False)
        return b"data: " + text.encode(errors="backslashreplace") + b"\n\n"  # half a pair as JSON has it: \ud83d


class Anthropic:
    """`POST /v1/messages`, streaming: named events around content blocks, the stop reason in `message_delta`."""

    finish: ClassVar = {"stop": "end_turn", "length": "max_tokens", "refuse": "refusal", "odd": "tool_use"}

    def start(self, call: Call) -> list[bytes]:
        message: dict[str, Any] = {"id": f"msg_{call.number}", "type": "message", "role": "assistant"}
        message |= {"model": call.model, "content": [], "stop_reason": None, "stop_sequence": None}
        message |= {"usage": {"input_tokens": 11, "output_tokens": 1}}
        block: dict[str, Any] = {"index": 0, "content_block": {"type": "text", "text": ""}}
        return [self._event("message_start", message=message), self._event("content_block_start", **block), self.ping()]

    def text(self, call: Call, text: object) -> bytes:
        return self._event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})

    def thought(self, call: Call, text: str) -> bytes:
        return self._event("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": text})

    def end(self, call: Call, reason: str, usage: bool) -> list[bytes]:
        delta = {"stop_reason": self.finish[reason], "stop_sequence": None}
        counts = {"usage": {"output_tokens": len(call.sent)}} if usage else {}
        return [
            self._event("content_block_stop", index=0),
            self._event("message_delta", delta=delta, **counts),
            self._event("message_stop"),
        ]

    def broken(self, call: Call) -> bytes:
        return b'event: content_block_delta\ndata: {"type": "content_block_delta", "delta": {"text": "half a\n\n'

    def ping(self) -> bytes:
        return self._event("ping")

    def error_event(self, kind: str) -> bytes:
        return self._event("error", **self.error(kind))

    def error(self, kind: str) -> dict[str, Any]:
        return {"type": "error", "error": {"type": kind, "message": f"{kind}: key {CANARY} said no"}}

    def _event(self, name: str, **data: Any) -> bytes:
        text = json.dumps({"type": name, **data}, ensure_ascii=False)
        return f"event: {name}\ndata: {text}\n\n".encode(errors="backslashreplace")


@dataclass
class Reply:
    """What a mode may do with its connection: headers, one chunk per event, an end of its choice."""

    call: Call
    api: OpenAI | Anthropic
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def head(self, status: int = 200, kind: str = "text/event-stream", **headers: str) -> None:
        lines = [f"HTTP/1.1 {status} Whatever", f"content-type: {kind}", "transfer-encoding: chunked"]
        lines += ["connection: close", "cache-control: no-cache", f"x-request-id: req_{self.call.number}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.raw("\r\n".join([*lines, "", ""]).encode())

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        await self.raw(b"%x\r\n%b\r\n" % (len(data), data))

    async def start(self) -> None:
        await self.head()
        for event in self.api.start(self.call):
            await self.chunk(event)

    async def speak(self, count: int) -> None:
        """Send the next `count` tokens of the answer, at the pace asked for."""
        for _ in range(count):
            token = f"⟨{self.call.id}:{len(self.call.sent)}⟩ "
            self.call.sent.append(token)  # before it is written: the client may leave in the middle
            await self.chunk(self.api.text(self.call, token))
            await asyncio.sleep(self.call.pace)

    async def finish(self, reason: str = "stop", usage: bool = True) -> None:
        for event in self.api.end(self.call, reason, usage):
            await self.chunk(event)
        await self.end()

    async def end(self) -> None:
        await self.raw(b"0\r\n\r\n")

    async def refuse(self, status: int, kind: str, **headers: str) -> None:
        await self.head(status, "application/json", **headers)
        await self.chunk(json.dumps(self.api.error(kind)).encode())
        await self.end()

    def reset(self) -> None:
        connection = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.writer.transport.abort()


Request = tuple[str, str, dict[str, str], bytes]  # method, path, headers, body
Mode = Callable[[Reply], Coroutine[Any, Any, None]]
MODES: dict[str, Mode] = {}


def mode(*names: str) -> Callable[[Mode], Mode]:
    def register(function: Mode) -> Mode:
        MODES.update(dict.fromkeys(names, function))
        return function

    return register


def begins(function: Mode) -> Mode:
    """The mode starts like a good answer and goes wrong after `after` tokens."""

    async def begun(reply: Reply) -> None:
        await reply.start()
        await reply.speak(min(reply.call.after, reply.call.tokens))
        await function(reply)

    return begun


@mode("ok", "slow")
async def answer(reply: Reply) -> None:
    await reply.start()
    await reply.speak(reply.call.tokens)
    await reply.finish()


@mode("no-usage")
async def answer_uncounted(reply: Reply) -> None:
    await reply.start()
    await reply.speak(reply.call.tokens)
    await reply.finish(usage=False)


@mode("broken")
async def answer_in_broken_text(reply: Reply) -> None:
    """Each token beside something no text may hold; `sent` is what can be made of it."""
    await reply.start()
    for n in range(reply.call.tokens):
        await reply.speak(1)
        for piece, made in BROKEN[n % len(BROKEN)]:
            reply.call.sent[-1] += made
            await reply.chunk(reply.api.text(reply.call, piece))
    await reply.finish()


@mode("length")
async def answer_cut_short(reply: Reply) -> None:
    await reply.start()
    await reply.speak(reply.call.tokens)
    await reply.finish("length")


@mode("reasoning")
async def think_then_answer(reply: Reply) -> None:
    await reply.start()
    for n in range(5):
        await reply.chunk(reply.api.thought(reply.call, f"thinking {n} "))
        await asyncio.sleep(reply.call.pace)
    await reply.speak(reply.call.tokens)
    await reply.finish()


@mode("refuse")
@begins
async def refuse(reply: Reply) -> None:
    await reply.finish("refuse")


@mode("odd-finish")
@begins
async def finish_for_a_reason_nobody_asked_for(reply: Reply) -> None:
    await reply.finish("odd")


@mode("odd-types")
@begins
async def say_a_number(reply: Reply) -> None:
    await reply.chunk(reply.api.text(reply.call, 42))
    await reply.finish()


@mode("finish-stall")
@begins
async def finish_then_say_nothing(reply: Reply) -> None:
    for event in reply.api.end(reply.call, "stop", False)[:-1]:  # all but [DONE] / message_stop
        await reply.chunk(event)
    await forever()


@mode("429")
async def rate_limited(reply: Reply) -> None:
    await reply.refuse(429, "rate_limit_error")


@mode("429-retry-after")
async def rate_limited_for_two_seconds(reply: Reply) -> None:
    await reply.refuse(429, "rate_limit_error", retry_after="2")


@mode("429-retry-date")
async def rate_limited_for_a_century(reply: Reply) -> None:
    await reply.refuse(429, "rate_limit_error", retry_after="Wed, 21 Oct 2099 07:28:00 GMT")


@mode("quota")
async def out_of_money(reply: Reply) -> None:
    await reply.refuse(429, "insufficient_quota")


@mode("400", "401", "403", "404", "413", "500", "503", "529")
async def refuse_with_a_status(reply: Reply) -> None:
    kinds = {"4": "invalid_request_error", "5": "api_error"}
    kind = {"529": "overloaded_error", "401": "authentication_error"}.get(reply.call.mode)
    await reply.refuse(int(reply.call.mode), kind or kinds[reply.call.mode[0]])


@mode("redirects")
async def send_away_for_ever(reply: Reply) -> None:
    await reply.refuse(307, "api_error", location="?again")


@mode("key")
async def refuse_the_key_and_repeat_it(reply: Reply) -> None:
    await reply.head(401, "application/json")
    await reply.chunk(json.dumps({"error": {"message": f"no such key: {reply.call.key}", "type": "authentication_error"}}).encode())
    await reply.end()


@mode("no-header")
async def say_nothing_at_all(reply: Reply) -> None:
    await forever()


@mode("stall")
@begins
async def stop_speaking(reply: Reply) -> None:
    await forever()


@mode("ping-stall")
@begins
async def stop_speaking_but_stay_alive(reply: Reply) -> None:
    while True:
        await reply.chunk(reply.api.ping())
        await asyncio.sleep(0.02)


@mode("rst")
@begins
async def reset(reply: Reply) -> None:
    reply.reset()


@mode("rst-first")
async def reset_before_the_header(reply: Reply) -> None:
    reply.reset()


@mode("cut")
@begins
async def cut_in_the_middle_of_a_chunk(reply: Reply) -> None:
    await reply.raw(b'fff\r\ndata: {"id": "chat')


@mode("clean-eof")
@begins
async def end_without_a_finish(reply: Reply) -> None:
    await reply.end()


@mode("garbage")
@begins
async def break_the_json(reply: Reply) -> None:
    await reply.chunk(reply.api.broken(reply.call))
    await reply.finish()


@mode("non-utf8")
@begins
async def break_the_encoding(reply: Reply) -> None:
    await reply.chunk(b"data: {\xff\xfe\xff}\n\n")
    await reply.finish()


@mode("html200")
async def page(reply: Reply) -> None:
    await reply.head(kind="text/html; charset=utf-8")
    await reply.chunk(f"<!doctype html>\n<title>Sign in</title>\n\n<p>{CANARY}</p>\n".encode())
    await reply.end()


@mode("json200")
async def error_with_a_good_status(reply: Reply) -> None:
    await reply.refuse(200, "server_error")


@mode("empty200")
async def nothing(reply: Reply) -> None:
    await reply.head()
    await reply.end()


@mode("error-event")
@begins
async def error_in_the_stream(reply: Reply) -> None:
    await reply.chunk(reply.api.error_event("overloaded_error"))
    await reply.end()


@mode("huge")
@begins
async def one_huge_event(reply: Reply) -> None:
    await reply.chunk(reply.api.text(reply.call, "x" * HUGE))
    await reply.finish()


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


class Vendors:
    """The server, in a thread with a loop of its own so that the code under test cannot slow it down."""

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self.calls: list[Call] = []
        self._asked: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(5):
            raise RuntimeError(f"nothing listens on port {self.port}")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join(5)

    @property
    def url(self) -> str:
        """What an Anthropic client takes as its base; an OpenAI client wants `/v1` behind it."""
        return f"http://127.0.0.1:{self.port}"

    def count(self, prompt: str) -> int:
        """How many calls had `prompt` as their last user message."""
        return self._asked[prompt]

    def reset(self) -> None:
        with self._changed:
            self.calls.clear()
            self._asked.clear()

    def wait(self, true_of: Callable[[Call], object], timeout: float = 5) -> Call:
        """Block until a call is as wanted (use `asyncio.to_thread`). Raises `TimeoutError`."""
        with self._changed:
            if self._changed.wait_for(lambda: any(map(true_of, self.calls)), timeout):
                return next(filter(true_of, self.calls))
        raise TimeoutError(f"expected such a call within {timeout} s, got {[call.mode for call in self.calls]}")

    async def _serve(self) -> None:
        self._loop, self._leave = asyncio.get_running_loop(), asyncio.Event()
        self._open: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._leave.wait()
        server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connection(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, then the end: with no second request on it, all that can be read after it is a hang-up."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._route(await read_request(reader), reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def _route(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, path, headers, body = request
        key = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        match method, path:
            case "POST", "/v1/chat/completions":
                await self._play(Reply(self._called("openai", key, body), OpenAI(), reader, writer))
            case "POST", "/v1/messages":
                await self._play(Reply(self._called("anthropic", key, body), Anthropic(), reader, writer))
            case "GET", "/v1/models":
                models = [{"id": f"fake-{name}", "object": "model", "owned_by": "fake"} for name in MODES]
                await send_json(writer, {"object": "list", "data": models})
            case "GET", "/calls":
                told = {"calls": [asdict(call) for call in self.calls], "counts": dict(self._asked)}
                await send_json(writer, told)
            case "POST", "/reset":
                self.reset()
                await send_json(writer, {})
            case _:
                await send_json(writer, {"error": f"no {method} {path} here"}, 404)

    def _called(self, api: str, key: str, body: bytes) -> Call:
        request = json.loads(body)
        prompt = last_user_text(request["messages"])
        asked = directives(prompt, request["model"])
        with self._changed:
            self._asked[prompt] += 1
            if self._asked[prompt] > int(asked.get("times", "1000000000")):
                asked["mode"] = "ok"
            call = Call(
                number=len(self.calls),
                api=api,
                model=request["model"],
                prompt=prompt,
                id=asked.get("id", f"{zlib.crc32(prompt.encode()):08x}"),
                mode=asked["mode"],
                after=int(asked.get("after", "5")),
                tokens=int(asked.get("tokens", "20")),
                pace=float(asked.get("pace", "0.1" if asked["mode"] == "slow" else "0")),
                key=key,
                body=request,
                started=time.monotonic(),
            )
            self.calls.append(call)
            self._changed.notify_all()
        return call

    async def _play(self, reply: Reply) -> None:
        """Run the mode until it ends or the client hangs up, whichever is first, and write down which."""
        playing = asyncio.create_task(MODES[reply.call.mode](reply))
        watching = asyncio.create_task(reply.reader.read(1))
        try:
            await asyncio.wait({playing, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left = not playing.done() or isinstance(playing.exception(), ConnectionError)
            for task in (playing, watching):
                task.cancel()
            await asyncio.gather(playing, watching, return_exceptions=True)
            with self._changed:
                setattr(reply.call, "hung_up" if left else "ended", time.monotonic())
                self._changed.notify_all()
        if not left:
            playing.result()  # a mistake in a mode should be seen, not look like a rude vendor


async def read_request(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, path, _ = head[0].split(" ")
    pairs = (line.partition(":") for line in head[1:] if line)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    return method, path.partition("?")[0], headers, await reader.readexactly(int(headers.get("content-length", "0")))


async def send_json(writer: asyncio.StreamWriter, value: object, status: int = 200) -> None:
    body = json.dumps(value).encode()
    head = f"HTTP/1.1 {status} Whatever\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    writer.write(head.encode() + b"connection: close\r\n\r\n" + body)
    await writer.drain()


def last_user_text(messages: list[dict[str, Any]]) -> str:
    """The last thing the user said; both APIs also allow a list of parts."""
    content = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def directives(prompt: str, model: str) -> dict[str, str]:
    found = DIRECTIVE.search(prompt)
    asked = dict(word.split(":", 1) for word in found[1].split() if ":" in word) if found else {}
    name = asked.get("mode") or model.removeprefix("fake-")
    return {**asked, "mode": name if name in MODES else "ok"}


def main() -> None:
    parser = argparse.ArgumentParser(description="A model vendor on loopback that misbehaves on request.")
    parser.add_argument("--port", type=int, default=0)
    with Vendors(parser.parse_args().port) as vendors:
        print(vendors.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
