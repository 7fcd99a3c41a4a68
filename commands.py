"""The command line: what `python service.py …` can do."""

from __future__ import annotations

import argparse
import asyncio
import functools
import http.client
import json
import logging
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import servers
from chat.errors import ChatError, StartupError
from chat.live.wire import Address, Wire
from chat.providers import ChatMessage, Limits, ProviderError, Providers
from chat.settings import HERE, Model, Secret, Settings, origins
from chat.store.database import Database, new_id
from chat.store.schema import Migration, schema_steps

QUESTION = [ChatMessage("user", "Say OK.")]
SECONDS = 20.0  # each check may take
VOTES = {"a": "model_a", "b": "model_b", "tie": "tie", "bad": "both_bad"}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python service.py",
        description="Parley, a chat-arena service. Settings are in settings.toml; variables override them.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for function in (serve, release, check, show_settings, chat):
        name = "settings" if function is show_settings else function.__name__
        words = (function.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=words, description=function.__doc__)
        command.set_defaults(function=function)
    command.add_argument("url", nargs="?", default="http://localhost:8001", help="of the service (%(default)s)")
    command.add_argument("--model", help="the model to talk to; the first one on offer otherwise")
    command.add_argument("--arena", action="store_true", help="talk to two models with their names hidden, and vote")
    options = parser.parse_args(sys.argv[1:] or ["serve"])
    try:
        sys.exit(options.function(options))
    except StartupError as problem:
        sys.stderr.write(f"parley: {problem}\n")
        sys.exit(servers.STARTUP_FAILURE)


def _settings() -> Settings:
    settings = servers.settings_or_exit()
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    return settings


# -- for operators


def serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM. This is the command where none is named."""
    settings = _settings()
    servers.serve(settings, functools.partial(_say_hello, settings))


def _say_hello(settings: Settings) -> None:
    if settings.production:
        return
    url = f"http://localhost:{settings.port}"
    print(f"{settings.name} is at {url}  (health: {url}/api/health/)")
    print(f"Try it:  curl -N '{url}/api/messages/stream/?format=text' -d '{{\"content\": \"Hello\"}}'")
    print("Set OPENAI_API_KEY or ANTHROPIC_API_KEY for real models, DATABASE_URL for PostgreSQL, REDIS_URL for workers")
    sys.stdout.flush()


def release(options: argparse.Namespace) -> None:
    """Bring the database's schema up to date, each step once, beside workers and other releases that run already."""
    applied = asyncio.run(_release(_settings()))
    print(f"parley: schema up to date, {applied} step{'' if applied == 1 else 's'} applied")


async def _release(settings: Settings) -> int:
    database = Database(settings.database_url, timeout=settings.storage_timeout)
    await database.connect()
    try:
        return await database.migrate((HERE / "models.sql").read_text())
    finally:
        await database.disconnect()


def show_settings(options: argparse.Namespace) -> None:
    """Print every setting, its value and where the value comes from; secrets are hidden."""
    settings = _settings()
    for field, origin in origins(settings).items():
        value = getattr(settings, field)
        if field == "models":
            value = [model.id for model in value]
        elif isinstance(value, Secret) and not value:
            value = ""  # which hides nothing
        print(f"{field:24}{value!r:40}  {origin}")


def check(options: argparse.Namespace) -> int:
    """Ask the database, Redis and every model on offer whether they answer; exit with 1 if one does not.

    A real model is asked for one word, which costs next to nothing.
    """
    return asyncio.run(_check(_settings()))


async def _check(settings: Settings) -> int:
    failed = 0
    async for name, problem in _findings(settings):
        print(f"{'FAILED' if problem else 'ok':8}{name}" + (f": {problem}" if problem else ""), flush=True)
        failed += bool(problem)
    return 1 if failed else 0


async def _findings(settings: Settings) -> AsyncIterator[tuple[str, str]]:
    """Yield the name of each thing that was asked and its problem with the way to mend it; "" if it is well."""
    yield "database", await _database_problem(settings)
    if settings.redis_url:
        yield "Redis", await _redis_problem(settings)
    providers = Providers(settings)
    try:
        for model in settings.models:
            if model.id not in providers.models:
                print(f"{'-':8}model {model.id}: not on offer; set {model.api_key_env} to offer it")
            else:
                yield f"model {model.id}", await _model_problem(providers, model)
    finally:
        await providers.close()


async def _database_problem(settings: Settings) -> str:
    # Not exclusive: a service that runs beside this command is no problem.
    database = Database(settings.database_url, pool_size=1, timeout=settings.storage_timeout)
    try:
        await database.connect()
        steps = schema_steps((HERE / "models.sql").read_text())
        applied = await Migration(steps, database.postgres, database.now, database.fetch_all).applied()
        behind = len(steps) - len(applied)
        return f"the schema lacks {behind} steps: run `python service.py release`" if behind > 0 else ""
    except (StartupError, ChatError) as problem:
        return f"{problem}. Is DATABASE_URL right, and does the server run?"
    finally:
        await database.disconnect()


