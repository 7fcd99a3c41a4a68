"""A long run under random faults: readers that come and go, turns in some sessions, a fault every 5 s, on two workers.

    python benchmarks/soak.py --minutes 10 --readers 200 --seed 1

needs what the tests need (`tests/requirements.txt`). At the end all invariants I1 to I10 are checked
(`tests/harness/checker.py`); I8, how little a bystander feels, is not, as here everybody is struck. Exit status 1 when
one was violated. A seed draws the same turns, readers and faults again.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.harness.chaos import Report, chaos, world


def summary(report: Report, seconds: float) -> str:
    counts, journal = report.counts, report.journal
    ends = ", ".join(f"{n} {end}" for end, n in report.statuses.most_common())
    lines = [
        ("turns", f"{counts['turns']}; replies: {ends}"),
        ("text", f"{counts['tokens']} tokens said by models, {journal.heard} characters delivered"),
        ("readers", f"{counts['readers']}; {counts['drops']} drops, {counts['holds']} holds, "
                    f"{len(journal.of(None, 'closed'))} connections ended"),
        ("faults", f"{counts['faults']}: " + ", ".join(f"{n} {kind}" for kind, n in report.faults.most_common())),
        ("repairs", ", ".join(f"{name} {n}" for name, n in report.repairs.most_common()) or "none"),
        ("held", ", ".join(f"{name} {_number(name, before)} → {_number(name, report.after.get(name, 0))}"
                           for name, before in report.before.items())),
        ("took", f"{seconds:.0f} s"),
        ("violations", str(len(report.violations))),
    ]  # fmt: skip
    return "\n".join(f"{name:<11} {text}" for name, text in lines)


def _number(name: str, value: float) -> str:
    return f"{value / 1e6:.0f} MB" if name == "rss" else f"{value:g}"


async def main(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    sessions = arguments.sessions
    async with world(arguments.storage) as here:
        report = await chaos(
            here,
            arguments.seed,
            arguments.minutes * 60,
            sessions=sessions,
            readers=arguments.readers // sessions,
            every=(arguments.every, arguments.every),
            pace=(0.05, 0.3),
            rest=(2.0, 20.0),
            chunks=False,
        )
    print(summary(report, time.monotonic() - started))
    if not report.violations:
        return 0
    print(*report.violations[:50], sep="\n")
    if arguments.story:
        arguments.story.write_text(report.story())
        arguments.story.with_suffix(".log").write_text(report.log)
    return 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--storage", choices=["postgres", "sqlite"], default="postgres")
    parser.add_argument("--readers", type=int, default=200, help="at a time, over all sessions")
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two faults")
    parser.add_argument("--story", type=Path, help="where to write what happened when something was violated")
    sys.exit(asyncio.run(main(parser.parse_args())))
