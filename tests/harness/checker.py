"""What has to hold after every scenario: invariants I1 to I10, each a function from evidence to violations.

    evidence = await gather(journal, database_url, calls=vendors.calls, logs=service.log(), canaries=[CANARY])
    check(evidence)

A violation is one string that begins with its invariant. What a scenario allows beyond the rule (a code 1006 where it
kills a worker, text lost where nothing keeps it) is said in its `Allowed`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from .evidence import Allowed, Evidence, MessageRow, Rows, TurnRow, VendorCall, counts, gather, read_rows
from .noise import Noise
from .reader import Reader
from .view import STATUSES, TERMINAL, View, difference

__all__ = [
    "Allowed",
    "Evidence",
    "MessageRow",
    "Rows",
    "TurnRow",
    "VendorCall",
    "check",
    "counts",
    "gather",
    "read_rows",
]

STATUS_OF = {  # the closed list of error codes, with the status each has over HTTP
    "bad_request": 400, "invalid": 400, "authentication_required": 401, "token_expired": 401, "token_invalid": 401,
    "forbidden": 403, "origin_not_allowed": 403, "not_found": 404, "method_not_allowed": 405, "busy": 409,
    "conflict": 409, "already_voted": 409, "too_large": 413, "unsupported_media_type": 415, "rate_limited": 429,
    "daily_limit_reached": 403, "budget_exhausted": 429, "storage_unavailable": 503, "relay_unavailable": 503,
    "draining": 503, "internal": 500,
}  # fmt: skip
OF_REPLIES = {
    "provider_timeout", "provider_rate_limited", "provider_refused", "provider_unavailable", "provider_truncated",
    "provider_protocol", "too_long", "interrupted",
}  # fmt: skip
CODES = frozenset(STATUS_OF) | OF_REPLIES
BAD_LOG = re.compile(
    r"Traceback \(most recent call last\)|was never retrieved|was never awaited|Exception in ASGI application"
    r"|Fatal Python error|ResourceWarning|Task was destroyed but it is pending"
)
NUMBER = re.compile(r"⟨([^⟨⟩]*):(\d+)⟩")
MEGABYTE = 1_000_000


Violations = list[str]
CLOSES = frozenset({1000, 1001, 1012})


def check(evidence: Evidence) -> None:
    """Run all of them; raises AssertionError with every violation and the whole story."""
    violations = [violation for invariant in INVARIANTS for violation in invariant(evidence)]
    if violations:
        head = f"{len(violations)} violation(s):\n  " + "\n  ".join(violations[:50])
        raise AssertionError(f"{head}\n\nThe story:\n{evidence.journal.story()}")


# I1 … I3: text


def i1_no_token_lost(evidence: Evidence) -> Violations:
    """What was seen is what is stored is what the provider said, up to where it was cut."""
    found = _broken(evidence, "I1", "gap", "overlap", "cursor", "differs", "changed", "unknown", "resumed", "greeting")
    if not evidence.allowed.lost:
        found += [f"I1 {e.reader}: shown and gone: {_shrunk(e.data)}" for e in evidence.journal.of(None, "shrunk")]
    if evidence.rows is not None:
        found += _seen_is_stored(evidence, evidence.rows)
        found += _stored_is_said(evidence, evidence.rows)
    return found


def i2_none_twice(evidence: Evidence) -> Violations:
    found = _broken(evidence, "I2", "repeat")
    return found + [f"I2 {who}: {wrong}" for who, text in _answers(evidence) for wrong in _numbers(text, "twice")]


def i3_none_out_of_order(evidence: Evidence) -> Violations:
    found = _broken(evidence, "I3", "disorder", "late")
    return found + [f"I3 {who}: {wrong}" for who, text in _answers(evidence) for wrong in _numbers(text, "order")]


def _seen_is_stored(evidence: Evidence, rows: Rows) -> Iterator[str]:
    for view, message in evidence.seen():
        row = rows.message(message.id)
        if row is None:
            if message.id not in evidence.allowed.forgotten:
                yield f"I1 {view.name}: message {message.id} was seen and is not stored"
            continue
        whole = message.text == row.content
        begun = row.content.startswith(message.text) or evidence.allowed.lost or row.status not in TERMINAL
        if not (whole if message.over else begun):
            yield f"I1 {view.name}: {message.id} seen and stored: {difference(message.text, row.content)}"


def _stored_is_said(evidence: Evidence, rows: Rows) -> Iterator[str]:
    """A reply is what some call for its prompt said: all of it, for a success; as far as it goes, for the rest."""
    said: dict[str, list[str]] = defaultdict(list)
    for call in evidence.calls or ():
        said[call.prompt].append("".join(call.sent))
    prompts = {row.turn_id: row.content for row in rows.messages if row.role == "user"}
    for row in rows.messages:
        texts = said.get(prompts.get(row.turn_id, ""), [])
        if row.role != "assistant" or not texts:
            continue
        whole = row.status == "success"
        if not any(text == row.content if whole else text.startswith(row.content) for text in texts):
            yield f"I1 {row.id} ({row.status}) stored and said: {difference(row.content, max(texts, key=len))}"


def _answers(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Every text an assistant is known by, with whose knowledge it is."""
    for view, message in evidence.seen():
        if message.role == "assistant":
            yield f"{view.name}: {message.id}", message.text
    for row in evidence.rows.messages if evidence.rows else ():
        if row.role == "assistant":
            yield f"stored: {row.id}", row.content


