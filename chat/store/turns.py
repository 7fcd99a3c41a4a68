"""Turns and their messages: the statements that start, checkpoint, fence and end an answer.

A turn is one user message and the replies it asked for. While a turn runs, every write carries its owner. A worker that
was thought dead and comes back changes nothing: its statements match no row any more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from ..errors import ChatError, invalid, not_found
from ..formats.tellings import BLANK
from .budgets import Budget, Reservation, reserve
from .database import Database, new_id
from .queries import Query, Row, Values
from .sessions import Session


@dataclass(frozen=True)
class StoredTurn:
    """A turn as its owner starts it.

    `rows`: its messages in order; the first is the user's, the others are replies. The one reply of an operator's own
    words is the first.
    """

    id: str
    session: Session
    account_id: str
    position: int
    previous: str  # the turn before this one, "" before the first; of a turn made again, its old id; "" where unknown
    rows: tuple[Row, ...]
    fresh: bool  # False: this message id made a turn before; nothing was written
    reservation: Reservation | None = None  # the tokens a new turn may use

    def check(self, ask: Ask) -> None:
        """Raise `conflict` when the turn answers another text: this message id was used for that text before."""
        if self.rows[0]["content"] != ask.content:
            raise ChatError("conflict", "This message was sent before with another text. Give the new one a new id.")


@dataclass(frozen=True)
class Ask:
    """A client's request for a turn: the message's id and text, and the reply ids that the client chose, by side.

    replaces: an older turn of this message id is deleted with all turns after it, unless the same request began it.
    """

    message_id: str
    content: str
    reply_ids: dict[str, str]
    replaces: bool = False


@dataclass(frozen=True)
class Terms:
    """The owner of a new turn and its cost. lease: milliseconds; tokens: the most it can cost each of `budgets`."""

    owner: str
    lease: int
    tokens: int
    budgets: tuple[Budget, ...]
    daily_messages: int
    turns_per_account: int
    person_reads: str  # the reply to a message that a person will answer; `{name}` stands for the person's name


def check_content(content: str, prompt_max: int) -> None:
    """Refuse a message's text that is empty or too long or cannot be stored. Raises `invalid` or `too_large`."""
    if not content.strip():
        raise invalid("content", "a message needs some text")
    if len(content) > prompt_max:
        raise ChatError("too_large", f"A message may have {prompt_max} characters; this has {len(content)}.")
    if "\x00" in content:
        raise invalid("content", "a message cannot contain NUL characters")  # PostgreSQL stores none


MESSAGE = """session_id, id, turn_id, role, participant, model, content, status, failure_reason, position, parent_ids,
             latency_ms, first_token_ms, feedback, created_at, updated_at"""
NAMES = [name.strip() for name in MESSAGE.split(",")]
INSERT_MESSAGE = f"INSERT INTO messages ({MESSAGE}) VALUES ({', '.join(':' + name for name in NAMES)})"

UNANSWERED: Row = BLANK | {"feedback": None}
PERSON = "person:"  # before a name, in a message's `model`: a person wrote the message


def person_says(name: str, content: str) -> Row:
    """Return the columns of a person's reply, which is complete at once."""
    return {"model": PERSON + name, "content": content, "status": "success"}


async def insert_turn(
    database: Database, session: Session, account_id: str, ask: Ask, terms: Terms, turn_id: str
) -> StoredTurn:
    """Write a turn, its user message and its empty replies, whole or not at all.

    The same message id returns the same turn for ever, unless `ask.replaces`. While a person answers in the session,
    the turn is over at once, and its reply says who will answer. Raises `busy` while another turn of the session runs,
    `rate_limited` when the account has too many running turns, `already_voted` for a turn that would be replaced,
    `conflict` for one that holds a person's words, and the errors of `reserve`.
    """

    async def work(query: Query) -> StoredTurn:
        now = database.now()
        places = 1 + len(session.sides)
        position, person = await allot_positions(query, session, account_id, now, places, first_words(ask.content))
        old = await _replaced(query, session, ask) if ask.replaces else []
        await check_free(query, session.id, account_id, terms.turns_per_account, "" if old else ask.message_id)
        if old:
            await _delete_from(query, session.id, old[0]["position"])
        rows = _rows(session, turn_id, ask, position, now)
        if person is not None:
            said = terms.person_reads.replace("{name}", person)
            rows[1:] = [row | person_says(person, said) for row in rows[1:]]
        turn = StoredTurn(turn_id, session, account_id, position, "", tuple(rows), True)
        return await write_turn(query, turn, now, terms, runs=person is None)

    try:
        return await database.transaction(work, patience=None, line=account_id)
    except Known:
        existing = await select_turn_of_message(database, session, ask.message_id)
        if existing is None:
            raise ChatError("conflict", "This message was deleted meanwhile.") from None
        return existing


