"""Accounts: the people and guests sessions belong to, and what they have spent today."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import msgspec

from ..errors import ChatError
from ..tokens import SKEW, Tokens
from .database import Database, StorageUnavailable, new_id
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
    expires_at: int


def iso(milliseconds: int | None) -> str | None:
    """Milliseconds since 1970 as the wire's ISO 8601 UTC, or None."""
    if milliseconds is None:
        return None
    seconds, rest = divmod(milliseconds, 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest:03d}Z"


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


def _account(row: Row) -> Account:
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
    assert row is not None
    return _account(row)


async def select_account(database: Database, id: str, token_version: int) -> Account:
    """The account a verified token names. Raises `token_invalid` when it is gone or the token was revoked."""
    row = await database.fetch_one(
        f"SELECT {COLUMNS} FROM accounts WHERE id = :id AND token_version = :version",
        {"id": id, "version": token_version},
    )
    if row is None:
        raise ChatError("token_invalid", "This token is not valid any more.")
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
    if token.kind == "ticket":
        await insert_used_token(database, token.jti, token.exp)
    account = await select_account(database, token.id, token.tv)
    return account, 0.0 if token.kind == "ticket" else float(token.exp + SKEW)


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
    if row is None:
        raise ChatError("token_invalid", "This token is not valid any more.")
    return _account(row)


async def insert_used_token(database: Database, jti: str, expires_at: int) -> None:
    """Use up a single-use token. Raises `token_invalid` for its second use, on whichever worker."""
    row = await database.fetch_one(
        """INSERT INTO used_tokens (id, expires_at) VALUES (:id, :expires_at)
           ON CONFLICT (id) DO NOTHING RETURNING id""",
        {"id": jti, "expires_at": expires_at * 1000},
    )
    if row is None:
        raise ChatError("token_invalid", "This token has been used already.")


async def delete_expired(database: Database) -> None:
    """Forget used tokens that could not be used again anyway, and budgets of days long over."""
    await database.execute("DELETE FROM used_tokens WHERE expires_at < :then", {"then": database.now() - 3_600_000})
    await database.execute("DELETE FROM budgets WHERE day < :day", {"day": _day(database.now() - 35 * 86_400_000)})


# -- budgets: tokens are reserved before the call in one statement, so that parallel requests cannot pass the limit


def _day(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(milliseconds / 1000))


def budgets_of(account_id: str) -> tuple[str, str]:
    return f"account:{account_id}", "service"


async def reserve(
    query: Query, now: int, account_id: str, tokens: int, limits: tuple[int, int], daily_messages: int
) -> None:
    """Take `tokens` from the account's day and the service's. Raises when one is used up; call inside a transaction.

    limits: tokens a day of the account and of the service, 0 for none.
    """
    own, service = budgets_of(account_id)
    rows = await query.fetch_all(
        """INSERT INTO budgets (name, day, tokens, messages)
           VALUES (:own, :day, :tokens, 1), (:service, :day, :tokens, 1)
           ON CONFLICT (name, day) DO UPDATE
               SET tokens = budgets.tokens + :tokens, messages = budgets.messages + 1
           RETURNING name, tokens, messages""",
        {"own": own, "service": service, "day": _day(now), "tokens": tokens},
    )
    spent = {row["name"]: row for row in rows}
    if daily_messages and spent[own]["messages"] > daily_messages:
        raise ChatError("daily_limit_reached", f"You have reached today's limit of {daily_messages} messages.")
    if any(limit and spent[name]["tokens"] > limit for name, limit in zip((own, service), limits, strict=True)):
        message = "Today's budget is used up. Please come back tomorrow."
        raise ChatError("budget_exhausted", message, retry_after=3600)


class Unused:
    """What turns that ended have not used of what they had reserved, until it is given back: all of it at once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._tokens: Counter[tuple[str, str]] = Counter()  # by the budget's name and day

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def add(self, account_id: str, reserved_at: int, tokens: int) -> None:
        """reserved_at: the `now` of `reserve`, whose day this belongs to."""
        if tokens > 0:
            day = _day(reserved_at)
            for name in budgets_of(account_id):
                self._tokens[name, day] += tokens

    async def give_back(self) -> None:
        """Write it down. Raises `StorageUnavailable`; then it is still there, unless it may be written yet."""
        tokens, self._tokens = self._tokens, Counter()
        # in the order `reserve` takes the rows: two transactions would wait for each other otherwise
        values = [{"name": name, "day": day, "tokens": tokens[name, day]} for name, day in sorted(tokens)]

        async def work(query: Query) -> None:
            await query.execute_many(
                "UPDATE budgets SET tokens = tokens - :tokens WHERE day = :day AND name = :name", values
            )

        try:
            if values:
                await self._database.transaction(work)
        except StorageUnavailable as problem:
            if not isinstance(problem.__cause__, TimeoutError):
                self._tokens += tokens
            raise
