"""Nonsense for the service as the Procfile starts it: requests over its table of routes, raw frames on its sockets.

    python -m tests.fuzz [requests|frames …] [--minutes 20] [--seed 1]

prints a line a minute: what was sent, how it was answered, what the process holds. Exit status 1: a 5xx (but for a
vendor's own failure on /v1), a socket closed with 1011, a traceback, or something that is not given back.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import consumers
import routes
from tests.floods import GROWTH, HOST, PRODUCTION, UPGRADE, real_model
from tests.harness.api import Guest, guest, new_session, post_turn, ticket
from tests.harness.servers import Postgres, Redis
from tests.harness.service import SHORT, Service
from tests.vendors import Vendors

ROUNDS = 4  # guests that send at once
SENT = 40  # requests or frames of one guest
NASTY = ["", " ", "x" * 3000, "\u0000", "\ud800", "‮\u2028", "{}", "../../etc/passwd", "%00", "' OR 1=1 --", "-1", "1e999", "é" * 64]
WORDS = ["random", "direct", "compare", "json", "markdown", "tie", "model_a", "preference", "report", "user", "assistant"]
# every field that a body, a query or a frame may have, and some more
FIELDS = (
    "id session_id session_type mode model model_a_id model_b_id title metadata content messages role parts text type temperature"
    " max_tokens stream stream_options stop n display_name preferences refresh is_pinned is_public feedback_type preference"
    " rating comment categories message_id threadId runId trigger messageId offset before after limit search period format"
    " ticket token share_token anonymous_token cursor requestId is_typing timestamp message body forwardedProps state tools"
).split()
NAMES = (
    "Authorization X-Anonymous-Token Cookie Origin Host Accept Content-Type Last-Event-ID X-Forwarded-For Upgrade Expect"
    " Content-Length Transfer-Encoding Connection Access-Control-Request-Method Access-Control-Request-Headers Range"
).split()
TYPES = "ping test message stop typing_indicator request_state resume auth send abort"
BODIES: dict[str, dict[str, Any]] = {  # a good one of each route, to be spoiled
    "/api/auth/refresh": {"refresh": "{refresh}"},
    "/api/users/me": {"display_name": "Ann", "preferences": {"a": 1}},
    "/api/sessions": {"mode": "direct", "model_a_id": "{model}", "title": "t", "metadata": {}},
    "/api/sessions/{session_id}": {"title": "t", "is_public": True},
    "/api/messages/stream": {"session_id": "{session_id}", "content": "hello", "id": "m1"},
    "/api/feedback": {"session_id": "{session_id}", "message_id": "{message_id}", "feedback_type": "rating", "rating": 3},
    "/api/chat": {"id": "{session_id}", "messages": [{"id": "u", "role": "user", "parts": [{"type": "text", "text": "hi"}]}]},
    "/api/ag-ui": {"threadId": "{session_id}", "runId": "r", "messages": [{"id": "u", "role": "user", "content": "hi"}]},
    "/v1/chat/completions": {"model": "{model}", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5},
}
FRAMES: list[dict[str, Any]] = [
    {"type": "ping", "timestamp": 1},
    {"type": "message", "content": "hello"},
    {"type": "typing_indicator", "is_typing": True},
    {"type": "resume", "cursor": "x.1.2"},
    {"type": "send", "requestId": "r", "id": "{session_id}", "messages": BODIES["/api/chat"]["messages"]},
    {"type": "auth", "token": "{access}"},
]


class Nonsense:
    """Draws what is sent. Half of it is nearly right: nonsense alone would get no further than a parser."""

    def __init__(self, chance: random.Random, known: dict[str, str]) -> None:
        self.chance = chance
        self.known = known  # `session_id`, `access` and the like → ones that are good

    def value(self, depth: int = 0) -> Any:
        pick = self.chance
        if depth < 3 and pick.random() < 0.3:
            many = range(pick.choice([0, 1, 2, 40]))
            return [self.value(depth + 1) for _ in many] if pick.random() < 0.5 else self.object(depth + 1)
        return pick.choice([None, True, -1, 0, 2**63, 10**400, 0.5, pick.choice(NASTY), pick.choice(WORDS), self.good()])

    def object(self, depth: int = 0) -> dict[str, Any]:
        return {self.chance.choice(FIELDS): self.value(depth) for _ in range(self.chance.randrange(5))}

    def good(self) -> str:
        return self.chance.choice(list(self.known.values()))

    def filled(self, text: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda found: self.known.get(found[1], found[0]), text)

    def spoiled(self, good: dict[str, Any]) -> bytes:
        """The good object as JSON, with as many things wrong as it happens."""
        found = json.loads(self.filled(json.dumps(good)))
        for _ in range(self.chance.choice([0, 0, 1, 1, 2])):
            found[self.chance.choice([*found, *FIELDS])] = self.value()
        text = self.chance.choice([json.dumps, lambda it: json.dumps(it, ensure_ascii=False)])(found)
        data = bytearray(text.encode("utf-8", "surrogatepass"))
        if self.chance.random() < 0.15 and data:
            for _ in range(self.chance.randrange(1, 4)):
                data[self.chance.randrange(len(data))] = self.chance.randrange(256)
        return bytes(data[: self.chance.randrange(len(data) + 1)] if self.chance.random() < 0.05 else data)

    # -- requests

    def request(self) -> tuple[str, bytes]:
        """A route's path, and the bytes of a request that is more or less for it."""
        pick = self.chance
        route = pick.choice(routes.table)
        method = pick.choice(sorted(route.methods or ())) if pick.random() < 0.9 else pick.choice(["PUT", "OPTIONS", "BREW"])
        path = self.filled(route.path) if pick.random() < 0.7 else re.sub(r"\{\w+\}", lambda _: self.escaped(), route.path)
        query = "&".join(f"{pick.choice(FIELDS)}={self.escaped()}" for _ in range(pick.choice([0, 0, 1, 3])))
        if "{session_id}" not in route.path and pick.random() < 0.5:
            query += self.filled("&session_id={session_id}")
        headers = [("Host", "localhost"), ("Connection", "close")]
        if pick.random() < 0.8:
            headers.append(("Authorization", "Bearer " + self.known["access"]))
        headers += [(pick.choice(NAMES), pick.choice([*NASTY, self.good(), *WORDS])) for _ in range(pick.choice([0, 0, 1, 2]))]
        body = b""
        if method != "GET" and pick.random() < 0.9:
            body = self.spoiled(BODIES.get(route.path, {})) if pick.random() < 0.8 else pick.randbytes(pick.randrange(300))
            headers.append(("Content-Length", str(len(body))))
        lines = [f"{method} {path}?{query} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
        return route.path, "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass") + body

    def escaped(self) -> str:
        text = self.chance.choice([*NASTY, *WORDS, self.good(), "0", "99", "0" * 64]).encode("utf-8", "surrogatepass")
        return "".join(chr(byte) if chr(byte).isalnum() or byte in b"-_.{}'" else f"%{byte:02X}" for byte in text)

    # -- frames

    def frames(self) -> bytes:
        """Some frames; in half of all cases without a broken one, which ends the socket, among them."""
        broken = self.chance.random() < 0.5
        return b"".join([self.frame(broken) for _ in range(self.chance.randrange(1, 12))])

    def frame(self, broken: bool) -> bytes:
        """A frame that is more or less one: https://www.rfc-editor.org/rfc/rfc6455#section-5.2"""
        pick = self.chance
        payload = self.spoiled(pick.choice([*FRAMES, {"type": pick.choice(TYPES.split())}]))[:65_535]
        if not broken:
            size = struct.pack("!BH", 0xFE, len(payload)) if len(payload) > 125 else bytes([0x80 | len(payload)])
            return b"\x81" + size + b"\0\0\0\0" + payload
        if pick.random() < 0.1:
            payload = pick.choice([b"", pick.randbytes(pick.randrange(200)), b"\x03\xe8bye", b"\xff\xfe", b"x" * 70_000])
        odd = pick.random() < 0.2
        first = pick.randrange(256) if odd else pick.choice([0x81, 0x81, 0x81, 0x81, 0x01, 0x80, 0x89, 0x8A, 0x88])
        length = len(payload) if pick.random() < 0.97 else pick.choice([0, 1, 125, 126, 65_535, 2**31, 2**63 - 1])
        masked = 0x80 if pick.random() < 0.97 else 0
        if length < 126:
            head = bytes([first, masked | length])
        elif length < 65_536:
            head = bytes([first, masked | 126]) + struct.pack("!H", length)
        else:
            head = bytes([first, masked | 127]) + struct.pack("!Q", length)
        return head + b"\0\0\0\0" * bool(masked) + payload