class Known(Exception):
    """The session has a message of this id: nothing must be written."""


async def _replaced(query: Query, session: Session, ask: Ask) -> list[Row]:
    """Return the turns that `ask` replaces, oldest first; none when the same request began the last turn.

    A turn that began after the session was read is replaced by no request: its client has not seen that turn.
    """
    old = await _select_turns_from(query, session.id, ask.message_id)
    if not old or old[0]["user_message_id"] != ask.message_id:
        return []
    rows = await select_turn_messages(query, old[0]["id"]) if len(old) == 1 else []
    if rows and rows[0]["content"] == ask.content and set(ask.reply_ids.values()) <= {row["id"] for row in rows}:
        return []
    if old[-1]["position"] >= session.next_position:
        raise ChatError("conflict", "The conversation has gone on meanwhile. Please look at it again.")
    _check_replaceable(old)
    return old


async def insert_regeneration(
    database: Database, session: Session, account_id: str, message_id: str, terms: Terms, turn_id: str
) -> StoredTurn:
    """Answer the session's last user message again, in a new turn that takes the place of the old one.

    message_id: a reply, which is made again under its own id while the other reply stays; or the user message, for all
    replies.
    """

    async def work(query: Query) -> StoredTurn:
        now = database.now()
        position, person = await allot_positions(query, session, account_id, now, 1)
        await check_free(query, session.id, account_id, terms.turns_per_account)
        old = await _select_turns_from(query, session.id, message_id)
        if len(old) != 1:
            raise ChatError("conflict", "Only the last answer can be made again.")
        if person is not None:
            raise _by_person()
        _check_replaceable(old)
        rows = [row | {"turn_id": turn_id} for row in await _delete_from(query, session.id, old[0]["position"])]
        for row in rows:
            if row["role"] == "assistant" and message_id in (row["id"], old[0]["user_message_id"]):
                row |= UNANSWERED | {"updated_at": now}
        turn = StoredTurn(turn_id, session, account_id, position, old[0]["id"], tuple(rows), True)
        return await write_turn(query, turn, now, terms, runs=True)

    return await database.transaction(work, patience=None, line=account_id)


async def _select_turns_from(query: Query, session_id: str, message_id: str) -> list[Row]:
    """Return the turn of a message and all turns after it, oldest first."""
    return await query.fetch_all(
        """SELECT t.id, t.user_message_id, t.position, v.id AS vote_id,
                  (SELECT COUNT(*) FROM messages m WHERE m.turn_id = t.id AND m.model LIKE :person) AS by_person
             FROM turns t LEFT JOIN votes v ON v.turn_id = t.id
            WHERE t.session_id = :session_id AND t.position >=
                  (SELECT o.position FROM messages m JOIN turns o ON o.id = m.turn_id
                    WHERE m.session_id = :session_id AND m.id = :message_id)
            ORDER BY t.position""",
        {"session_id": session_id, "message_id": message_id, "person": PERSON + "%"},
    )


def _check_replaceable(old: list[Row]) -> None:
    if any(turn["vote_id"] is not None for turn in old):
        raise ChatError("already_voted", "This answer has been voted on and stays as it is.")
    if any(turn["by_person"] for turn in old):
        raise _by_person()


def _by_person() -> ChatError:
    return ChatError("conflict", "A person's answer cannot be made again.")


async def _delete_from(query: Query, session_id: str, position: int) -> list[Row]:
    """Delete the turns of a session from this position on, with their messages, which are returned in order."""
    values = {"session_id": session_id, "position": position}
    rows = await query.fetch_all(
        f"""DELETE FROM messages WHERE session_id = :session_id AND turn_id IN
                  (SELECT id FROM turns WHERE session_id = :session_id AND position >= :position)
           RETURNING {MESSAGE}""",
        values,
    )
    await query.execute("DELETE FROM turns WHERE session_id = :session_id AND position >= :position", values)
    return sorted(rows, key=lambda row: int(row["position"]))