async def _redis_problem(settings: Settings) -> str:
    try:
        address = Address(settings.redis_url, verify=settings.relay_tls_verify)
        async with asyncio.timeout(SECONDS):
            wire = await Wire.open(address)
            await wire.send("SET", f"{settings.relay_prefix}:check", "1", "EX", "1")
            wire.close()
    except StartupError as problem:
        return str(problem)
    except TimeoutError:
        return "no answer. Is the host of REDIS_URL reachable from here?"
    except Exception as problem:  # whatever a connection can die of: the operator wants to read it
        return f"{problem}. Is REDIS_URL right, and may it write?"
    return ""


MENDING = {
    "provider_unavailable": "it could not be reached, or refused the key; the line above says which. Look at its key "
    "({key}), its base_url and its model_code",
    "provider_rate_limited": "the vendor's limit is reached; it will work later, or with another key ({key})",
    "provider_refused": "the vendor refused the question; look at its model_code and max_tokens",
    "provider_timeout": "no answer in time; look at its base_url",
}


async def _model_problem(providers: Providers, model: Model) -> str:
    limits = Limits(max_tokens=16, first_token_timeout=SECONDS, idle_timeout=SECONDS)
    try:
        await providers.answer(model, QUESTION, limits, lambda text: None, lambda size: None)
    except ProviderError as problem:
        mending = MENDING.get(problem.code, "its answer could not be read; does its base_url speak this API?")
        return mending.format(key=model.api_key_env or "it has none")
    return ""


# -- a small chat in the terminal


def chat(options: argparse.Namespace) -> int:
    """Talk to a running service in this terminal.

    Ctrl-C stops an answer, Ctrl-D ends the chat; in an arena /vote a, b, tie or bad.
    """
    url = options.url if "://" in options.url else f"http://{options.url}"
    try:
        return _chat(Talk(url.rstrip("/"), options.model, options.arena))
    except urllib.error.HTTPError as refusal:
        sys.stderr.write(f"parley: {_sentence(refusal)}\n")
    except (OSError, ValueError, http.client.HTTPException) as problem:  # also an address that is none
        sys.stderr.write(f"parley: nothing answers at {url} ({problem}); scripts/serve starts a service\n")
    return 1


class Talk:
    """A guest with a session of a service, reached over HTTP."""

    def __init__(self, url: str, model: str | None, arena: bool) -> None:
        self._url = url
        self._headers = {"Content-Type": "application/json"}
        token = self.ask("/api/auth/anonymous/", {})["tokens"]["access"]
        self._headers["Authorization"] = f"Bearer {token}"
        wish = {"mode": "random"} if arena else {"mode": "direct", "model_a_id": model}
        self._session = self.ask("/api/sessions/", wish)["id"]
        self._message = ""

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        with self._open(path, body) as response:
            return json.load(response)

    def say(self, content: str) -> None:
        """Print the answer as it comes. Ctrl-C stops it; what was said until then is printed."""
        self._message = new_id()
        body = {"session_id": self._session, "id": self._message, "content": content}
        with self._open("/api/messages/stream/?format=text", body) as answer:
            while True:
                try:
                    if not (part := answer.read1(65536)):
                        return
                    sys.stdout.buffer.write(part)
                    sys.stdout.flush()
                except KeyboardInterrupt:
                    self.ask(f"/api/sessions/{self._session}/stop/", {})

    def vote(self, preference: str) -> str:
        body = {"session_id": self._session, "message_id": self._message, "feedback_type": "preference"}
        session = self.ask("/api/feedback/", body | {"preference": preference})["session_update"]
        return "  ".join(f"{side}: {session[f'model_{side}']['display_name']}" for side in "ab")

    def _open(self, path: str, body: dict[str, Any]) -> http.client.HTTPResponse:
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), self._headers)
        found: http.client.HTTPResponse = urllib.request.urlopen(request)
        return found


def _chat(talk: Talk) -> int:
    with suppress(EOFError):
        while True:
            said = input("> ").strip()
            try:
                if said.startswith("/vote"):
                    preference = VOTES.get(said.removeprefix("/vote").strip())
                    print(talk.vote(preference) if preference else "Vote a, b, tie or bad.")
                elif said:
                    talk.say(said)
            except urllib.error.HTTPError as refusal:
                print(_sentence(refusal))
    print()
    return 0


def _sentence(refusal: urllib.error.HTTPError) -> str:
    with suppress(ValueError, KeyError, TypeError):
        return str(json.load(refusal)["message"])
    return str(refusal)
