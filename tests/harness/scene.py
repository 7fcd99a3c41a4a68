"""What every fault scenario needs: a service with its servers (`Stage`), one session on it (`Scene`), the check at the
end. Numbers a scenario measures are printed by `measured` (`pytest -rP`, or `-s`).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

from . import until
from .api import Guest, call, guest, messages, new_session
from .checker import Allowed, Evidence, check
from .client import SocketReader, SSEReader
from .evidence import MessageRow, read_rows
from .journal import Journal
from .reader import Reader
from .servers import Postgres, Redis
from .service import Service

FLUENT = {"id": "fluent", "provider": "demo", "pace": 0.02, "personality": "scholar"}  # 50 tokens a second
HASTY = {"id": "hasty", "provider": "demo", "pace": 0.001, "personality": "poet"}
ENVIRONMENT = {
    "SECRET_KEY": "test-secret-key-of-more-than-32-characters",
    "PARLEY_ENV": "local",
    "PARLEY_OPEN_SESSIONS": "false",
    "PARLEY_MODELS": json.dumps([FLUENT, HASTY]),
    "PARLEY_MAX_TOKENS": "100000",
}
LEASE, SWEEP, DRAIN = 2.0, 1.0, 3.0  # seconds, as in `service.SHORT`


def counted(n: int) -> str:
    """What the demo models say to `/count n`."""
    return " ".join(f"⟨{i}⟩" for i in range(n))


def measured(what: str, value: float, unit: str = "s") -> None:
    print(f"measured: {what}: {value:.3f} {unit}")


@dataclass
class Stage:
    """A running service and what it stands on."""

    service: Service
    database_url: str
    redis: Redis | None = None
    postgres: Postgres | None = None

    async def scene(self, **session: Any) -> Scene:
        """A fresh guest's fresh session, on a service that is well."""
        await until(self._ready, 15, "a service that is ready")
        someone = await guest(self.service.url)
        session.setdefault("model_a_id", "fluent")
        made = await new_session(self.service.url, someone.access, **session)
        return Scene(self, someone, made, len(self.service.log()))

    async def _ready(self) -> bool:
        answers = await asyncio.gather(*[call(url, "GET", "/api/health/") for url in self.service.urls])
        return all(answer.status_code == 200 for answer in answers)


@dataclass
class Scene:
    """One session, its readers and their journal. Leaving it ends the readers."""

    stage: Stage
    someone: Guest
    session: dict[str, Any]
    logged: int = 0  # characters the service had printed before
    journal: Journal = field(default_factory=Journal)
    readers: list[Reader] = field(default_factory=list)

    @property
    def id(self) -> str:
        return str(self.session["id"])

    def _bases(self, worker: int | Sequence[int]) -> list[str]:
        return [self.stage.service.urls[n] for n in ([worker] if isinstance(worker, int) else worker)]

    async def socket(self, name: str, worker: int | Sequence[int] = 0, **options: Any) -> SocketReader:
        """A recording socket on this worker; of several it takes the next each time it comes back."""
        options.setdefault("bases", self._bases(worker))
        reader = SocketReader(self.journal, name, session_id=self.id, token=self.someone.access, **options)
        self.readers.append(reader)
        await reader.start()
        return reader

    async def sse(self, name: str, worker: int | Sequence[int] = 0, **options: Any) -> SSEReader:
        options.setdefault("bases", self._bases(worker))
        reader = SSEReader(self.journal, name, session_id=self.id, token=self.someone.access, **options)
        self.readers.append(reader)
        await reader.start()
        return reader

    async def stored(self) -> list[dict[str, Any]]:
        """The session's messages as the API tells them, asked of the last worker."""
        return await messages(self.stage.service.urls[-1], self.someone.access, self.id)

    async def reply(self, n: int = -1) -> MessageRow:
        """The session's last reply as it is in the database."""
        rows = await read_rows(self.stage.database_url, self.id)
        return [row for row in rows.messages if row.role == "assistant"][n]

    async def over(self, within: float = 20.0) -> None:
        """Wait until no turn of this session runs, as the database has it."""

        async def ended() -> bool:
            return all(turn.status == "ended" for turn in (await read_rows(self.stage.database_url, self.id)).turns)

        await until(ended, within, "the end of all turns", self.journal.story)

    async def check(self, *readers: Reader, **allowed: Any) -> None:
        """All invariants on what these readers (or all) know, the database holds and the service printed."""
        evidence = Evidence(
            self.journal,
            readers or self.readers,
            await read_rows(self.stage.database_url, self.id),
            logs=self.stage.service.log()[self.logged :],
            allowed=Allowed(**allowed),
        )
        check(evidence)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        await asyncio.gather(*[reader.leave() for reader in self.readers])
        if kind is not None:
            print(self.journal.story(), self.stage.service.log()[self.logged :][-8000:], sep="\n")


def text_of(reader: Reader) -> str:
    """All text of replies this reader has."""
    return "".join(reader.view.texts())


def longest_silence(journal: Journal, reader: str, since: float, until: float) -> float:
    """The longest time without text for this reader that began in a span; after the last text nothing is missing."""
    came = [entry.at for entry in journal.of(reader, "event") if entry.data.get("type") == "message_chunk"]
    times = [since, *[at for at in came if at > since]]
    return max((later - at for at, later in pairwise(times) if at < until), default=0.0)


def first_beyond(journal: Journal, reader: str, characters: int) -> float | None:
    """When this reader first had more than so many characters of a turn's text; None when it never did."""
    had = 0
    for entry in journal.of(reader, "event"):
        if entry.data.get("type") == "message_chunk":
            had += len(entry.data["chunk"])
            if had > characters:
                return entry.at
    return None


async def all_of(work: Iterable[Any], at_once: int) -> list[Any]:
    """Run coroutines, so many at a time."""
    gate = asyncio.Semaphore(at_once)

    async def one(each: Any) -> Any:
        async with gate:
            return await each

    return await asyncio.gather(*[one(each) for each in work])


def now() -> float:
    return time.monotonic()
