"""A frozen value with every setting: `settings.toml`, then the environment over it.

A setting is named once, here and in the file; `PARLEY_<NAME>` overrides it. Secrets have no default and come from the
environment alone. Everything wrong is one `StartupError` line that names the setting and never prints a secret.
"""

from __future__ import annotations

import difflib
import fcntl
import functools
import os
import re
import secrets
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import SplitResult, urlsplit

import msgspec
from msgspec import Meta

from .errors import StartupError

HERE = Path(__file__).resolve().parent.parent
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]", "testserver")


# The ranges of clocks and limits. Values outside them would break the service later and unnoticed: a loop that never
# pauses, a wait that ends before it begins.
Seconds = Annotated[float, Meta(gt=0, le=1e6)]
Pause = Annotated[float, Meta(ge=0, le=1e6)]
Count = Annotated[int, Meta(ge=1, le=2**53)]
Whole = Annotated[int, Meta(ge=0, le=2**53)]


class Secret(str):
    """A string that does not print itself: settings end up in logs and tracebacks."""

    def __repr__(self) -> str:
        return "'***'"


def split_secret_url(variable: str, url: str, schemes: tuple[str, ...]) -> SplitResult:
    """Return the parts of a URL that may hold a password. Raises `StartupError` without any of its text.

    A `/`, `?` or `#` in a password ends the host's part early: the rest would show up as a port, a path or a host.
    """
    special = f"{variable} is not a URL: percent-encode what is special in its password"
    try:
        parts = urlsplit(url)
        url.encode()  # bytes that are not UTF-8 arrive as lone surrogates, which no driver can send
        _ = parts.port
    except ValueError as problem:
        port = "port" in str(problem).lower() and "@" not in parts.path + parts.query + parts.fragment
        raise StartupError(f"{variable} has a port that is not a number" if port else special) from None
    if parts.scheme not in schemes:
        raise StartupError(f"{variable} must start with {' or '.join(f'{scheme}://' for scheme in schemes)}")
    if parts.netloc and "@" in parts.path + parts.query + parts.fragment:
        raise StartupError(special)
    return parts


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A language model on offer. `vendor` and `display_name` are what people see, `model_code` what the API is told."""

    id: Annotated[str, Meta(min_length=1)]
    provider: str
    model_code: str = ""
    display_name: str = ""
    vendor: str = ""
    base_url: str = ""
    api_key_env: str = ""
    system: str = ""
    max_tokens: Whole = 0
    pace: Pause = 0.02
    personality: str = ""
    paid: bool | None = None
    thinks: bool = False

    @property
    def demo(self) -> bool:
        return self.provider == "demo"

    @property
    def free(self) -> bool:
        """Whether an answer costs the operator nothing, as a demo model's: budgets count what is paid for."""
        return not (not self.demo if self.paid is None else self.paid)


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The contents of `settings.toml`, section by section; units and reasons are in its comments."""

    # from the environment only
    secret_keys: tuple[Secret, ...] = ()  # oldest → newest: all verify, the last one signs
    database_url: Secret = Secret("")
    redis_url: Secret = Secret("")
    admin_token: Secret = Secret("")
    api_keys: tuple[Secret, ...] = ()
    # [service]
    name: str = "Parley"
    env: str = "local"
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535)] = 8001
    workers: Whole = 1
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    public_url: str = ""
    trusted_proxies: Whole = 0
    open_sessions: bool = True
    token_in_query: bool = True
    log_level: str = "info"
    # [storage]
    pool_size: Count = 5
    storage_timeout: Seconds = 5.0
    checkpoint_every: Seconds = 0.5
    checkpoint_with_redis: Pause = 3.0
    # [relay]
    relay_prefix: str = "parley"
    relay_ack: Seconds = 0.25
    publish_every: Pause = 0.001
    relay_silence: Seconds = 3.0
    relay_tls_verify: bool = True
    # [turns]
    lease: Seconds = 10.0
    lease_renew: Seconds = 3.0
    sweep_every: Seconds = 5.0
    store_for: Pause = 25.0
    drain: Pause = 15.0
    first_token_timeout: Seconds = 60.0
    idle_timeout: Seconds = 30.0
    reply_timeout: Seconds = 300.0
    reply_max: Count = 200_000
    max_tokens: Count = 2048
    history_tokens: Count = 6000
    retry_after_max: Pause = 5.0
    # [limits]
    prompt_max: Count = 32_000
    body_max: Count = 262_144
    frame_max: Count = 65_536
    frames_per_second: Count = 20
    bad_frames: Count = 3
    sockets_per_session: Count = 10
    sockets_per_account: Count = 20
    connections_per_address: Count = 128
    streams_per_account: Count = 20
    streams_per_address: Count = 100
    sockets_per_address: Count = 50
    messages_per_minute: Count = 60
    turns_per_account: Count = 3
    guests_per_minute: Count = 30
    sessions_per_minute: Count = 30
    refreshes_per_minute: Count = 60
    reads_per_minute: Count = 10
    daily_tokens_account: Whole = 500_000
    daily_tokens_address: Whole = 4_000_000
    daily_tokens_service: Whole = 20_000_000
    daily_messages: Whole = 0
    # [sockets]
    auth_timeout: Seconds = 10.0
    send_timeout: Seconds = 10.0
    ping_interval: Seconds = 20.0
    ping_timeout: Seconds = 20.0
    sse_ping: Seconds = 15.0
    tcp_user_timeout: Seconds = 20.0
    # [arena]
    demo_models: str = "auto"
    votes_export: bool = True
    leaderboard_cache: Pause = 5.0
    draw_seed: Whole = 0
    pace: Pause = 0.05
    pace_chars: Count = 24
    # [widget]
    greeting: str = ""
    suggestions: tuple[str, ...] = ()
    person_reads: str = "{name} will answer you here."
    # [[models]]
    models: tuple[Model, ...] = ()

    @property
    def production(self) -> bool:
        return self.env == "production"

    @property
    def base_url(self) -> str:
        """Where people meet this service, "" where nobody said: a Host header is its sender's word."""
        named = next((host for host in self.allowed_hosts if "*" not in host), "") if self.production else ""
        return self.public_url.rstrip("/") or (f"https://{named}" if named else "")

    @property
    def postgres(self) -> bool:
        return self.database_url.startswith("postgres")


