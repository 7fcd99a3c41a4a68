"""Parley itself as a target: the real service, with accounts, storage, turn logs and limits, nothing switched off.

Limits are raised, because one benchmark from one address is many visitors; they are still checked.
"""

import json
import os
import secrets
import subprocess
import tempfile
import time
from pathlib import Path

from machine import CLIENT, HERE, ROOT, Load, Process, venv
from targets import PEERS, Target

MANY = "1000000000"
RAISED = {
    "PARLEY_CONNECTIONS_PER_ADDRESS": MANY,
    "PARLEY_STREAMS_PER_ACCOUNT": MANY,
    "PARLEY_STREAMS_PER_ADDRESS": MANY,
    "PARLEY_SOCKETS_PER_SESSION": MANY,
    "PARLEY_SOCKETS_PER_ACCOUNT": MANY,
    "PARLEY_SOCKETS_PER_ADDRESS": MANY,
    "PARLEY_MESSAGES_PER_MINUTE": MANY,
    "PARLEY_TURNS_PER_ACCOUNT": MANY,
    "PARLEY_GUESTS_PER_HOUR": MANY,  # names that this checkout does not know are left out
    "PARLEY_SESSIONS_PER_HOUR": MANY,
    "PARLEY_GUESTS_PER_MINUTE": MANY,
    "PARLEY_SESSIONS_PER_MINUTE": MANY,
    "PARLEY_DAILY_TOKENS_ACCOUNT": "0",
    "PARLEY_DAILY_TOKENS_ADDRESS": "0",
    "PARLEY_DAILY_TOKENS_SERVICE": "0",
    "PARLEY_REPLY_MAX": MANY,
    "PARLEY_MAX_TOKENS": MANY,
}


def writing(tokens: int, rate: float, pad: int = 0) -> str:
    """THE ONE PLACE that knows how the demo model is asked for tokens: `/count <tokens> <per second>`.

    It answers `⟨0:<µs of CLOCK_MONOTONIC>⟩ ⟨1:…⟩ …`, one delta a token, at that pace from the turn's start, each
    followed by `pad` more bytes: characters of two.
    """
    return f"/count {tokens} {rate:g} {pad // 2}" if pad else f"/count {tokens} {rate:g}"


