"""Where storage is: the URL that names it, and the file of SQLite with what lies beside it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from ..errors import StartupError
from ..settings import split_secret_url

SSL_MODES = {"disable", "allow", "prefer", "require", "verify-ca", "verify-full"}


def checked_url(url: str) -> str:
    """Return the URL as `databases` wants it. `databases` ignores `sslmode` silently and would connect unencrypted."""
    parts = split_secret_url("DATABASE_URL", url, ("sqlite", "postgresql", "postgres"))
    if parts.scheme == "sqlite":
        if parts.query or len(parts.path) < 2:
            raise StartupError("DATABASE_URL of SQLite must be sqlite:///<file>, without options")
        return url
    options = dict(parse_qsl(parts.query))
    mode = options.pop("sslmode", None) or ("require" if os.environ.get("DYNO") else None)
    if mode is not None and mode not in SSL_MODES:
        raise StartupError(f"DATABASE_URL has an unknown sslmode: {mode}")
    if mode is not None:
        options["ssl"] = mode
    return urlunsplit(parts._replace(query=urlencode(options)))


def place(url: str) -> str:
    """Name the database in a line of the log, without its password."""
    parts = urlsplit(url)
    return f"at {parts.hostname}:{parts.port or 5432}{parts.path}" if parts.scheme != "sqlite" else parts.path[1:]


def private_file(url: str) -> Path:
    """Return the file of SQLite, which its owner alone may read: everybody's conversations and votes are in it.

    SQLite gives the files that it makes beside this one the same mode. A directory that exists is left as it is.
    """
    path = Path(urlsplit(url).path[1:])
    if not path.parent.exists():
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError, PermissionError):  # not there, or another user's
            os.chmod(f"{path}{suffix}", 0o600)
    return path


def take_lock(path: Path) -> int:
    """Keep a second process from serving this SQLite file without Redis: its readers would miss our events."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StartupError(
            f"another process is serving {path.stem} already; more than one worker needs REDIS_URL"
        ) from None
    return descriptor