class Fuzz:
    """A run against one service, and what became of it."""

    def __init__(self, service: Service, seed: int) -> None:
        self.service = service
        self.seed = seed
        self.answers: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def requests(self, nonsense: Nonsense) -> None:
        path, said = nonsense.request()
        answer = await self._said(said, 0.3 if nonsense.chance.random() < 0.9 else 0.001)
        found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
        status = found[1].decode() if found else "nothing"
        self.answers[status] += 1
        vendors_own = path.startswith("/v1/") and status in ("502", "504")
        if status.startswith("5") and not vendors_own:
            self.wrong.append(f"{said[:600]!r} was answered {answer[:600]!r}")

    async def frames(self, nonsense: Nonsense) -> None:
        """A socket, and some frames; at its end either side leaves."""
        pick = nonsense.chance
        path = nonsense.filled(consumers.table[0].path)
        credential = f"Authorization: Bearer {nonsense.known['access']}\r\n" if pick.random() < 0.9 else ""
        frames = nonsense.frames()
        answer = await self._said(f"GET {path} HTTP/1.1\r\n{credential}".encode() + UPGRADE, 0.3, frames)
        closed = re.search(rb"\x88[\x02-\x7d]([\x03-\x13].)[ -~]*\Z", answer, re.DOTALL)
        code = str(int.from_bytes(closed[1], "big")) if closed else "open" if b" 101 " in answer else "refused"
        self.answers[code] += 1
        if code == "1011":
            self.wrong.append(f"{frames[:600]!r} closed the socket with 1011")

    async def _said(self, first: bytes, patience: float, then: bytes = b"") -> bytes:
        """What is answered within so many seconds, then we leave."""
        reader, writer = await asyncio.open_connection(HOST, self.service.ports[0])
        answer = b""
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(patience):
                writer.write(first)
                if then:
                    answer = await reader.readuntil(b"\r\n\r\n")
                    half = len(then) // 2
                    for part in (then[:half], then[half:]):
                        writer.write(part)
                        await writer.drain()
                while part := await reader.read(65_536):
                    answer = (answer + part)[-100_000:] if then else (answer + part)[:100_000]
        writer.transport.abort()
        return answer

    async def run(self, kind: str, seconds: float) -> None:
        send: Callable[[Nonsense], Awaitable[None]] = getattr(self, kind)
        until = time.monotonic() + seconds

        async def rounds(n: int) -> None:
            chance = random.Random(f"{self.seed} {kind} {n}")
            while time.monotonic() < until:
                nonsense = Nonsense(chance, await known(self.service.url))
                for _ in range(SENT):
                    await send(nonsense)

        await asyncio.gather(*[rounds(n) for n in range(ROUNDS)])

    async def quiet(self) -> dict[str, float]:
        """What the service holds when nobody is there."""
        held: dict[str, float] = {}
        async with asyncio.timeout(30):
            while not held or held != self.service.resources():
                held = self.service.resources()
                await asyncio.sleep(1)
        return held

    async def judged(self, kind: str, seconds: float, slice: float = 60.0) -> list[str]:
        """Send for so long, a first slice of which warms up; return all that was wrong."""
        began, before = time.monotonic(), None
        while (left := began + seconds - time.monotonic()) > 0:
            await self.run(kind, min(slice, left))
            held = await self.quiet()
            before = before or held
            said = ", ".join(f"{name} {count}" for name, count in sorted(self.answers.items()))
            print(f"{kind}: {said}; {held['rss'] / 1e6:.1f} MB, {held['fds']:.0f} descriptors", flush=True)
        if before is not None and held["rss"] - before["rss"] > GROWTH:
            self.wrong.append(f"it grew from {before['rss'] / 1e6:.1f} to {held['rss'] / 1e6:.1f} MB")
        if before is not None and held["fds"] > before["fds"] + 2:
            self.wrong.append(f"it held {before['fds']:.0f} descriptors and then {held['fds']:.0f}")
        if "Traceback" in (log := self.service.log()):
            self.wrong.append(log[log.index("Traceback") - 500 :][:3000])
        return self.wrong


