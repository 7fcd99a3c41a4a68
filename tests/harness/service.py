"""The application under test as real server processes: started, killed, frozen, restarted.

Waiting is in threads and signals take effect at once, as in `servers.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import pytest

from .processes import HOST, START_TIMEOUT, Port, Process, remove_directory, temporary_directory

ROOT = Path(__file__).resolve().parents[2]
SHORT = {  # clocks for tests, as faults.md wants them, and limits out of the way
    "PARLEY_LEASE": "2",
    "PARLEY_LEASE_RENEW": "0.5",
    "PARLEY_SWEEP_EVERY": "1",
    "PARLEY_DRAIN": "3",
    "PARLEY_SEND_TIMEOUT": "2",
    "PARLEY_PING_INTERVAL": "1",
    "PARLEY_PING_TIMEOUT": "3",  # the tests' own process may stand still for a second
    "PARLEY_AUTH_TIMEOUT": "2",
    "PARLEY_FIRST_TOKEN_TIMEOUT": "1",
    "PARLEY_IDLE_TIMEOUT": "1",
    "PARLEY_GUESTS_PER_MINUTE": "1000000",
    "PARLEY_SESSIONS_PER_MINUTE": "1000000",
    "PARLEY_CONNECTIONS_PER_ADDRESS": "1000000",
    "PARLEY_STREAMS_PER_ACCOUNT": "1000000",
    "PARLEY_STREAMS_PER_ADDRESS": "1000000",
    "PARLEY_MESSAGES_PER_MINUTE": "1000000",
    "PARLEY_REFRESHES_PER_MINUTE": "1000000",
    "PARLEY_READS_PER_MINUTE": "1000000",
    "PARLEY_SOCKETS_PER_SESSION": "1000",
    "PARLEY_SOCKETS_PER_ACCOUNT": "1000",
    "PARLEY_SOCKETS_PER_ADDRESS": "10000",
    "PARLEY_TURNS_PER_ACCOUNT": "1000",
    "PARLEY_DAILY_TOKENS_ACCOUNT": "0",
    "PARLEY_DAILY_TOKENS_ADDRESS": "0",
    "PARLEY_DAILY_TOKENS_SERVICE": "0",
}
OURS = {"DATABASE_URL", "REDIS_URL", "SECRET_KEY", "ADMIN_TOKEN", "API_KEYS", "ALLOWED_HOSTS", "ALLOWED_ORIGINS"}
OURS |= {"PORT", "WEB_CONCURRENCY", "DYNO", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"}  # not taken from who runs the tests

UVICORN = """-m uvicorn {app} --host 127.0.0.1 --port {port} --workers {workers} --no-access-log --http h11
 --ws websockets-sansio --ws-max-size 65536 --ws-per-message-deflate false --ws-ping-interval 1 --ws-ping-timeout 3
 --timeout-graceful-shutdown 2"""
COMMANDS = {  # what stands after `python`; {workers} is 1 unless the port is shared
    "serve": "service.py serve",  # the service's own start, with the port and the workers from its environment
    "uvicorn": UVICORN,
    "hypercorn": "-m hypercorn {app} --bind 127.0.0.1:{port} --workers {workers} --graceful-timeout 2",
    "granian": "-m granian {app} --interface asgi --host 127.0.0.1 --port {port} --workers {workers}",
    "daphne": "-m daphne {app} -b 127.0.0.1 -p {port}",
}


class Service:
    """The application under a real server: `workers` processes on a port each, or one port shared by `workers`.

    `env` goes over `SHORT` and over the caller's environment without its secrets; `each[i]` over that for process `i`
    (its own proxy, say). `command` replaces the words after `python` (see `COMMANDS`), `options` come after them.
    A worker is named by its number; with a shared port that is its place among the parent's children.
    """

    def __init__(
        self,
        env: Mapping[str, str] | None = None,
        *,
        workers: int = 1,
        shared_port: bool = False,
        server: str = "uvicorn",
        app: str = "service:app",
        root: Path = ROOT,
        python: str = sys.executable,
        command: Sequence[str] | None = None,
        options: Sequence[str] = (),
        each: Sequence[Mapping[str, str]] = (),
        ready_path: str = "/readyz",
        ready_within: float = START_TIMEOUT,
    ) -> None:
        _require(server, python)
        self.workers, self.shared_port = workers, shared_port
        self.ready_path, self.ready_within = ready_path, ready_within
        self.directory = temporary_directory("service")
        self._ports = [Port() for _ in range(1 if shared_port else workers)]
        self.ports = [int(port) for port in self._ports]
        self.processes = [
            Process(
                [python, *self._words(command or COMMANDS[server].split(), app, port), *options],
                self.directory / f"log-{i}.txt",
                environment(self._place(port), env or {}, each[i] if i < len(each) else {}),
                root,
            )
            for i, port in enumerate(self.ports)
        ]

    def _words(self, command: Sequence[str], app: str, port: int) -> list[str]:
        workers = self.workers if self.shared_port else 1
        return [word.format(app=app, port=port, workers=workers) for word in command]

    def _place(self, port: int) -> dict[str, str]:
        return {"PORT": str(port), "WEB_CONCURRENCY": str(self.workers if self.shared_port else 1)}

    @property
    def urls(self) -> list[str]:
        """`http://127.0.0.1:<port>` of each worker; of all of them together when they share one."""
        return [f"http://{HOST}:{port}" for port in self.ports]

    @property
    def url(self) -> str:
        return self.urls[0]

    async def start(self) -> Self:
        await asyncio.to_thread(self._start)
        return self

    async def stop(self) -> None:
        """SIGTERM to all, as a platform does at a deploy; SIGKILL to what is still there after 30 s."""
        await asyncio.to_thread(self._stop)

    async def restart(self, i: int = 0) -> None:
        """Stop process `i` in good order if it runs, start it again on its port."""
        await asyncio.to_thread(self.processes[i].stop, signal.SIGTERM, 30.0)
        await self.launch(i)

    async def launch(self, i: int) -> None:
        """Start process `i` (after a kill, say) and wait until it is ready."""
        self.processes[i].start()
        await asyncio.to_thread(self._wait_until_ready, i)

    async def ended(self, i: int = 0, within: float = 30.0) -> int:
        """Wait until process `i` has gone by itself and return its exit code."""
        return await asyncio.to_thread(self.processes[i].wait, within)

    def kill(self, i: int = 0) -> None:
        """SIGKILL worker `i`, now. A process of its own is gone when this returns."""
        if self.shared_port:
            self.worker(i).kill()
        else:
            self.processes[i].kill()

    def terminate(self, i: int | None = None) -> None:
        """SIGTERM to worker `i`, or to every process (with a shared port: the parent). Does not wait; see `ended`."""
        if i is not None and self.shared_port:
            self.worker(i).terminate()
        else:
            for process in self.processes if i is None else [self.processes[i]]:
                process.send(signal.SIGTERM)

    def pause(self, i: int = 0) -> None:
        if self.shared_port:
            self.worker(i).suspend()
        else:
            self.processes[i].pause()

    def resume(self, i: int = 0) -> None:
        if self.shared_port:
            self.worker(i).resume()
        else:
            self.processes[i].resume()

    def worker(self, i: int = 0) -> psutil.Process:
        """The process that serves as worker `i`: the one to signal, or to ask for memory and descriptors."""
        if not self.shared_port:
            return psutil.Process(self.processes[i].pid)
        return self._shared_workers()[i]

    @property
    def pids(self) -> list[int]:
        return [self.worker(i).pid for i in range(self.workers)]

    def resources(self, i: int = 0) -> dict[str, float]:
        """What worker `i` holds: open descriptors, threads, resident bytes."""
        process = self.worker(i)
        with process.oneshot():
            return {"fds": process.num_fds(), "threads": process.num_threads(), "rss": process.memory_info().rss}

    def log(self, i: int | None = None) -> str:
        """Everything printed so far by process `i`, or by all of them."""
        processes = self.processes if i is None else [self.processes[i]]
        return "".join(process.output() for process in processes)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        remove_directory(self.directory)
        for port in self._ports:
            port.release()

    def _start(self) -> None:
        try:
            for process in self.processes:
                process.start()
            for i in range(len(self.processes)):
                self._wait_until_ready(i)
        except BaseException:
            for process in self.processes:
                process.kill()
            raise

    def _stop(self) -> None:
        self.terminate()
        for process in self.processes:
            process.stop(signal.SIGTERM, 30.0)

    def _wait_until_ready(self, i: int) -> None:
        self.processes[i].wait_until(lambda: self._ready(i), self.ready_within)

    def _ready(self, i: int) -> bool:
        if self.shared_port and len(self._shared_workers()) < self.workers:
            return False
        return status_of(self.ports[i], self.ready_path) == 200

    def _shared_workers(self) -> list[psutil.Process]:
        """The parent's children that serve; multiprocessing's resource tracker is not one."""
        members = self.processes[0].members()[1:]
        return [process for process in members if "resource_tracker" not in " ".join(_command_line(process))]

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        await asyncio.to_thread(self.close)


def environment(*over: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process under test: the caller's without what is ours, `SHORT`, a key, then `over`."""
    inherited = {name: v for name, v in os.environ.items() if name not in OURS and not name.startswith("PARLEY_")}
    values = inherited | SHORT | {"SECRET_KEY": "key-of-the-tests-0123456789abcdef", "PYTHONUNBUFFERED": "1"}
    for more in over:
        values |= more
    return values


def status_of(port: int, path: str) -> int | None:
    """The status of a GET answered within a second, or None."""
    connection = http.client.HTTPConnection(HOST, port, timeout=1)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


@functools.cache
def _require(server: str, python: str) -> None:
    """Skip the test where `python` has no such server."""
    if server == "serve":
        return
    words = [python, "-c", f"import importlib.util as u, sys; sys.exit(not u.find_spec({server!r}))"]
    if subprocess.run(words, timeout=30).returncode:
        pytest.skip(f"{server} is not installed")


def _command_line(process: psutil.Process) -> Iterator[str]:
    with contextlib.suppress(psutil.Error):
        yield from process.cmdline()
