"""Sessions: the statements that make, find, change and delete them.

The models of a session are `Hidden`: they cannot be encoded, printed or compared with a string, so an output that
forgets the mask (`mask.py`) fails instead of leaking.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import msgspec

from ..errors import not_found
from .database import Database, new_id
from .queries import Query, Row, Values

MODES = ("direct", "compare", "random")
SIDES = ("a", "b")


class Hidden:
    """A model's id that only the mask and the server's own work may see."""

    __slots__ = ("_id",)

    def __init__(self, id: str) -> None:
        self._id = id

    def __repr__(self) -> str:
        return "<hidden model>"

    def for_server(self) -> str:
        """The id, to call the model or credit a vote with. Never for an output."""
        return self._id


@dataclass(frozen=True, slots=True)
class Session:
    """A chat session. Times are milliseconds since 1970."""

    id: str
    account_id: str
    display_name: str  # its owner's
    mode: str
    title: str | None
    session_type: str | None
    model_a: Hidden | None
    model_b: Hidden | None
    is_public: bool
    is_open: bool
    is_pinned: bool
    share_token: str | None
    metadata: str
    message_count: int
    next_position: int  # of the next message when the session was read
    version: int
    voted_at: int | None
    last_message_at: int | None
    created_at: int
    updated_at: int
    operator: str | None  # the person who answers in the model's place

    @property
    def key(self) -> str:
        """The unique key of this session: someone else may use the id again after a deletion."""
        return f"{self.id}:{self.created_at}:{self.account_id[-12:]}"

    @property
    def identity(self) -> Values:
        """The values that a write names, so that it never falls on a later session of the same id."""
        return {"id": self.id, "created_at": self.created_at}

    @property
    def sides(self) -> tuple[str, ...]:
        return SIDES[:1] if self.mode == "direct" else SIDES

    @property
    def blind(self) -> bool:
        return self.mode == "random" and self.voted_at is None

    def model(self, side: str) -> Hidden:
        hidden = self.model_a if side == "a" else self.model_b
        assert hidden is not None
        return hidden


# -- statements. A session is its owner's; an open one (local start only) is everybody's; a public one may be read.

COLUMNS = """id, account_id, mode, title, session_type, model_a, model_b, is_public, is_open, is_pinned, share_token,
             metadata, next_position, version, voted_at, last_message_at, created_at, updated_at, operator,
             (SELECT display_name FROM accounts a WHERE a.id = sessions.account_id) AS display_name,
             (SELECT COUNT(*) FROM messages m WHERE m.session_id = sessions.id) AS message_count"""
SELECT = f"SELECT {COLUMNS} FROM sessions"


def _session(row: Row) -> Session:
    row["model_a"] = None if row["model_a"] is None else Hidden(row["model_a"])
    row["model_b"] = None if row["model_b"] is None else Hidden(row["model_b"])
    for name in ("is_public", "is_open", "is_pinned"):
        row[name] = bool(row[name])
    return Session(**row)


async def _fetch(database: Database | Query, sql: str, values: Values) -> list[Session]:
    return [_session(row) for row in await database.fetch_all(sql, values)]


async def fetch_session(database: Database | Query, sql: str, values: Values, name: str = "session") -> Session:
    """Return the session that the statement selects or changes. Raises `not_found` for none, by this name."""
    for session in await _fetch(database, sql, values):
        return session
    raise not_found(name)


async def insert_session(
    database: Database,
    account_id: str,
    mode: str,
    models: tuple[str, str | None],
    *,
    id: str | None = None,
    title: str | None = None,
    session_type: str | None = None,
    metadata: dict[str, Any] | None = None,
    is_open: bool = False,
) -> Session | None:
    """Make a session. None: the id exists already, whoever owns it."""
    made = await _fetch(
        database,
        f"""INSERT INTO sessions (id, account_id, mode, title, session_type, model_a, model_b, is_public, is_open,
                                 is_pinned, metadata, next_position, version, created_at, updated_at)
           VALUES (:id, :account_id, :mode, :title, :session_type, :model_a, :model_b, 0, :is_open,
                   0, :metadata, 0, 1, :now, :now)
           ON CONFLICT (id) DO NOTHING RETURNING {COLUMNS}""",
        {
            "id": id or new_id(),
            "account_id": account_id,
            "mode": mode,
            "title": title,
            "session_type": session_type,
            "model_a": models[0],
            "model_b": models[1],
            "is_open": int(is_open),
            "metadata": msgspec.json.encode(metadata or {}).decode(),
            "now": database.now(),
        },
    )
    return made[0] if made else None


WRITABLE = "id = :id AND (account_id = :account_id OR is_open = 1)"


async def find_session(database: Database, id: str, account_id: str) -> Session | None:
    """Return the session if the account may write in it."""
    found = await _fetch(database, f"{SELECT} WHERE {WRITABLE}", {"id": id, "account_id": account_id})
    return found[0] if found else None


async def select_session(database: Database, id: str, account_id: str) -> Session:
    """Return the session if the account may write in it. Raises `not_found`: other people's do not exist for them."""
    return await fetch_session(database, f"{SELECT} WHERE {WRITABLE}", {"id": id, "account_id": account_id})


