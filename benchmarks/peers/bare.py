"""A Starlette app with nothing in it: what `/api/health/` and a streamed answer cost before anything is done."""

import asyncio
import time

from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route


async def health(request):
    return JSONResponse({"status": "healthy", "container_type": "asgi", "async_enabled": True})


async def stream(request):
    body = await request.json()
    count, rate = body["tokens"], body["rate"]

    async def tokens():
        start = time.monotonic()
        for n in range(count):
            await asyncio.sleep(max(0, start + n / rate - time.monotonic()))
            yield f'a0:"⟨{n}⟩ "\n'
        yield 'ad:{"finishReason":"stop"}\n'

    return StreamingResponse(tokens(), media_type="text/plain; charset=utf-8")


app = Starlette(routes=[Route("/api/health/", health), Route("/api/messages/stream/", stream, methods=["POST"])])
