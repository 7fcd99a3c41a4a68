"""Faults at random over readers and turns at random, all from one seed; afterwards the invariants.

    python -m tests.harness.chaos --seed 7 --seconds 20

replays a seed: who says what, who reads, what breaks and for how long are drawn from it beforehand; how the machine
interleaves them is not. Prints the story when something was violated. `--count` runs so many seeds from `--seed` on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from chat.metrics import COUNTED
from tests.vendors import CANARY, Vendors

from .api import Guest, call, guest, new_session
from .checker import INVARIANTS, NUMBER, Violations, counts, i9_no_leak
from .client import SocketReader, SSEReader
from .evidence import Allowed, Evidence, Rows, gather, read_rows
from .journal import Journal
from .processes import StartFailed, temporary_directory
from .reader import Reader
from .servers import Postgres, Redis
from .service import ROOT, Service
from .view import TERMINAL, difference

KEY = "sk-CANARY-the-key-of-the-service-itself"
GOOD = ("ok", "slow", "length", "reasoning", "no-usage", "finish-stall", "broken")  # modes that end in an answer
BAD = ("stall", "rst", "cut", "clean-eof", "garbage", "non-utf8", "error-event", "429", "500", "529", "no-header")
BAD += ("rst-first", "html200", "empty200", "429-retry-after", "ping-stall", "refuse", "odd-finish", "quota")
QUIET = 40.0  # seconds after the last fault in which everything has to have ended: 25 s are an ending's to be stored
EXIT = 25.0  # seconds from SIGTERM to the end
FRESH = 1.0  # seconds after Redis is back in which what it forgot may not have been said again
STALE = 2.0  # seconds a worker may be frozen before its turns are taken: the lease of the tests
TAKEN = 5.0  # seconds in which another worker has taken them: the lease, a sweep, and a start
CLOSES = (1006, 1011, 4408)  # killed; frozen longer than a ping may take; on hold
TURNED_AWAY = (4403, 4404)  # what a reader is told whose right has ended, and nobody else
EARLY = 0.02  # seconds after a message in which a stop is early: the turn is being written, launched, announced


def models(vendors: Vendors) -> list[dict[str, Any]]:
    """One model of each remote provider."""
    return [
        {"id": "alpha", "provider": "openai_chat", "model_code": "fake-alpha", "display_name": "Alpha"}
        | {"base_url": f"{vendors.url}/v1", "api_key_env": "VENDOR_KEY", "vendor": "A"},
        {"id": "beta", "provider": "anthropic_messages", "model_code": "fake-beta", "display_name": "Beta"}
        | {"base_url": vendors.url, "api_key_env": "VENDOR_KEY", "vendor": "B"},
    ]


@dataclass
class World:
    """What outlives one run. Without PostgreSQL each run has an SQLite file of its own."""

    redis: Redis
    postgres: Postgres | None
    vendors: Vendors

    @property
    def storage(self) -> str:
        return "postgres" if self.postgres is not None else "sqlite"

    def environment(self, **more: str) -> dict[str, str]:
        """A service of its own on a fresh database."""
        file = f"sqlite:///{temporary_directory('chaos') / 'parley.db'}"
        return {
            "DATABASE_URL": self.postgres.create_database() if self.postgres is not None else file,
            "REDIS_URL": self.redis.url,
            "PARLEY_ENV": "local",
            "PARLEY_OPEN_SESSIONS": "false",
            "PARLEY_MODELS": json.dumps(models(self.vendors)),
            "VENDOR_KEY": KEY,
            "ADMIN_TOKEN": OPERATOR,
        } | more


@asynccontextmanager
async def world(storage: str = "postgres") -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(Redis())
        postgres = await stack.enter_async_context(Postgres()) if storage == "postgres" else None
        yield World(redis, postgres, stack.enter_context(Vendors()))


@dataclass
class Report:
    """What a run did and found."""

    seed: int
    violations: Violations
    journal: Journal
    log: str
    counts: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    repairs: Counter[str] = field(default_factory=Counter)  # what the workers counted, by metric
    before: dict[str, float] = field(default_factory=dict)  # what all workers held, and what stood in both servers
    after: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        done = ", ".join(f"{n} {what}" for what, n in sorted(self.counts.items()))
        ends = ", ".join(f"{n} {what}" for what, n in sorted(self.statuses.items()))
        return f"seed {self.seed}: {len(self.violations)} violation(s); {done}; replies: {ends}"

    def story(self) -> str:
        """What happened, of all sessions or of those in which something was violated."""
        struck = set(re.findall(r"\bs\d+(?=l\d)", " ".join(self.violations)))
        others = re.compile(rf"(?!({'|'.join(struck)})l)s\d+l\d") if struck else None
        told = self.journal.story(20_000, lambda text: others is None or not others.match(text))
        return "\n".join([str(self), *self.violations[:50], "", told, "", self.log[-8000:]])


@dataclass(eq=False)
class Life:
    """A session from its making to its deletion; the next of the same id is another account's.

    `name` begins the id of every message said in it and of every token of its answers.
    """

    name: str
    session: str
    owner: Guest
    over: bool = False
    readers: list[Reader] = field(default_factory=list)


class Chaos:
    """One run: sessions that talk, readers that come and go, faults, then quiet and the invariants.

    Seconds, shortest and longest: `every` between two strokes of faults, `pace` between two tokens, `rest` between two
    deeds of a watcher, `life` of a session before it is deleted. `chunks=False` keeps no chunk in the journal: hours of them fill a machine.
    """

    def __init__(
        self,
        world: World,
        service: Service,
        seed: int,
        seconds: float,
        *,
        sessions: int = 3,
        readers: int = 3,
        every: tuple[float, float] = (0.3, 2.0),
        pace: tuple[float, float] = (0.002, 0.03),
        rest: tuple[float, float] = (0.2, 2.0),
        life: tuple[float, float] = (2.0, 20.0),
        chunks: bool = True,
    ) -> None:
        self.world, self.service, self.seed, self.seconds = world, service, seed, seconds
        self.sessions, self.watchers, self.every, self.pace, self.rest = sessions, readers, every, pace, rest
        self.life = life
        self.database_url = str(service.processes[0].env["DATABASE_URL"])  # type: ignore[index]
        self.journal = Journal(chunks=chunks)
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.repairs: Counter[str] = Counter()  # what workers counted before they died
        self.lives: list[Life] = []
        self.turned_away: set[Reader] = set()  # whose right to read has ended
        self.violations: Violations = []
        self._busy: set[str] = set()  # what a fault has in its hands
        self._redis_away: list[list[float]] = []  # spans, monotonic
        self._deaths: list[float] = []
        self._until = 0.0

    async def run(self) -> Report:
        self._until = time.monotonic() + self.seconds
        before = await self._holdings()
        people = [await guest(self.service.url), await guest(self.service.url)]
        async with asyncio.TaskGroup() as group:
            group.create_task(self._faults())
            for n in range(self.sessions):
                group.create_task(self._session(n, people))
        self.journal.note("quiet")
        await self._settle()
        for reader in self.readers:
            await reader.leave()
        after = await self._nothing_left(before)
        evidence = await gather(
            self.journal,
            self.readers,
            self.database_url,
            calls=list(self.world.vendors.calls),
            logs=self.service.log(),
            canaries=[CANARY, KEY, OPERATOR],
            allowed=Allowed(lost=self._may_lose(), codes=CLOSES + TURNED_AWAY, log=LOUD, forgotten=self._deleted()),
        )
        self.violations += [violation for invariant in INVARIANTS for violation in invariant(evidence)]
        self.violations += _success_of_nothing(evidence)
        self.violations += _positions(evidence.rows)
        self.violations += [wrong for life in self.lives for wrong in self._of_another_life(life)]
        report = Report(self.seed, self.violations, self.journal, evidence.logs, self.counts)
        report.counts["readers"] = len(self.readers)
        report.faults, report.repairs, report.before, report.after = self.faults, self.repairs, before, after
        for row in evidence.rows.messages if evidence.rows else ():
            if row.role == "assistant":
                report.statuses[row.status + (f"/{row.failure_reason}" if row.failure_reason else "")] += 1
        report.counts["tokens"] = sum(len(call.sent) for call in self.world.vendors.calls)
        return report

    def _dice(self, name: str) -> random.Random:
        return random.Random(f"{self.seed} {name}")

    def _running(self) -> bool:
        return time.monotonic() < self._until

    @property
    def readers(self) -> list[Reader]:
        return [reader for life in self.lives for reader in life.readers]

    # -- sessions

    async def _session(self, n: int, people: list[Guest]) -> None:
        """One id, life after life: each ends with a deletion, and the next is somebody else's."""
        dice = self._dice(f"session {n}")
        async with asyncio.TaskGroup() as group:
            number = 0
            while self._running():
                life = Life(f"s{n}l{number}", f"chaos-{self.seed}-{n}", people[(n + number) % 2])
                await self._begin(dice, life)
                for m in range(self.watchers):
                    group.create_task(self._watcher(f"{life.name}r{m}", life))
                group.create_task(self._shared(f"{life.name}x", life))
                await self._live(dice, life)
                number += 1

    async def _begin(self, dice: random.Random, life: Life) -> None:
        wish: dict[str, Any] = {"mode": "direct", "model_a_id": dice.choice(["alpha", "beta"])}
        if dice.random() < 0.4:
            wish = {"mode": "compare", "model_a_id": "alpha", "model_b_id": "beta"}
        await self._patiently(lambda: new_session(self.service.url, life.owner.access, id=life.session, **wish))
        self.lives.append(life)

    async def _live(self, dice: random.Random, life: Life) -> None:
        """Turn after turn, each asked for until it is there and waited for until it has ended; then perhaps the end."""
        turn, ends = 0, time.monotonic() + dice.uniform(*self.life)
        while self._running() and time.monotonic() < ends:
            await self._turn(dice, f"{life.name}t{turn}", life)
            turn += 1
        if not self._running():
            return
        last = asyncio.create_task(self._turn(dice, f"{life.name}t{turn}", life))
        await asyncio.sleep(dice.choice([0.0, dice.uniform(0, EARLY), dice.uniform(0, 1.0)]))
        self.journal.note(f"{life.name}: deleted")
        await self._patiently(lambda: self._asked("DELETE", life, "", 404))
        self.counts["deletions"] += 1
        life.over = True
        await last

    async def _asked(self, method: str, life: Life, path: str = "", *also: int) -> httpx.Response | None:
        """The answer to a request about a session, when it is a success or one of `also`."""
        url = self.service.urls[len(self.readers) % len(self.service.urls)]
        answer = await call(url, method, f"/api/sessions/{life.session}/{path}", life.owner.access)
        return answer if answer.status_code < 300 or answer.status_code in also else None

    async def _turn(self, dice: random.Random, name: str, life: Life) -> None:
        session, someone = life.session, life.owner
        mode = dice.choice(GOOD) if dice.random() < 0.6 else dice.choice(BAD)
        asked = {"mode": mode, "tokens": dice.randint(20, 150), "pace": round(dice.uniform(*self.pace), 3)}
        asked |= {"after": dice.randint(0, 40), "id": name, "times": dice.choice([1, 9])}
        content = f"[[{' '.join(f'{key}:{value}' for key, value in asked.items())}]]"
        way, stop_after = dice.choice(["socket", "post", "post"]), dice.uniform(0.1, 3.0) if dice.random() < 0.1 else 0
        base = dice.randrange(len(self.service.urls))
        self.counts["turns"] += 1
        self.journal.note(f"{name} ({way}): {content}")
        if way == "socket":
            await self._said_by_socket(life, content, name)
        bases = self.service.urls[base:] + self.service.urls[:base]
        poster = SSEReader(self.journal, name, bases, session, token=someone.access, content=content, id=name)
        life.readers.append(poster)
        starting = asyncio.create_task(poster.start())  # until there is an answer: one turn, whoever came first
        if dice.random() < 0.15:
            self.counts["early stops"] += 1
            await self._stop(bases[-1], name, life, dice.uniform(0, EARLY))
        await starting
        if stop_after:
            await self._stop(bases[-1], name, life, stop_after)
        await poster.ended(45.0)
        await self._patiently(lambda: self._turn_over(session))
        await asyncio.sleep(dice.uniform(0, 0.3))

    async def _stop(self, base: str, name: str, life: Life, after: float) -> None:
        await asyncio.sleep(after)
        with contextlib.suppress(httpx.HTTPError):
            self.journal.note(f"{name}: stop")
            await call(base, "POST", f"/api/sessions/{life.session}/stop/", life.owner.access)

    async def _turn_over(self, session: str) -> bool:
        rows = await read_rows(self.database_url, session)
        return all(turn.status != "running" for turn in rows.turns)

    async def _said_by_socket(self, life: Life, content: str, id: str) -> None:
        sockets = [reader for reader in life.readers if isinstance(reader, SocketReader) and reader.token]
        for reader in sockets[::-1]:
            with contextlib.suppress(Exception):  # between two connections; the POST that follows says it again
                await reader.say(content, id)
                return

    async def _patiently(self, ask: Callable[[], Awaitable[Any]], within: float = 45.0) -> Any:
        """The first truthy answer, whatever goes wrong meanwhile; faults last less than `within` seconds."""
        deadline = time.monotonic() + within
        while True:
            with contextlib.suppress(Exception):  # PostgreSQL away, a worker away, a refusal: all of it passes
                if answer := await ask():
                    return answer
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {within} s\n{self.journal.story()}")
            await asyncio.sleep(0.05)

    # -- readers

    async def _shared(self, name: str, life: Life) -> None:
        """The session is shared, read by somebody without a token, and unshared, again and again."""
        dice = self._dice(f"shared {name}")
        number = 0
        while self._running() and not life.over:
            await asyncio.sleep(dice.uniform(*self.rest))
            answer = await self._patiently(lambda: self._asked("POST", life, "share/", 404))
            if answer.status_code == 404 or life.over:
                return  # deleted meanwhile; an answer that came late may be of a later life of the same owner
            query = {"share_token": answer.json()["share_token"]}
            bases = dice.sample(self.service.urls, len(self.service.urls))
            reader = SocketReader(self.journal, f"{name}{number}", bases, life.session, query=query)
            number += 1
            life.readers.append(reader)
            with contextlib.suppress(TimeoutError):
                await reader.start()
            await asyncio.sleep(dice.uniform(0.1, 3.0))
            if not self._running():
                return  # shared to the end
            self.journal.note(f"{life.name}: unshared")
            await self._patiently(lambda: self._asked("POST", life, "unshare/", 404))
            self.counts["unshares"] += 1
            self.turned_away.add(reader)

    async def _watcher(self, name: str, life: Life) -> None:
        """One reader after another: each joins, drops its connection, holds, and leaves at moments of its own."""
        dice = self._dice(f"watcher {name}")
        number = 0
        while self._running() and not life.over:
            await asyncio.sleep(dice.uniform(0, 1.5))
            bases = dice.sample(self.service.urls, len(self.service.urls))
            kind: type[SocketReader] | type[SSEReader] = SocketReader if dice.random() < 0.75 else SSEReader
            reader = kind(self.journal, f"{name}.{number}", bases, life.session, token=life.owner.access)
            number += 1
            life.readers.append(reader)
            with contextlib.suppress(TimeoutError):  # nobody there to accept it: it goes on trying
                await reader.start()
            leaves = time.monotonic() + dice.uniform(1.0, max(2.0, self.seconds))
            while self._running() and time.monotonic() < leaves and not reader.finished:
                await asyncio.sleep(dice.uniform(*self.rest))
                deed = dice.random()
                if deed < 0.3:
                    reader.drop()
                    self.counts["drops"] += 1
                elif deed < 0.45:
                    reader.hold()
                    await asyncio.sleep(dice.uniform(0.1, 2.5))
                    reader.release()
                    self.counts["holds"] += 1
            if self._running() and not life.over:  # at the end all stay: what they know is looked at then
                reader.view.left = True
                await reader.leave()

    def _deleted(self) -> set[str]:
        """Ids of the messages of sessions that are no more."""
        return {id for life in self.lives if life.over for reader in life.readers for id in reader.view.messages}

    def _of_another_life(self, life: Life) -> Violations:
        """What readers were told that was said under the same id, but not to them; who was turned away for nothing."""
        found = []
        for reader in life.readers:
            known = reader.view.messages.values()
            ids = {each.id for each in known if each.role == "user"}
            ids |= {token[1] for each in known for token in NUMBER.finditer(each.text)}
            found += [f"P13 {reader.name} was told {id}" for id in sorted(ids) if not id.startswith(f"{life.name}t")]
            codes = reader.codes if isinstance(reader, SocketReader) else []
            if not (life.over or reader in self.turned_away) and (away := set(codes) & set(TURNED_AWAY)):
                found.append(f"P13 {reader.name} may read and was turned away with {away}")
        return found

    # -- faults

    async def _faults(self) -> None:
        dice = self._dice("faults")
        async with asyncio.TaskGroup() as group:
            await asyncio.sleep(dice.uniform(0.2, 1.0))
            faults = [fault for fault in FAULTS if fault.storage in ("", self.world.storage)]
            while self._running():
                for _ in range(dice.choice([1, 1, 2, 3])):
                    group.create_task(self._fault(dice.choice(faults), random.Random(dice.random())))
                await asyncio.sleep(dice.uniform(*self.every))

    async def _fault(self, fault: Fault, dice: random.Random) -> None:
        """One fault, unless another has the same thing in its hands."""
        worker = dice.randrange(self.service.workers)
        held = fault.on if fault.on != "worker" else f"worker {worker}"
        if held in self._busy:
            return
        self._busy.add(held)
        self.counts["faults"] += 1
        self.faults[fault.strike.__name__] += 1
        try:
            await fault.strike(self, dice, worker)
        finally:
            self._busy.discard(held)

    async def redis_killed(self, dice: random.Random, _: int) -> None:
        with self._no_redis(TAKEN):  # the text of a worker that died before is nowhere else until its turns are taken
            self.journal.fault("redis killed")
            self.world.redis.kill()
            await asyncio.sleep(dice.uniform(0, 2.0))
            await self.world.redis.start()
            self.journal.fault("redis started")

    async def redis_paused(self, dice: random.Random, _: int) -> None:
        with self._no_redis():
            self.journal.fault("redis paused")
            self.world.redis.pause()
            await asyncio.sleep(dice.uniform(0.1, 3.0))
            self.world.redis.resume()
            self.journal.fault("redis resumed")

    @contextlib.contextmanager
    def _no_redis(self, before: float = 0.0) -> Any:
        span = [time.monotonic() - before, float("inf")]
        self._redis_away.append(span)
        try:
            yield
        finally:
            span[1] = time.monotonic()

    async def pubsub_cut(self, dice: random.Random, _: int) -> None:
        from redis.asyncio import Redis as Client

        for _ in range(dice.randint(1, 3)):
            self.journal.fault("redis: CLIENT KILL TYPE pubsub")
            async with Client.from_url(self.world.redis.url) as client:
                await client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            await asyncio.sleep(dice.uniform(0, 0.3))

    async def postgres_crashed(self, dice: random.Random, _: int) -> None:
        assert self.world.postgres is not None
        self.journal.fault("postgres: immediate restart")
        await self.world.postgres.restart("immediate")
        self.journal.fault("postgres is back")

    async def postgres_paused(self, dice: random.Random, _: int) -> None:
        assert self.world.postgres is not None
        self.journal.fault("postgres paused")
        self.world.postgres.pause()
        await asyncio.sleep(dice.uniform(0.1, 3.0))
        self.world.postgres.resume()
        self.journal.fault("postgres resumed")

    async def sqlite_locked(self, dice: random.Random, _: int) -> None:
        """Another program, a backup say, writes to the file."""
        self.journal.fault("sqlite locked")
        await asyncio.to_thread(_lock, self.database_url.partition(":///")[2], dice.uniform(0.1, 3.0))
        self.journal.fault("sqlite unlocked")

    async def worker_killed(self, dice: random.Random, worker: int) -> None:
        await self._count_repairs(worker)
        self.journal.fault(f"worker {worker} killed")
        self._deaths.append(time.monotonic())
        self.service.kill(worker)
        await asyncio.sleep(dice.uniform(0, 4.0))
        await self._launch(worker)

    async def worker_frozen(self, dice: random.Random, worker: int) -> None:
        self.journal.fault(f"worker {worker} frozen")
        self._deaths.append(time.monotonic())
        self.service.pause(worker)
        await asyncio.sleep(dice.uniform(0.1, 2.5 * STALE))
        self.service.resume(worker)
        self.journal.fault(f"worker {worker} goes on")

    async def worker_stopped(self, dice: random.Random, worker: int) -> None:
        await self._count_repairs(worker)
        self.journal.fault(f"worker {worker}: SIGTERM")
        self._deaths.append(time.monotonic())
        self.service.terminate(worker)
        started = time.monotonic()
        try:
            code = await self.service.ended(worker, EXIT)
            self.journal.note(f"worker {worker} ended with {code} after {time.monotonic() - started:.1f} s")
        except subprocess.TimeoutExpired:
            self.violations.append(f"P8 worker {worker} was there {EXIT} s after SIGTERM")
            self.service.kill(worker)
        await self._launch(worker)

    async def _launch(self, worker: int) -> None:
        """As a platform does: again and again until it stands."""
        for _ in range(10):
            with contextlib.suppress(StartFailed):
                await self.service.launch(worker)
                self.journal.fault(f"worker {worker} started")
                return
            self.service.processes[worker].stop(signal.SIGKILL)
        raise StartFailed(f"worker {worker} does not start\n{self.service.log(worker)[-4000:]}")

    def _may_lose(self) -> bool:
        """Text that only a worker knew is lost with it: said while Redis was away, or before Redis had it again."""
        spans = [(start - 0.1, end + FRESH) for start, end in self._redis_away]
        return any(start <= death <= end for death in self._deaths for start, end in spans)

    # -- what is held (I9)

    async def _holdings(self) -> dict[str, float]:
        """What all workers hold together, and what stands in Redis and PostgreSQL where there is one."""
        held: Counter[str] = Counter()
        for worker in range(self.service.workers):
            held.update(self.service.resources(worker))
            held.update({name: value for name, value in (await self._metrics(worker)).items() if name in HELD})
        return dict(held) | await counts(self.world.redis.url, self.database_url if self.world.postgres else None)

    async def _metrics(self, worker: int) -> dict[str, float]:
        answer = await call(self.service.urls[worker], "GET", "/metrics", OPERATOR)
        lines = [line.split() for line in answer.text.splitlines() if "{" not in line and not line.startswith("#")]
        return {line[0]: float(line[1]) for line in lines if len(line) == 2}

    async def _count_repairs(self, worker: int) -> None:
        with contextlib.suppress(httpx.HTTPError):
            counted = await self._metrics(worker)
            self.repairs.update({name: int(value) for name, value in counted.items() if name in REPAIRS and value})

    async def _nothing_left(self, before: dict[str, float]) -> dict[str, float]:
        """Wait until what the run took is given back; what is not, is a violation."""
        deadline = time.monotonic() + GIVEN_BACK
        room = {"rss": GROWTH * self.service.workers, "fds": (POOL + self.sessions) * self.service.workers}
        # Threads stay once they were needed: as many as asyncio allows, and the four in which uvloop looks up names.
        room["threads"] = self.service.workers * (min(32, (os.cpu_count() or 1) + 4) + 4)
        while wrong := i9_no_leak(before, after := await self._holdings(), room):
            if time.monotonic() > deadline:
                self.violations += wrong
                break
            await asyncio.sleep(0.1)
        for worker in range(self.service.workers):
            await self._count_repairs(worker)
        return after

    # -- the end

    async def _settle(self) -> None:
        """Nothing is being done to anything any more: every turn ends, every socket has all of its session, or is closed."""
        for life in self.lives:
            for reader in life.readers:
                reader.release()
                reader.view.left = reader.view.left or life.over or reader in self.turned_away
        deadline = time.monotonic() + QUIET
        await self._patiently(self._all_over, QUIET)
        try:
            while behind := await self._behind():
                if time.monotonic() > deadline:
                    self.violations += [f"P2 {each}" for each in behind]
                    break
                await asyncio.sleep(0.05)
        finally:
            self.journal.note("settled")

    async def _all_over(self) -> bool:
        rows = await read_rows(self.database_url)
        return all(row.status in TERMINAL for row in rows.messages) and all(t.status != "running" for t in rows.turns)

    async def _behind(self) -> list[str]:
        rows = await read_rows(self.database_url)
        found = []
        unwelcome = self.turned_away.union(*[life.readers for life in self.lives if life.over])
        for reader in self.readers:
            if reader.finished:
                continue
            if reader in unwelcome:
                found.append(f"{reader.name} goes on reading what it may not read any more")
                continue
            for row in [row for row in rows.messages if row.session_id == reader.session_id][-2:]:
                known = reader.view.messages.get(row.id)
                if isinstance(reader, SSEReader):
                    found.append(f"{reader.name} is still being answered")
                elif known is None:
                    found.append(f"{reader.name} has not heard of {row.id}")
                elif (known.text, known.status) != (row.content, row.status):
                    found.append(f"{reader.name}: {row.id} {known.status}: {difference(known.text, row.content)}")
        return found


