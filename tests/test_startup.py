"""A start that cannot work says why in one line, exits, and prints no secret and no traceback."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chat import settings
from chat.errors import StartupError
from chat.live.wire import Address
from chat.settings import read_settings
from chat.store.places import checked_url, place
from chat.store.schema import schema_steps
from tests.conftest import SECRET
from tests.harness.processes import Port
from tests.harness.service import OURS, ROOT

CANARY = "canary-p4ssword"


def start(tmp_path: Path, *command: str, **environment: str) -> tuple[int, str]:
    """Run a command that is expected to end by itself; its exit code and all it printed."""
    kept = {name: value for name, value in os.environ.items() if name not in OURS and not name.startswith("PARLEY_")}
    default = {"SECRET_KEY": SECRET, "DATABASE_URL": f"sqlite:///{tmp_path / 'parley.db'}", "PORT": str(int(Port()))}
    ended = subprocess.run(
        [sys.executable, *(command or ("service.py", "serve"))],
        cwd=ROOT,
        env=kept | default | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
    )
    return ended.returncode, ended.stdout


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"DATABASE_URL": f"mysql://u:{CANARY}@localhost/x"}, "DATABASE_URL must start with"),
        ({"DATABASE_URL": f"postgresql://u:{CANARY}@localhost:port/x"}, "port that is not a number"),
        ({"DATABASE_URL": f"postgresql://u:{CANARY}@127.0.0.1:1/x"}, "cannot open the database at 127.0.0.1:1/x"),
        ({"DATABASE_URL": f"postgresql://u:{CANARY}@127.0.0.1:1/x?sslmode=often"}, "unknown sslmode"),
        ({"DATABASE_URL": "sqlite:////proc/nowhere/parley.db"}, "cannot open the database"),
        ({"REDIS_URL": f"http://:{CANARY}@localhost"}, "REDIS_URL must start with"),
        ({"PARLEY_NO_SUCH": "1"}, "unknown setting PARLEY_NO_SUCH"),
        ({"PARLEY_LEASE": "soon"}, "settings: "),
        ({"PARLEY_MODELS": "[]"}, "no [[models]]"),
        ({"PARLEY_ENV": "production", "SECRET_KEY": ""}, "SECRET_KEY is not set"),
        ({"PARLEY_RELAY_PREFIX": "two words"}, "relay_prefix must be"),
        ({"PARLEY_ENV": "production", "SECRET_KEY": "k" * 31}, "SECRET_KEY is too short"),
        ({"PARLEY_ENV": "production", "SECRET_KEY": f"{'k' * 40},{'k' * 31}"}, "SECRET_KEY is too short"),
        ({"PARLEY_ENV": "production", "ADMIN_TOKEN": CANARY[:15]}, "ADMIN_TOKEN is too short"),
        ({"PARLEY_LOG_LEVEL": "trace"}, "log_level must be one of"),
        ({"WEB_CONCURRENCY": "2"}, "2 workers need REDIS_URL"),
        ({"PORT": "99999"}, "<= 65535"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path: Path, environment: dict[str, str], words: str) -> None:
    code, said = start(tmp_path, **environment)
    assert code != 0
    assert words in said
    assert "Traceback" not in said and CANARY not in said and SECRET not in said


@pytest.mark.parametrize(
    "line",
    [
        "port = -1", "pool_size = 0", "storage_timeout = nan", "idle_timeout = inf", "checkpoint_every = 0", "lease = 0",
        "lease_renew = 10", "drain = -1", "sse_ping = 0", "prompt_max = -5", "max_tokens = 0", "frame_max = 0", "pace_chars = 0",
        "daily_tokens_account = -1", "trusted_proxies = -1", 'allowed_hosts = ["https://example.org"]',
        'allowed_hosts = ["example.org:443"]', 'allowed_origins = ["example.org"]', 'allowed_origins = ["https://example.org/"]',
        'allowed_origins = ["*"]', 'public_url = "javascript:alert(1)"',
    ],
)  # fmt: skip
def test_a_value_that_would_do_harm_later_is_refused_at_once(tmp_path: Path, line: str) -> None:
    """A loop that never pauses, a wait that has ended before it begins, a name that nothing matches."""
    name = line.partition(" ")[0]
    path = tmp_path / "settings.toml"
    path.write_text(f'[service]\n{line}\n[[models]]\nid = "m"\nprovider = "demo"\n')
    with pytest.raises(StartupError) as refused:
        read_settings(path, {"SECRET_KEY": SECRET})
    assert name in str(refused.value).lower() and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("PARLEY_PROMT_MAX", "1", "unknown setting PARLEY_PROMT_MAX: is PARLEY_PROMPT_MAX meant?"),
        ("PARLEY_PERSON_READS", "{names} is here.", "person_reads can have {name} in it, and no other braces"),
        ("ADMIN_TOKEN", f"{CANARY}\N{SNOWMAN}", "ADMIN_TOKEN must be"),
        ("ADMIN_TOKEN", f"{CANARY} {CANARY}", "ADMIN_TOKEN must be"),
        ("API_KEYS", f"{SECRET},{CANARY}\N{SNOWMAN}", "API_KEYS must be"),
        ("SECRET_KEY", f"{CANARY * 4}\udcff", "SECRET_KEY is not UTF-8"),
    ],
)
def test_a_variable_that_could_not_work_is_refused_at_once(name: str, text: str, words: str) -> None:
    """A name that nothing reads, a word that visitors would see, a token that no header carries."""
    with pytest.raises(StartupError) as refused:
        read_settings(environ={"SECRET_KEY": SECRET} | {name: text})
    said = str(refused.value)
    assert words in said and CANARY not in said and "\n" not in said


ODD = ["{0}/{0}", "{0}#{0}", "{0}?{0}", "[{0}", "{0}]", "12#{0}", "12/{0}", "{0}\u2100", "{0}\udcff", "{0}:{0}", "{0}@{0}"]


@pytest.mark.parametrize("password", ODD, ids=[ascii(each) for each in ODD])
def test_an_odd_password_is_never_taken_for_a_host_a_port_or_a_path(password: str) -> None:
    """Either the URL is refused, in a line without it, or the host is the right one."""
    for scheme, where in (("redis", lambda url: repr(Address(url))), ("postgresql", lambda url: place(checked_url(url)))):
        try:
            found = where(f"{scheme}://u:{password.format(CANARY)}@127.0.0.1:1/0")
        except StartupError as problem:
            found = f"127.0.0.1:1/0 {problem}"
        assert "127.0.0.1:1/0" in found and CANARY not in found


@pytest.mark.parametrize("variable", ["REDIS_URL", "DATABASE_URL"])
def test_a_start_with_an_odd_password_prints_none(tmp_path: Path, variable: str) -> None:
    scheme = "redis" if variable == "REDIS_URL" else "postgresql"
    for password in (f"{CANARY}#{CANARY}", f"{CANARY}\udcff", f"{CANARY}:%zz"):
        url = f"{scheme}://u:{password}@127.0.0.1:1/0"
        code, said = start(tmp_path, "service.py", "check", **{variable: url, "PARLEY_LOG_LEVEL": "debug"})
        assert code != 0 and "Traceback" not in said and CANARY not in said, said


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said = start(tmp_path, PORT=str(taken.getsockname()[1]))
    assert code != 0 and "cannot listen on" in said and "Traceback" not in said


@pytest.mark.parametrize("command", ["serve", "release"])
def test_a_file_that_is_no_database_ends_the_start(tmp_path: Path, command: str) -> None:
    """The line was printed, and the process stayed for ever: a thread of the connection kept it."""
    (tmp_path / "parley.db").write_bytes(b"no database" * 500)
    code, said = start(tmp_path, "service.py", command)
    assert code != 0 and "file is not a database" in said and "Traceback" not in said, said


def test_a_file_that_another_program_keeps_locked_is_one_line(tmp_path: Path) -> None:
    """The reason was a timeout, after 30 s."""
    with sqlite3.connect(tmp_path / "parley.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        code, said = start(tmp_path)
    assert code != 0 and "parley.db: OperationalError database is locked" in said and "Traceback" not in said, said
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("command", ["serve", "release"])
def test_a_disk_that_is_full_before_the_schema_stands_is_one_line(tmp_path: Path, command: str) -> None:
    limited = f"""import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.argv = ["service.py", "{command}"]
