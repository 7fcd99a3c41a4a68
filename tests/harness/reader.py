"""What every recording reader does, whatever it reads from: come back, hold, wait, remember."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from . import until
from .journal import Journal
from .view import View

COME_BACK = frozenset({1001, 1006, 1011, 1012, 4408})  # 1011 is a mistake of the service's, but no reason to leave
JITTER = 0.05  # seconds: the most a reader waits before its first attempt to come back
LONGEST_WAIT = 0.5  # seconds between two attempts while nobody answers
GIVE_UP = 60.0  # seconds without an answer


class Reader(ABC):
    """What both kinds share: bases, coming back, holding, waiting."""

    def __init__(
        self, journal: Journal, name: str, bases: str | Sequence[str], session_id: str | None, token: str | None,
        *, resume: bool, greeted: bool, give_up: float,
    ) -> None:  # fmt: skip
        self.journal, self.name, self.session_id, self.token = journal, name, session_id, token
        self.bases = [bases] if isinstance(bases, str) else list(bases)
        self.resume, self.give_up = resume, give_up
        self.view = View(journal, name, greeted)
        self.connections = 0  # that were accepted
        self.finished = False  # it will not come back
        self._reading = asyncio.Event()
        self._reading.set()
        self._chance = random.Random(name)
        self._task: asyncio.Task[None] | None = None

    # what a test does with it

    @property
    def cursor(self) -> str | None:
        return self.view.cursor

    def hold(self) -> None:
        """Stop reading, connected: what is sent piles up in buffers, then in the service."""
        self._reading.clear()

    def release(self) -> None:
        self._reading.set()

    @abstractmethod
    def drop(self) -> None:
        """Lose the connection, now, without a word. It comes back by itself, from its cursor."""

    async def until(self, condition: Callable[[], Any], within: float = 10.0, what: str = "the condition") -> Any:
        """As `tests.harness.until`, with the story in the failure."""
        return await until(condition, within, f"{self.name}: {what}", self.journal.story)

    async def turn_ended(self, count: int = 1, within: float = 20.0) -> None:
        """Wait until `count` turns have ended as this reader sees it, since it was made."""
        await self.until(lambda: self.view.turns_ended >= count, within, f"{count} turn(s) ended")

    async def replies_ended(self, count: int = 1, within: float = 20.0) -> None:
        """Wait until it knows the endings of `count` replies, told or found in a snapshot: who joins late gets that."""
        seen = self.view.messages

        def ended() -> bool:
            return sum(each.role == "assistant" and each.over for each in seen.values()) >= count

        await self.until(ended, within, f"{count} replies ended")

    @property
    def told(self) -> int:
        """How many tokens chunks have brought, of all replies."""
        return sum(message.tokens for message in self.view.messages.values())

    async def tokens(self, count: int, within: float = 20.0) -> None:
        """Wait until chunks have brought `count` tokens in all; a busy machine puts several into one chunk."""
        await self.until(lambda: self.told >= count, within, f"{count} tokens")

    async def ended(self, within: float = 10.0) -> None:
        """Wait until it will not come back any more."""
        await self.until(lambda: self.finished, within, "finished")

    # life

    async def start(self) -> Self:
        """Begin reading; returns once the first connection has said where it starts, or was refused for good."""
        self._task = asyncio.create_task(self._run(), name=f"reader {self.name}")
        await self.until(lambda: (self.connections and self.view.greeted) or self.finished, 15, "first connection")
        if self._task.done():
            self._task.result()
        return self

    async def leave(self) -> None:
        """Stop for good."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        await self.leave()

    async def _run(self) -> None:
        """One connection after the other, until told to stop by the service, the test, or `give_up`."""
        failures, silent_since, attempt = 0, time.monotonic(), 0
        try:
            while True:
                base = self.bases[attempt % len(self.bases)]
                attempt += 1
                before = self.connections
                if not await self._connection(base):
                    break
                if self.connections > before:
                    failures, silent_since = 0, time.monotonic()
                elif time.monotonic() - silent_since > self.give_up:
                    self._note("gave up")
                    break
                failures += 1
                await asyncio.sleep(self._chance.random() * min(JITTER * 2 ** (failures - 1), LONGEST_WAIT))
        finally:
            self.finished = True

    @abstractmethod
    async def _connection(self, base: str) -> bool:
        """One connection from attempt to end. Returns whether to come back."""

    def _accepted(self, cursor: str | None) -> None:
        self.connections += 1
        self.view.connected(cursor)

    def _note(self, text: str) -> None:
        self.journal.add(self.name, "note", {"text": text})

    def _take(self, text: str | bytes) -> dict[str, Any] | None:
        """One frame or event into the view; None, and written down, when it is not a JSON object in text."""
        try:
            event = json.loads(text) if isinstance(text, str) else None
        except ValueError:
            event = None
        if not isinstance(event, dict):
            self.view.violation("shape", f"expected a JSON object as text, got {text!r:.200}")
            return None
        self.view.apply(event)
        return event
