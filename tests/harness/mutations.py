"""Do the tests notice? A safeguard is taken out of a copy of the tree, and the scenarios that stand for it are run.

    python -m tests.harness.mutations            # each; or --only repair, --keep what pytest says

Prints which scenario failed first for each; exit status 1 when one was missed by all of them, or is not there to be taken
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*cache", "data", "node_modules")
AT_ONCE = 2  # trees: their scenarios mostly wait
RELAY, WORKERS, MOMENTS = "tests/test_faults_relay.py", "tests/test_faults_workers.py", "tests/test_moments.py"
ROOMS, SLOW = "tests/test_relay.py", "tests/sockets/test_slow_readers.py"
OWNERS = "tests/test_owners.py"
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
        (("chat/live/rooms.py", "        self._again = True\n        if self._learning", "        return\n        if self._learning"),),
        (f"{RELAY}::test_redis_drops_its_listeners_five_times", f"{RELAY}::test_redis_is_killed_and_comes_back"),
    ),
    Mutation(
        "missed",
        "a reader goes from an ended turn to the latest, whatever lies between",
        (("chat/live/rooms.py", "if cursor.over and cursor.turn_id == answer.previous and", "if cursor.over and"),),
        (ROOMS, f"{WORKERS}::test_a_turn_begins_elsewhere_before_the_last_ones_end_is_heard"),
    ),
    Mutation(
        "merge",
        "words that are known are learned again",
        (("chat/live/answers.py", "reply.text += text[known - offset :]", "reply.text += text"),),
        ("tests/test_answers.py", f"{WORKERS}::test_snapshots_while_redis_is_away_bring_nothing_twice"),
    ),
    Mutation(
        "owned",
        "an owner's statements match whoever owns the turn",
        (
            ("chat/store/turns.py", "t.id = :turn_id AND t.owner = :owner AND t.status = 'running')", "t.id = :turn_id)"),
            ("chat/store/turns.py", "WHERE id = :turn_id AND owner = :owner RETURNING", "WHERE id = :turn_id RETURNING"),
        ),
        (f"{FROZEN}_longer_than_its_lease", f"{FROZEN}_while_its_answer_ends"),
    ),
    Mutation(
        "frozen",
        "an owner that was frozen does not ask whether it still is one",
        (("chat/live/leases.py", "        if self._awake():\n            return True", "        if True:\n            return True"),),
        (f"{OWNERS}::test_a_thawed_owner_of_a_taken_turn_says_nothing_more", f"{FROZEN}_and_nobody_comes_before_it_goes_on"),
    ),
    Mutation(
        "early",
        "a stop before a turn's models are asked is forgotten",
        (("chat/live/turn.py", "            self.early = why\n", "            pass\n"),),
        (f"{MOMENTS}::test_a_stop_in_the_first_moments_leaves_nothing_pending", f"{WORKERS}::test_a_battle_is_stopped_when_its_models_have_ended"),
    ),
    Mutation(
        "rights",
        "whose right to read has ended goes on reading",
        (("chat/live/rooms.py", "if account_id in (\"\", self.session.account_id, follower.right.account_id):", "if False:"),),
        (f"{MOMENTS}::test_a_right_that_ends_ends_open_readers",),
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
        ("tests/test_database.py", f"{RELAY}::test_six_hundred_tabs_close_during_writes"),
    ),
    Mutation(
        "given up",
        "a write that its caller has given up is carried out all the same",
        (("chat/store/database.py", 'if not call.decide("commit"):', "if False:"),),
        ("tests/test_pool.py",),
    ),
    Mutation(
        "deadline",
        "a reader that takes nothing is never cut",
        (("consumers/session.py", "patience = self.chat.settings.send_timeout", "patience = 86400.0"),),
        (f"{SLOW}::test_a_reader_that_takes_nothing_is_cut_and_comes_back", f"{RELAY}::test_slow_reader_and_silent_reader"),
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
        if mutation is not NOTHING:
            words.append("--exitfirst")
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
    wanted = [each for each in (*MUTATIONS, NOTHING) if each.name in (arguments.only or [m.name for m in MUTATIONS])]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        missed = [name for name in threads.map(lambda each: noticed(each, arguments.keep), wanted) if name]
    sys.exit(f"wrong: {', '.join(missed)}" if missed else 0)


def noticed(mutation: Mutation, keep: bool) -> str:
    """Run one and print what it came to; its name when the tests said what they should not have said."""
    started = time.monotonic()
    failed = run(mutation, keep)
    took = time.monotonic() - started
    print(f"{mutation.name:<10} {mutation.what}: {', '.join(failed) or 'nobody noticed'} ({took:.0f} s)", flush=True)
    return mutation.name if bool(failed) == (mutation is NOTHING) else ""


if __name__ == "__main__":
    main()
