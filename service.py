"""Parley, wired: settings in, ASGI application out. A server is given `app`; `commands.py` is the command line."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

import consumers
import routes
import servers
from chat.direct import EXTENSION
from chat.errors import ChatError, StartupError
from chat.settings import Settings
from chat.state import State, open_state
from routes.gate import Gate, refuse
from routes.inputs import error_answer

log = logging.getLogger("parley")


def create_app(settings: Settings) -> Service:
    """The service for these settings. The service opens its resources at startup, or else at the first request."""
    return Service(settings)


class Service(Starlette):
    """A Starlette application that starts itself: Daphne runs no lifespan, and a failed start is one line."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(
            routes=[*routes.table, *consumers.table],
            exception_handlers={ChatError: _chat_error, 405: _not_allowed, Exception: _any_error},
        )
        self.router.redirect_slashes = False
        self.router.default = _nothing_here
        self.settings = settings
        # Outermost: Starlette's own answers pass the gate, too. Starlette's middleware does nothing for a socket and
        # would stay on its stack as long as it lives.
        self.gate = Gate(super().__call__, self.router, settings)
        self.chat: State | None = None
        self._starting = asyncio.Lock()
        self._stack = AsyncExitStack()
        self._alone = False  # started without lifespan

    async def ensure_started(self, *, alone: bool = False) -> State:
        """Open everything, once; `alone` where no lifespan will say when to close it. Raises `StartupError`."""
        async with self._starting:
            if self.chat is None:
                try:
                    self.chat = await open_state(self.settings, self._stack)
                except BaseException:
                    await self._stack.aclose()
                    raise
                servers.calm_the_collector()
                self._alone = alone
                if alone:
                    servers.end_first(self._stack.aclose)
            return self.chat

    def begin_drain(self) -> None:
        """Give running answers their last seconds: called by a server that waits for its requests before it ends."""
        if self.chat is not None:
            self.chat.generation.begin_drain()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        try:
            await self._answer(scope, receive, send)
        finally:
            # The extension refers to the scope: a whole request would stay in memory until a collection, which is rare.
            scope.get("extensions", {}).pop(EXTENSION, None)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            chat = self.chat or await self.ensure_started(alone=True)
        except StartupError as problem:
            log.error("%s", problem)
            await refuse(ChatError("storage_unavailable", "The service could not start yet."), scope, receive, send)
            return
        scope.setdefault("state", {})["chat"] = chat
        await self.gate(scope, receive, servers.closing(send) if self._alone and scope["type"] == "websocket" else send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        failure = ""
        try:
            await self.ensure_started()
        except StartupError as problem:
            failure = f"parley: {problem}"
        except Exception:  # a server takes an exception here for "knows no lifespan" and goes on without us
            log.exception("the service could not start")
            failure = "parley: the service could not start"
        if failure:
            await send({"type": "lifespan.startup.failed", "message": failure})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._stack.aclose()
        await send({"type": "lifespan.shutdown.complete"})


# -- errors: every one leaves in the same shape


async def _chat_error(connection: Any, problem: Exception) -> Response:
    assert isinstance(problem, ChatError)
    return error_answer(problem, connection.scope["path"])


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer where no route is. Starlette refuses a socket there with 403, as a page that may not call is refused."""
    problem = ChatError("not_found", "There is nothing here.")
    if scope["type"] == "http" and any(route.path_regex.match(scope["path"]) for route in consumers.table):
        problem = ChatError("bad_request", "This is the address of a WebSocket, and the Upgrade header is missing.")
    await refuse(problem, scope, receive, send)


async def _not_allowed(request: Request, problem: Exception) -> Response:
    answer = error_answer(ChatError("method_not_allowed", "This method is not allowed here."), request.scope["path"])
    # Starlette names the methods of the first route of this path only.
    found = [route for route in routes.table if route.matches(request.scope)[0] is not Match.NONE]
    answer.headers["Allow"] = ", ".join(sorted({name for route in found for name in getattr(route, "methods", ())}))
    return answer


async def _any_error(request: Request, problem: Exception) -> Response:
    log.error("%s %s failed", request.method, request.scope["path"], exc_info=problem)
    return error_answer(ChatError("internal", "Something went wrong on our side."), request.scope["path"])


if __name__ == "__main__":
    import commands

    commands.main()
else:
    servers.keep_logs_discreet()
    app = create_app(servers.settings_or_exit())
