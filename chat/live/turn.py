"""A turn of this worker as an object: its state, its replies' streams, and how each of them ended."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Literal

from ..providers import Finish
from ..store.budgets import Meter
from ..store.queries import Row
from ..store.sessions import Session
from ..store.turns import StoredTurn
from .pace import Rhythm
from .voice import Voice

State = Literal["starting", "answering", "ending", "over", "lost"]


@dataclass
class Result:
    """How one reply ended."""

    status: str = "success"
    reason: str | None = None
    finish: Finish | None = None
    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None  # seconds after the start
    said: int = 0  # characters


@dataclass(eq=False)
class Turn:
    """A turn of this worker.

    `early`: the status with which the turn is to end before its models do, `stopped` or `interrupted`; `stored`: its
    rows, once they are written; `voice`: its way to the readers, once it has begun to speak.
    """

    id: str
    session: Session
    account_id: str
    state: State = "starting"
    early: str | None = None
    stored: StoredTurn | None = None
    voice: Voice | None = None
    streams: dict[str, asyncio.Task[None]] = field(default_factory=dict)  # by side
    results: dict[str, Result] = field(default_factory=dict)
    meters: dict[str, Meter] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)  # the sides whose ending readers were not told
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # one ending at a time: the last one ends the turn as well
    unsaved: list[Row] = field(default_factory=list)  # endings that readers were told and the database does not have
    checkpointed: dict[str, int] = field(default_factory=dict)  # characters the database has, by side
    checkpointed_at: float = 0.0  # monotonic
    # of a blind battle
    rhythm: Rhythm | None = None  # the pace of both sides; None: text is shown as it comes
    held: dict[str, str] = field(default_factory=dict)  # text that has come from the model and is not shown yet
    finished: set[str] = field(default_factory=set)  # the sides whose model has stopped
    moved: asyncio.Event = field(default_factory=asyncio.Event)  # set when `held` or `finished` changed
    released: dict[str, asyncio.Event] = field(default_factory=dict)  # set when a side's last piece is shown

    @property
    def runs(self) -> bool:
        """Whether a stop can still end the turn early."""
        return self.state in ("starting", "answering")

    @property
    def replies(self) -> dict[str, Row]:
        assert self.stored is not None
        return {row["participant"]: row for row in self.stored.rows[1:]}

    @property
    def out(self) -> Voice:
        """The voice of a turn that has begun to speak."""
        assert self.voice is not None
        return self.voice

    def text(self, side: str) -> str:
        return self.out.answer.replies[side].text

    def end_early(self, why: str) -> None:
        """Cancel the streams that run; a stream that has not begun never will."""
        if self.early is None and self.runs:
            self.early = why
        for stream in self.streams.values():
            stream.cancel()
