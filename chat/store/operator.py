"""A person in the place of a session's model: the operator's statements. The caller has checked who asks.

Only a session with one model is taken over: in a battle a person's words would tell the two sides apart.
"""

from __future__ import annotations

from typing import Any

from ..errors import ChatError
from . import sessions
from .accounts import iso
from .database import Database, new_id
from .queries import Query
from .sessions import Session
from .turns import (
    Known,
    StoredTurn,
    allot_positions,
    check_free,
    message_row,
    person_says,
    select_turn_of_message,
    write_turn,
)

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
    values = {"id": id, "name": name}
    sql = f"UPDATE sessions SET operator = CAST(:name AS TEXT) WHERE id = :id RETURNING {sessions.COLUMNS}"
    return await sessions.fetch_session(database, sql, values)


async def insert_words(database: Database, session: Session, message_id: str, content: str) -> None:
    """Write what the person who took the session over says: a turn of one reply, whole at once.

    The same id again is the same message. Raises `conflict` when nobody took the session over or another message has
    the id, and `busy` while the model's last answer ends.
    """

    async def work(query: Query) -> None:
        now, turn_id = database.now(), new_id()
        position, person = await allot_positions(query, session, session.account_id, now, 1)
        if person is None:
            raise ChatError("conflict", "Take this session over before you speak in it.")
        await check_free(query, session.id, "", 1, message_id)
        reply = message_row(session.id, turn_id, now) | person_says(person, content)
        reply |= {"id": message_id, "role": "assistant", "participant": "a", "position": position}
        await write_turn(query, StoredTurn(turn_id, session, session.account_id, position, "", (reply,), True), now)

    try:
        await database.transaction(work, line=session.account_id)
    except Known:  # and the session stays as it was: its readers would be told of a change otherwise
        turn = await select_turn_of_message(database, session, message_id)
        if turn is None or (turn.rows[0]["role"], turn.rows[0]["content"]) != ("assistant", content):
            raise ChatError("conflict", "Another message has this id. Give the new one a new id.") from None
