"""The source from which rooms learn: the database, and Redis for a turn that runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import RelayUnavailable, not_found
from ..settings import Settings
from ..store import sessions, turns
from ..store.database import Database
from ..store.mask import Mask
from ..store.sessions import Session
from ..tasks import Tasks
from .answers import Answer
from .bus import RedisBus
from .events import SessionNotice, session_event
from .voice import joined, text_key


class Past(NamedTuple):
    """An older turn as the database has it.

    answer: None when the turn was deleted or made again; next_id: of the turn after it, "" for none; resumable: whether
    clients can hold cursors of it.
    """

    answer: Answer | None
    next_id: str
    resumable: bool


class Source:
    """The part of a relay that its rooms know: storage, tasks and counts."""

    def __init__(self, settings: Settings, database: Database, mask: Mask, bus: RedisBus | None) -> None:
        self.settings = settings
        self.database = database
        self.mask = mask
        self.bus = bus
        self.tasks = Tasks()
        self.counts: dict[str, int] = {}
        self.rights_changed_at = float("-inf")  # monotonic: when a right was last said to have ended, whoever had it
        self.on_stop: Callable[[str], None] = lambda turn_id: None  # ends a turn of this worker, by its id

    def count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    async def latest(self, session: Session) -> tuple[Session, Answer | None]:
        """Return the session and its latest turn as the database has them. Raises `not_found`, `StorageUnavailable`."""
        key, session = session.key, await sessions.select_unchecked(self.database, session.id)
        if session.key != key:
            raise not_found("session")
        row = await turns.select_latest_turn(self.database, session)
        return session, None if row is None else await self._answer(session, row)

    async def past(self, session: Session, turn_id: str) -> Past:
        """Return a turn of the session and the id of the turn after it. Raises `StorageUnavailable`."""
        rows = await turns.select_turn_and_next(self.database, session, turn_id)
        if not turn_id:
            return Past(None, rows[0]["id"] if rows else "", True)
        if not rows or rows[0]["id"] != turn_id:
            return Past(None, "", False)
        answer = await self._answer(session, rows[0])
        return Past(answer, rows[1]["id"] if len(rows) > 1 else "", bool(rows[0]["resumable"]))

    async def _answer(self, session: Session, row: dict[str, Any]) -> Answer | None:
        """Make the answer of a turn from its rows; None when the turn was made again meanwhile."""
        rows = await turns.select_turn_messages(self.database, row["id"])
        if not rows:
            return None
        rows = [each | {"feedback": None} for each in rows]  # a turn is told to all its readers alike
        return Answer(row["id"], row["position"], row["previous"] or "", self.mask.messages(session, rows))

    async def learn_from_redis(self, answer: Answer) -> None:
        """Learn the texts of a running turn from Redis. If Redis is away, readers wait for the next checkpoint."""
        if self.bus is None or answer.over:
            return
        sides = list(answer.replies)
        try:
            async with asyncio.timeout(self.settings.relay_ack * 4):
                values = await self.bus.command("MGET", *[text_key(self.bus, answer.turn_id, side) for side in sides])
        except (RelayUnavailable, TimeoutError):
            return
        for side, value in zip(sides, values, strict=True):
            answer.learn_text(side, joined(answer.replies[side].text, value or b""))

    def change_of(self, before: Session, session: Session) -> SessionNotice:
        """Return the event for readers that know the session as it was before."""
        return self.notice_of(session, "revealed" if before.blind and not session.blind else "updated")

    def notice_of(self, session: Session, action: str) -> SessionNotice:
        """Return the event with the session's present state."""
        member, reader = (
            session_event("session_update", session=whole, action=action, version=session.version).decode()
            for whole in (self.mask.session(session), self.mask.session(session, "reader"))
        )
        return SessionNotice(member, reader, session.version)