runpy.run_path("service.py", run_name="__main__")"""
    code, said = start(tmp_path, "-c", limited)
    assert code != 0 and "disk I/O error" in said and "Traceback" not in said, said


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the length of a listener's queue")
def test_as_many_connections_wait_as_the_kernel_allows(tmp_path: Path) -> None:
    """Of 3,000 connections at once a third was left to the retries of TCP, up to 25 s apart."""
    looking = """import runpy, socket, struct, sys, uvicorn
async def startup(self, sockets=None):
    await begin(self, sockets)
    [told] = struct.unpack_from("I", sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 28)
    print("the queue has", told)
    self.should_exit = True
begin, uvicorn.Server.startup = uvicorn.Server.startup, startup
sys.argv = ["service.py", "serve"]
runpy.run_path("service.py", run_name="__main__")"""
    _, said = start(tmp_path, "-c", looking)
    most = min(65_535, int(Path("/proc/sys/net/core/somaxconn").read_text()))
    assert f"the queue has {most}\n" in said


def test_a_plain_uvicorn_refuses_two_workers_without_redis(tmp_path: Path) -> None:
    """The parent stops as well: it would start them again for ever."""
    code, said = start(tmp_path, "-m", "uvicorn", "service:app", "--workers", "2", "--port", str(int(Port())))
    assert "2 workers need REDIS_URL" in said and "Traceback" not in said
    assert code in (0, 3)  # uvicorn's parent reports its children's failure in words only


def test_an_unreadable_settings_file_is_one_line(tmp_path: Path) -> None:
    """A copy of the project with a broken, an unknown and a secret setting in its file."""
    for text, words in (
        ("[service\n", "is not valid TOML"),
        ("\udcff", "is not valid TOML"),
        ("[service]\nno_such = 1\n", "unknown setting `no_such`"),
        ("[limits]\nprompt_mix = 1\n", "unknown setting `prompt_mix`: is prompt_max meant?"),
        ("[limits]\nport = 1\n[service]\nport = 2\n", "has `port` twice"),
        (f'[service]\nadmin_token = "{CANARY}"\n', "is a secret"),
        ("port = 1\n", "stands outside every section"),
        ("[limts]\nprompt_max = 1\n", "unknown section `limts`: is limits meant?"),
    ):
        for name in ("service.py", "chat", "routes", "consumers", "models.sql"):
            if not (tmp_path / name).exists():
                (tmp_path / name).symlink_to(ROOT / name)
        (tmp_path / "settings.toml").write_text(text, errors="surrogateescape")
        file = str(tmp_path / "settings.toml")
        program = "from pathlib import Path; from chat.settings import read_settings as read"
        program += f"; read(Path({file!r}), {{}})"
        code, said = start(tmp_path, "-c", program)
        assert code != 0 and words in said.splitlines()[-1] and CANARY not in said


def test_first_starts_at_once_share_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them read the file that another had made and not written yet: its key was the empty string."""
    monkeypatch.setattr(settings, "HERE", tmp_path)
    kept = tmp_path / "data" / "secret.key"

    def keys_of_starts() -> set[str]:
        together = threading.Barrier(4)

        def begin(_: int) -> str:
            together.wait()
            return str(read_settings(environ={}).secret_keys[-1])

        with ThreadPoolExecutor(4) as starts:
            return set(starts.map(begin, range(4)))

    for _ in range(30):
        [key] = keys_of_starts()
        assert len(key) > 32 and key == kept.read_text().strip()
        assert kept.stat().st_mode & 0o777 == 0o600
        kept.write_text("")  # as a start that was killed leaves the file
        [other] = keys_of_starts()
        assert len(other) > 32
        kept.unlink()