async def select_readable(database: Database, id: str, account_id: str) -> Session:
    """Return the session if the account may read it: anyone may read a public one. Raises `not_found`."""
    readable = f"{SELECT} WHERE id = :id AND (account_id = :account_id OR is_open = 1 OR is_public = 1)"
    return await fetch_session(database, readable, {"id": id, "account_id": account_id})


async def select_unchecked(database: Database, id: str) -> Session:
    """Return the session, for the server's own work: no caller is checked. Raises `not_found`."""
    return await fetch_session(database, f"{SELECT} WHERE id = :id", {"id": id})


async def select_shared(database: Database, share_token: str) -> Session:
    """Return the session that this link shares. Raises `not_found`."""
    shared = f"{SELECT} WHERE share_token = :token"
    return await fetch_session(database, shared, {"token": share_token}, "shared session")


async def select_session_of_message(database: Database, message_id: str, account_id: str) -> Session:
    """Return the session of a message, if the account may write there. Raises `not_found`.

    Clients choose the ids of messages: of two sessions with this one the younger message's is meant.
    """
    sql = f"""{SELECT} WHERE id =
               (SELECT m.session_id FROM messages m JOIN sessions s ON s.id = m.session_id
                 WHERE m.id = :id AND (s.account_id = :account_id OR s.is_open = 1)
                 ORDER BY m.created_at DESC LIMIT 1)"""
    return await fetch_session(database, sql, {"id": message_id, "account_id": account_id}, "message")


async def select_running(database: Database, account_id: str) -> list[Session]:
    """The account's sessions in which an answer is being written."""
    running = "EXISTS (SELECT 1 FROM turns t WHERE t.session_id = sessions.id AND t.status = 'running')"
    return await _fetch(database, f"{SELECT} WHERE account_id = :account_id AND {running}", {"account_id": account_id})


async def select_sessions(
    database: Database, account_id: str, *, mode: str | None, search: str | None, limit: int, before: tuple[int, str]
) -> list[Session]:
    """The account's sessions, newest change first, from below the `(updated_at, id)` of the last one shown."""
    return await _fetch(
        database,
        f"""{SELECT}
             WHERE account_id = :account_id
               AND (CAST(:mode AS TEXT) IS NULL OR mode = :mode)
               AND (CAST(:search AS TEXT) IS NULL OR LOWER(title) LIKE LOWER(:search) ESCAPE '!')
               AND (updated_at < :updated_at OR (updated_at = :updated_at AND id < :id))
             ORDER BY updated_at DESC, id DESC LIMIT :limit""",
        {
            "account_id": account_id,
            "mode": mode,
            "search": _like(search),
            "updated_at": before[0],
            "id": before[1],
            "limit": limit,
        },
    )


def _like(search: str | None) -> str | None:
    if not search:
        return None
    for sign in "!%_":
        search = search.replace(sign, "!" + sign)
    return f"%{search}%"


async def update_session(
    database: Database,
    id: str,
    account_id: str,
    *,
    title: str | None = None,
    is_pinned: bool | None = None,
    is_public: bool | None = None,
) -> Session:
    """Change what is given; None leaves it as it is. Only the owner may.

    A session that is made private loses its share link, too.
    """
    return await fetch_session(
        database,
        f"""UPDATE sessions SET title = COALESCE(CAST(:title AS TEXT), title),
                  is_pinned = COALESCE(CAST(:is_pinned AS INTEGER), is_pinned),
                  is_public = COALESCE(CAST(:is_public AS INTEGER), is_public),
                  share_token = CASE WHEN is_public = 1 AND CAST(:is_public AS INTEGER) = 0 THEN NULL
                                     ELSE share_token END,
                  version = version + 1, updated_at = :now
            WHERE id = :id AND account_id = :account_id RETURNING {COLUMNS}""",
        {
            "id": id,
            "account_id": account_id,
            "title": title,
            "is_pinned": None if is_pinned is None else int(is_pinned),
            "is_public": None if is_public is None else int(is_public),
            "now": database.now(),
        },
    )


async def update_share(database: Database, id: str, account_id: str, share: bool) -> Session:
    """Give the session a share token (the one it has, if any) or take it away. Only the owner may."""
    return await fetch_session(
        database,
        f"""UPDATE sessions SET share_token = CASE WHEN :share = 1 THEN COALESCE(share_token, :token) END,
                  version = version + 1
            WHERE id = :id AND account_id = :account_id RETURNING {COLUMNS}""",
        {"id": id, "account_id": account_id, "share": int(share), "token": secrets.token_urlsafe(16)},
    )


async def delete_session(database: Database, session: Session, account_id: str) -> None:
    """Delete the session with all of its messages. The votes stay: they are facts about models."""
    row = await database.fetch_one(
        """DELETE FROM sessions WHERE id = :id AND created_at = :created_at AND account_id = :account_id
           RETURNING id""",
        session.identity | {"account_id": account_id},
    )
    if row is None:
        raise not_found("session")
