"""Tickets: each opens one socket or stream, once. Tickets stand in URLs, which proxies and servers log.

An EventSource reconnects to the same URL by itself. So a used ticket opens the same session's stream again, within
`AWAY`, for a client whose cursor is of a turn that it was told with this ticket, even if the turn was made again
meanwhile. A client that was cut off before it had a cursor may use the ticket once more in its 30 s.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from ..errors import ChatError
from ..tokens import Tokens
from .accounts import Account, insert_used_token, select_account
from .database import Database

AWAY = 600_000  # milliseconds from one opening of a stream to the next; none is longer than a reply may take


async def open_stream(database: Database, tokens: Tokens, text: str, session_id: str, turn_id: str) -> Account:
    """Return the account whose ticket opens this session's stream. The caller checks whether it may read there.

    turn_id: of the cursor the reader comes back with, "" without one. Raises `token_invalid` or `token_expired`.
    """
    token = tokens.read(text, "ticket")
    account = await select_account(database, token.id, token.tv)  # first: storage that fails here leaves the ticket
    if turn_id and await _again(database, f"{token.jti} {session_id} {turn_id}"):
        await database.execute(USED, {"id": token.jti, "until": token.exp * 1000})
    else:
        await insert_used_token(database, token.jti, tokens.fresh(token).exp)
    return account


USED = """INSERT INTO used_tokens (id, expires_at) VALUES (:id, :until)
          ON CONFLICT (id) DO UPDATE SET expires_at = excluded.expires_at"""


async def note_told(database: Database, tokens: Tokens, text: str, session_id: str, turn_id: str) -> None:
    """Note that a reader with this ticket is told this turn, whose cursors will open the session's stream again."""
    id = f"{tokens.read(text, 'ticket').jti} {session_id} {turn_id}"
    await database.execute(USED, {"id": id, "until": database.now() + AWAY})


async def give_back(database: Database, tokens: Tokens, text: str) -> None:
    """Take a ticket for unused again: its stream was cut before its end, perhaps before the client had a cursor."""
    await database.execute("DELETE FROM used_tokens WHERE id = :id", {"id": tokens.read(text, "ticket").jti})


@contextlib.asynccontextmanager
async def give_back_if_refused(database: Database, tokens: Tokens, text: str) -> AsyncIterator[None]:
    """Give a used ticket ("" for none) back when the block raises a refusal that may pass: its client tries again."""
    try:
        yield
    except ChatError as problem:
        if text and problem.retryable:
            await give_back(database, tokens, text)
        raise


async def _again(database: Database, id: str) -> bool:
    row = await database.fetch_one(
        "UPDATE used_tokens SET expires_at = :until WHERE id = :id AND expires_at > :now RETURNING id",
        {"id": id, "now": database.now(), "until": database.now() + AWAY},
    )
    return row is not None
