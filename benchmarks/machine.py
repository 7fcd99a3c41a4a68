"""The machine under the benchmark: cores, processes and what they cost, and the tools the peers are built with.

Linux only: costs and memory are read from /proc.
"""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import timeit
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
CACHE = HERE / ".cache"

# The server has one core for itself, whatever it is; Redis, the load client and this process share the others.
CORES = sorted(os.sched_getaffinity(0))
SERVER, CLIENT = {CORES[-1]}, set(CORES[:-1]) or set(CORES)

TICK = os.sysconf("SC_CLK_TCK")


class Missing(Exception):
    """A tool that is not on this machine; the text says how to get it."""


def busy() -> float:
    """How much of the cores others use just now, 0 to 1, watched for a second; stolen time is use."""

    def times() -> tuple[int, int]:
        fields = [int(word) for word in read(Path("/proc/stat")).splitlines()[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    before = times()
    time.sleep(1)
    total, idle = (after - then for after, then in zip(times(), before, strict=True))
    return 1 - idle / total


def python() -> str:
    """Which Python runs the service and its Python peers: one built without profiles (PGO) is 13 to 23 % slower.

    Distributions build with profiles without saying so in the configuration, so a fixed piece of work is timed too.
    """
    told = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    squares = min(timeit.repeat("sum(i * i for i in range(100_000))", number=1, repeat=20))
    built = "with" if told else "without"
    version = sys.version.split()[0]
    return f"Python {version}, configured {built} --enable-optimizations, {squares * 1000:.1f} ms of squares"


class Process:
    """A process pinned to cores, with whatever children it starts."""

    def __init__(self, *command: object, cores: set[int], log: str | None = None, **options: object) -> None:
        CACHE.mkdir(exist_ok=True)
        options.setdefault("cwd", HERE / "peers")
        if log:
            options["stdout"] = options["stderr"] = open(CACHE / f"{log}.log", "ab")  # noqa: SIM115 (the child's)
        self.popen = subprocess.Popen(
            [str(word) for word in command],
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            start_new_session=True,
            **options,
        )

    def tree(self) -> Iterator[int]:
        """Every pid of this process and its descendants."""
        waiting = [self.popen.pid]
        while waiting:
            pid = waiting.pop()
            yield pid
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                waiting += map(int, read(children).split())

    def cpu(self) -> float:
        """User and system seconds so far."""
        seconds = 0.0
        for pid in self.tree():
            fields = read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
            seconds += sum(map(int, fields[11:13])) / TICK if fields else 0
        return seconds

    def memory(self) -> float:
        """Resident memory in MiB."""
        kib = 0
        for pid in self.tree():
            for line in read(Path(f"/proc/{pid}/smaps_rollup")).splitlines():
                kib += int(line.split()[1]) if line.startswith("Rss:") else 0
        return kib / 1024

    def stop(self) -> None:
        """End the group this process leads: asked first, killed after five seconds."""
        for signum in signal.SIGTERM, signal.SIGKILL:
            try:
                os.killpg(self.popen.pid, signum)
                self.popen.wait(5)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def read(path: Path) -> str:
    """The file's text, or nothing: a process may end between being listed and being read."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port: int, process: Process, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.popen.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"expected {process.popen.args[0]} to listen on port {port}; see {CACHE}/*.log")


def tool(name: str, package: str) -> str:
    """The path of a program, also where only root's PATH looks."""
    path = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
    if path is None:
        raise Missing(f"install {package} (it brings `{name}`)")
    return path


def venv(name: str, requirements: Path) -> Path:
    """The Python of a virtual environment in the cache, made again when its requirements or this Python change."""
    folder = CACHE / name
    stamp = folder / "requirements.sha"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest() + f" {sys.executable} {sys.version}"
    if read(stamp) != wanted:
        print(f"installing {requirements.relative_to(ROOT)} into {folder.relative_to(ROOT)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [folder / "bin/pip", "install", "--quiet", "--disable-pip-version-check", "-r", requirements]
        if subprocess.run(install).returncode:
            raise Missing(f"make `pip install -r {requirements.relative_to(ROOT)}` work")
        stamp.write_text(wanted)
    return folder / "bin/python"


def node() -> str:
    """Node's path, with the packages of peers/package.json in the cache."""
    program, npm = tool("node", "nodejs (20 or later)"), tool("npm", "npm")
    package = (HERE / "peers/package.json").read_bytes()
    folder = CACHE / "node"
    installed = folder / "package.json"
    if not installed.exists() or installed.read_bytes() != package or not (folder / "node_modules").exists():
        folder.mkdir(parents=True, exist_ok=True)
        installed.write_bytes(package)
        command = [npm, "install", "--silent", "--no-audit", "--no-fund"]
        if subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL).returncode:
            installed.unlink()
            raise Missing("make `npm install` work for benchmarks/peers/package.json")
    return program


def compiled(source: Path) -> Path:
    program = CACHE / source.stem
    CACHE.mkdir(exist_ok=True)
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        compiler = tool("cc", "a C compiler (gcc or clang)")
        subprocess.run([compiler, "-O2", "-Wall", "-o", program, source], check=True)
    return program


class Redis:
    """A Redis of our own on the client's cores, empty and forgetful."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        program = tool("redis-server", "redis-server")
        options = ["--bind", "127.0.0.1", "--port", self.port, "--save", "", "--appendonly", "no"]
        self.process = Process(program, *options, cores=CLIENT, log="redis")
        wait_for_port(self.port, self.process)

    def stop(self) -> None:
        self.process.stop()


class Load:
    """The load client with its sockets open; see load.c."""

    def __init__(self, port: int, targets: list[str], options: list[str]) -> None:
        self.sockets = sum("\tblocked" not in line for line in targets)
        file = CACHE / f"targets-{port}"
        file.write_text("".join(line + "\n" for line in targets))
        program = compiled(HERE / "load.c")
        command = [program, "127.0.0.1", port, file, *options]
        self.process = Process(*command, cores=CLIENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.opened = self.answer()
        file.unlink()

    def answer(self) -> dict:
        line = self.process.popen.stdout.readline()
        if not line:
            raise RuntimeError("expected a report from the load client, it ended")
        return json.loads(line)

    def tell(self, command: str) -> None:
        self.process.popen.stdin.write(command + "\n")
        self.process.popen.stdin.flush()

    def begin(self) -> None:
        """Count from here. Answered, because a writer on another core is faster than a command in a pipe."""
        self.tell("begin")
        self.answer()

    def wait(self, tokens: int, seconds: float) -> dict:
        self.tell(f"wait {tokens} {seconds}")
        return self.answer()

    def close(self) -> None:
        self.process.popen.stdin.close()
        self.process.stop()
