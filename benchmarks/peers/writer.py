"""The writer of the Python peers: it makes the tokens of S1, S2 and S3 and knows nothing of how they travel.

`publish` is the peer's own publish call. A token is what the service would send: one JSON event of about 230 bytes.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qs

# A writer that runs behind by more than this drops the rest, so that an overloaded peer's phase ends at all.
LATE = 1.0

TURN = "0197f7c2-54a1-7d3e-9c0b-6a1f2e3d4c5b"
REPLY = "0197f7c2-54a2-7b61-8f12-0d9e8c7b6a5f"

Publish = Callable[[str, dict], Awaitable[None]]


def event(n: int, pad: int = 0) -> dict:
    """One token as an event; the marker carries its number and the moment it was written."""
    marker = f"⟨{n}:{time.monotonic_ns() // 1000}⟩ "
    return {
        "type": "message_chunk",
        "turn_id": TURN,
        "seq": n,
        "message_id": REPLY,
        "participant": "a",
        "chunk": marker + "x" * pad,
        "requestId": TURN,
    }


async def write(publish: Publish, sessions: int, rate: float, seconds: float, pad: int = 0) -> None:
    """Write `rate` tokens a second into each of the sessions, each in its own task, evenly out of step."""
    tasks = [
        pace(publish, f"s{i}", time.monotonic() + i / sessions / rate, rate, round(rate * seconds), pad)
        for i in range(sessions)
    ]
    await asyncio.gather(*tasks)


async def pace(publish: Publish, session: str, start: float, rate: float, count: int, pad: int) -> None:
    for n in range(count):
        wait = start + n / rate - time.monotonic()
        if wait < -LATE:
            return
        if wait > 0:
            await asyncio.sleep(wait)
        try:
            await publish(session, event(n, pad))
        except Exception as error:  # a user's task would lose this token too; the client counts it
            print(f"publish failed: {error!r}", flush=True)


def start(publish: Publish, query: str) -> asyncio.Task:
    """Start writing as the query of `GET /write?sessions=&rate=&seconds=&pad=` says."""
    given = {name: float(values[0]) for name, values in parse_qs(query).items()}
    return asyncio.ensure_future(
        write(publish, int(given["sessions"]), given["rate"], given["seconds"], int(given.get("pad", 0)))
    )
