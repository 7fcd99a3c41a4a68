"""The messages of a session in pages that are bounded in characters: a long session is read without being held.

The caller has checked who may read the session, perhaps long ago: an export waits for its reader between two pages.
Someone else may use the session's id again meanwhile, so a page is of that session alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from .database import Database
from .queries import Row
from .sessions import Session
from .turns import MESSAGE, SAME

PAGE_MAX = 500_000  # characters of one page; a message alone may have fewer than half of that
AT_ONCE = 200  # messages of an export's page
FIRST, LAST = -1, 2**31 - 1  # positions before and after all that a session may have


async def select_page(database: Database, session: Session, limit: int, before: int = LAST) -> tuple[list[Row], bool]:
    """Return the last messages below position `before`, as many as fit, oldest first; and whether more exist."""
    sizes = await _select_sizes(database, session, "position < :position", "DESC", before, limit + 1)
    fits = sizes[: min(limit, _fitting(sizes))]
    rows = await _select_between(database, session, fits[-1]["position"], fits[0]["position"]) if fits else []
    return rows, bool(rows) and len(sizes) > len(fits)  # none: the session was deleted between the two statements


async def each_page(database: Database, session: Session) -> AsyncIterator[list[Row]]:
    """Yield all messages in order, in pages of whole turns: a message's children have to stand in its page."""
    position, waiting = FIRST, list[Row]()
    while sizes := await _select_sizes(database, session, "position > :position", "ASC", position, AT_ONCE):
        position, start = sizes[_fitting(sizes) - 1]["position"], sizes[0]["position"]
        rows = waiting + await _select_between(database, session, start, position)
        turn = max((n for n, row in enumerate(rows) if row["role"] == "user"), default=0)
        waiting = rows[turn:]
        if turn:
            yield rows[:turn]
    if waiting:
        yield waiting


def _fitting(sizes: list[Row]) -> int:
    """Return how many of these messages fit on a page, at least one."""
    room = PAGE_MAX
    for n, row in enumerate(sizes):
        room -= row["size"]
        if room < 0:
            return max(1, n)
    return len(sizes)


async def _select_sizes(
    database: Database, session: Session, where: str, order: str, position: int, limit: int
) -> list[Row]:
    return await database.fetch_all(
        f"""SELECT position, LENGTH(content) AS size FROM messages WHERE session_id = :id AND {SAME} AND {where}
             ORDER BY position {order} LIMIT :limit""",
        session.identity | {"position": position, "limit": limit},
    )


async def _select_between(database: Database, session: Session, first: int, last: int) -> list[Row]:
    return await database.fetch_all(
        f"""SELECT {MESSAGE} FROM messages
             WHERE session_id = :id AND {SAME} AND position BETWEEN :first AND :last ORDER BY position""",
        session.identity | {"first": first, "last": last},
    )
