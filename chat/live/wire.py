"""A connection to Redis: its address, its handshake, commands out, answers in.

RESP is parsed and packed by hiredis. This file never reconnects: a connection that fails is closed.
Protocol: https://redis.io/docs/latest/develop/reference/protocol-spec/ (RESP2).
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, cast
from urllib.parse import parse_qs, unquote

import hiredis

from ..errors import RelayRefused, RelayUnavailable, StartupError
from ..settings import split_secret_url
from ..tasks import settle

log = logging.getLogger("parley.bus")

ANSWER_TIMEOUT = 5.0  # seconds without any answer after which a connection that waits for one counts as dead

Answered = Callable[[Any], None] | None  # a callback with Redis' answer or an exception; None: nobody waits for it


class Address:
    """Where Redis is, from a redis://, rediss:// or unix:// URL. `repr` carries no password."""

    def __init__(self, url: str, verify: bool = True) -> None:
        parts = split_secret_url("REDIS_URL", url, ("redis", "rediss", "unix"))
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        try:
            self.host, self.port = parts.hostname or "localhost", parts.port or 6379
            self.db = int(parts.path.strip("/") or 0) if parts.scheme != "unix" else int(query.get("db", 0))
        except ValueError:
            raise StartupError("REDIS_URL has a database that is not a number") from None
        self.path = unquote(parts.path) if parts.scheme == "unix" else None
        self.username = unquote(parts.username or "")
        self.password = unquote(parts.password or "")
        self.tls = _tls(verify and query.get("ssl_cert_reqs", "required") != "none", query.get("ssl_ca_certs")) if (
            parts.scheme == "rediss"
        ) else None  # fmt: skip

    def __repr__(self) -> str:
        return self.path or f"{self.host}:{self.port}/{self.db}"

    def greeting(self) -> list[tuple[Any, ...]]:
        """The commands every new connection starts with."""
        commands: list[tuple[Any, ...]] = []
        if self.password:
            commands.append(("AUTH", self.username, self.password) if self.username else ("AUTH", self.password))
        if self.db:
            commands.append(("SELECT", self.db))
        return [*commands, ("PING",)]


def _tls(verify: bool, authority: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Wire(asyncio.Protocol):
    """A connection. Answers are called back in order; pub/sub messages go to `pushed`, a batch at a time."""

    def __init__(self, pushed: Callable[[list[Any]], None] | None = None) -> None:
        self._reader = hiredis.Reader(replyError=RelayRefused)
        self._waiting: deque[Answered] = deque()
        self._pushed = pushed
        self._transport: asyncio.Transport | None = None
        self.writable = True  # False while a stalled Redis reads nothing: more commands would only fill our memory
        self.lost = asyncio.get_running_loop().create_future()
        self.heard_at = 0.0  # loop time

    @classmethod
    async def open(cls, address: Address, pushed: Callable[[list[Any]], None] | None = None) -> Wire:
        """Connect and greet. Raises `OSError` or `RelayUnavailable`; nothing stays open then."""
        loop = asyncio.get_running_loop()
        wire = cls()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                if address.path:
                    await loop.create_unix_connection(lambda: wire, address.path)
                else:
                    await loop.create_connection(lambda: wire, address.host, address.port, ssl=address.tls)
                await asyncio.gather(*[wire.send(*command) for command in address.greeting()])
        except BaseException:
            wire.close()
            raise
        wire._pushed = pushed
        return wire

    async def watch(self, seconds: float) -> None:
        """Wait for `seconds` while the connection lasts. Raises `ConnectionResetError` as soon as it is lost."""
        await asyncio.wait({self.lost}, timeout=seconds)
        if self.lost.done():
            raise ConnectionResetError("the connection was lost")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self.heard_at = asyncio.get_running_loop().time()

    def connection_lost(self, exc: Exception | None) -> None:
        while self._waiting:
            guarded(self._waiting.popleft(), RelayUnavailable("the connection to Redis was lost"))
        if not self.lost.done():
            self.lost.set_result(None)

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True

    def data_received(self, data: bytes) -> None:
        self.heard_at = asyncio.get_running_loop().time()
        self._reader.feed(data)
        pushed = []
        try:
            while (answer := self._reader.gets()) is not False:
                if self._pushed is not None:
                    pushed.append(answer)
                elif self._waiting and (answered := self._waiting.popleft()) is not None:
                    guarded(answered, answer)
        except hiredis.ProtocolError as problem:
            log.warning("redis spoke no RESP: %s", problem)
            self.close()
        if pushed and self._pushed is not None:
            self._pushed(pushed)

    def send(self, *command: Any) -> asyncio.Future[Any]:
        """Write one command; the future has its answer. On a wire for pub/sub the future is never done."""
        future = asyncio.get_running_loop().create_future()
        self.write(hiredis.pack_command(command), [partial(settle, future)])
        return future

    def write(self, data: bytes, waiting: list[Answered]) -> None:
        if self._transport is None or self._transport.is_closing():
            for answered in waiting:
                guarded(answered, RelayUnavailable("not connected to Redis"))
            return
        if self._pushed is None:
            if not self._waiting:
                self.heard_at = asyncio.get_running_loop().time()  # the wait for an answer starts now
            self._waiting.extend(waiting)
        self._transport.write(data)

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def guarded(call: Callable[..., None] | None, *given: Any) -> None:
    """Call `call` if there is one. Never raises: an error of one turn must not close the connection of all."""
    if call is None:
        return
    try:
        call(*given)
    except Exception:
        log.exception("a callback failed")