async def write_turn(
    query: Query, turn: StoredTurn, now: int, terms: Terms | None = None, *, runs: bool = False
) -> StoredTurn:
    """Write a turn with its messages, and reserve what the terms say. A turn that does not run is over at once."""
    row = await query.fetch_one(
        """INSERT INTO turns (id, session_id, account_id, user_message_id, position, status, owner, lease_until,
                              stop_requested, resumable, created_at, ended_at)
           VALUES (:id, :session_id, :account_id, :user_message_id, :position, :status, :owner, :lease_until,
                   0, 1, :now, :ended_at)
           RETURNING (SELECT p.id FROM turns p WHERE p.session_id = :session_id AND p.position < :position
                       ORDER BY p.position DESC LIMIT 1) AS previous""",
        {
            "id": turn.id,
            "session_id": turn.session.id,
            "account_id": turn.account_id,
            "user_message_id": turn.rows[0]["id"],
            "position": turn.position,
            "status": "running" if runs else "ended",
            "owner": "" if terms is None else terms.owner,
            "lease_until": now if terms is None else now + terms.lease,
            "now": now,
            "ended_at": None if runs else now,
        },
    )
    await query.execute_many(INSERT_MESSAGE, list(turn.rows))
    previous = turn.previous or (row and row["previous"]) or ""
    if terms is None:
        return replace(turn, previous=previous)
    # The last statement, because the service's budget is one row that all turns write and lock.
    reservation = await reserve(query, now, terms.budgets, terms.tokens if runs else 0, terms.daily_messages)
    return replace(turn, previous=previous, reservation=reservation)


# PostgreSQL evaluates this once, before the scan of the sessions: the condition names none of their columns.
LOCK_ACCOUNT = "AND EXISTS (SELECT 1 FROM accounts WHERE id = :account_id FOR NO KEY UPDATE)"


async def allot_positions(
    query: Query, session: Session, account_id: str, now: int, places: int, title: str | None = None
) -> tuple[int, str | None]:
    """Return the first of `places` positions for new messages, and the name of the person who answers, if one does.

    The transaction locks the account's row, then the session's: turns of one session, and of one account, start one at
    a time.
    """
    row = await query.fetch_one(
        f"""UPDATE sessions SET next_position = next_position + :places, version = version + 1, updated_at = :now,
                  last_message_at = :now, title = COALESCE(title, CAST(:title AS TEXT))
            WHERE id = :id AND created_at = :created_at AND (account_id = :account_id OR is_open = 1)
                  {"" if query.one_at_a_time else LOCK_ACCOUNT}
           RETURNING next_position, operator""",
        session.identity | {"account_id": account_id, "places": places, "now": now, "title": title},
    )
    if row is None:
        raise not_found("session")
    return int(row["next_position"]) - places, row["operator"]


async def check_free(
    query: Query, session_id: str, account_id: str, turns_per_account: int, message_id: str = ""
) -> None:
    row = await query.fetch_one(
        # Each count has an index. For one count with an OR, SQLite reads all running turns of everybody.
        """SELECT (SELECT COUNT(*) FROM turns WHERE status = 'running' AND session_id = :session_id) AS here,
                  (SELECT COUNT(*) FROM turns WHERE status = 'running' AND account_id = :account_id) AS running,
                  (SELECT COUNT(*) FROM messages WHERE session_id = :session_id AND id = :message_id) AS known""",
        {"session_id": session_id, "account_id": account_id, "message_id": message_id},
    )
    assert row is not None
    if row["known"]:
        raise Known
    if row["here"]:
        raise ChatError("busy", "An answer is still being written in this session.", retry_after=1)
    if row["running"] >= turns_per_account:
        raise ChatError(
            "rate_limited", f"You have {turns_per_account} answers running already. Wait for one.", retry_after=5
        )


def message_row(session_id: str, turn_id: str, now: int) -> Row:
    """Return the columns that all messages of a new turn have alike, the others empty."""
    row: Row = dict.fromkeys(NAMES) | {"session_id": session_id, "turn_id": turn_id, "parent_ids": "[]"}
    return row | {"created_at": now, "updated_at": now}


