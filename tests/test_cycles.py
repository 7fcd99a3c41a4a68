"""What a request leaves behind in its process: nothing that only the garbage collector could take away."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from websockets.asyncio.client import ClientConnection

from chat.live.answers import Answer
from chat.live.generation import Turn
from chat.live.rooms import Follower, Room
from chat.live.voice import Voice
from chat.settings import read_settings
from consumers.ai_sdk import Requests
from consumers.session import Conversation
from servers import DirectProtocol, HeadProtocol
from tests.conftest import CLOSED
from tests.harness.api import guest, http, new_session, post_turn
from tests.harness.processes import HOST, Port
from tests.sockets import hear, plain

KINDS = (HeadProtocol, RequestResponseCycle, DirectProtocol, Conversation, Requests)
KINDS += (Room, Follower, Answer, Voice, Turn)


@asynccontextmanager
async def _served(folder: Path, patch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """The service as it starts itself, in this process."""
    for name in [name for name in os.environ if name.startswith("PARLEY_")]:
        patch.delenv(name)  # the tests' own are no settings, and the module reads them when it is imported
    service = importlib.import_module("service")
    environment = {"DATABASE_URL": f"sqlite:///{folder / 'parley.db'}", "PARLEY_TURNS_PER_ACCOUNT": "9"}
    settings = read_settings(environ=CLOSED | environment)
    port = int(Port())
    config = uvicorn.Config(
        service.create_app(settings), HOST, port, http=HeadProtocol, ws=DirectProtocol, log_level="error"
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://{HOST}:{port}"
    finally:
        server.should_exit = True
        await running


async def test_requests_streams_and_sockets_leave_no_cycle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with _served(tmp_path, monkeypatch) as url:
        someone = await guest(url)
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                session_id = (await new_session(url, someone.access))["id"]
                async with http(url) as client:
                    assert (await client.get("/livez")).status_code == 200
                await post_turn(url, someone.access, session_id, "/count 3")
                async with plain(url, session_id, someone.access) as opened:
                    await hear(opened, "session_state")
                    await _ask_as_the_ai_sdk_does(opened, session_id)
            async with asyncio.timeout(5):
                while alive := _alive():
                    await asyncio.sleep(0.05)
        except TimeoutError:
            pytest.fail(f"still there: {alive}")
        finally:
            gc.enable()


async def _ask_as_the_ai_sdk_does(opened: ClientConnection, session_id: str) -> None:
    """A turn to its end, and one that goes on after its socket."""
    for number, last in enumerate(("end", "chunk")):
        said = [{"role": "user", "parts": [{"type": "text", "text": f"/count {3 + 30 * number}"}]}]
        await opened.send(json.dumps({"type": "send", "requestId": "r", "id": session_id, "messages": said}))
        async with asyncio.timeout(5):
            while json.loads(await opened.recv())["type"] != last:
                pass


def _alive() -> list[str]:
    return [type(each).__name__ for each in gc.get_objects() if type(each) in KINDS]
