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
    next_position: int  # of the messages that did not exist when the session was read
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
    def life(self) -> Values:
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

COLUMNS = """s.id, s.account_id, a.display_name, s.mode, s.title, s.session_type, s.model_a, s.model_b, s.is_public,
             s.is_open, s.is_pinned, s.share_token, s.metadata, s.next_position, s.version, s.voted_at,
             s.last_message_at, s.created_at, s.updated_at, s.operator,
             (SELECT COUNT(*) FROM messages m WHERE m.session_id = s.id) AS message_count"""
FROM = "FROM sessions s JOIN accounts a ON a.id = s.account_id"


def _session(row: Row) -> Session:
    row["model_a"] = None if row["model_a"] is None else Hidden(row["model_a"])
    row["model_b"] = None if row["model_b"] is None else Hidden(row["model_b"])
    for name in ("is_public", "is_open", "is_pinned"):
        row[name] = bool(row[name])
    return Session(**row)


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
) -> bool:
    """Make a session; whether this call made it (False: the id exists already, whoever owns it)."""
    row = await database.fetch_one(
        """INSERT INTO sessions (id, account_id, mode, title, session_type, model_a, model_b, is_public, is_open,
                                 is_pinned, metadata, next_position, version, created_at, updated_at)
           VALUES (:id, :account_id, :mode, :title, :session_type, :model_a, :model_b, 0, :is_open,
                   0, :metadata, 0, 1, :now, :now)
           ON CONFLICT (id) DO NOTHING RETURNING id""",
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
    return row is not None


async def _find(database: Database | Query, where: str, values: Values) -> Session | None:
    row = await database.fetch_one(f"SELECT {COLUMNS} {FROM} WHERE {where}", values)
    return None if row is None else _session(row)


async def find_session(database: Database | Query, id: str, account_id: str) -> Session | None:
    """Return the session if the account may write in it."""
    mine = "s.id = :id AND (s.account_id = :account_id OR s.is_open = 1)"
    return await _find(database, mine, {"id": id, "account_id": account_id})


async def select_session(database: Database | Query, id: str, account_id: str) -> Session:
    """Return the session if the account may write in it. Raises `not_found`."""
    return _found(await find_session(database, id, account_id))


async def select_readable(database: Database, id: str, account_id: str) -> Session:
    """Return the session if the account may read it: anyone may read a public one. Raises `not_found`."""
    readable = "s.id = :id AND (s.account_id = :account_id OR s.is_open = 1 OR s.is_public = 1)"
    return _found(await _find(database, readable, {"id": id, "account_id": account_id}))


async def select_unchecked(database: Database, id: str) -> Session:
    """Return the session, for the server's own work: no caller is checked. Raises `not_found`."""
    return _found(await _find(database, "s.id = :id", {"id": id}))


async def select_shared(database: Database, share_token: str) -> Session:
    """Return the session that this link shares. Raises `not_found`."""
    return _found(await _find(database, "s.share_token = :token", {"token": share_token}), "shared session")


def _found(session: Session | None, name: str = "session") -> Session:
    if session is None:
        raise not_found(name)
    return session


async def select_running(database: Database, account_id: str) -> list[Session]:
    """The account's sessions in which an answer is being written."""
    rows = await database.fetch_all(
        f"""SELECT {COLUMNS} {FROM} WHERE s.account_id = :account_id
               AND EXISTS (SELECT 1 FROM turns t WHERE t.session_id = s.id AND t.status = 'running')""",
        {"account_id": account_id},
    )
    return [_session(row) for row in rows]


async def select_sessions(
    database: Database, account_id: str, *, mode: str | None, search: str | None, limit: int, before: tuple[int, str]
) -> list[Session]:
    """The account's sessions, newest change first, from below the `(updated_at, id)` of the last one shown."""
    rows = await database.fetch_all(
        f"""SELECT {COLUMNS} {FROM}
             WHERE s.account_id = :account_id
               AND (CAST(:mode AS TEXT) IS NULL OR s.mode = :mode)
               AND (CAST(:search AS TEXT) IS NULL OR LOWER(s.title) LIKE LOWER(:search) ESCAPE '!')
               AND (s.updated_at < :updated_at OR (s.updated_at = :updated_at AND s.id < :id))
             ORDER BY s.updated_at DESC, s.id DESC LIMIT :limit""",
        {
            "account_id": account_id,
            "mode": mode,
            "search": _like(search),
            "updated_at": before[0],
            "id": before[1],
            "limit": limit,
        },
    )
    return [_session(row) for row in rows]


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
    return await _update(
        database,
        """UPDATE sessions SET title = COALESCE(CAST(:title AS TEXT), title),
                  is_pinned = COALESCE(CAST(:is_pinned AS INTEGER), is_pinned),
                  is_public = COALESCE(CAST(:is_public AS INTEGER), is_public),
                  share_token = CASE WHEN is_public = 1 AND CAST(:is_public AS INTEGER) = 0 THEN NULL
                                     ELSE share_token END,
                  version = version + 1, updated_at = :now
            WHERE id = :id AND account_id = :account_id RETURNING id""",
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
    return await _update(
        database,
        """UPDATE sessions SET share_token = CASE WHEN :share = 1 THEN COALESCE(share_token, :token) END,
                  version = version + 1
            WHERE id = :id AND account_id = :account_id RETURNING id""",
        {"id": id, "account_id": account_id, "share": int(share), "token": secrets.token_urlsafe(16)},
    )


async def _update(database: Database, sql: str, values: Values) -> Session:
    """Change a session of this account and return it, both or neither: the caller has readers to tell."""

    async def work(query: Query) -> Session:
        if await query.fetch_one(sql, values) is None:
            raise not_found("session")
        return await select_session(query, values["id"], values["account_id"])

    return await database.transaction(work)


async def delete_session(database: Database, session: Session, account_id: str) -> None:
    """Delete the session with all of its messages. The votes stay: they are facts about models."""
    row = await database.fetch_one(
        """DELETE FROM sessions WHERE id = :id AND created_at = :created_at AND account_id = :account_id
           RETURNING id""",
        session.life | {"account_id": account_id},
    )
    if row is None:
        raise not_found("session")