def test_release_applies_the_schema_once(tmp_path: Path) -> None:
    steps = len(schema_steps((ROOT / "models.sql").read_text()))
    assert start(tmp_path, "service.py", "release") == (0, f"parley: schema up to date, {steps} steps applied\n")
    assert start(tmp_path, "service.py", "release") == (0, "parley: schema up to date, 0 steps applied\n")
    assert start(tmp_path, "service.py", "dance")[0] != 0


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 0),
        ({"DYNO": "web.1"}, 1),
        ({"RENDER": "true"}, 1),
        ({"DYNO": "web.1", "PARLEY_TRUSTED_PROXIES": "0"}, 0),
        ({"DYNO": "web.1", "PARLEY_TRUSTED_PROXIES": "2"}, 2),
    ],
)
def test_a_known_platform_says_how_many_proxies_it_has(environment: dict[str, str], expected: int) -> None:
    environ = {"SECRET_KEY": SECRET, "DATABASE_URL": "sqlite:///x.db"} | environment
    assert read_settings(environ=environ).trusted_proxies == expected


def test_open_sessions_are_never_in_production() -> None:
    """Whatever is asked for: anyone could read and write any session."""
    environ = {"SECRET_KEY": SECRET, "DATABASE_URL": "sqlite:///x.db", "PARLEY_OPEN_SESSIONS": "true"}
    assert read_settings(environ=environ).open_sessions
    assert not read_settings(environ=environ | {"PARLEY_ENV": "production"}).open_sessions
