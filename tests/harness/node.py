"""Clients that other people wrote in JavaScript: their packages, and those of `tests/interop` at work."""

from __future__ import annotations

import asyncio
import fcntl
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .service import ROOT

HERE = ROOT / "tests" / "interop"
PATIENCE = 20.0  # seconds for a client to do what it is told; Node.js alone takes one to start on a busy machine


def packages(folder: Path = HERE) -> str:
    """Install a folder's packages, once per change of their lock file. Return what went wrong, or nothing."""
    lock, stamp = folder / "package-lock.json", folder / "node_modules" / ".installed"
    with open(lock) as asked:
        fcntl.flock(asked, fcntl.LOCK_EX)  # test processes that install at once would remove each other's packages
        if not stamp.exists() or stamp.read_text() != lock.read_text():
            done = subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, text=True)
            if done.returncode:
                return f"npm could not install {folder.name}/package.json: {done.stderr.strip()[-300:]}"
            stamp.write_text(lock.read_text())
    return ""


class Node:
    """One process of a script that plays many clients, each in a tab of its own: to start Node.js takes longer than a test."""

    def __init__(self, script: str, *words: str) -> None:
        self._command = ["node", str(HERE / script), *words]
        self._tabs: list[Client] = []
        self.ended = False

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe, limit=2**24)
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        await self._reading

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            seen = json.loads(line)
            self._tabs[seen.pop("tab")].hear(seen)
        self.ended = True
        for tab in self._tabs:
            tab.wake()

    async def open(self, **given: Any) -> Client:
        """A client with all that it has to know."""
        tab = Client(self, len(self._tabs))
        self._tabs.append(tab)
        await self.write({"tab": tab.number, "given": given})
        return tab

    async def write(self, line: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line).encode() + b"\n")
        await self._process.stdin.drain()


class Client:
    """A client that is given commands, a line of JSON each, and prints what it sees; `seen` is all of that."""

    def __init__(self, node: Node, number: int) -> None:
        self._node, self.number = node, number
        self._new = asyncio.Event()
        self._looked = 0
        self.seen: list[dict[str, Any]] = []

    def hear(self, seen: dict[str, Any]) -> None:
        self.seen.append(seen)
        self._new.set()

    def wake(self) -> None:
        self._new.set()

    async def do(self, command: str, **more: Any) -> None:
        await self._node.write({"tab": self.number, "do": command} | more)

    async def sees(self, wanted: Callable[[dict[str, Any]], Any], what: str) -> dict[str, Any]:
        """Wait for a thing it prints after the last one that was waited for."""
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    self._new.clear()
                    while self._looked < len(self.seen):
                        self._looked += 1
                        if wanted(self.seen[self._looked - 1]):
                            return self.seen[self._looked - 1]
                    assert not self._node.ended, f"the client ended before {what}: {str(self.seen[-2:])[:600]}"
                    await self._new.wait()
        except TimeoutError:
            raise TimeoutError(f"{what}: not within {PATIENCE} s; last: {str(self.seen[-2:])[:600]}") from None

    async def does(self, command: str, **more: Any) -> None:
        """Give a command and wait for its end."""
        await self.do(command, **more)
        await self.sees(lambda seen: seen.get("done") == command, command)

    async def sees_more(self) -> None:
        """Wait until a conversation is shown that is longer than the one last looked at."""
        known = len("".join(_said(_shown(self.seen[: self._looked]))))
        await self.sees(lambda seen: len("".join(_said(seen.get("messages", [])))) > known, "more of the answer")

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as it was last shown."""
        return _shown(self.seen)

    @property
    def problems(self) -> list[str]:
        return [seen["problem"] for seen in self.seen if "problem" in seen]

    def texts(self) -> list[str]:
        """What stands in the last message or, of an arena turn, in both sides, by whichever means the client has."""
        return _said(self.messages)


def _shown(seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return next((each["messages"] for each in reversed(seen) if "messages" in each), [])


def _said(messages: list[dict[str, Any]]) -> list[str]:
    said: list[str] = []
    for message in reversed(messages):
        if message["role"] != "assistant":
            break
        said = message["texts"] + said
    return said
