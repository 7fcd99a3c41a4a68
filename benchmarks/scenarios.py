"""The scenarios: what is asked of every target, and the numbers that come of it. README.md says what each means."""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from machine import Load, Missing, Redis
from parley import Parley, http_load
from postgres import Postgres
from targets import Target

WARM = 2.0  # seconds of the same load before what counts: Node compiles, caches and buffers fill
DRAIN = 3.0  # seconds after the last token was due in which it may still arrive
BACKLOG = 10.0  # seconds a peer gets to clear what the warming left behind
FIRST_RATE = 2_000  # tokens a second at which S3 begins; every peer but a broken one manages that
LATEST_P99 = 250.0  # ms; beyond it a stream is no longer live
EDGE = 2.0  # seconds at the beginning and at the end of a run that growth does not count
BLOCKED = 200  # readers that do not read, in the memory scenario

Sample = dict[str, float]


def join(target: Target, sessions: int, sockets: int) -> Load:
    """Open so many sockets in each session and begin once all have joined."""
    target.prepare(sessions)
    lines = [target.socket(session) for session in range(sessions) for _ in range(sockets)]
    load = Load(target.port, lines, target.load_options)
    if load.opened["open"] < len(lines):
        print(f"  {target.label}: expected {len(lines)} open sockets, got {load.opened}", file=sys.stderr)
    return load


def phase(target: Target, load: Load, sessions: int, rate: float, seconds: float, pad: int = 0) -> Sample:
    """Write for so long and say what arrived, what it cost and how late it was. Numbers begin at 0 in each phase."""
    count = round(rate * seconds)
    offered = count * load.sockets
    load.begin()
    spent = -target.cpu()
    target.write(load, sessions, rate, seconds, pad)
    heard = load.wait(count, seconds + DRAIN)
    spent += target.cpu()
    late = {name: heard[f"{name[:-3]}_us"] / 1000 for name in ("p50_ms", "p99_ms", "max_ms")}
    return {
        "tokens": heard["tokens"],
        "per_cpu_second": heard["tokens"] / max(spent, 0.01),
        "per_second": heard["tokens"] / max(heard["seconds"], seconds * 0.9),
        "lost": heard["lost"],
        "lost_percent": 100 * (1 - heard["tokens"] / offered),
        "tokens_per_frame": heard["tokens"] / max(heard["frames"], 1),
        "repeated": heard["repeated"],
        "misordered": heard["misordered"],
        "deaf": heard["deaf"],
        "client_load": heard["client_load"],
        "cpu_seconds": spent,
        **(late if heard["max_us"] else {}),  # tokens may come without a time in them
    }


def fan_out(target: Target, sessions: int, sockets: int, rate: float, seconds: float) -> Sample:
    """Whole answers to sockets that have just joined, from the first token to the last; warmed by others before."""
    load = join(target, sessions, sockets)
    try:
        warmed = phase(target, load, sessions, rate, WARM)
        if warmed["lost_percent"]:  # what a saturated peer still holds back is not the measured phase's fault
            load.wait(round(rate * WARM), BACKLOG)
    finally:
        load.close()
    load = join(target, sessions, sockets)
    try:
        return phase(target, load, sessions, rate, seconds)
    finally:
        load.close()


def whole(sample: Sample) -> bool:
    """Every socket got every token once and in order: of a phase, or of what the load client reports."""
    return not (sample["lost"] or sample["repeated"] or sample["misordered"])


def with_target(kind: type[Target], use: Callable, **attributes: object) -> Any:
    """Start a target with a Redis of its own, use it, stop both."""
    redis = Redis()
    try:
        target = kind(redis, **attributes)
        try:
            return use(target)
        finally:
            target.stop()
    finally:
        redis.stop()


def on_both(kind: type[Target], measure: Callable) -> Sample:
    """On SQLite, and with `_pg` behind the names once more on PostgreSQL; where there is none, that is said loudly."""
    sample = with_target(kind, measure)
    try:
        postgres = Postgres()
    except Missing as missing:
        print(f"NOT ON POSTGRESQL: {missing}", file=sys.stderr)
        return sample
    try:
        again = with_target(kind, measure, database_url=postgres.url)
        return sample | {f"{name}_pg": value for name, value in again.items()}
    finally:
        postgres.stop()


# The scenarios: each starts a kind of target as often as it needs, and gives named numbers.


def s1(kind: type[Target], seconds: float) -> Sample:
    return with_target(kind, lambda target: fan_out(target, 1, 500, 50, seconds))


def s2(kind: type[Target], seconds: float) -> Sample:
    return with_target(kind, lambda target: fan_out(target, 200, 3, 30, seconds))