def _numbers(text: str, what: str) -> Iterator[str]:
    """What is wrong with the numbered tokens `⟨id:n⟩` of a text: one that came twice, one that is not the next."""
    last: dict[str, int] = {}
    for found in NUMBER.finditer(text):
        id, n = found[1], int(found[2])
        if id in last and n <= last[id] and what == "twice":
            yield f"token {found[0]} came again after {last[id]}"
        elif n > last.get(id, n - 1 if n <= 1 else -1) + 1 and what == "order":
            yield f"token {found[0]} came after {last.get(id, 'nothing')}"
        last[id] = max(n, last.get(id, n))


def _shrunk(data: Mapping[str, Any]) -> str:
    return f"{data['message_id']}: {difference(data['seen'], data['stored'])}"


# I4: ends


def i4_one_end(evidence: Evidence) -> Violations:
    """Exactly one terminal status per message, in time, and all agree on it."""
    found = _broken(evidence, "I4", "second", "early")
    for view, message in evidence.seen():
        if message.terminals > 1:
            found.append(f"I4 {view.name}: message {message.id} ended {message.terminals} times")
        if message.role == "assistant" and not (message.over or view.left or evidence.allowed.running):
            found.append(f"I4 {view.name}: message {message.id} is still {message.status}")
    return found + list(_disagreements(evidence)) + list(_too_slow(evidence)) + list(_open_rows(evidence))


def _disagreements(evidence: Evidence) -> Iterator[str]:
    known: dict[str, dict[str, str]] = defaultdict(dict)
    for view, message in evidence.seen():
        if message.over:
            known[message.id][view.name] = f"{message.status}/{message.failure_reason}"
    for row in evidence.rows.messages if evidence.rows else ():
        if row.id in known:
            known[row.id]["the database"] = f"{row.status}/{row.failure_reason}"
    for id, says in known.items():
        if len(set(says.values())) > 1:
            yield f"I4 message {id} ended differently: " + ", ".join(f"{who} {what}" for who, what in says.items())


def _too_slow(evidence: Evidence) -> Iterator[str]:
    limit = evidence.allowed.within
    for view, message in evidence.seen():
        if limit is not None and message.ended is not None and message.ended - message.created > limit:
            took = message.ended - message.created
            yield f"I4 {view.name}: message {message.id} took {took:.1f} s to end, allowed {limit} s"


def _open_rows(evidence: Evidence) -> Iterator[str]:
    for row in evidence.rows.messages if evidence.rows else ():
        if row.status not in STATUSES:
            yield f"I4 stored: message {row.id} has status {row.status!r}"
        elif row.status not in TERMINAL and not evidence.allowed.running:
            yield f"I4 stored: message {row.id} is still {row.status}"


# I5: errors