def http_load(job: dict) -> dict:
    """Run one job of http_load.py on the client's cores."""
    python = venv("peers", PEERS / "requirements.txt")
    process = Process(
        python, HERE / "http_load.py", cores=CLIENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    output, _ = process.popen.communicate(json.dumps(job))
    return json.loads(output)


class Parley(Target):
    label = "Parley"
    load_options = ("--only", '"message_chunk"', "--greeted", "yes")
    in_scenarios = (*Target.in_scenarios, "http", "streams", "turnover", "upstream-S2", "upstream-streams", "waits")
    root = ROOT
    model = "demo-scholar"
    database_url = ""  # a fresh SQLite file unless a subclass or a scenario says otherwise
    with_redis = True

    def start(self) -> None:
        python = venv("service", ROOT / "requirements.txt")
        self.folder = tempfile.TemporaryDirectory()
        known = (self.root / "chat/settings.py").read_text()
        env = {
            **{name: value for name, value in RAISED.items() if f" {name[7:].lower()}:" in known},
            "PARLEY_ENV": "production",
            "SECRET_KEY": secrets.token_hex(32),
            "DATABASE_URL": self.database_url or f"sqlite:///{self.folder.name}/parley.db",
            "OPENAI_API_KEY": "",  # a key in this shell would cost memory, and could cost money
            "ANTHROPIC_API_KEY": "",
            **self.models(),
        }
        if not self.with_redis:
            env["REDIS_URL"] = ""
        self.python, self.env = python, env
        release = [python, self.root / "service.py", "release"]
        subprocess.run(release, env=os.environ | env, check=True, stdout=subprocess.DEVNULL)
        self.serve(python, self.root / "service.py", "serve", **env)
        self.tokens = [answer["tokens"]["access"] for answer in self.ask([["POST", "/api/auth/anonymous/", {}, {}]])]

    def models(self) -> dict[str, str]:
        """What the environment says of the models on offer; those of settings.toml if nothing."""
        return {}

    def fill(self, sessions: int, messages: int, votes: int) -> None:
        """Give the first guest years of use; see fill.py."""
        [me] = self.ask([["GET", "/api/users/me/", {"Authorization": f"Bearer {self.tokens[0]}"}, None]])
        command = [self.python, HERE / "fill.py", self.env["DATABASE_URL"], me["id"], sessions, messages, votes]
        subprocess.run([str(word) for word in command], check=True)

    def start_again(self) -> float:
        """Seconds from the command to an open port, on a database that is there."""
        self.processes.pop().stop()
        began = time.monotonic()
        self.serve(self.python, self.root / "service.py", "serve", **self.env)
        return time.monotonic() - began

    def ask(self, requests: list) -> list[dict]:
        """Every request once; the answers' bodies. Anything but a success ends the run."""
        answers = http_load({"kind": "once", "port": self.port, "requests": requests, "connections": 32})["answers"]
        for (method, path, _, _), (status, body) in zip(requests, answers, strict=True):
            if status >= 300:
                raise RuntimeError(f"expected {method} {path} to succeed, got {status} {body}")
        return [body for _, body in answers]

    def new_session(self, token: str) -> list:
        body = {"mode": "direct", "model_a_id": self.model}
        return ["POST", "/api/sessions/", {"Authorization": f"Bearer {token}"}, body]

    def new_turn(self, content: str) -> list:
        """A turn in a session of its own, made along with it, answered to its end as bare text."""
        body = {"content": content, "mode": "direct", "model_a_id": self.model}
        return ["POST", "/api/messages/stream/?format=text", {"Authorization": f"Bearer {self.tokens[0]}"}, body]

    def prepare(self, sessions: int) -> None:
        made = self.ask([self.new_session(self.tokens[0])] * sessions)
        self.sessions = [session["id"] for session in made]
        self.writers: set[int] = set()

    def socket(self, session: int) -> str:
        """The first socket of each session is also the one that asks for the tokens."""
        line = f"/ws/chat/session/{self.sessions[session]}/\tprotocol=parley.v1, t.{self.tokens[0]}"
        if session in self.writers:
            return line
        self.writers.add(session)
        return line + "\twriter"

    def write(self, load: Load, sessions: int, rate: float, seconds: float, pad: int = 0) -> None:
        frame = {"type": "message", "content": writing(round(rate * seconds), rate, pad)}
        load.tell(f"write {1_000_000 / rate:.0f} {json.dumps(frame)}")

    def turns(self, count: int, tokens: int, rate: float) -> list:
        """Requests for `count` turns, each of a guest of its own in a session of its own."""
        guests = self.ask([["POST", "/api/auth/anonymous/", {}, {}]] * count)
        access = [guest["tokens"]["access"] for guest in guests]
        sessions = self.ask([self.new_session(token) for token in access])
        return [
            [
                "POST",
                "/api/messages/stream/",
                {"Authorization": f"Bearer {token}"},
                {"session_id": session["id"], "content": writing(tokens, rate)},
            ]
            for token, session in zip(access, sessions, strict=True)
        ]

    def stop(self) -> None:
        super().stop()
        self.folder.cleanup()


class ParleyOpenAI(Parley):
    label = "Parley, OpenAI upstream"
    in_scenarios = ("upstream-S2", "upstream-streams")
    model = "upstream"
    provider, path = "openai_chat", "/v1"

    def models(self) -> dict[str, str]:
        place = {"base_url": self.upstream() + self.path, "api_key_env": "VENDOR_KEY"}
        model = {"id": self.model, "provider": self.provider, "model_code": "m", **place}
        return {"PARLEY_MODELS": json.dumps([model]), "VENDOR_KEY": "none of your business"}


class ParleyAnthropic(ParleyOpenAI):
    label = "Parley, Anthropic upstream"
    provider, path = "anthropic_messages", ""


def of(kind: type[Parley], root: Path) -> type[Parley]:
    """Return the same target of another checkout, on this one's Python and packages."""
    attributes = {"root": root, "label": f"{kind.label} ({root.name})"}
    return type(f"{kind.__name__}Of{root.name.title()}", (kind,), attributes)


class ParleyInProcess(Parley):
    label = "Parley, one process without Redis"
    in_scenarios = ("idle", "memory")
    with_redis = False


class Bare(Target):
    """A Starlette app that only answers; see peers/bare.py."""

    label = "bare Starlette"
    in_scenarios = ("http", "streams")

    def start(self) -> None:
        python = venv("peers", PEERS / "requirements.txt")
        self.serve(python, "-m", "uvicorn", "--port", self.port, "--no-access-log", "bare:app")

    def turns(self, count: int, tokens: int, rate: float) -> list:
        return [["POST", "/api/messages/stream/", {}, {"tokens": tokens, "rate": rate}]] * count
