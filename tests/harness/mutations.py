"""Do the tests notice? A safeguard is taken out of a copy of the tree, and the scenarios that stand for it are run.

    python -m tests.harness.mutations            # each; or --only repair, --keep what pytest says

Prints which scenarios failed for each; exit status 1 when one was missed by all of them, or is not there to be taken
out any more. Without any change the same scenarios pass: `--only nothing`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*cache", "data")
RELAY, WORKERS = "tests/test_faults_relay.py", "tests/test_faults_workers.py"
SLOW = "tests/sockets/test_slow_readers.py"
FROZEN = f"{WORKERS}::test_the_owner_is_frozen"


@dataclass(frozen=True)
class Mutation:
    """`changes`: file, what stands there, what is put instead; `tests`: what pytest is asked to run."""

    name: str
    what: str
    changes: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "repair",
        "a gap is not repaired",
        (("chat/live/rooms.py", "        self._again = True\n        if self._early", "        return\n        if self._early"),),
        (
            f"{RELAY}::test_redis_is_killed_and_comes_back",
            f"{RELAY}::test_redis_drops_its_listeners_five_times",
            f"{WORKERS}::test_a_turn_begins_elsewhere_before_the_last_ones_end_is_heard",
        ),
    ),
    Mutation(
        "owned",
        "an owner's statements match whoever owns the turn",
        (
            ("chat/store/turns.py", " AND t.owner = :owner AND t.status = 'running')", ")"),
            ("chat/store/turns.py", "WHERE id = :id AND owner = :owner AND status = 'running' RETURNING", "WHERE id = :id RETURNING"),
        ),
        (f"{FROZEN}_longer_than_its_lease", f"{FROZEN}_while_its_answer_ends"),
    ),
    Mutation(
        "fence",
        "an owner that was frozen does not ask whether it still is one",
        (
            ("chat/live/generation.py", "        writer.sure = lambda: self._awake() and not running.fenced\n", ""),
            ("chat/live/generation.py", "        writer.fence = lambda: self._still_ours(running)\n", ""),
        ),
        (f"{FROZEN}_longer_than_its_lease", f"{FROZEN}_and_nobody_comes_before_it_goes_on"),
    ),
    Mutation(
        "numbers",
        "an event that is known is taken again",
        (
            ("chat/live/events.py", "            if entry.seq <= self.last or self.closed:\n", "            if self.closed:\n"),
            ("chat/live/events.py", " or (entry.from_seq <= self.last and entry.kind == \"chunk\"):", ":"),
        ),
        ("tests/test_turn_log.py", f"{WORKERS}::test_snapshots_while_redis_is_away_bring_nothing_twice"),
    ),
    Mutation(
        "shield",
        "a caller that leaves takes its storage call along",
        (
            (
                "chat/store/database.py",
                "not (await asyncio.wait({running}, timeout=timeout))[0]:",
                "await asyncio.wait_for(running, timeout) is running:",
            ),
        ),
        (f"{RELAY}::test_six_hundred_tabs_close_during_writes",),
    ),
    Mutation(
        "deadline",
        "a reader that takes nothing is never cut",
        (("consumers/session.py", "patience = self.chat.settings.send_timeout", "patience = 86400.0"),),
        (SLOW, f"{RELAY}::test_slow_reader_and_silent_reader"),
    ),
)  # fmt: skip
NOTHING = Mutation("nothing", "no change", (), tuple(sorted({test for each in MUTATIONS for test in each.tests})))


def run(mutation: Mutation, keep: bool) -> list[str]:
    """The scenarios that failed. Raises `ValueError` where there is nothing to change, or none of them can begin."""
    with tempfile.TemporaryDirectory(prefix="parley-mutation-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        for name, before, after in mutation.changes:
            text = (tree / name).read_text()
            if text.count(before) != 1:
                raise ValueError(f"{name} has {text.count(before)} times what {mutation.name} changes: {before!r}")
            (tree / name).write_text(text.replace(before, after))
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", *mutation.tests]
        ended = subprocess.run(words, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if keep or ended.returncode not in (0, 1):
        print(ended.stdout)
    if re.search(r"^ERROR ", ended.stdout, re.MULTILINE):
        raise ValueError(f"with {mutation.name} no scenario can begin: that is no sign that one would notice")
    return re.findall(r"^FAILED \S+?::(\S+)", ended.stdout, re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", choices=[each.name for each in (*MUTATIONS, NOTHING)])
    parser.add_argument("--keep", action="store_true", help="print what pytest says")
    arguments = parser.parse_args()
    missed = []
    for mutation in [each for each in (*MUTATIONS, NOTHING) if each.name in (arguments.only or [m.name for m in MUTATIONS])]:
        started = time.monotonic()
        failed = run(mutation, arguments.keep)
        print(f"{mutation.name:<10} {mutation.what}: {', '.join(failed) or 'nobody noticed'}"
              f" ({time.monotonic() - started:.0f} s)", flush=True)  # fmt: skip
        if bool(failed) == (mutation is NOTHING):
            missed.append(mutation.name)
    sys.exit(f"wrong: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
