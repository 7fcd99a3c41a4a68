"""Ends what a test run started, even when the run itself was killed: it waits for the run's pipe to close.

Run as a script by `processes.py`, one per test run. It must not import anything of ours: it is started by path, outside
the package. Lines on stdin: `+pid <n>` and `-pid <n>`, `+dir <path>` and `-dir <path>`; at the end of input every
process still named is killed with its whole family, and every directory still named is removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterable

import psutil


def family(leader: psutil.Process) -> set[psutil.Process]:
    """The process, its descendants, and what else is in its group; what is left of them when it is dead.

    Both are needed: PostgreSQL's children make groups of their own, and uvicorn's workers outlive a killed parent.
    """
    found: set[psutil.Process] = set()
    if leader.is_running():
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {leader, *leader.children(recursive=True)}
    elif psutil.pid_exists(leader.pid):
        return found  # its number, and so its group's, belongs to somebody else by now
    for pid in psutil.pids():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(pid) == leader.pid:
                found.add(psutil.Process(pid))
    return found


def alive(process: psutil.Process) -> bool:
    """Whether it still runs. A zombie does not: nobody may ever wait for an orphan's."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL each of them that is still the process it was: psutil compares start times, so no recycled pid is hit."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def main() -> None:
    processes: dict[str, psutil.Process] = {}
    directories: set[str] = set()
    for line in sys.stdin:
        what, _, name = line.rstrip("\n").partition(" ")
        if what == "+pid":
            with contextlib.suppress(psutil.NoSuchProcess):
                processes[name] = psutil.Process(int(name))
        elif what == "-pid":
            processes.pop(name, None)
        elif what == "+dir":
            directories.add(name)
        else:
            directories.discard(name)
    doomed = set().union(*map(family, processes.values()))
    kill(doomed)
    psutil.wait_procs(doomed, timeout=5)
    for path in directories:
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