def i5_errors_are_typed(evidence: Evidence) -> Violations:
    """Frames, refusals and failures from the closed list, close codes of the contract, no traceback."""
    found = _broken(evidence, "I5", "shape")
    found += [f"I5 {e.reader}: {wrong}" for e in evidence.journal.of(None, "event") for wrong in _untyped(e.data)]
    found += [f"I5 {e.reader}: {wrong}" for e in evidence.journal.of(None, "refused") for wrong in _refusal(e.data)]
    return found + list(_bad_closes(evidence)) + list(_bad_reasons(evidence)) + list(_bad_log(evidence))


def _untyped(event: Mapping[str, Any]) -> Iterator[str]:
    kind = event.get("type")
    if "requestId" not in event:
        yield f"{kind} event without requestId"
    if kind == "error":
        if event.get("code") not in CODES:
            yield f"error event with code {event.get('code')!r}"
        if not isinstance(event.get("message"), str) or not event["message"]:
            yield f"error event {event.get('code')} without a sentence"
        if not isinstance(event.get("retryable"), bool):
            yield f"error event {event.get('code')} does not say whether it is retryable"
    if kind == "message_complete":
        yield from _failure(event.get("status"), event.get("failure_reason"))


def _failure(status: object, reason: object) -> Iterator[str]:
    if status == "failed" and reason not in CODES:
        yield f"a failed message with reason {reason!r}"
    if status == "success" and reason is not None:
        yield f"a success with reason {reason!r}"


def _refusal(data: Mapping[str, Any]) -> Iterator[str]:
    """An HTTP answer that is not a success: the one shape, with the status its code has."""
    status, body = data.get("status"), data.get("body")
    if isinstance(body, str):
        try:
            body = json.loads(body)
        except ValueError:
            yield f"{status} with a body that is not JSON: {body[:100]!r}"
            return
    code = body.get("error") if isinstance(body, dict) else None
    if code not in STATUS_OF:
        yield f"{status} with error {code!r}"
    elif STATUS_OF[code] != status:
        yield f"{code} has status {status}, expected {STATUS_OF[code]}"
    elif not body.get("message") or body.get("detail") != body.get("message"):
        yield f"{code} without message and detail alike"


def _bad_closes(evidence: Evidence) -> Iterator[str]:
    for entry in evidence.journal.of(None, "closed"):
        code = entry.data["code"]
        if isinstance(code, int) and code not in CLOSES and code not in evidence.allowed.codes:
            yield f"I5 {entry.reader}: closed with {code} {entry.data['reason']!r}"


def _bad_reasons(evidence: Evidence) -> Iterator[str]:
    for row in evidence.rows.messages if evidence.rows else ():
        for wrong in _failure(row.status, row.failure_reason):
            yield f"I5 stored: message {row.id}: {wrong}"


def _bad_log(evidence: Evidence) -> Iterator[str]:
    """Each line that should not be there, with the two that follow; `allowed.log` is looked for in the same three."""
    lines = evidence.logs.splitlines()
    for i, line in enumerate(lines):
        if BAD_LOG.search(line):
            excerpt = "\n".join(lines[i : i + 40])
            if evidence.allowed.log is None or not re.search(evidence.allowed.log, excerpt):
                yield f"I5 log line {i + 1}: {line.strip()[:200]} … {_last_line_of(lines, i)}"


def _last_line_of(lines: Sequence[str], start: int) -> str:
    """The line of a traceback that names the exception: the first after it that is not indented."""
    return next((line for line in lines[start + 1 :] if line[:1].strip()), "")[:200]


# I6, I7: calls and leases


def i6_one_call(evidence: Evidence) -> Violations:
    """One provider call per prompt and model; one more only when the first said nothing."""
    calls: dict[tuple[str, str], list[VendorCall]] = defaultdict(list)
    for call in evidence.calls or ():
        calls[call.prompt, call.model].append(call)
    found = []
    for (prompt, model), made in calls.items():
        spoke = [call for call in made[:-1] if call.sent]
        if len(made) > evidence.allowed.calls:
            found.append(f"I6 {len(made)} calls of {model} for {prompt!r:.80}, allowed {evidence.allowed.calls}")
        elif spoke:
            found.append(
                f"I6 {model} was called again for {prompt!r:.80} after it had said {len(spoke[0].sent)} pieces"
            )
    return found