async def known(base: str) -> dict[str, str]:
    """A new guest's own things, by the names that routes and bodies have for them."""
    someone: Guest = await guest(base)
    session = await new_session(base, someone.access)
    turn = await post_turn(base, someone.access, session["id"], "hello")
    return {
        "session_id": session["id"],
        "message_id": turn.events[0]["message"]["id"],
        "model": session["model_a"]["id"],
        "model_id": session["model_a"]["id"],
        "access": someone.access,
        "refresh": someone.refresh,
        "ticket": await ticket(base, someone.access),
    }


# limits out of the way: they would answer nearly all of it
ENVIRONMENT = PRODUCTION | {name: value for name, value in SHORT.items() if "_PER_" in name or "DAILY" in name}


async def main(kinds: list[str], minutes: float, seed: int) -> bool:
    failed = False
    with Postgres() as postgres, Redis() as redis, Vendors() as vendors:
        given = ENVIRONMENT | real_model(vendors) | {"REDIS_URL": redis.url, "DATABASE_URL": postgres.create_database()}
        async with Service(given, server="serve") as service:
            for kind in kinds:
                wrong = await Fuzz(service, seed).judged(kind, minutes * 60)
                print("\n".join(wrong) if wrong else f"{kind}: nothing wrong")
                failed |= bool(wrong)
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=["requests", "frames"], help="requests, frames")
    parser.add_argument("--minutes", type=float, default=20.0, help="of each")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    sys.exit(asyncio.run(main(options.kinds, options.minutes, options.seed)))
