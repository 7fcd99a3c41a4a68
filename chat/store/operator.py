"""A person in the place of a session's model: the operator's statements. The caller has checked who asks.

Only a session with one model is taken over: in a battle a person's words would tell the two sides apart.
"""

from __future__ import annotations

import contextlib
from typing import Any

from ..errors import ChatError, not_found
from . import sessions
from .accounts import iso
from .database import Database, new_id
from .queries import Query, Row
from .sessions import Session
from .turns import INSERT_MESSAGE, NAMES, Known, insert_turn_row, person_says

LISTED = 50  # sessions on the operator's page


async def select_latest(database: Database) -> list[dict[str, Any]]:
    """Return the sessions that changed last, as the operator's page lists them; battles are not among them."""
    rows = await database.fetch_all(
        """SELECT s.id, s.title, s.operator, s.updated_at, a.display_name,
                  (SELECT COUNT(*) FROM messages m WHERE m.session_id = s.id) AS message_count
             FROM sessions s JOIN accounts a ON a.id = s.account_id
            WHERE s.mode = 'direct' ORDER BY s.updated_at DESC LIMIT :limit""",
        {"limit": LISTED},
    )
    return [row | {"updated_at": iso(row["updated_at"])} for row in rows]


async def update_operator(database: Database, id: str, name: str | None) -> Session:
    """Have a person of this name answer in the session, or with None its model. Raises `not_found`, `conflict`."""
    session = await sessions.select_unchecked(database, id)
    if session.mode != "direct":
        raise ChatError("conflict", "A session with two models cannot be taken over.")
    row = await database.fetch_one(
        "UPDATE sessions SET operator = CAST(:name AS TEXT) WHERE id = :id RETURNING id", {"id": id, "name": name}
    )
    if row is None:
        raise not_found("session")
    return session


async def insert_words(database: Database, session: Session, message_id: str, content: str) -> None:
    """Write what the person who took the session over says: a turn of one reply, whole at once.

    The same id again is the same message. Raises `conflict` when nobody took the session over or another message has
    the id, and `busy` while the model's last answer ends.
    """

    async def work(query: Query) -> None:
        now, turn_id = database.now(), new_id()
        row = await query.fetch_one(
            """UPDATE sessions SET next_position = next_position + 1, version = version + 1, updated_at = :now,
                      last_message_at = :now
                WHERE id = :id AND operator IS NOT NULL RETURNING next_position - 1 AS position, operator""",
            {"id": session.id, "now": now},
        )
        if row is None:
            raise ChatError("conflict", "Take this session over before you speak in it.")
        known = await query.fetch_one(
            "SELECT role, content FROM messages WHERE session_id = :session_id AND id = :id",
            {"session_id": session.id, "id": message_id},
        )
        if known is not None and (known["role"], known["content"]) != ("assistant", content):
            raise ChatError("conflict", "Another message has this id. Give the new one a new id.")
        if known is not None:
            raise Known  # and the session stays as it was: its readers would be told of a change otherwise
        running = await query.fetch_one(
            "SELECT id FROM turns WHERE session_id = :session_id AND status = 'running'", {"session_id": session.id}
        )
        if running is not None:
            raise ChatError("busy", "The model's answer is still being written in this session.", retry_after=1)
        position = row["position"]
        await insert_turn_row(
            query, turn_id, session.id, session.account_id, message_id, position, ("", now, False), now
        )
        reply: Row = dict.fromkeys(NAMES)
        reply |= {"session_id": session.id, "id": message_id, "turn_id": turn_id, "created_at": now, "updated_at": now}
        reply |= {"role": "assistant", "participant": "a", "position": position, "parent_ids": "[]"}
        await query.execute(INSERT_MESSAGE, reply | person_says(row["operator"], content))

    with contextlib.suppress(Known):
        await database.transaction(work, line=session.id)
