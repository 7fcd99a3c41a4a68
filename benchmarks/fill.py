"""Years of use, put straight into a database, for the `waits` scenario. Run with the service's own Python.

    python fill.py <database url> <account id> <sessions> <messages> <votes>

gives the account so many sessions, the newest of them, `big`, so many messages, and the service so many counted votes
between 60 models. The schema has to be there (`service.py release`).
"""

import asyncio
import random
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chat.store.database import Database
from chat.store.queries import Query
from chat.store.turns import INSERT_MESSAGE, NAMES

AT_ONCE = 20_000
SESSION = """INSERT INTO sessions (id, account_id, mode, title, model_a, is_public, is_open, is_pinned, metadata,
                                   next_position, version, created_at, updated_at)
             VALUES (:id, :account_id, 'direct', :title, 'demo-scholar', 0, 0, 0, '{}', :next_position, 1, :at, :at)"""
VOTE = """INSERT INTO votes (id, turn_id, session_id, account_id, mode, model_a, model_b, preference, counted,
                             created_at)
          VALUES (:id, :id, :id, :id, 'random', :a, :b, :preference, 1, :at)"""


async def put(database: Database, sql: str, rows: Iterable[dict]) -> None:
    rows = iter(rows)
    while some := list(islice(rows, AT_ONCE)):

        async def write(query: Query, some: list[dict] = some) -> None:
            await query.execute_many(sql, some)

        await database.transaction(write, patience=None)


async def main(url: str, account: str, sessions: int, messages: int, votes: int) -> None:
    database = Database(url)
    await database.connect()
    now, dice = database.now(), random.Random(1)
    text = "Rivers, patience and machines: what a model says in a paragraph of some forty words. " * 6
    await put(database, SESSION, (
        {"id": f"s{n}", "account_id": account, "title": f"Talk number {n} of rivers", "next_position": 0,
         "at": now - 60_000 * (n + 1)} for n in range(sessions - 1)
    ))  # fmt: skip
    await put(database, SESSION, [
        {"id": "big", "account_id": account, "title": "The long one", "next_position": messages, "at": now}
    ])  # fmt: skip
    blank = dict.fromkeys(NAMES) | {"session_id": "big", "status": "success", "parent_ids": "[]", "seq": 9}
    await put(database, INSERT_MESSAGE, (
        blank | {"id": f"m{n}", "turn_id": f"t{n // 2}", "role": "assistant" if n % 2 else "user", "position": n,
                 "participant": "a" if n % 2 else None, "model": "demo-scholar" if n % 2 else None,
                 "content": text if n % 2 else "And then?", "created_at": now + n, "updated_at": now + n}
        for n in range(messages)
    ))  # fmt: skip
    models = [f"model-{n}" for n in range(60)]
    await put(database, VOTE, (
        {"id": f"v{n}", "a": a, "b": b, "preference": dice.choice(("model_a", "model_b", "tie", "both_bad")),
         "at": now - 3_000 * (votes - n)}
        for n in range(votes) for a, b in [dice.sample(models, 2)]
    ))  # fmt: skip
    if not url.startswith("sqlite"):  # within a minute its autovacuum has, where tables grow by and by
        await database.execute("ANALYZE")
    await database.disconnect()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])))