def s3(kind: type[Target], seconds: float) -> Sample:
    """Double the rate until the peer fails, then start it afresh and go on from the last good rate in smaller steps."""
    step = min(seconds, 3.0)

    def climb(target: Target, first: float, factor: float, steps: int) -> Sample | None:
        load, best = join(target, 1, 500), None
        try:
            phase(target, load, 1, first / 500, 1.0)
            for i in range(steps):
                rate = first * factor**i
                sample = phase(target, load, 1, rate / 500, step)
                if sample["per_second"] < 0.9 * rate or not whole(sample) or sample.get("p99_ms", 0) >= LATEST_P99:
                    print(f"  gave up at {rate:,.0f} tokens/s: {sample}", file=sys.stderr)
                    break
                best = sample
            return best
        finally:
            load.close()

    coarse = with_target(kind, lambda target: climb(target, FIRST_RATE, 2, 14))
    if coarse is None:
        return {"per_second": 0}
    rate = coarse["per_second"] * 1.19
    fine = with_target(kind, lambda target: climb(target, rate, 1.19, 4))
    return fine or coarse


def idle(kind: type[Target], seconds: float) -> Sample:
    """20 sessions of one socket, 5 tokens a second in each: every token finds a service with nothing to do."""
    return with_target(kind, lambda target: fan_out(target, 20, 1, 5, max(seconds, 10)))


def memory(kind: type[Target], seconds: float) -> Sample:
    """What the server holds at rest, for idle sockets, and for readers that have stopped reading."""

    def idle_sockets(target: Target) -> Sample:
        time.sleep(1)
        base = target.memory()
        first = join(target, 100, 3)  # what is allocated once is not the price of a socket
        before = target.memory()
        more = join(target, 667, 3)
        time.sleep(1)
        per_socket = (target.memory() - before) / more.sockets
        first.close()
        more.close()
        return {"base_mib": base, "mib_per_1000_idle": per_socket * 1000}

    def with_blocked(readers: int, target: Target) -> Sample:
        target.prepare(1)
        lines = [target.socket(0)] + [target.socket(0) + "\tblocked" for _ in range(readers)]
        load = Load(target.port, lines, target.load_options)
        for _ in range(2):  # the kernel's buffers hold the first megabytes; what comes after has to stay somewhere
            time.sleep(1)  # an answer of 10 MB is written down at its end; until then its session takes no other
            before = target.memory()
            sample = phase(target, load, 1, 500, 5, pad=4000)
            if not whole(sample):
                raise RuntimeError(f"expected all of 10 MB, got {sample}")
        grown = target.memory() - before
        load.close()
        return {"grown": grown, "p99_ms": sample["p99_ms"]}

    alone, beside = (with_target(kind, partial(with_blocked, readers)) for readers in (0, BLOCKED))
    return with_target(kind, idle_sockets) | {
        "mib_per_blocked": (beside["grown"] - alone["grown"]) / BLOCKED,
        "alone_p99_ms": alone["p99_ms"],
        "beside_p99_ms": beside["p99_ms"],
    }


def growth(kind: type[Target], seconds: float) -> Sample:
    """The same 18,000 tokens a second, over more sockets of one session, then over more sessions of 3 sockets."""

    def in_the_middle(sessions: int, sockets: int, rate: float, target: Target) -> float:
        """Tokens per CPU-second while answers run: a thousand of them begin and end as well, which is in `http`."""
        load = join(target, sessions, sockets)
        try:
            load.begin()
            target.write(load, sessions, rate, seconds + 2 * EDGE)
            count = round(rate * (seconds + 2 * EDGE))
            tokens, spent = -load.wait(count, EDGE)["tokens"], -target.cpu()
            tokens, spent = tokens + load.wait(count, seconds)["tokens"], spent + target.cpu()
            heard = load.wait(count, EDGE + DRAIN)
            if not whole(heard):
                print(f"  {target.label}: not whole: {heard}", file=sys.stderr)
            return tokens / max(spent, 0.01)
        finally:
            load.close()

    shapes = {f"{sockets}_sockets": (1, sockets, 18_000 / sockets) for sockets in (10, 50, 500, 5000)}
    shapes |= {f"{sessions}_sessions": (sessions, 3, 6_000 / sessions) for sessions in (1, 10, 100, 1000)}
    return {name: with_target(kind, partial(in_the_middle, *shape)) for name, shape in shapes.items()}


def http(kind: type[Target], seconds: float) -> Sample:
    """`/api/health/`, and for Parley sessions created, and whole turns of one token, on SQLite and on PostgreSQL."""

    def hammer(target: Target, requests: list) -> Sample:
        job = {"kind": "rate", "port": target.port, "requests": requests, "connections": 32, "seconds": seconds}
        http_load(job | {"seconds": 1})
        spent = -target.cpu()
        result = http_load(job)
        spent += target.cpu()
        if result["errors"]:
            print(f"  {target.label}: {result['errors']} of {result['answers']} answers are errors", file=sys.stderr)
        per_cpu_second = result["answers"] / max(spent, 0.01)
        return {"per_second": result["per_second"], "per_cpu_second": per_cpu_second, "ms": 1000 / per_cpu_second}

    def health(target: Target) -> Sample:
        return hammer(target, [["GET", "/api/health/", {}, None]])

    def writes(target: Parley) -> Sample:
        made = hammer(target, [target.new_session(target.tokens[0])])
        said = hammer(target, [target.new_turn("/count 1")])
        return {"sessions": made["per_second"], "turns": said["per_second"], "turn_ms": said["ms"]}

    sample = {f"health_{name}": value for name, value in with_target(kind, health).items()}
    if issubclass(kind, Parley):
        sample |= on_both(kind, writes)
    return sample