ENVIRONMENT = {  # the names platforms use → ours
    "DATABASE_URL": "database_url",
    "REDIS_URL": "redis_url",
    "ADMIN_TOKEN": "admin_token",
    "PORT": "port",
    "WEB_CONCURRENCY": "workers",
    "ALLOWED_HOSTS": "allowed_hosts",
    "ALLOWED_ORIGINS": "allowed_origins",
    "API_KEYS": "api_keys",
    "SECRET_KEY": "secret_keys",
}
# A variable by which a platform is known → how many proxies of its own append to X-Forwarded-For.
PLATFORMS = {"DYNO": 1, "RENDER": 1, "FLY_APP_NAME": 1, "RAILWAY_ENVIRONMENT_ID": 1, "K_SERVICE": 1}
# As browsers send them: an entry of another form would match nothing, without a word.
HOST = re.compile(r"\*|(\*\.)?[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9._\-\[\]:]+")
WEB = re.compile(r"https?://[^/\s]")
IN_HEADER = re.compile(r"[!-~]*")  # what clients can send behind `Bearer`
SECTIONS = ("service", "storage", "relay", "turns", "limits", "sockets", "arena", "widget")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
ENVIRONMENT_ONLY = {"database_url", "redis_url", "admin_token", "api_keys", "secret_keys"}


def read_settings(path: Path = HERE / "settings.toml", environ: Mapping[str, str] | None = None) -> Settings:
    """Return the settings of this process. Raises `StartupError` with one line that says what to change."""
    environ = os.environ if environ is None else environ
    return _checked(_completed(_as_set(path, environ), environ))


