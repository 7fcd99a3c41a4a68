"""Processes for the tests: a port nobody else takes, and a process group that never outlives the test run.

Knows nothing of what it starts; `servers.py` does.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import psutil

from . import POLL, pause
from .reaper import alive, family, kill

HOST = "127.0.0.1"
FIRST_PORT = 15_000
START_TIMEOUT = 30.0  # seconds: a loaded two-core machine needs 3 for the slowest, PostgreSQL's first start
STOP_TIMEOUT = 10.0  # seconds a server has to go by itself before it is killed
TAIL = 4000  # characters of a log shown with a failure
_chance = random.SystemRandom()  # not the global one: seeded alike in two test runs, they would want the same ports
_mutex = threading.Lock()
_running: set[Process] = set()
_directories: set[Path] = set()


class StartFailed(RuntimeError):
    """A server did not come up; the message ends with the tail of what it printed."""


# Ports


class Port:
    """A loopback port that is ours until `release`, also while its server is down.

    Taken below the kernel's ephemeral range, so that no outgoing connection gets it meanwhile, and marked by a lock
    on one byte of a shared file, so that no other test run does.
    """

    _taken: ClassVar[set[int]] = set()

    def __init__(self) -> None:
        with _mutex:
            self.number = self._take()
            self._taken.add(self.number)

    def __int__(self) -> int:
        return self.number

    def release(self) -> None:
        with _mutex:
            if self.number in self._taken:
                self._taken.discard(self.number)
                fcntl.lockf(_port_locks(), fcntl.LOCK_UN, 1, self.number)

    def _take(self) -> int:
        for _ in range(500):
            number = _chance.randrange(FIRST_PORT, _first_ephemeral())
            if number not in self._taken and _lock(number):
                if not listening(number):
                    return number
                fcntl.lockf(_port_locks(), fcntl.LOCK_UN, 1, number)
        raise StartFailed("no free port found in 500 tries")


@functools.cache
def _port_locks() -> int:
    """A descriptor opened once and never closed: closing any of that file would drop all of this process's locks."""
    path = Path(tempfile.gettempdir()) / f"parley-test-ports-{os.getuid()}"
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lock(number: int) -> bool:
    try:
        fcntl.lockf(_port_locks(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
    except OSError:
        return False
    return True


@functools.cache
def _first_ephemeral() -> int:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        first = 32_768
    return first if first > FIRST_PORT + 1000 else 65_536


def listening(number: int) -> bool:
    """Whether somebody holds the port: asked by binding it, which leaves no trace as nothing connects."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, number))
        except OSError:
            return True
    return False


# Directories


def temporary_directory(name: str) -> Path:
    """A directory that is gone after the run, whatever ends the run."""
    path = Path(tempfile.mkdtemp(prefix=f"parley-{name}-"))
    _directories.add(path)
    _tell_reaper(f"+dir {path}")
    return path


def remove_directory(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    _directories.discard(path)
    _tell_reaper(f"-dir {path}")


# Processes


class Process:
    """One server process in a session of its own, its output appended to `log`. Signals reach its whole family."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        user: int | None = None,
    ) -> None:
        self.command, self.log, self.env, self.cwd, self.user = list(command), log, env, cwd, user
        self._popen: subprocess.Popen[bytes] | None = None
        self._leader: psutil.Process | None = None
        self._family: set[psutil.Process] = set()
        self._paused = False

    @property
    def pid(self) -> int:
        return self._started().pid

    @property
    def running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    @property
    def returncode(self) -> int | None:
        """Its exit code, minus the signal's number when a signal ended it, None while it runs."""
        return self._started().poll()

    def start(self) -> None:
        if self.running:
            raise StartFailed(f"expected a stopped process, got pid {self.pid} running: {self.command[0]}")
        as_user = {} if self.user is None else {"user": self.user, "group": self.user, "extra_groups": []}
        with open(self.log, "ab") as output:
            self._popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=None if self.env is None else dict(self.env),
                cwd=self.cwd,
                start_new_session=True,
                **as_user,  # type: ignore[arg-type]
            )
        self._leader = psutil.Process(self.pid)
        self._paused = False
        _running.add(self)
        _tell_reaper(f"+pid {self.pid}")

    def wait_until(self, ready: Callable[[], bool], within: float) -> None:
        """Block until `ready()`; raises `StartFailed` when the process ends first or `within` seconds pass."""
        deadline = time.monotonic() + within
        while True:
            looked = time.monotonic()
            if ready():
                return
            if not self.running:
                raise StartFailed(f"{self.command[0]} ended with {self.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise StartFailed(f"{self.command[0]} was not ready within {within} s:\n{self.tail()}")
            time.sleep(pause(looked))

    def send(self, number: int) -> None:
        """Send a signal to the process itself, not to its children."""
        if self.running:
            os.kill(self.pid, number)

    def pause(self) -> None:
        """SIGSTOP the whole family, the parent first so that it makes no more children meanwhile."""
        self._paused = True
        self.send(signal.SIGSTOP)
        self._signal_family(signal.SIGSTOP)
        self._wait_while(_runs, 5.0)  # it takes effect when each is next scheduled, not when it is sent

    def resume(self) -> None:
        self._signal_family(signal.SIGCONT)
        self._paused = False

    def kill(self) -> None:
        """SIGKILL the whole family and wait until none of it is left: a matter of milliseconds."""
        if self._popen is None:
            return
        if self.running:
            self.send(signal.SIGSTOP)  # else a parent could fork between the look and the kill
        self._remember()
        kill(self._family)
        self._popen.wait(STOP_TIMEOUT)
        self._wait_while(alive, STOP_TIMEOUT)
        self._gone()

    def stop(self, number: int = signal.SIGTERM, within: float = STOP_TIMEOUT) -> None:
        """Send `number`, give it `within` seconds to go, kill what is left."""
        if self.running:
            self._remember()
            self.send(number)
            if self._paused:
                self.resume()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._started().wait(within)
                self._wait_while(alive, 1.0)
        self.kill()

    def wait(self, within: float) -> int:
        """Block until the process has ended by itself and return its code; raises `subprocess.TimeoutExpired`."""
        return self._started().wait(within)

    def members(self) -> list[psutil.Process]:
        """The family as it is now, the process itself first."""
        return sorted(filter(alive, self._relatives()), key=lambda process: (process.pid != self.pid, process.pid))

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def tail(self) -> str:
        return self.output()[-TAIL:]

    def _started(self) -> subprocess.Popen[bytes]:
        if self._popen is None:
            raise StartFailed(f"not started: {self.command[0]}")
        return self._popen

    def _remember(self) -> None:
        """Keep who belongs to us: once the parent is dead, children with groups of their own cannot be found again."""
        self._family = set(filter(alive, self._family | self._relatives()))

    def _relatives(self) -> set[psutil.Process]:
        return set() if self._leader is None else family(self._leader)

    def _signal_family(self, number: int) -> None:
        self._remember()
        for process in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _wait_while(self, holds: Callable[[psutil.Process], bool], within: float) -> None:
        """Wait until it holds for none of the family."""
        deadline = time.monotonic() + within
        while any(holds(process) for process in self._family) and time.monotonic() < deadline:
            time.sleep(POLL)

    def _gone(self) -> None:
        self._family.clear()
        _running.discard(self)
        _tell_reaper(f"-pid {self.pid}")


def _runs(process: psutil.Process) -> bool:
    try:
        return alive(process) and process.status() != psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


# The end of the run


@atexit.register
def clean_up() -> None:
    """What a test forgot: its processes, its directories, then the reaper, which finds nothing left to do."""
    for process in list(_running):
        process.kill()
    for path in list(_directories):
        remove_directory(path)
    if _reaper.cache_info().currsize:
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            _reaper().communicate(timeout=STOP_TIMEOUT)


@functools.cache
def _reaper() -> subprocess.Popen[str]:
    """The process that does the same when this one dies without a word."""
    script = Path(__file__).with_name("reaper.py")
    null = subprocess.DEVNULL
    command = [sys.executable, "-I", str(script)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=null, stderr=null, text=True, start_new_session=True)


def _tell_reaper(line: str) -> None:
    """Best effort: without it only a killed test run leaves something behind."""
    with _mutex, contextlib.suppress(OSError, ValueError):
        pipe = _reaper().stdin
        if pipe is not None:
            pipe.write(line + "\n")
            pipe.flush()