def i7_leases_live(evidence: Evidence) -> Violations:
    """Nothing is open in the database without somebody who holds its lease."""
    if evidence.rows is None:
        return []
    now = evidence.rows.now
    live = {turn.id for turn in evidence.rows.turns if turn.status == "running" and turn.lease_until > now}
    found = [
        f"I7 message {row.id} is {row.status} and nobody holds turn {row.turn_id}"
        for row in evidence.rows.messages
        if row.status not in TERMINAL and row.turn_id not in live
    ]
    return found + [
        f"I7 turn {turn.id} runs, its lease ran out {now - turn.lease_until} ms ago"
        for turn in evidence.rows.turns
        if turn.status == "running" and turn.id not in live
    ]


# I8, I9: others, and what is left behind


def tempo(reader: Reader | View, noise: Noise, since: float = 0.0, until: float = math.inf) -> list[float]:
    """Seconds between one piece of text and the next, within each reply, as far as they came in that time, without
    those that the machine kept everybody waiting."""
    view = reader.view if isinstance(reader, Reader) else reader
    found = []
    for message in view.messages.values():
        times = [at for at in message.chunks if since <= at <= until]
        found += [max(0.0, later - at - noise.between(at, later)) for at, later in pairwise(times)]
    return found


def i8_bystander(baseline: Sequence[float], during: Sequence[float], floor: float = 0.05) -> Violations:
    """The p99 between tokens stays under twice the baseline's; under `floor` seconds nobody sees it."""
    if not baseline or not during:
        return [f"I8 nothing to compare: {len(baseline)} gaps before, {len(during)} during"]
    before, now = p99(baseline), p99(during)
    if now <= max(2 * before, floor):
        return []
    return [f"I8 bystander: p99 between tokens {now * 1000:.0f} ms, baseline {before * 1000:.0f} ms"]


def p99(values: Sequence[float]) -> float:
    return sorted(values)[max(0, math.ceil(len(values) * 0.99) - 1)]


def i9_no_leak(
    before: Mapping[str, float], after: Mapping[str, float], slack: Mapping[str, float] | None = None
) -> Violations:
    """Everything counted is back where it was: `rss` within 30 MB, the rest exactly, plus `slack` by name."""
    room = {"rss": 30 * MEGABYTE} | dict(slack or {})
    return [
        f"I9 {name}: {before[name]:g} before, {after[name]:g} after"
        for name in before
        if after.get(name, math.inf) > before[name] + room.get(name, 0)
    ]


# I10: secrets


def i10_no_canary(evidence: Evidence) -> Violations:
    """No secret that was planted is in a log or in anything a client got."""
    found = Counter({("the log", canary): evidence.logs.count(canary) for canary in evidence.canaries})
    for entry in evidence.journal.of(None, "event", "refused", "closed"):
        text = str(entry.data)
        for canary in evidence.canaries:
            found[f"what {entry.reader} got", canary] += text.count(canary)
    return [f"I10 {canary[:12]}… is in {place}, {count} times" for (place, canary), count in found.items() if count]


INVARIANTS = (
    i1_no_token_lost,
    i2_none_twice,
    i3_none_out_of_order,
    i4_one_end,
    i5_errors_are_typed,
    i6_one_call,
    i7_leases_live,
    i10_no_canary,
)  # I8 and I9 compare two moments: a scenario that has them adds them to its own assertions


def _broken(evidence: Evidence, invariant: str, *rules: str) -> Violations:
    """What the readers themselves found wrong, each rule of each reader told a few times at most."""
    told: Counter[tuple[str, str]] = Counter()
    found = []
    for entry in evidence.journal.violations(None, rules):
        told[entry.reader, entry.data["rule"]] += 1
        if told[entry.reader, entry.data["rule"]] <= 5:
            found.append(f"{invariant} {entry.reader}: {entry.data['rule']}: {entry.data['text']}")
    return found + [f"{invariant} {who}: {rule} {n} times" for (who, rule), n in told.items() if n > 5]
