"""What every request and every socket meets before its route: hosts, origins, sizes; and headers on every answer.

Starlette's own TrustedHost and CORS middleware leave sockets open to every page on the web.
"""

from __future__ import annotations

import asyncio
import functools
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chat.errors import ChatError
from chat.settings import Settings

from .inputs import error_answer

OPEN_TO_ALL = {"/api/health", "/health", "/livez", "/live", "/readyz", "/ready"}  # no Host, no Origin asked for
SAFE = ((b"x-content-type-options", b"nosniff"),)
VARY = (b"vary", b"Origin")  # CORS says so of what passes it: an answer may not be kept for another page
ENCRYPTED = (b"strict-transport-security", b"max-age=31536000")  # browsers heed it only where it came encrypted


class Gate:
    """Stands around the application: `app` answers HTTP, `sockets` takes what is let through of WebSockets."""

    def __init__(self, app: ASGIApp, sockets: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.sockets = sockets
        self.settings = settings
        local = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
        # Not in Starlette's own list, which every part of every answer passes, and where errors would be outside.
        self.told_to_pages = functools.partial(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_origin_regex=None if settings.production else local,
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Anonymous-Token", "Last-Event-ID"],
            expose_headers=["X-Turn-Id", "X-Session-Id", "X-Anonymous-Token", "Link", "Retry-After"],
            max_age=600,
        )
        self.safe = (*SAFE, ENCRYPTED) if settings.production else SAFE
        self.bounded = RequestBodyLimitMiddleware(app, settings.body_max)
        self.told = self.told_to_pages(self.bounded)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Every path answers with and without its trailing slash; a redirect would lose a POST's body in some clients.
        if len(scope["path"]) > 1 and scope["path"].endswith("/"):
            scope["path"] = scope["path"].rstrip("/") or "/"
        problem = self.refusal(scope)
        if scope["type"] == "http":
            await self._answer(problem, scope, receive, send)
        elif problem is not None:
            await refuse(problem, scope, receive, send)
        else:
            await self.sockets(scope, receive, send)

    async def _answer(self, problem: ChatError | None, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        headers = Headers(scope=scope)
        origin, large = headers.get("origin"), int(headers.get("content-length", 0)) > self.settings.body_max
        own = self.safe if origin is not None else (*self.safe, VARY)  # of what no page asked for, CORS says nothing

        async def send_safely(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message["headers"], *own]
            await send(message)

        app: ASGIApp
        if problem is not None:
            app = functools.partial(refuse, problem)
        elif large:  # Starlette would say it in words of its own
            app = functools.partial(refuse, ChatError("too_large", "The body is too large."))
            app = app if origin is None else self.told_to_pages(app)
        elif origin is not None:
            app = self.told
        else:
            app = self.app if scope["method"] in ("GET", "HEAD") else self.bounded  # else there is no body to bound
        try:
            await app(scope, receive, send_safely)
        except asyncio.CancelledError:
            # A server that stops has no patience left; what it cancelled and nobody catches it prints as a traceback.
            if not begun:
                problem = ChatError("draining", "The service is restarting.", retry_after=2)
                await refuse(problem, scope, receive, send_safely)

    def refusal(self, scope: Scope) -> ChatError | None:
        """Why this is not answered, if it is not."""
        if "\x00" in scope["path"] or b"%00" in scope["query_string"]:
            return ChatError("bad_request", "An address cannot contain NUL characters.")  # PostgreSQL takes none
        if scope["path"] in OPEN_TO_ALL:
            return None
        headers, allowed = Headers(scope=scope), self.settings.allowed_hosts
        host, origin = headers.get("host", ""), headers.get("origin")
        if "*" not in allowed and not _host_allowed(host, allowed):
            return ChatError("bad_request", "This host name is not served here. Set ALLOWED_HOSTS to allow it.")
        if origin is not None and not self._origin_allowed(origin, host):
            return ChatError("origin_not_allowed", "This page may not call here. Set ALLOWED_ORIGINS to allow it.")
        return None

    def _origin_allowed(self, origin: str, host: str) -> bool:
        """A page may call if it is listed, comes from this very host, or runs on this machine on a local start."""
        try:
            parts = urlsplit(origin)
            name = parts.hostname
        except ValueError:
            return False
        if origin in self.settings.allowed_origins or (parts.netloc and parts.netloc.lower() == host.lower()):
            return True
        return not self.settings.production and name in ("localhost", "127.0.0.1", "::1")


async def refuse(problem: ChatError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request, or a socket's handshake, with an error and nothing else."""
    answer = error_answer(problem, scope["path"])
    if scope["type"] == "http":
        await answer(scope, receive, send)
    elif "websocket.http.response" in scope.get("extensions", {}):
        await receive()
        await send({"type": "websocket.http.response.start", "status": answer.status_code,
                    "headers": answer.raw_headers})  # fmt: skip
        await send({"type": "websocket.http.response.body", "body": answer.body})
    else:
        await receive()
        await send({"type": "websocket.close", "code": 4403})


def _host_allowed(host: str, allowed: tuple[str, ...]) -> bool:
    name = (host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host).lower()
    names = [each.lower() for each in allowed]
    return name in names or any(each.startswith("*.") and name.endswith(each[1:]) for each in names)