@dataclass(frozen=True)
class Fault:
    """`on`: the thing that is struck; two faults never hold the same thing."""

    on: str
    strike: Callable[[Chaos, random.Random, int], Awaitable[None]]
    storage: str = ""  # the only kind of storage that can be struck so


FAULTS = (
    Fault("redis", Chaos.redis_killed),
    Fault("redis", Chaos.redis_paused),
    Fault("redis", Chaos.pubsub_cut),
    Fault("storage", Chaos.postgres_crashed, "postgres"),
    Fault("storage", Chaos.postgres_paused, "postgres"),
    Fault("storage", Chaos.sqlite_locked, "sqlite"),
    Fault("worker", Chaos.worker_killed),
    Fault("worker", Chaos.worker_frozen),
    Fault("worker", Chaos.worker_stopped),
)
LOUD = None
OPERATOR = "the-operator-of-the-chaos"
HELD = {"chat_followers", "chat_rooms", "chat_turns_running", "asyncio_tasks"}
REPAIRS = {f"{name}_total" for name, _ in COUNTED.values()}
GIVEN_BACK = 10.0  # seconds after the last reader has left
GROWTH = 30e6  # bytes a worker may grow
POOL = 5  # connections to PostgreSQL a worker may open and keep; to each model vendor it keeps one per stream at once


