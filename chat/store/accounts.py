"""Accounts: the people and guests that sessions belong to, and the tickets they have used. Both expire."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any

import msgspec

from ..errors import ChatError
from ..tokens import SKEW, Tokens
from .database import Database, new_id
from .queries import Query, Row

GUEST_LIFETIME = 30 * 86400 * 1000  # milliseconds


@dataclass(frozen=True, slots=True)
class Account:
    """A person or guest. Times are milliseconds since 1970."""

    id: str
    display_name: str
    preferences: dict[str, Any]
    token_version: int
    created_at: int
    updated_at: int
    expires_at: int  # at the earliest: whoever was active since lives on. 0: it is being deleted


def iso(milliseconds: int | None) -> str | None:
    """Milliseconds since 1970 as the wire's ISO 8601 UTC, or None."""
    if milliseconds is None:
        return None
    seconds, rest = divmod(milliseconds, 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest:03d}Z"


def account_id(account: Account | None) -> str:
    """Return the id of whoever asks, "" for nobody: no session is theirs."""
    return "" if account is None else account.id


def account_json(account: Account) -> dict[str, Any]:
    """`user` as its owner sees it."""
    return {
        "id": account.id,
        "email": None,
        "phone_number": None,
        "display_name": account.display_name,
        "auth_provider": "anonymous",
        "is_anonymous": True,
        "created_at": iso(account.created_at),
        "updated_at": iso(account.updated_at),
        "is_active": True,
        "preferences": account.preferences,
        "anonymous_expires_at": iso(account.expires_at),
    }


def _account(row: Row | None) -> Account:
    """Return the account of a row. Raises `token_invalid` for none: it is gone, or its tokens were revoked."""
    if row is None:
        raise ChatError("token_invalid", "This token is not valid any more.")
    return Account(**row | {"preferences": msgspec.json.decode(row["preferences"])})


COLUMNS = "id, display_name, preferences, token_version, created_at, updated_at, expires_at"


async def insert_guest(database: Database, display_name: str | None) -> Account:
    """Make a guest. Without a name it gets one of its own."""
    now = database.now()
    row = await database.fetch_one(
        f"""INSERT INTO accounts ({COLUMNS})
            VALUES (:id, :display_name, '{{}}', 1, :now, :now, :expires_at) RETURNING {COLUMNS}""",
        {
            "id": new_id(),
            "display_name": display_name or f"Anonymous_{secrets.token_hex(4)}",
            "now": now,
            "expires_at": now + GUEST_LIFETIME,
        },
    )
    return _account(row)


async def select_account(database: Database, id: str, token_version: int) -> Account:
    """The account a verified token names. Raises `token_invalid` when it is gone or the token was revoked."""
    row = await database.fetch_one(
        f"SELECT {COLUMNS} FROM accounts WHERE id = :id AND token_version = :version AND expires_at > 0",
        {"id": id, "version": token_version},
    )
    return _account(row)


async def renew_account(database: Database, id: str, token_version: int) -> Account:
    """The account a verified refresh token names, which lives as long as the new one. Raises `token_invalid`."""
    row = await database.fetch_one(
        f"""UPDATE accounts SET expires_at = :until
             WHERE id = :id AND token_version = :version AND expires_at > 0 RETURNING {COLUMNS}""",
        {"id": id, "version": token_version, "until": database.now() + GUEST_LIFETIME},
    )
    return _account(row)


async def verified(database: Database, tokens: Tokens, kind: str, text: str) -> Account:
    """Return the account behind a credential."""
    return (await verified_until(database, tokens, kind, text))[0]


async def verified_until(database: Database, tokens: Tokens, kind: str, text: str) -> tuple[Account, float]:
    """Return the account behind a credential and when the credential expires (Unix seconds; 0: never).

    `access` may be either of our long tokens: clients have one place to put it. A ticket opens a connection that may
    outlive it.
    """
    kinds = {"access": ("access", "anonymous"), "anonymous": ("anonymous",), "ticket": ("ticket",)}[kind]
    token = tokens.verify(text, *kinds)
    account = await select_account(database, token.id, token.tv)
    if token.kind != "ticket":
        return account, float(token.exp + SKEW)
    await insert_used_token(database, token.jti, token.exp)  # last: storage that fails before leaves the ticket
    return account, 0.0


