"""The smallest relay of a model's stream: Starlette and httpx, nothing stored, nothing checked, a reader an answer."""

import json
import os

import httpx
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
client = httpx.AsyncClient(base_url=os.environ["UPSTREAM"], timeout=60, limits=limits)


async def health(request):
    return JSONResponse({"status": "healthy"})


async def completions(request):
    asked = await request.json()

    async def tokens():
        async with client.stream("POST", "/v1/chat/completions", json=asked) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:])["choices"]
                    if choices and (text := choices[0]["delta"].get("content")):
                        yield f"data: {json.dumps({'text': text})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(tokens(), media_type="text/event-stream")


app = Starlette(routes=[Route("/api/health/", health), Route("/v1/chat/completions", completions, methods=["POST"])])
