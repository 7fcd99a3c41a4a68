"""A model vendor that only streams: OpenAI's chat completions and Anthropic's messages, of any length and pace.

The last message says `/count <tokens> <per second>`, as to Parley's demo model, and is answered with
`⟨0:<µs of CLOCK_MONOTONIC>⟩ ⟨1:…⟩ …`, an event a token of the size the vendors send, at that pace from the request on.
"""

import asyncio
import json
import os
import time

import uvloop

FRAME = {"id": "chatcmpl-Bq1nXk2", "object": "chat.completion.chunk", "created": 1_790_000_000, "model": "m"}
FRAME |= {"service_tier": "default", "system_fingerprint": "fp_0123456789"}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(delta: dict, reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return "data: " + json.dumps({**FRAME, "choices": [choice]}, ensure_ascii=False) + "\n\n"


def event(name: str, **data: object) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data}, ensure_ascii=False)}\n\n"


def openai(count: int) -> tuple[str, str, str]:
    usage = {"prompt_tokens": 9, "completion_tokens": count, "total_tokens": count + 9}
    counted = "data: " + json.dumps({**FRAME, "choices": [], "usage": usage}) + "\n\n"
    start = chunk({"role": "assistant", "content": "", "refusal": None})
    return start, chunk({"content": "@@"}), chunk({}, "stop") + counted + "data: [DONE]\n\n"


def anthropic(count: int) -> tuple[str, str, str]:
    message = {"id": "msg_01", "type": "message", "role": "assistant", "model": "m", "content": []}
    message |= {"stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 9, "output_tokens": 1}}
    start = event("message_start", message=message)
    start += event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    token = event("content_block_delta", index=0, delta={"type": "text_delta", "text": "@@"})
    end = event("content_block_stop", index=0)
    end += event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": count})
    return start, token, end + event("message_stop")


class Connection(asyncio.Protocol):
    """One request after the other on a connection that is kept."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport, self.received, self.timer = transport, b"", None

    def connection_lost(self, problem: Exception | None) -> None:
        if self.timer:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, separator, body = self.received.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
        if not separator or len(body) < length:
            return
        self.received = body[length:]
        *_, count, rate = json.loads(body[:length])["messages"][-1]["content"].split()
        self.count, self.rate, self.said = int(count), float(rate), 0
        start, self.token, self.end = (anthropic if b"/messages " in lines[0] else openai)(self.count)
        self.begun = LOOP.time()
        self.transport.write(HEAD)
        self.write(start)
        self.speak()

    def write(self, text: str) -> None:
        data = text.encode()
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def speak(self) -> None:
        """Say all that is due, then wait for the next."""
        while self.said < self.count:
            due = self.begun + self.said / self.rate
            if due > LOOP.time():
                self.timer = LOOP.call_at(due, self.speak)
                return
            last = self.said == self.count - 1
            text = f"⟨{self.said}:{time.monotonic_ns() // 1000}⟩{'' if last else ' '}"
            self.write(self.token.replace("@@", text))
            self.said += 1
        self.write(self.end)
        self.transport.write(b"0\r\n\r\n")


async def main() -> None:
    global LOOP
    LOOP = asyncio.get_running_loop()
    server = await LOOP.create_server(Connection, "127.0.0.1", int(os.environ["PORT"]), backlog=2048)
    await server.serve_forever()


uvloop.run(main())