def _rows(session: Session, turn_id: str, ask: Ask, position: int, now: int) -> list[Row]:
    blank = message_row(session.id, turn_id, now)
    user = {"id": ask.message_id, "role": "user", "content": ask.content, "status": "success", "position": position}
    rows = [blank | user]
    for place, side in enumerate(session.sides, 1):
        reply = {
            "id": ask.reply_ids.get(side) or new_id(),
            "role": "assistant",
            "participant": side,
            "model": session.model(side).for_server(),
            "position": position + place,
            "parent_ids": msgspec.json.encode([ask.message_id]).decode(),
        }
        rows.append(blank | reply | UNANSWERED)
    return rows


def first_words(text: str) -> str | None:
    """Return a title: the first words of the first message, at most 50 characters. None for no words."""
    words = " ".join(text.split())
    if len(words) <= 50:
        return words or None
    return words[:49].rsplit(" ", 1)[0] + "…"


# -- reading

# Between the caller's check of a session and the statement someone else may have used the session's id again.
SAME = "EXISTS (SELECT 1 FROM sessions s WHERE s.id = :id AND s.created_at = :created_at)"  # with its `identity`


async def select_turn_messages(query: Database | Query, turn_id: str) -> list[Row]:
    """Return the stored messages of a turn. For the server's own work: no caller is checked."""
    return await query.fetch_all(
        f"SELECT {MESSAGE} FROM messages WHERE turn_id = :turn_id ORDER BY position", {"turn_id": turn_id}
    )


async def select_turn_of_message(query: Database | Query, session: Session, message_id: str) -> StoredTurn | None:
    """Return the turn a message of this session belongs to; its position is that of its first message.

    A turn that is made again between two statements would have no messages.
    """
    rows = await query.fetch_all(
        f"""SELECT {MESSAGE} FROM messages WHERE session_id = :id AND turn_id =
                  (SELECT turn_id FROM messages WHERE session_id = :id AND id = :message_id) AND {SAME}
            ORDER BY position""",
        session.identity | {"message_id": message_id},
    )
    if not rows:
        return None
    return StoredTurn(rows[0]["turn_id"], session, session.account_id, rows[0]["position"], "", tuple(rows), False)


async def select_first_message(database: Database, session: Session) -> str | None:
    """Return the text of the session's first user message."""
    row = await database.fetch_one(
        f"SELECT content FROM messages WHERE session_id = :id AND role = 'user' AND {SAME} ORDER BY position LIMIT 1",
        session.identity,
    )
    return None if row is None else str(row["content"])


TURN = """t.id, t.session_id, t.account_id, t.position, t.status, t.owner, t.stop_requested, t.resumable, t.ended_at,
          (SELECT p.id FROM turns p WHERE p.session_id = t.session_id AND p.position < t.position
            ORDER BY p.position DESC LIMIT 1) AS previous"""


async def select_latest_turn(database: Database, session: Session) -> Row | None:
    return await database.fetch_one(
        f"SELECT {TURN} FROM turns t WHERE t.session_id = :id AND {SAME} ORDER BY t.position DESC LIMIT 1",
        session.identity,
    )


async def select_turn_and_next(database: Database, session: Session, turn_id: str) -> list[Row]:
    """Return the turn and the turn after it, as far as they exist; for "" the session's first turn alone."""
    return await database.fetch_all(
        f"""SELECT {TURN} FROM turns t
            WHERE t.session_id = :id AND {SAME}
              AND ((:turn_id = '' AND t.position = (SELECT MIN(position) FROM turns WHERE session_id = :id))
                OR t.position >= (SELECT position FROM turns WHERE id = :turn_id AND session_id = :id))
            ORDER BY t.position LIMIT 2""",
        session.identity | {"turn_id": turn_id},
    )


# -- the owner's statements: each matches only while the turn is this worker's

OWNED = "EXISTS (SELECT 1 FROM turns t WHERE t.id = :turn_id AND t.owner = :owner AND t.status = 'running')"
OWN = "id, session_id, account_id, position, stop_requested, ended_at"