def _success_of_nothing(evidence: Evidence) -> Violations:
    """A success is the whole of a call that meant to end: never what a vendor left half said."""
    whole = {(call.prompt, "".join(call.sent)) for call in evidence.calls or () if getattr(call, "mode", "") in GOOD}
    rows = evidence.rows.messages if evidence.rows else []
    prompts = {row.turn_id: row.content for row in rows if row.role == "user"}
    return [
        f"P4 {row.id} is a success of {len(row.content)} characters, which no call said to its end"
        for row in rows
        if row.role == "assistant" and row.status == "success" and (prompts[row.turn_id], row.content) not in whole
    ]


def _positions(rows: Rows | None) -> Violations:
    taken = Counter((row.session_id, row.position) for row in rows.messages) if rows else Counter()
    return [f"P9 position {position} of {session} is taken {n} times" for (session, position), n in taken.items() if n > 1]


async def chaos(
    world: World,
    seed: int,
    seconds: float,
    *,
    workers: int = 2,
    root: Path = ROOT,
    environment: dict[str, str] | None = None,
    **options: Any,
) -> Report:
    """Run one seed against a service of its own; `options` are those of `Chaos`."""
    world.vendors.reset()
    async with Service(world.environment(**environment or {}), workers=workers, root=root, server="serve") as service:
        run = Chaos(world, service, seed, seconds, **options)
        try:
            return await run.run()
        except BaseExceptionGroup as group:
            why = [f"HANG {problem!r:.300}" for problem in _leaves(group)]
        except TimeoutError as problem:
            why = [f"HANG {problem!r:.300}"]
        finally:
            for server in filter(None, (world.redis, world.postgres)):
                server.resume() if server.running else await server.start()
        return Report(seed, run.violations + why, run.journal, service.log(), run.counts)


