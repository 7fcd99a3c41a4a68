"""Every resource of a worker, opened once, in order, and closed in reverse."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from broadcaster import Broadcast

from .arena.published import vote_line
from .cached import Cached
from .errors import ChatError, RelayUnavailable
from .limits import RateLimits
from .live.bus import RedisBus
from .live.generation import Generation
from .live.leases import Leases
from .live.relay import Relay
from .metrics import Metrics
from .providers import Providers
from .settings import HERE, Settings
from .store.database import Database
from .store.mask import Mask
from .store.votes import Leaderboard
from .store.votes_file import VotesFile
from .tokens import Tokens

CHECK_TIMEOUT = 2.0  # seconds
CHECKED_FOR = 0.25  # seconds: anyone may ask for health, as often as they like, and each check goes to the database


@dataclass(frozen=True)
class State:
    """The objects that request handlers share."""

    settings: Settings
    database: Database
    tokens: Tokens
    limits: RateLimits
    mask: Mask
    relay: Relay
    generation: Generation
    providers: Providers
    leaderboard: Leaderboard
    votes_file: VotesFile
    metrics: Metrics
    checks: Cached[dict[str, str]]  # what health says of the database, Redis and the relay
    dice: random.Random  # draws the pairs of blind battles


async def open_state(settings: Settings, stack: AsyncExitStack) -> State:
    """Open everything; `stack` closes it. Raises `StartupError` with the one line to print."""
    worker = secrets.token_hex(4)
    providers = Providers(settings)
    stack.push_async_callback(providers.close)
    bus = (
        RedisBus(
            settings.redis_url,
            verify=settings.relay_tls_verify,
            origin=worker,
            every=settings.publish_every,
            prefix=settings.relay_prefix,
        )
        if settings.redis_url
        else None
    )
    # Without Redis a second process on the same file would be a second service that hears nothing of this one.
    exclusive, patience = not settings.redis_url, settings.storage_timeout
    database = Database(settings.database_url, pool_size=settings.pool_size, timeout=patience, exclusive=exclusive)
    stack.push_async_callback(database.disconnect)
    await database.connect()
    await database.migrate((HERE / "models.sql").read_text())
    mask = Mask({model.id: model for model in settings.models}, settings.base_url)
    broadcast = Broadcast(backend=bus) if bus is not None else Broadcast("memory://")
    relay = Relay(settings, database, mask, broadcast, bus, worker)
    await relay.start()
    stack.push_async_callback(relay.stop)
    limits = RateLimits(worker, bus)
    generation = Generation(settings, database, relay, providers, limits, worker)
    generation.start()
    generation.tasks.spawn(providers.load())
    Leases(settings, database, relay, generation).start()
    stack.push_async_callback(generation.drain)
    tokens = Tokens(settings.secret_keys, lambda: database.now() / 1000)
    metrics = _metrics(relay, generation, bus)
    leaderboard = Leaderboard(database, settings.leaderboard_cache)
    votes_file = VotesFile(database, lambda vote: vote_line(vote, tokens.pseudonym))
    stack.callback(votes_file.close)
    dice = random.Random(settings.draw_seed) if settings.draw_seed else random.SystemRandom()
    return State(
        settings=settings,
        database=database,
        tokens=tokens,
        limits=limits,
        mask=mask,
        relay=relay,
        generation=generation,
        providers=providers,
        leaderboard=leaderboard,
        votes_file=votes_file,
        metrics=metrics,
        checks=Cached(CHECKED_FOR, lambda: _checks(database, relay, bus)),
        dice=dice,
    )


def _metrics(relay: Relay, generation: Generation, bus: RedisBus | None) -> Metrics:
    def followers() -> float:
        return sum(len(room.followers) for room in relay.rooms.values())

    metrics = Metrics(
        relay.counts,
        {
            "chat_followers": ("Sockets and streams that follow a session here", followers),
            "chat_rooms": ("Sessions somebody follows or writes here", lambda: len(relay.rooms)),
            "chat_turns_running": ("Turns this worker answers", lambda: len(generation.turns)),
            "chat_relay_lag_seconds": ("A message through the relay and back", lambda: relay.lag),
            "chat_bus_failures": ("Connections to Redis that were lost or refused", lambda: bus.failures if bus else 0),
            "asyncio_tasks": ("Tasks of the event loop", lambda: len(asyncio.all_tasks())),
            "event_loop_lag_seconds": ("How late the loop was at the last beat", lambda: generation.tasks.lag),
        },
    )
    generation.observe = metrics.reply
    return metrics


async def _checks(database: Database, relay: Relay, bus: RedisBus | None) -> dict[str, str]:
    stored, cached = await asyncio.gather(_answers(database.fetch_one("SELECT 1 AS one")), _pinged(bus))
    return {
        "database": "ok" if stored else "failed",
        "cache": "ok" if cached else "failed",
        "channels": "configured" if relay.healthy else "failed",
    }


async def _pinged(bus: RedisBus | None) -> bool:
    return bus is None or await _answers(bus.command("PING"))


async def _answers(asked: Awaitable[Any]) -> bool:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT):
            return bool(await asked)
    except (ChatError, RelayUnavailable, TimeoutError):
        return False
