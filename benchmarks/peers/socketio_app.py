"""python-socketio with its Redis manager: a room a session."""

import os
from urllib.parse import parse_qs

import socketio
import writer
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

sio = socketio.AsyncServer(
    async_mode="asgi", client_manager=socketio.AsyncRedisManager(os.environ["REDIS_URL"]), cors_allowed_origins="*"
)


@sio.event
async def connect(sid, environ):
    await sio.enter_room(sid, parse_qs(environ["QUERY_STRING"])["session"][0])


async def publish(session, event):
    await sio.emit("message_chunk", event, room=session)


async def write(request):
    app.state.writer = writer.start(publish, request.url.query)
    return PlainTextResponse("writing")


app = Starlette(routes=[Route("/write", write)])
asgi = socketio.ASGIApp(sio, app)