def _lock(path: str, seconds: float) -> None:
    with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        time.sleep(seconds)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    return [
        leaf
        for problem in group.exceptions
        for leaf in (_leaves(problem) if isinstance(problem, BaseExceptionGroup) else [problem])
    ]


async def _main(arguments: argparse.Namespace) -> int:
    failed = []
    async with world(arguments.storage) as here:
        for seed in range(arguments.seed, arguments.seed + arguments.count):
            report = await chaos(here, seed, arguments.seconds, workers=arguments.workers, root=arguments.root)
            print(report, flush=True)
            if report.violations:
                failed.append(seed)
                path = Path(arguments.stories) / f"chaos-{seed}.txt" if arguments.stories else None
                if path is None:
                    print(report.story(), flush=True)
                else:
                    path.write_text(report.story())
                    path.with_suffix(".log").write_text(report.log)
                    print("\n".join(f"    {each[:300]}" for each in report.violations[:6]), flush=True)
    print(f"{arguments.count - len(failed)} seeds passed, failed: {failed or 'none'}")
    return bool(failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--storage", choices=["postgres", "sqlite"], default="postgres")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree to serve")
    parser.add_argument("--stories", help="write the stories of failures into this folder instead of printing them")
    sys.exit(asyncio.run(_main(parser.parse_args())))


if __name__ == "__main__":
    main()