def origins(
    settings: Settings, path: Path = HERE / "settings.toml", environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return where each of these settings has its value from: a variable, the file, the code, or what it implies."""
    environ = os.environ if environ is None else environ
    as_set, in_file = _as_set(path, environ), _from_file(path)
    variables = {_field(name): name for name, text in environ.items() if text}
    return {
        field: "implied by other settings"
        if getattr(as_set, field) != getattr(settings, field)
        else variables.get(field) or (path.name if field in in_file else "default")
        for field in Settings.__struct_fields__
    }


def _as_set(path: Path, environ: Mapping[str, str]) -> Settings:
    values = _from_file(path) | _from_environment(environ)
    try:
        return msgspec.convert(values, Settings, strict=False, dec_hook=lambda kind, value: kind(value))
    except msgspec.ValidationError as problem:
        raise StartupError(f"settings: {problem}") from None


def _field(variable: str) -> str | None:
    """Return the setting a variable of the environment is about, if it is about one."""
    return ENVIRONMENT.get(variable) or (variable[7:].lower() if variable.startswith("PARLEY_") else None)


def _from_file(path: Path) -> dict[str, Any]:
    try:
        sections = msgspec.toml.decode(path.read_bytes())
    except OSError as problem:
        raise StartupError(f"settings: cannot read {path.name}: {problem.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as problem:
        raise StartupError(f"settings: {path.name} is not valid TOML: {problem}") from None
    values: dict[str, Any] = {}
    for section, content in sections.items():
        if section == "models":
            values["models"] = content
        elif not isinstance(content, dict):
            raise StartupError(f"settings: {path.name}: `{section}` stands outside every section")
        elif section not in SECTIONS:
            raise StartupError(f"settings: {path.name} has an unknown section `{section}`{_perhaps(section, SECTIONS)}")
        elif twice := values.keys() & content.keys():
            raise StartupError(f"settings: {path.name} has `{min(twice)}` twice, in two sections")
        else:
            values |= content
    for name in values:
        if name not in Settings.__struct_fields__:
            perhaps = _perhaps(name, Settings.__struct_fields__)
            raise StartupError(f"settings: {path.name} has an unknown setting `{name}`{perhaps}")
        if name in ENVIRONMENT_ONLY:
            raise StartupError(f"settings: `{name}` is a secret: set it in the environment, not in {path.name}")
    return values


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, text in environ.items():
        field = _field(name)
        if field is None or (text == "" and name in ENVIRONMENT):
            continue
        if field not in Settings.__struct_fields__:
            perhaps = _perhaps(name, [f"PARLEY_{each.upper()}" for each in Settings.__struct_fields__])
            raise StartupError(f"settings: the environment has an unknown setting {name}{perhaps}")
        if text.encode(errors="ignore").decode() != text:  # neither a key nor an answer could be made of it
            raise StartupError(f"settings: {name} is not UTF-8")
        values[field] = _parsed(field, text)
    return values


def _perhaps(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the known one that is nearest, if one is near."""
    near = difflib.get_close_matches(name, known, 1)
    return f": is {near[0]} meant?" if near else ""


def _parsed(field: str, text: str) -> Any:
    """Text of the environment as what the field wants: lists by comma, models as JSON, the rest is converted later."""
    if field in ("models", "suggestions"):  # sentences have commas
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError as problem:
            raise StartupError(f"settings: PARLEY_{field.upper()} is not JSON: {problem}") from None
    if field in ("allowed_hosts", "allowed_origins", "api_keys", "secret_keys"):
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _completed(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """Fill in what depends on the rest: the local database, the local key, who may knock."""
    settings = msgspec.structs.replace(settings, workers=max(settings.workers, workers_asked(sys.argv)))
    several = settings.workers > 1 or settings.postgres
    if settings.env == "local" and "PARLEY_ENV" not in environ and several:
        settings = msgspec.structs.replace(settings, env="production")
    changes: dict[str, Any] = {}
    if not settings.database_url:
        changes["database_url"] = Secret(f"sqlite:///{HERE / 'data' / 'parley.db'}")
    if settings.production:  # whatever is asked for: anyone could read and write any session
        changes["open_sessions"] = False
    if not settings.trusted_proxies and "PARLEY_TRUSTED_PROXIES" not in environ:
        changes["trusted_proxies"] = max([PLATFORMS[name] for name in PLATFORMS if environ.get(name)], default=0)
    if not settings.secret_keys and not settings.production:
        changes["secret_keys"] = (_local_key(HERE / "data" / "secret.key"),)
    if not settings.allowed_hosts:
        changes["allowed_hosts"] = ("*",) if settings.production else LOCAL_HOSTS
    return msgspec.structs.replace(settings, **changes)


def workers_asked(argv: list[str]) -> int:
    """How many workers the server's command line asks for (`--workers 2`, `-w 2`, `--workers=2`), as far as it says.

    A worker is not told how many siblings it has, but its `sys.argv` is its parent's.
    """
    for name, value in zip(argv, [*argv[1:], ""], strict=True):
        name, _, joined = name.partition("=")
        if name in ("--workers", "-w") and (joined or value).isdigit():
            return int(joined or value)
    return 1


def _local_key(path: Path) -> Secret:
    """A key made once and kept readable for its owner alone, so that tokens outlive a restart on a laptop."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (path.exists() and path.stat().st_size):
            private = functools.partial(os.open, mode=0o600)
            with open(path, "a", opener=private) as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # of two first starts the second has to find the first one's key
                if not path.stat().st_size:
                    file.write(secrets.token_urlsafe(48) + "\n")
        return Secret(path.read_text().strip())
    except OSError as problem:
        raise StartupError(f"settings: cannot keep a local key in {path.name}: {problem.strerror}") from None


def _checked(settings: Settings) -> Settings:
    if settings.env not in ("local", "production"):
        raise StartupError("settings: env must be local or production")
    if not settings.secret_keys:
        raise StartupError(
            "SECRET_KEY is not set: set it to 32 or more random characters, e.g. the output of "
            "`python -c 'import secrets; print(secrets.token_urlsafe(48))'`, and keep it the same on every worker."
        )
    for variable, tokens in (("ADMIN_TOKEN", (settings.admin_token,)), ("API_KEYS", settings.api_keys)):
        if not all(IN_HEADER.fullmatch(token) for token in tokens):
            raise StartupError(f"{variable} must be visible ASCII characters: no client could send any other")
    if set("{}") & set(settings.person_reads.replace("{name}", "")):
        raise StartupError("settings: person_reads can have {name} in it, and no other braces")
    if settings.demo_models not in ("auto", "always"):
        raise StartupError("settings: demo_models must be auto or always")
    if settings.log_level not in LOG_LEVELS:
        raise StartupError(f"settings: log_level must be one of {', '.join(LOG_LEVELS)}")
    if settings.lease_renew >= settings.lease:
        raise StartupError("settings: lease_renew must be shorter than lease: turns would be taken from their workers")
    for host in settings.allowed_hosts:
        if not HOST.fullmatch(host):
            raise StartupError(f"settings: ALLOWED_HOSTS: {host!r} is no bare host, as example.org is")
    for origin in settings.allowed_origins:
        if not ORIGIN.fullmatch(origin):
            raise StartupError(f"settings: ALLOWED_ORIGINS: {origin!r} is no origin, as https://example.org is")
    if any(url and not WEB.match(url) for url in (settings.public_url, *(model.base_url for model in settings.models))):
        raise StartupError("settings: public_url and base_url must start with https:// or http://")
    if settings.production and any(len(key) < 32 for key in settings.secret_keys):
        raise StartupError("SECRET_KEY is too short: use 32 or more random characters.")
    if settings.production and 0 < len(settings.admin_token) < 16:
        raise StartupError("ADMIN_TOKEN is too short: use 16 or more random characters.")
    if settings.workers > 1 and not settings.redis_url:
        raise StartupError(
            f"{settings.workers} workers need REDIS_URL: without Redis a reader on one worker would miss what another "
            "says. Set REDIS_URL, or WEB_CONCURRENCY=1."
        )
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", settings.relay_prefix):
        raise StartupError("settings: relay_prefix must be letters, digits, `_`, `.` or `-`")
    if not settings.models:
        raise StartupError("settings: there is no [[models]] entry; the demo models need no key")
    ids = [model.id for model in settings.models]
    if len(set(ids)) < len(ids):
        raise StartupError("settings: two models have the same id")
    unknown = {model.provider for model in settings.models} - {"demo", "openai_chat", "anthropic_messages"}
    if unknown:
        raise StartupError(f"settings: unknown provider {min(unknown)}: demo, openai_chat or anthropic_messages")
    return settings