async def renew_leases(database: Database, owner: str, lease: int) -> dict[str, Row]:
    """Prolong the leases of all this worker's turns and return the turns by id. lease: milliseconds.

    The lease counts from the beginning of the transaction: one that had to wait would write a lease that has run out.
    """

    async def work(query: Query) -> dict[str, Row]:
        rows = await query.fetch_all(
            f"""UPDATE turns SET lease_until = :until WHERE owner = :owner AND status = 'running'
               RETURNING {OWN}""",
            {"owner": owner, "until": database.now() + lease},
        )
        return {row["id"]: row for row in rows}

    return await database.transaction(work)


async def select_stops(database: Database, owner: str) -> list[str]:
    """Return the ids of this worker's turns that somebody asked to stop."""
    rows = await database.fetch_all(
        "SELECT id FROM turns WHERE owner = :owner AND status = 'running' AND stop_requested = 1", {"owner": owner}
    )
    return [row["id"] for row in rows]


async def checkpoint(database: Database, values: list[Values]) -> None:
    """Write the text so far of many running replies in one transaction.

    Each of `values`: turn_id, owner, id, session_id, content, now.
    """

    async def work(query: Query) -> None:
        await query.execute_many(
            f"""UPDATE messages SET content = :content, updated_at = :now, status = 'streaming'
                 WHERE session_id = :session_id AND id = :id AND status IN ('pending', 'streaming') AND {OWNED}""",
            values,
        )

    await database.transaction(work)


UPDATE_OWN_TURN = """
    UPDATE turns SET status = CASE WHEN :last = 1 THEN 'ended' ELSE status END,
                     ended_at = CASE WHEN :last = 1 THEN COALESCE(ended_at, CAST(:now AS BIGINT)) ELSE ended_at END
     WHERE id = :turn_id AND owner = :owner RETURNING id"""
UPDATE_REPLY = """
    UPDATE messages SET content = :content, status = :status, failure_reason = :failure_reason,
                        latency_ms = :latency_ms, first_token_ms = :first_token_ms, updated_at = :now
     WHERE session_id = :session_id AND id = :id AND turn_id = :turn_id"""


async def update_endings(database: Database, owner: str, rows: list[Row], *, last: bool) -> bool:
    """Write the endings of replies, and with the `last` one the turn's, whole or not at all.

    False: another worker owns the turn now. Writing an ending twice is harmless: a first attempt may have been written
    without an answer to its COMMIT, and may have ended the turn.
    """
    now = database.now()
    own = {"turn_id": rows[0]["turn_id"], "owner": owner, "last": int(last), "now": now}

    async def work(query: Query) -> bool:
        if await query.fetch_one(UPDATE_OWN_TURN, own) is None:
            return False
        for row in rows:
            await query.execute(UPDATE_REPLY, row | {"now": now})
        return True

    return await database.transaction(work)


# -- statements of any worker


async def select_running_turn(database: Database, session: Session) -> str:
    """Return the id of the session's running turn, "" when none runs."""
    row = await database.fetch_one(
        f"SELECT id FROM turns WHERE session_id = :id AND {SAME} AND status = 'running'", session.identity
    )
    return "" if row is None else str(row["id"])


async def request_stop(database: Database, turn_id: str, account_id: str) -> bool:
    """Ask the owner of a running turn to end the turn. False when the turn does not run.

    The stop names its turn: the session's next turn may have begun before storage carries the statement out.
    """
    row = await database.fetch_one(
        """UPDATE turns SET stop_requested = 1
            WHERE id = :id AND status = 'running'
              AND EXISTS (SELECT 1 FROM sessions s
                           WHERE s.id = turns.session_id AND (s.account_id = :account_id OR s.is_open = 1))
           RETURNING id""",
        {"id": turn_id, "account_id": account_id},
    )
    return row is not None


async def take_over(database: Database, owner: str, lease: int) -> list[Row]:
    """Take the turns whose lease has run out and return them: this worker owns them from now on.

    A turn of another worker gets its `ended_at`, although it runs until its endings are stored: nobody may ask the
    models again, not even a worker that never got the answer to this statement. A worker's own turns go on.
    """
    now = database.now()
    return await database.fetch_all(
        f"""UPDATE turns SET ended_at = CASE WHEN owner = :owner THEN ended_at ELSE CAST(:now AS BIGINT) END,
                   owner = :owner, lease_until = :until
             WHERE status = 'running' AND lease_until < :now RETURNING {OWN}""",
        {"owner": owner, "until": now + lease, "now": now},
    )