async def update_account(
    database: Database, id: str, display_name: str | None, preferences: dict[str, Any] | None
) -> Account:
    """Change what is given; None leaves it as it is."""
    row = await database.fetch_one(
        f"""UPDATE accounts SET display_name = COALESCE(CAST(:display_name AS TEXT), display_name),
                   preferences = COALESCE(CAST(:preferences AS TEXT), preferences), updated_at = :now
             WHERE id = :id RETURNING {COLUMNS}""",
        {
            "id": id,
            "display_name": display_name,
            "preferences": None if preferences is None else msgspec.json.encode(preferences).decode(),
            "now": database.now(),
        },
    )
    return _account(row)


async def revoke_tokens(database: Database, id: str) -> None:
    """End every token the account was ever given."""
    await database.execute("UPDATE accounts SET token_version = token_version + 1 WHERE id = :id", {"id": id})


async def delete_account(database: Database, id: str) -> None:
    """Delete the account with its sessions and their messages. The votes stay, without an owner.

    The account's tokens are invalid from the first statement on. If the worker dies, a sweep finishes the deletion.
    """
    await database.execute("UPDATE accounts SET expires_at = 0 WHERE id = :id", {"id": id})
    await _delete_marked(database, id)


async def _delete_marked(database: Database, id: str) -> None:
    """Delete an account that `expires_at` 0 marks: first what there may be much of, in small pieces."""
    for statement in DELETE_PIECES:
        await database.execute_in_pieces(statement, {"id": id})

    async def work(query: Query) -> None:
        await query.execute("UPDATE votes SET account_id = '' WHERE account_id = :id", {"id": id})
        await query.execute("DELETE FROM budgets WHERE name = :name", {"name": f"account:{id}"})
        await query.execute("DELETE FROM accounts WHERE id = :id", {"id": id})

    await database.transaction(work)


DELETE_PIECES = (
    """DELETE FROM messages WHERE (session_id, id) IN
              (SELECT m.session_id, m.id FROM sessions s JOIN messages m ON m.session_id = s.id
                WHERE s.account_id = :id LIMIT :piece) RETURNING id""",
    """DELETE FROM turns WHERE id IN
              (SELECT t.id FROM sessions s JOIN turns t ON t.session_id = s.id
                WHERE s.account_id = :id LIMIT :piece) RETURNING id""",
    "DELETE FROM sessions WHERE id IN (SELECT id FROM sessions WHERE account_id = :id LIMIT :piece) RETURNING id",
)


async def insert_used_token(database: Database, jti: str, expires_at: int) -> None:
    """Use up a single-use token. Raises `token_invalid` for its second use, on whichever worker."""
    row = await database.fetch_one(
        """INSERT INTO used_tokens (id, expires_at) VALUES (:id, :expires_at)
           ON CONFLICT (id) DO NOTHING RETURNING id""",
        {"id": jti, "expires_at": expires_at * 1000},
    )
    if row is None:
        raise ChatError("token_invalid", "This token has been used already.")


AT_ONCE = 20  # accounts looked at by one sweep: their sessions may be many


async def delete_expired(database: Database) -> None:
    """Delete used tokens that could not be used again anyway, and guests who have not come back."""
    now = database.now()
    await database.execute_in_pieces(
        """DELETE FROM used_tokens WHERE id IN
                  (SELECT id FROM used_tokens WHERE expires_at < :then ORDER BY expires_at LIMIT :piece)
           RETURNING id""",
        {"then": now - 3_600_000},
    )
    # A guest whose sessions changed since lives on from then; a message does not write this down each time. The outer
    # condition is the one that PostgreSQL evaluates again for an account that is renewed at the same moment.
    await database.execute(
        """UPDATE accounts SET expires_at = COALESCE(
                  (SELECT MAX(s.updated_at) + :lifetime FROM sessions s
                    WHERE s.account_id = accounts.id AND s.updated_at > :since), 0)
            WHERE expires_at > 0 AND expires_at < :now
              AND id IN (SELECT id FROM accounts WHERE expires_at > 0 AND expires_at < :now
                          ORDER BY expires_at LIMIT :at_once)""",
        {"lifetime": GUEST_LIFETIME, "since": now - GUEST_LIFETIME, "now": now, "at_once": AT_ONCE},
    )
    marked = "SELECT id FROM accounts WHERE expires_at = 0 LIMIT :at_once"
    for row in await database.fetch_all(marked, {"at_once": AT_ONCE}):
        await _delete_marked(database, row["id"])
