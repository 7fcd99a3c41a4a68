"""The ownership of turns: leases are renewed, lost and taken over. The database decides, by its own clock.

A worker that was frozen for longer than its lease asks before it publishes more text; a turn whose worker died is taken
by whoever sees its lease run out, and ended with the longest text known.
"""

from __future__ import annotations

import asyncio
import logging
import time

from ..providers import Limits
from ..settings import Settings
from ..store import accounts, budgets, sessions, turns
from ..store.database import Database, StorageUnavailable
from ..store.queries import Row
from ..store.turns import StoredTurn
from ..tasks import Tasks
from .generation import Generation
from .relay import Relay
from .turn import Turn

log = logging.getLogger("parley.generation")

RETRY = 0.5  # seconds until leases that storage did not renew are tried again
LOOK_FOR_STOPS = 0.5  # seconds between two looks for stops that Redis did not carry


class Leases:
    """The leases of this worker's turns."""

    def __init__(self, settings: Settings, database: Database, relay: Relay, generation: Generation) -> None:
        self.settings = settings
        self.database = database
        self.relay = relay
        self.generation = generation
        self.worker = generation.worker
        self.turns = generation.turns
        self.tasks: Tasks = generation.tasks
        self._awake_at = self._renewed_at = time.monotonic()
        self._slept = False  # this process was frozen until after its lease: its turns may be another worker's
        self._asking: asyncio.Task[None] | None = None  # asks the database, after a freeze, which turns are still ours
        self._strangers: set[str] = set()  # turns of ours in the database that `turns` lacked at the last renewal
        generation.surely_owned = self.surely_owned
        generation.adopt = self.adopt

    def start(self) -> None:
        beat = self.tasks.beat
        beat(self._keep, self.settings.lease_renew)
        beat(self._sweep, self.settings.sweep_every)
        beat(self._watch, self.settings.lease_renew / 2)
        if self.relay.bus is not None:
            beat(self._look_for_stops, LOOK_FOR_STOPS)

    def surely_owned(self) -> bool:
        """Whether this worker certainly owns its turns. After a freeze longer than the lease the database is asked."""
        if self._awake():
            return True
        if self._asking is None:
            self._asking = self.tasks.spawn(self._make_sure())
        return False

    async def _make_sure(self) -> None:
        """Confirm all leases with one query, however many texts wait; then let the turns that are ours go on."""
        try:
            while self._slept:  # also while storage is away: a turn may have been taken before that
                await self._keep()
        finally:
            self._asking = None
        for turn in self.turns.values():
            if turn.voice is not None:
                turn.voice.hurry()

    async def _watch(self) -> None:
        self._awake()

    def _awake(self) -> bool:
        """Detect a freeze in which the lease ran out: a lease counts from its last renewal, not from the freeze."""
        now = time.monotonic()
        frozen = now - self._awake_at > self.settings.lease_renew
        self._slept = self._slept or (frozen and now - self._renewed_at > self.settings.lease)
        self._awake_at = now
        return not self._slept

    async def _keep(self) -> None:
        """Renew the leases, again and again while storage is away.

        Leases would run out in a longer pause, and a worker that did not notice the outage would take the turns.
        """
        while True:
            try:
                return await self._renew()
            except StorageUnavailable:
                await asyncio.sleep(RETRY)

    async def _renew(self) -> None:
        """Renew the leases of this worker's turns, and learn which of them it lost."""
        before = set(self.turns)
        answering = [turn for turn in self.turns.values() if turn.state == "answering"]  # their rows are written
        await self.database.set_clock()
        asked = time.monotonic()
        owned = await turns.renew_leases(self.database, self.worker, int(self.settings.lease * 1000))
        self._renewed_at = asked
        self._slept = time.monotonic() - asked > self.settings.lease  # frozen while the answer was on its way, say
        for turn in answering:
            if turn.id not in owned and turn.state == "answering" and not turn.lock.locked():
                self.generation.lose(turn)
        for turn_id in owned.keys() & self.turns.keys():
            if owned[turn_id]["stop_requested"]:
                self.turns[turn_id].end_early("stopped")
        for turn in list(self.turns.values()):
            if turn.unsaved and turn.state == "over":
                await self._save(turn)
        # A stranger is a turn of ours that is not in `turns`: its INSERT succeeded after its caller had given up. Two
        # renewals in a row have to find it, because a turn may begin and end during one. A worker that ends leaves its
        # strangers to the others: its drain would not wait for their answers.
        strangers = owned.keys() - before - self.turns.keys() if not self.generation.draining else set()
        for turn_id in strangers & self._strangers:
            self.tasks.spawn(self.adopt(owned[turn_id]))
        self._strangers = strangers

    async def _save(self, turn: Turn) -> None:
        """Write endings that were published while the database was unavailable."""
        await turns.update_endings(self.database, self.worker, turn.unsaved, last=True)
        turn.unsaved = []
        self.turns.pop(turn.id, None)  # two renewals may be under way

    async def adopt(self, row: Row) -> None:
        """Launch a turn that is ours in the database and that nobody here knows.

        A turn that was taken over ends, and so does one of which readers may have seen text. Any other was written
        after its caller had been refused, and is answered: the caller's retry finds it running.
        """
        if row["id"] in self.turns:
            return
        session = await sessions.select_unchecked(self.database, row["session_id"])
        rows = tuple(await turns.select_turn_messages(self.database, row["id"]))
        if row["id"] in self.turns or not rows:
            return
        turn = self.turns[row["id"]] = Turn(row["id"], session, row["account_id"])
        if row["stop_requested"]:
            turn.early = "stopped"
        elif row["ended_at"] is not None:
            turn.early = "interrupted"
        stored = StoredTurn(turn.id, session, turn.account_id, row["position"], "", rows, False)
        self.generation.launch(turn, stored, Limits(self.settings.max_tokens))

    async def _look_for_stops(self) -> None:
        """Find the stops that other workers asked for while Redis did not carry them."""
        if any(turn.runs for turn in self.turns.values()):
            for turn_id in await turns.select_stops(self.database, self.worker):
                self.generation.stop_here(turn_id)

    async def _sweep(self) -> None:
        """Take over turns whose worker died, end them with the longest text known, and delete what has expired."""
        await self.database.set_clock()
        # After an outage the owners renew as soon as they can; a sweep before that would take turns of live workers.
        disturbed_at = self.database.disturbed_at
        if self.generation.draining or (disturbed_at and time.monotonic() - disturbed_at < self.settings.lease):
            return
        for row in await turns.take_over(self.database, self.worker, int(self.settings.lease * 1000)):
            if row["ended_at"] is not None:  # else the turn is our own, not renewed in time, and is renewed now
                self.relay.count("taken_over")
                log.warning("turn %s: its worker is gone, ending the turn", row["id"])
                self.tasks.spawn(self.adopt(row))
        await accounts.delete_expired(self.database)
        await budgets.delete_old_budgets(self.database)
