"""Parley, wired: settings in, ASGI application out. `python service.py` serves it, `python service.py release` prepares
the database. Everything a request meets before its route stands in `create_app`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import re
import signal
import socket
import sys
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import consumers
import routes
from chat.direct import EXTENSION
from chat.errors import ChatError, StartupError
from chat.settings import HERE, Settings, read_settings
from chat.state import State, open_state
from chat.store.database import Database
from routes.inputs import error_answer

log = logging.getLogger("parley")

REDACTED = re.compile(r"\b(token|anonymous_token|ticket|share_token|key)=[^&\s\"]+")

STARTUP_FAILURE = 3
OPEN_TO_ALL = {"/api/health", "/health", "/livez", "/live", "/readyz", "/ready"}  # no Host, no Origin asked for


def create_app(settings: Settings) -> Service:
    """The service for these settings. It opens its resources when it is started, or else when it is first asked."""
    return Service(settings)


class Service(Starlette):
    """A Starlette application that starts itself: Daphne runs no lifespan, and a failed start is one line."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(
            routes=[*routes.table, *consumers.table],
            exception_handlers={ChatError: _chat_error, HTTPException: _http_error, Exception: _any_error},
        )
        self.router.redirect_slashes = False
        self.settings = settings
        # Outermost: what Starlette answers by itself passes it, too. Its middleware has nothing to say to a socket, and
        # would stay on its stack as long as it lives.
        self.gate = Gate(super().__call__, self.router, settings)
        self.chat: State | None = None
        self._starting = asyncio.Lock()
        self._stack = AsyncExitStack()
        self._alone = False  # started without lifespan
        self._ending: asyncio.Task[None] | None = None

    async def ensure_started(self, *, alone: bool = False) -> State:
        """Open everything, once; `alone` where no lifespan will say when to close it. Raises `StartupError`."""
        async with self._starting:
            if self.chat is None:
                try:
                    self.chat = await open_state(self.settings, self._stack)
                except BaseException:
                    await self._stack.aclose()
                    raise
                _calm_the_collector()
                self._alone = alone
                if alone:
                    self._take_signals()
            return self.chat

    def _take_signals(self) -> None:
        """End before the server does, which says nothing of it: its signals come here first and are passed on after.

        Else Daphne would cut every answer off, and then wait for ever for the threads of SQLite's connections.
        """
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ValueError):  # not the main thread: nobody can take signals here
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, functools.partial(self._hear, loop, signal.getsignal(number)))

    def _hear(self, loop: asyncio.AbstractEventLoop, theirs: Any, number: int, frame: Any) -> None:
        loop.call_soon_threadsafe(self._end, theirs, number)

    def _end(self, theirs: Any, number: int) -> None:
        def pass_on(ended: asyncio.Task[None]) -> None:
            signal.signal(number, theirs)
            signal.raise_signal(number)

        if self._ending is None:  # a platform may say it twice
            self._ending = asyncio.create_task(self._stack.aclose())
            self._ending.add_done_callback(pass_on)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        try:
            await self._answer(scope, receive, send)
        finally:
            # It refers to the scope again: all of a request would stay until the collector comes, which is seldom.
            scope.get("extensions", {}).pop(EXTENSION, None)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            chat = self.chat or await self.ensure_started(alone=True)
        except StartupError as problem:
            log.error("%s", problem)
            await refuse(ChatError("storage_unavailable", "The service could not start yet."), scope, receive, send)
            return
        scope.setdefault("state", {})["chat"] = chat
        # Every path answers with and without its trailing slash; a redirect would lose a POST's body in some clients.
        if len(scope["path"]) > 1 and scope["path"].endswith("/"):
            scope["path"] = scope["path"].rstrip("/") or "/"
        await self.gate(scope, receive, _closing(send) if self._alone and scope["type"] == "websocket" else send)

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


def _calm_the_collector() -> None:
    """Look for cycles seldom: with many turns Python's default looks through all that lives again and again, in vain.

    What is opened at the start stays and is never looked at; nearly all that comes and goes has no cycles.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


NEAREST = {1003: 4400, 1009: 4400, 1012: 4408}  # a client does the same on both


def _closing(send: Send) -> Send:
    """Close sockets also where the server refuses the standard's own codes, as Daphne does with all but 1000."""

    async def send_closing(message: Message) -> None:
        try:
            await send(message)
        except Exception:  # Daphne's raises no narrower one
            if message["type"] != "websocket.close" or message["code"] not in NEAREST:
                raise
            await send({**message, "code": NEAREST[message["code"]]})

    return send_closing


SAFE = ((b"x-content-type-options", b"nosniff"),)
PLAIN = (*SAFE, (b"vary", b"Origin"))  # CORS says so of what passes it: an answer may not be kept for another page


class Gate:
    """Which hosts are answered and which web pages may call, on HTTP and sockets alike; and headers for every answer.

    Starlette's own TrustedHost and CORS middleware leave sockets open to every page on the web.
    """

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
        self.bounded = RequestBodyLimitMiddleware(app, settings.body_max)
        self.told = self.told_to_pages(self.bounded)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
        own = SAFE if origin is not None else PLAIN  # of what no page asked for, CORS has nothing to say

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


# -- errors: every one leaves in the same shape


async def _chat_error(connection: Any, problem: Exception) -> Response:
    assert isinstance(problem, ChatError)
    return error_answer(problem, connection.scope["path"])


async def _http_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    sentences = {
        404: ("not_found", "There is nothing here."),
        405: ("method_not_allowed", "This method is not allowed here."),
        413: ("too_large", "The body is too large."),
    }
    code, sentence = sentences.get(problem.status_code, ("bad_request", "The request was not understood."))
    answer = error_answer(ChatError(code, sentence), request.scope["path"])
    if problem.status_code == 405:  # Starlette names the methods of the first route of this path only
        found = [route for route in routes.table if route.matches(request.scope)[0] is not Match.NONE]
        answer.headers["Allow"] = ", ".join(sorted({name for route in found for name in getattr(route, "methods", ())}))
    return answer


