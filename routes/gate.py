"""The checks of every request and socket before its route: hosts and origins; and headers on every answer.

Starlette's own TrustedHost and CORS middleware leave sockets open to every page on the web.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chat import callers
from chat.errors import ChatError
from chat.limits import Crowd
from chat.settings import Settings

from .inputs import error_answer

log = logging.getLogger("parley.gate")

OPEN_TO_ALL = {"/api/health", "/health", "/livez", "/live", "/readyz", "/ready"}  # no Host, no Origin asked for
PERSONAL = ("/api/", "/v1/", "/admin", "/metrics")
SAFE = [(b"x-content-type-options", b"nosniff"), (b"vary", b"Origin")]  # no answer may be kept for another page
ENCRYPTED = (b"strict-transport-security", b"max-age=31536000")  # browsers heed it only where it came encrypted
METHODS = b"GET, POST, PATCH, DELETE"
EXPOSED = b"X-Turn-Id, X-Session-Id, X-Cursor, X-Anonymous-Token, Link, Retry-After"

Lines = dict[bytes, bytes]  # of a request's head: names in lower case


class Gate:
    """Stands around the application: `app` answers HTTP, `sockets` takes what is let through of WebSockets."""

    def __init__(self, app: ASGIApp, sockets: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.sockets = sockets
        self.settings = settings
        self._under_way = Crowd()  # requests, where proxies stand in front
        self._warned: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Every path answers with and without its trailing slash; a redirect would lose a POST's body in some clients.
        if len(scope["path"]) > 1 and scope["path"].endswith("/"):
            scope["path"] = scope["path"].rstrip("/") or "/"
        headers: Lines = dict(reversed(scope["headers"]))  # of lines with the same name the first counts
        problem = self._refusal(scope, headers)
        if scope["type"] == "http":
            await self._answer(problem, headers, scope, receive, send)
        elif problem is not None:
            await refuse(problem, scope, receive, send)
        else:
            await self.sockets(scope, receive, send)

    async def _answer(
        self, problem: ChatError | None, headers: Lines, scope: Scope, receive: Receive, send: Send
    ) -> None:
        begun = False

        async def send_safely(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message["headers"], *self._added(scope["path"], headers, message["headers"])]
            await send(message)

        address = self._address(scope, headers)
        try:
            if address and not self._under_way.enter(address, self.settings.connections_per_address):
                problem = ChatError("rate_limited", "There are too many requests at once from this address.")
            if problem is not None:
                await refuse(problem, scope, receive, send_safely)
            elif scope["method"] == "OPTIONS" and {b"origin", b"access-control-request-method"} <= headers.keys():
                await _preflight(scope, receive, send_safely)
            else:
                await self.app(scope, receive, send_safely)
        except asyncio.CancelledError:
            # A server that stops has no patience left; what it cancelled and nobody catches it prints as a traceback.
            if not begun:
                problem = ChatError("draining", "The service is restarting.", retry_after=2)
                await refuse(problem, scope, receive, send_safely)
        finally:
            if address:
                self._under_way.leave(address)

    def _added(self, path: str, headers: Lines, own: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return what every answer carries, as far as the route has not said otherwise."""
        added, names = list(SAFE), {name for name, _ in own}
        if b"referrer-policy" not in names:
            added.append((b"referrer-policy", b"no-referrer"))  # addresses of shared sessions open them
        if b"cache-control" not in names and path.startswith(PERSONAL):
            added.append((b"cache-control", b"no-store"))
        if self.settings.production:
            added.append(ENCRYPTED)
        origin = headers.get(b"origin")
        if origin is not None and self._origin_allowed(origin.decode("latin-1"), _host(headers)):
            added += [
                (b"access-control-allow-origin", origin),
                (b"access-control-allow-credentials", b"true"),  # clients send them; no cookie is a credential here
                (b"access-control-expose-headers", EXPOSED),
            ]
        return added

    def _address(self, scope: Scope, headers: Lines) -> str:
        """Return whose request it is where proxies stand in front of us; without one its connection is counted."""
        if not self.settings.trusted_proxies:
            if b"x-forwarded-for" in headers:
                self._warn_once(
                    "X-Forwarded-For is sent, but trusted_proxies is 0: if a proxy stands in front, all visitors count "
                    "as one address. Set PARLEY_TRUSTED_PROXIES to the number of proxies"
                )
            return ""
        forwarded = Headers(scope=scope).getlist("x-forwarded-for")
        return callers.address(scope.get("client"), forwarded, self.settings.trusted_proxies)

    def _warn_once(self, text: str) -> None:
        """Log a line that strangers can cause, a hundred different ones at most."""
        if text not in self._warned and len(self._warned) < 100:
            self._warned.add(text)
            log.warning("%s", text)

    def _refusal(self, scope: Scope, headers: Lines) -> ChatError | None:
        """Why this is not answered, if it is not."""
        if "\x00" in scope["path"] or b"%00" in scope["query_string"]:
            return ChatError("bad_request", "An address cannot contain NUL characters.")  # PostgreSQL takes none
        if scope["path"] in OPEN_TO_ALL:
            return None
        host, origin = _host(headers), headers.get(b"origin", b"").decode("latin-1")
        allowed = self.settings.allowed_hosts
        if "*" not in allowed and not _host_allowed(host, allowed):
            self._warn_once(f"refused the host name {host[:200]!r}: add it to ALLOWED_HOSTS if it is ours")
            return ChatError("bad_request", "This host name is not served here. Set ALLOWED_HOSTS to allow it.")
        if b"origin" in headers and not self._origin_allowed(origin, host):
            advice = "add it to ALLOWED_ORIGINS if it may call here"
            if origin == "null":
                advice = "a page without an address (a sandboxed frame, a file, say) cannot be allowed"
            self._warn_once(f"refused the page {origin[:200]!r} (its Origin header): {advice}")
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


async def _preflight(scope: Scope, receive: Receive, send: Send) -> None:
    """Tell a page's browser that it may send what it asks for: SDKs bring headers of their own."""
    asked = Headers(scope=scope).get("access-control-request-headers", "")
    headers = [(b"access-control-allow-methods", METHODS), (b"access-control-max-age", b"600")]
    if asked:
        headers.append((b"access-control-allow-headers", asked.encode("latin-1")))
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


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


def _host(headers: Lines) -> str:
    return headers.get(b"host", b"").decode("latin-1")


def _host_allowed(host: str, allowed: tuple[str, ...]) -> bool:
    name = (host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host).lower()
    names = [each.lower() for each in allowed]
    return name in names or any(each.startswith("*.") and name.endswith(each[1:]) for each in names)
