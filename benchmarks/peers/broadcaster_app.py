"""broadcaster over Redis on Starlette, as its README shows: one task and one subscription a socket."""

import contextlib
import json
import os

import anyio
import writer
from broadcaster import Broadcast
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute

broadcast = Broadcast(os.environ["REDIS_URL"])


async def chat(websocket):
    await websocket.accept()
    async with anyio.create_task_group() as group:

        async def run_receiver():
            async for _ in websocket.iter_text():
                pass
            group.cancel_scope.cancel()

        group.start_soon(run_receiver)
        async with broadcast.subscribe(channel=websocket.path_params["session"]) as subscriber:
            async for event in subscriber:
                await websocket.send_text(event.message)


async def publish(session, event):
    await broadcast.publish(channel=session, message=json.dumps(event))


async def write(request):
    app.state.writer = writer.start(publish, request.url.query)
    return PlainTextResponse("writing")


@contextlib.asynccontextmanager
async def lifespan(app):
    await broadcast.connect()
    yield
    await broadcast.disconnect()


app = Starlette(routes=[Route("/write", write), WebSocketRoute("/ws/{session}", chat)], lifespan=lifespan)