async def _any_error(request: Request, problem: Exception) -> Response:
    log.error("%s %s failed", request.method, request.scope["path"], exc_info=problem)
    return error_answer(ChatError("internal", "Something went wrong on our side."), request.scope["path"])


# -- starting from a command line


def main() -> None:
    """`python service.py [serve|release]`."""
    command = sys.argv[1] if len(sys.argv) > 1 else "serve"
    if command not in ("serve", "release"):
        sys.exit("usage: python service.py [serve | release]")
    settings = settings_or_exit()
    _set_up_logging(settings)
    try:
        if command == "release":
            asyncio.run(release(settings))
        else:
            serve(settings)
    except StartupError as problem:
        print(f"parley: {problem}", file=sys.stderr)
        sys.exit(STARTUP_FAILURE)


def settings_or_exit() -> Settings:
    try:
        return read_settings()
    except StartupError as problem:
        print(f"parley: {problem}", file=sys.stderr)
        sys.exit(STARTUP_FAILURE)  # uvicorn's word for "the same would happen again": its parent process stops, too


async def release(settings: Settings) -> None:
    """Bring the database's schema up to date, each step once, beside workers and other releases that run already."""
    database = Database(settings.database_url, timeout=settings.storage_timeout)
    await database.connect()
    try:
        applied = await database.migrate((HERE / "models.sql").read_text())
    except ChatError as problem:
        raise StartupError(problem.message) from None
    finally:
        await database.disconnect()
    print(f"parley: schema up to date, {applied} step{'' if applied == 1 else 's'} applied")


def serve(settings: Settings) -> None:
    """Run uvicorn with what the service needs: small frames, no deflate, a bound on blocked sockets, a bounded stop."""
    import uvicorn

    from consumers.direct import DirectProtocol
    from routes.head import HeadProtocol

    listener = _listen(settings)
    config = uvicorn.Config(
        "service:app",
        workers=settings.workers,
        http=HeadProtocol,
        ws=DirectProtocol,
        ws_max_size=settings.frame_max,
        ws_per_message_deflate=False,
        ws_ping_interval=settings.ping_interval,
        ws_ping_timeout=settings.ping_timeout,
        timeout_graceful_shutdown=5,
        access_log=False,  # request lines carry tokens of clients that put them into the URL
        log_level="warning" if settings.log_level == "info" else settings.log_level,
        server_header=False,
        proxy_headers=False,  # whose word on the caller's address counts is `trusted_proxies` alone
    )
    if settings.workers > 1:
        from uvicorn.supervisors import Multiprocess

        parent = Multiprocess(config, sockets=[listener])
        parent.run()
        if any(worker.exitcode == STARTUP_FAILURE for worker in parent.processes):
            sys.exit(STARTUP_FAILURE)
        return

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            _say_hello(settings)

    Server(config).run(sockets=[listener])


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Without it a peer that vanished with unread bytes holds its connection for a quarter of an hour.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(settings.tcp_user_timeout * 1000))
    try:
        listener.bind((settings.host, settings.port))
    except (OSError, OverflowError) as problem:
        reason = getattr(problem, "strerror", None) or "a port is a number up to 65535"
        raise StartupError(f"cannot listen on {settings.host}:{settings.port}: {reason}") from None
    listener.listen(2048)
    listener.set_inheritable(True)
    return listener


def _say_hello(settings: Settings) -> None:
    if settings.production:
        return
    url = f"http://localhost:{settings.port}"
    print(f"{settings.name} is at {url}  (health: {url}/api/health/)")
    print(f"Try it:  curl -N '{url}/api/messages/stream/?format=text' -d '{{\"content\": \"Hello\"}}'")
    print("Set OPENAI_API_KEY or ANTHROPIC_API_KEY for real models, DATABASE_URL for PostgreSQL, REDIS_URL for workers")
    sys.stdout.flush()


class _Discreet(logging.Filter):
    """What a server prints of its clients, without what they can put there.

    Request lines have the tokens of those that cannot do better; and for each text that is not UTF-8, which closes its
    socket with 1007 and is no matter of ours, uvicorn would print a traceback.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if text.startswith("Invalid UTF-8 sequence"):
            return False
        if "?" not in text:
            return True
        # Argument by argument: uvicorn's formatter takes them apart, hypercorn's are a dictionary of its own kind.
        if isinstance(record.args, dict):
            record.args.update({name: _redacted(value) for name, value in record.args.items()})
        elif record.args:
            record.args = tuple(_redacted(value) for value in record.args)
        text = record.getMessage()
        if (clean := _redacted(text)) != text:
            record.msg, record.args = clean, ()
        return True


def _redact_daphne(generator: Any) -> None:
    """Daphne writes its request lines by itself, past `logging`."""
    write = generator.write_entry
    generator.write_entry = lambda self, **entry: write(self, **{name: _redacted(text) for name, text in entry.items()})


def _redacted(value: object) -> object:
    return REDACTED.sub(r"\1=***", value) if isinstance(value, str) else value


def _set_up_logging(settings: Settings) -> None:
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")


def _load() -> Service:
    settings = settings_or_exit()
    for name in ("uvicorn.error", "uvicorn.access", "hypercorn.access", "granian.access"):
        logging.getLogger(name).addFilter(_Discreet())
    if "daphne.access" in sys.modules:
        _redact_daphne(sys.modules["daphne.access"].AccessLogGenerator)
    return create_app(settings)


if __name__ == "__main__":
    main()
else:
    app = _load()
