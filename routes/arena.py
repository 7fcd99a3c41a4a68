"""The arena: votes and other feedback, the leaderboard, and the votes as a file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from chat.arena.ratings import Rating
from chat.errors import ChatError, invalid, not_found
from chat.formats import Id
from chat.state import State
from chat.store import sessions, votes
from chat.store.accounts import Account, iso
from chat.store.database import new_id

from . import inputs


class Feedback(msgspec.Struct):
    """A vote, a rating or a report. The arena's own clients send more fields than these."""

    session_id: Id
    message_id: Id
    feedback_type: Literal["preference", "rating", "report"]
    preference: Literal["model_a", "model_b", "tie", "both_bad", "like", "dislike"] | None = None
    rating: Annotated[int, Meta(ge=1, le=5)] | None = None
    comment: Annotated[str, Meta(max_length=2000)] | None = None
    categories: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(max_length=20)] | None = None


async def feedback(request: Request) -> Response:
    chat, account = await inputs.caller(request)
    said = await inputs.body(request, Feedback)
    body = await (_vote if said.feedback_type == "preference" else _rate)(chat, account, said)
    return inputs.answer(body, 201)


async def given(request: Request) -> Response:
    """The owner's feedback on a session: the votes, and the likes and reports with their words."""
    chat, account, session = await inputs.own_session(request)
    found = await votes.select_feedback(chat.database, session.id, account.id)
    return inputs.answer([_given(row) for row in found])


def _given(row: dict[str, Any]) -> dict[str, Any]:
    kept = msgspec.json.decode(row["feedback"])
    vote = {"feedback_type": "preference", "preference": kept}
    return {"message_id": row["id"]} | (kept if isinstance(kept, dict) else vote)


async def _vote(chat: State, account: Account, said: Feedback) -> dict[str, Any]:
    """Store a vote and tell everyone in the session, which it may reveal."""
    if said.preference not in votes.PREFERENCES:
        raise invalid("preference", f"expected one of {', '.join(votes.PREFERENCES)}")
    session = await sessions.select_session(chat.database, said.session_id, account.id)
    known = {model.id: model for model in chat.settings.models}
    was_blind = session.blind
    with chat.relay.doubtful(session):
        vote, session = await votes.insert_vote(
            chat.database, session, account.id, said.message_id, said.preference, known
        )
    chat.relay.count("votes")
    chat.relay.tell_update(session, "revealed" if was_blind else "voted")
    return {
        "id": vote.id,
        "feedback_type": "preference",
        "preference": vote.preference,
        "created_at": iso(vote.created_at),
        "session_update": chat.mask.session(session),
    }


async def _rate(chat: State, account: Account, said: Feedback) -> dict[str, Any]:
    """Keep a rating or a report of one reply, replacing the one before."""
    if said.feedback_type == "rating" and said.rating is None and said.preference not in ("like", "dislike"):
        raise invalid("rating", "expected 1 to 5, or a preference of like or dislike")
    kept = {
        "id": new_id(),
        "feedback_type": said.feedback_type,
        "preference": said.preference,
        "rating": said.rating,
        "comment": said.comment,
        "categories": said.categories or [],
        "created_at": iso(chat.database.now()),
    }
    text = msgspec.json.encode(kept).decode()
    if not await votes.update_feedback(chat.database, said.session_id, account.id, said.message_id, text):
        raise not_found("message")
    session = await sessions.select_session(chat.database, said.session_id, account.id)
    return kept | {"session_update": chat.mask.session(session)}


def _which(request: Request) -> tuple[str, tuple[str, ...]]:
    """The period and the modes of the votes that are asked about."""
    period = inputs.choice(request, "period", tuple(votes.PERIODS)) or "all_time"
    mode = inputs.choice(request, "mode", ("random", "compare", "all")) or "random"
    return period, ("random", "compare") if mode == "all" else (mode,)


async def leaderboard(request: Request) -> Response:
    chat = inputs.state(request)
    limit = inputs.number(request, "limit", 100, 1, 1000)
    standings = await chat.leaderboard.standings(*_which(request))
    return inputs.answer([_line(each, chat.mask.model(each.model)) for each in standings[:limit]])


def _line(rating: Rating, card: dict[str, Any]) -> dict[str, Any]:
    return {
        "rank": rating.rank,
        "id": rating.model,
        "name": card["display_name"],
        "provider": card["provider"],
        "elo_rating": _rounded(rating.rating),
        "ci_lower": _rounded(rating.lower),
        "ci_upper": _rounded(rating.upper),
        "rating_change": _rounded(rating.change),
        "battles": rating.battles,
        "wins": rating.wins,
        "losses": rating.losses,
        "ties": rating.ties,
        "both_bad": rating.both_bad,
        "win_rate": rating.win_rate,
        "preliminary": rating.preliminary,
    }


def _rounded(points: float | None) -> float | None:
    return None if points is None else round(points, 2)


async def details(request: Request) -> Response:
    """The facts a leaderboard is computed from: who met whom, and which votes were left out and why."""
    found = await inputs.state(request).leaderboard.board(*_which(request))
    names = ("model_a", "model_b", "preference", "votes")
    body = {
        "counted": sum(count for *_, count in found.tally),
        "pairs": [dict(zip(names, line, strict=True)) for line in found.tally],
        "left_out": [{"reason": reason, "votes": count} for reason, count in found.left_out],
    }
    return inputs.answer(body)


async def export(request: Request) -> Response:
    """The counted votes, one JSON record a line, as FastChat's `clean_battle` files have them; no texts."""
    chat = inputs.state(request)
    if not chat.settings.votes_export:
        raise ChatError("not_found", "The operator does not publish the votes.")
    await inputs.hit_long_read(request, None)
    return StreamingResponse(chat.votes_file.pieces(), media_type="application/x-ndjson")
