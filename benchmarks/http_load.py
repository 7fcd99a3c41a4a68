"""The HTTP load client: reads one job as JSON on its input, prints one JSON object.

    {"kind": "once",    "port", "requests", "connections"}            every request once; the answers' bodies
    {"kind": "rate",    "port", "requests", "connections", "seconds"} in turn for so long; how many a second
    {"kind": "streams", "port", "requests", "tokens", "probe", "spread"}  all within `spread` seconds, each read to its
                                                                      end and checked

A request is [method, path, headers, body or null]. `streams` also asks for the path `probe` twenty times a second:
how long that takes is how long the server's loop was busy with something else. Where tokens carry the time at which
they were written, `late` is how long each took to get here.
"""

import asyncio
import contextlib
import json
import re
import sys
import time

MARKER = re.compile(rb"(?:\xe2\x9f\xa8|\\u27e8)(\d+)(?::(\d+))?(?:\xe2\x9f\xa9|\\u27e9)")
PATIENCE = 120  # seconds until a stream that has not ended counts as incomplete


def wire(request: list, keep: bool = True) -> bytes:
    method, path, headers, body = request
    body = b"" if body is None else json.dumps(body).encode()
    headers = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": len(body), **headers}
    headers["Connection"] = "keep-alive" if keep else "close"
    head = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """The status and the body of one answer on a connection that is kept."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = re.search(rb"content-length: (\d+)", head)
    if length:
        return int(head.split()[1]), await reader.readexactly(int(length[1]))
    body = b""
    while size := int(await reader.readline(), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readline()
    return int(head.split()[1]), body


def quantiles(seconds: list[float]) -> dict:
    ordered = sorted(seconds) or [0.0]
    return {
        "p50_ms": round(ordered[len(ordered) // 2] * 1000, 2),
        "p99_ms": round(ordered[int(len(ordered) * 0.99)] * 1000, 2),
        "max_ms": round(ordered[-1] * 1000, 2),
    }


async def once(port: int, requests: list, connections: int) -> dict:
    waiting = list(enumerate(requests))[::-1]
    answers: list = [None] * len(requests)

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while waiting:
            i, request = waiting.pop()
            writer.write(wire(request))
            status, body = await answer(reader)
            answers[i] = [status, json.loads(body) if body else None]
        writer.close()

    await asyncio.gather(*(connection() for _ in range(connections)))
    return {"answers": answers}


async def rate(port: int, requests: list, connections: int, seconds: float) -> dict:
    data = [wire(request) for request in requests]
    took: list[float] = []
    errors = 0
    begun = time.monotonic()

    async def connection(i: int) -> None:
        nonlocal errors
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (asked := time.monotonic()) < begun + seconds:
            writer.write(data[i % len(data)])
            i += connections
            status, _ = await answer(reader)
            took.append(time.monotonic() - asked)
            errors += status >= 400
        writer.close()

    await asyncio.gather(*(connection(i) for i in range(connections)))
    return {"answers": len(took), "per_second": len(took) / seconds, "errors": errors, **quantiles(took)}


async def streams(port: int, requests: list, tokens: int, probe: str, spread: float = 0) -> dict:
    late: list[float] = []
    first: list[float] = []
    broken: list[list] = []
    complete = 0

    async def stream(i: int, request: list) -> None:
        nonlocal complete
        await asyncio.sleep(spread * i / len(requests))
        asked, received, numbers, place = time.monotonic(), bytearray(), [], 0
        with contextlib.suppress(OSError, asyncio.TimeoutError):  # counted: it is not complete
            async with asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(wire(request, keep=False))
                while data := await reader.read(65536):
                    now = time.monotonic()
                    received += data
                    for found in MARKER.finditer(received, place):
                        place = found.end()
                        if not numbers:
                            first.append(now - asked)
                        numbers.append(int(found[1]))
                        if found[2]:
                            late.append(now - int(found[2]) / 1e6)
                writer.close()
        whole = numbers == list(range(tokens))
        complete += whole
        if not whole and not broken:
            broken.append(request)
            print(f"  the first incomplete stream: {bytes(received[:300])} … {bytes(received[-300:])}", file=sys.stderr)

    async def look() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while True:
            asked = time.monotonic()
            writer.write(wire(["GET", probe, {}, None]))
            await answer(reader)
            lags.append(time.monotonic() - asked)
            await asyncio.sleep(0.05)

    lags: list[float] = []
    begun = time.monotonic()
    looking = asyncio.create_task(look())
    await asyncio.gather(*(stream(i, request) for i, request in enumerate(requests)))
    looking.cancel()
    lag = {f"lag_{name}": value for name, value in quantiles(lags).items()}
    lag |= {f"late_{name}": value for name, value in quantiles(late).items()}
    result = {"streams": len(requests), "complete": complete, "seconds": time.monotonic() - begun}
    return {**result, **quantiles(first), **lag}


def main() -> None:
    job = json.load(sys.stdin)
    work = {"once": once, "rate": rate, "streams": streams}[job.pop("kind")]
    try:
        from uvloop import new_event_loop
    except ImportError:  # only slower
        new_event_loop = asyncio.new_event_loop
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        json.dump(runner.run(work(**job)), sys.stdout)


if __name__ == "__main__":
    main()
