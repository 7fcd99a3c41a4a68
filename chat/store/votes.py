"""Votes: facts in rows, everything else computed from them.

A vote is one row per turn, written by one transaction that checks everything a vote must satisfy and credits the models
the server chose. Ratings are never stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..arena import ratings
from ..arena.integrity import names_itself
from ..arena.ratings import Rating
from ..cached import Cached
from ..errors import ChatError, not_found
from ..settings import Model
from .database import Database, new_id
from .queries import Query, Row
from .sessions import COLUMNS, Session, fetch_session

PREFERENCES = ("model_a", "model_b", "tie", "both_bad")
PERIODS = {"all_time": None, "monthly": 30, "weekly": 7, "daily": 1}  # days
ELO_VOTES = 100_000  # the newest votes that `rating_change` looks at
DAY = 86_400_000  # milliseconds
FOREVER = 2**62
Tally = tuple[str, str, str, int]  # model_a, model_b, preference, how often


@dataclass(frozen=True)
class Vote:
    """A vote as its voter is told it."""

    id: str
    preference: str
    created_at: int


@dataclass(frozen=True)
class Board:
    """A leaderboard, best first, models without a rating last, and its facts.

    tally: how each pair met and ended; left_out: how many votes were stored and not counted, by reason.
    """

    standings: list[Rating]
    tally: list[Tally]
    left_out: list[tuple[str, int]]


# -- casting


async def insert_vote(
    database: Database, session: Session, account_id: str, message_id: str, preference: str, models: Mapping[str, Model]
) -> tuple[Vote, Session]:
    """Cast the one vote of a turn. Raises `not_found`, `conflict` while a side is not whole, `already_voted`.

    message_id: the turn's user message or one of its replies. The session's first vote reveals it. Returns the session
    with the vote.
    """

    async def work(query: Query) -> tuple[Vote, Session]:
        # First, because this locks the session: nobody else votes in it meanwhile, and no answer is made again.
        now = database.now()
        voted = await fetch_session(
            query,
            f"""UPDATE sessions SET voted_at = COALESCE(voted_at, :now), version = version + 1, updated_at = :now
                 WHERE id = :id AND account_id = :account_id RETURNING {COLUMNS}""",
            {"id": session.id, "account_id": account_id, "now": now},
        )
        replies = await _select_battle(query, session.id, message_id)
        reason = _not_counted(voted, replies, models)
        vote = Vote(new_id(), preference, now)
        await query.execute(INSERT_VOTE, {
            "id": vote.id,
            "turn_id": replies[0]["turn_id"],
            "session_id": voted.id,
            "account_id": account_id,
            "mode": voted.mode,
            "model_a": replies[0]["model"],
            "model_b": replies[1]["model"],
            "preference": preference,
            "counted": int(reason is None),
            "reason": reason,
            "created_at": now,
        })  # fmt: skip
        await query.execute(
            "UPDATE messages SET feedback = :feedback WHERE turn_id = :turn_id AND role = 'user'",
            {"feedback": f'"{preference}"', "turn_id": replies[0]["turn_id"]},
        )
        return vote, voted

    return await database.transaction(work, line=session.id)


INSERT_VOTE = """
    INSERT INTO votes (id, turn_id, session_id, account_id, mode, model_a, model_b, preference, counted, reason,
                       created_at)
    VALUES (:id, :turn_id, :session_id, :account_id, :mode, :model_a, :model_b, :preference, :counted, :reason,
            :created_at)"""


async def _select_battle(query: Query, session_id: str, message_id: str) -> list[Row]:
    """Return the two replies of a message's turn, side a first, and how many votes their session has.

    Raises `not_found` and `conflict` unless there are two whole answers, and `already_voted`.
    """
    replies = await query.fetch_all(
        """SELECT m.turn_id, m.status, m.content, m.model, t.status AS turn_status, v.id AS vote_id,
                  (SELECT COUNT(*) FROM turns o JOIN votes w ON w.turn_id = o.id
                    WHERE o.session_id = :session_id) AS votes
             FROM messages m JOIN turns t ON t.id = m.turn_id LEFT JOIN votes v ON v.turn_id = t.id
            WHERE m.session_id = :session_id AND m.role = 'assistant' AND m.turn_id =
                  (SELECT turn_id FROM messages WHERE session_id = :session_id AND id = :id)
            ORDER BY m.participant""",
        {"session_id": session_id, "id": message_id},
    )
    if not replies:
        raise not_found("message")
    if replies[0]["vote_id"] is not None:
        raise ChatError("already_voted", "This answer has been voted on; a vote stays as it was cast.")
    if len(replies) < 2:
        raise ChatError("conflict", "There is one answer here; a vote needs two.")
    if any(row["status"] in ("pending", "streaming") or row["turn_status"] == "running" for row in replies):
        raise ChatError("conflict", "Both answers have to be finished before the vote.")
    if any(row["status"] != "success" for row in replies):
        raise ChatError("conflict", "Both answers have to be whole to be voted on; ask again.")
    return replies


def _not_counted(session: Session, replies: list[Row], models: Mapping[str, Model]) -> str | None:
    if session.mode == "random" and replies[0]["votes"]:
        return "revealed"
    if session.mode == "random" and any(names_itself(row["content"], _names(models, row["model"])) for row in replies):
        return "named"
    return None


def _names(models: Mapping[str, Model], id: str) -> list[str]:
    """Return the names people use for the model, without the vendor of a demo model: answers may speak of us."""
    model = models.get(id, Model(id=id, provider="unknown"))
    known = [] if model.free else [model.vendor, model.model_code]
    return [model.id, model.display_name, *known]


# -- the leaderboard


class Leaderboard:
    """Ratings computed from the votes when asked, and kept for a few seconds."""

    def __init__(self, database: Database, kept: float) -> None:
        self._database = database
        self._kept = kept
        self._boards: dict[tuple[str, tuple[str, ...]], Cached[Board]] = {}

    async def board(self, period: str, modes: tuple[str, ...]) -> Board:
        computed = partial(self._computed, period, modes)
        return await self._boards.setdefault((period, modes), Cached(self._kept, computed)).get()

    async def standings(self, period: str, modes: tuple[str, ...]) -> list[Rating]:
        return (await self.board(period, modes)).standings

    async def _computed(self, period: str, modes: tuple[str, ...]) -> Board:
        now, days = self._database.now(), PERIODS[period]
        since = 0 if days is None else now - days * DAY
        recent = now - (days or 30) * DAY
        votes = await _select_tally(self._database, since, FOREVER, modes)
        earlier = await _select_tally(self._database, 0, recent, modes)
        later = await _select_recent(self._database, recent, modes)
        # In a thread: a million votes between 60 models take a tenth of a second, in which every socket would wait.
        standings = await asyncio.to_thread(_standings, votes, earlier, later)
        return Board(standings, votes, await _select_left_out(self._database, since, modes))


def _standings(votes: list[Tally], earlier: list[Tally], later: list[tuple[str, str, str]]) -> list[Rating]:
    """Return the ratings by `votes`. Their `change`: the Elo points won in `later`, from the ratings by `earlier`."""
    start = {each.model: each.rating for each in ratings.bradley_terry(earlier) if each.rating is not None}
    elo = ratings.elo(later, start)
    mean = ratings.MEAN
    ratings_now = ratings.bradley_terry(votes)
    return [replace(each, change=elo.get(each.model, mean) - start.get(each.model, mean)) for each in ratings_now]


def _modes(modes: tuple[str, ...]) -> dict[str, Any]:
    return {"mode": modes[0], "other": modes[-1]}


async def _select_tally(database: Database, since: int, before: int, modes: tuple[str, ...]) -> list[Tally]:
    """Return how often each pair of models met with each outcome, in the order of the index that has these columns."""
    rows = await database.fetch_all(
        """SELECT model_a, model_b, preference, COUNT(*) AS battles FROM votes
            WHERE counted = 1 AND mode IN (:mode, :other) AND created_at >= :since AND created_at < :before
            GROUP BY mode, model_a, model_b, preference ORDER BY mode, model_a, model_b, preference""",
        _modes(modes) | {"since": since, "before": before},
    )
    return [(row["model_a"], row["model_b"], row["preference"], row["battles"]) for row in rows]


async def _select_left_out(database: Database, since: int, modes: tuple[str, ...]) -> list[tuple[str, int]]:
    """Return how many stored votes are not counted, for each reason, the most frequent reason first."""
    rows = await database.fetch_all(
        """SELECT COALESCE(reason, 'other') AS why, COUNT(*) AS votes FROM votes
            WHERE counted = 0 AND mode IN (:mode, :other) AND created_at >= :since
            GROUP BY why ORDER BY votes DESC, why""",
        _modes(modes) | {"since": since},
    )
    return [(row["why"], row["votes"]) for row in rows]


async def _select_recent(database: Database, since: int, modes: tuple[str, ...]) -> list[tuple[str, str, str]]:
    rows = await database.fetch_all(
        # Not `= 1`, for which the index of pairs would do: the newest are found by time, not by sorting a million.
        """SELECT model_a, model_b, preference FROM votes
            WHERE counted <> 0 AND mode IN (:mode, :other) AND created_at >= :since
            ORDER BY created_at DESC, id DESC LIMIT :limit""",
        _modes(modes) | {"since": since, "limit": ELO_VOTES},
    )
    return [(row["model_a"], row["model_b"], row["preference"]) for row in reversed(rows)]


async def select_votes(database: Database, after: tuple[int, str], limit: int, before: int = FOREVER) -> list[Row]:
    """Return the next counted votes in the order they were cast, after the vote with this `(created_at, id)`.

    before: milliseconds; later votes are left out.
    """
    return await database.fetch_all(
        """SELECT v.id, v.turn_id, v.account_id, v.mode, v.model_a, v.model_b, v.preference, v.created_at,
                  (SELECT COUNT(*) FROM turns t JOIN turns o ON o.session_id = t.session_id
                    WHERE t.id = v.turn_id AND o.position <= t.position) AS turn
             FROM votes v
            WHERE v.counted <> 0 AND (v.created_at > :time OR (v.created_at = :time AND v.id > :id))
              AND v.created_at < :before
            ORDER BY v.created_at, v.id LIMIT :limit""",
        {"time": after[0], "id": after[1], "limit": limit, "before": before},
    )


async def update_feedback(
    database: Database, session_id: str, account_id: str, message_id: str, feedback: str
) -> bool:
    """Store a session owner's feedback on a reply, in place of earlier feedback. False when they have no such reply."""
    row = await database.fetch_one(
        """UPDATE messages SET feedback = :feedback
            WHERE session_id = :session_id AND id = :id AND role = 'assistant'
              AND EXISTS (SELECT 1 FROM sessions s WHERE s.id = :session_id AND s.account_id = :account_id)
           RETURNING id""",
        {"session_id": session_id, "id": message_id, "account_id": account_id, "feedback": feedback},
    )
    return row is not None


async def select_feedback(database: Database, session_id: str, account_id: str) -> list[Row]:
    """Return the votes and reports of a session's owner as `{id, feedback}`, in the order of the messages."""
    return await database.fetch_all(
        """SELECT m.id, m.feedback FROM messages m JOIN sessions s ON s.id = m.session_id
            WHERE m.session_id = :session_id AND s.account_id = :account_id AND m.feedback IS NOT NULL
            ORDER BY m.position""",
        {"session_id": session_id, "account_id": account_id},
    )