def streams(kind: type[Target], seconds: float) -> Sample:
    """3,000 HTTP turns at once of 200 tokens, 6.7 a second each: 30 s, whatever --seconds says."""

    def measure(target: Target) -> Sample:
        count, tokens = (300, 20) if seconds < 5 else (3000, 200)
        requests = target.turns(count, tokens, 6.7)
        spent = -target.cpu()
        job = {"kind": "streams", "port": target.port, "requests": requests, "tokens": tokens, "probe": "/api/health/"}
        result = http_load(job)
        spent += target.cpu()
        return {
            "complete_percent": 100 * result["complete"] / count,
            "first_p50_ms": result["p50_ms"],
            "first_max_ms": result["max_ms"],
            "lag_p99_ms": result["lag_p99_ms"],
            "seconds": result["seconds"],
            "per_cpu_second": result["complete"] * tokens / max(spent, 0.01),
        }

    return with_target(kind, measure)


def turnover(kind: type[Target], seconds: float) -> Sample:
    """100 HTTP turns a second of 20 tokens, for a minute whatever --seconds says: the memory that is not given back."""

    def measure(target: Target) -> Sample:
        count = 300 if seconds < 5 else 6000
        requests = target.turns(count, 20, 50)
        before = target.memory()
        job = {"kind": "streams", "port": target.port, "requests": requests, "tokens": 20, "spread": count / 100}
        result = http_load(job | {"probe": "/api/health/"})
        return {
            "grown_mib": target.memory() - before,
            "memory_mib": target.memory(),
            "complete_percent": 100 * result["complete"] / count,
        }

    return with_target(kind, measure)


def upstream_s2(kind: type[Target], seconds: float) -> Sample:
    """S2 once more, for targets whose tokens come from a model vendor; Parley's demo model beside them."""
    return s2(kind, seconds)


def upstream_streams(kind: type[Target], seconds: float) -> Sample:
    """60, 100 and 200 HTTP turns that begin within a second, 30 tokens a second each: CPU of a token, and how late."""

    def measure(target: Target) -> Sample:
        sample: Sample = {}
        tokens = round(30 * seconds)
        for count in (20, 60, 100, 200):  # the first warms up: SDKs are imported, connections are made
            requests = target.turns(count, tokens, 30)
            job = {"kind": "streams", "port": target.port, "requests": requests, "tokens": tokens, "spread": 1}
            spent = -target.cpu()
            result = http_load(job | {"probe": target.probe})
            spent += target.cpu()
            sample |= {
                f"us_{count}": spent / max(result["complete"] * tokens, 1) * 1e6,
                f"core_{count}": spent / result["seconds"],
                f"first_p50_{count}": result["p50_ms"],
                f"first_p99_{count}": result["p99_ms"],
                f"late_p50_{count}": result["late_p50_ms"],
                f"late_p99_{count}": result["late_p99_ms"],
                f"complete_{count}": 100 * result["complete"] / count,
            }
        return sample | {"memory_mib": target.memory()}

    return with_target(kind, measure)


def waits(kind: type[Target], seconds: float) -> Sample:
    """What else a user waits for, after years of use: one request at a time, ms; and the second start, s."""
    sessions, messages, votes = (10_000, 1_000, 1_000_000) if seconds >= 5 else (1_000, 100, 10_000)
    pages = {
        "list": "/api/sessions/",
        "search": "/api/sessions/?search=number+77",
        "history": "/api/sessions/big/",
        "messages": "/api/messages/?session_id=big&limit=1000",
        "leaderboard": "/api/leaderboard/?mode=random",
        "again": "/api/leaderboard/?mode=random",
    }

    def measure(target: Parley) -> Sample:
        target.fill(sessions, messages, votes)
        sample = {}
        for name, path in pages.items():
            request = ["GET", path, {"Authorization": f"Bearer {target.tokens[0]}"}, None]
            job = {"kind": "rate", "port": target.port, "requests": [request], "connections": 1}
            sample[name] = http_load(job | {"seconds": 0.02 if name == "leaderboard" else 2})["p50_ms"]
        sample["start"] = target.start_again()
        return sample

    return on_both(kind, measure)


SCENARIOS = {
    "S1": s1,
    "S2": s2,
    "S3": s3,
    "idle": idle,
    "memory": memory,
    "growth": growth,
    "http": http,
    "streams": streams,
    "turnover": turnover,
    "upstream-S2": upstream_s2,
    "upstream-streams": upstream_streams,
    "waits": waits,
}
