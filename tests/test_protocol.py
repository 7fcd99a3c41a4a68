"""PROTOCOL.md is true: every example is asked of a service, in its order, and answered as it stands there."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from websockets.asyncio.client import connect

import consumers
import routes
from chat.errors import REPLY_SENTENCES, STATUS
from tests.conftest import CLOSED, store
from tests.harness.api import call
from tests.harness.service import ROOT, Service

PAGE = (ROOT / "PROTOCOL.md").read_text()
EXAMPLES = re.findall(r"^```(http|ws)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
ANY = "…"


class Reader:
    """Somebody who follows the page: what they were given, by the names the page has for it."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.given: dict[str, str] = {}

    def fill(self, text: str) -> str:
        return re.sub(r"\$(\w+)", lambda found: self.given[found[1]], text)

    def compare(self, expected: Any, answer: Any, path: str = "") -> None:
        """Compare an answer to an example of it; a name that is new takes what stands there."""
        if isinstance(expected, str) and expected.startswith("$"):
            assert self.given.setdefault(expected[1:], answer) == answer, path
        elif isinstance(expected, dict) and isinstance(answer, dict):
            assert expected.keys() == answer.keys(), (path, expected.keys() ^ answer.keys())
            for name, value in expected.items():
                self.compare(value, answer[name], f"{path}.{name}")
        elif isinstance(expected, list) and isinstance(answer, list):
            assert len(expected) == len(answer), (path, answer)
            for place, value in enumerate(expected):
                self.compare(value, answer[place], f"{path}[{place}]")
        else:
            assert expected in (ANY, answer), (path, answer)

    def compare_text(self, expected: str, answer: str) -> None:
        """Line by line: JSON after `data: ` as JSON, any id where one is left open."""
        lines, told = expected.split("\n"), answer.split("\n")
        assert len(lines) == len(told), answer
        for line, said in zip(lines, told, strict=True):
            if line.startswith("data: ") and line != "data: [DONE]":
                self.compare(json.loads(line[6:]), json.loads(said[6:]), line[:40])
            else:
                assert said == line or (line == f"id: {ANY}" and said.startswith("id: ")), (line, said)

    async def http(self, example: str) -> None:
        asked, _, answered = example.partition("→ ")
        first, *lines = self.fill(asked).strip().split("\n")
        headers = {}
        while lines and re.match(r"[A-Z][A-Za-z-]+: ", lines[0]):
            name, _, value = lines.pop(0).partition(": ")
            headers[name] = value
        method, path = first.split()
        anonymous = headers.pop("Authorization", None) is not None
        token = None if anonymous else self.given["access"]
        body = "\n".join(lines).encode() or None
        response = await call(self.base, method, path, token, headers=headers, content=body)
        head, _, expected = answered.partition("\n")
        status, _, header = head.partition(" ")
        assert response.status_code == int(status), response.text
        if header:
            name, _, value = header.partition(": ")
            self.compare(value, response.headers[name])
        if response.headers.get("content-type") == "application/json":
            self.compare(json.loads(expected), response.json())
        else:
            self.compare_text(expected, response.text)

    async def ws(self, example: str) -> None:
        path, *lines = example.strip().split("\n")
        headers = {"Authorization": f"Bearer {self.given['access']}"}
        url = f"ws{self.base.removeprefix('http')}{self.fill(path)}"
        async with connect(url, additional_headers=headers, proxy=None) as socket:
            for line in lines:
                if line.startswith(">"):
                    await socket.send(self.fill(line[2:]))
                else:
                    self.compare(json.loads(line[2:]), json.loads(await socket.recv()), line[:60])


async def test_every_example_is_answered_as_it_stands(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    environment = store("sqlite", request, tmp_path_factory.mktemp("protocol"))
    async with Service(CLOSED | environment, server="serve") as service:
        reader = Reader(service.url)
        assert len(EXAMPLES) > 20
        # The first one needs a token of the second's kind: who reads the page has one already.
        answer = await call(service.url, "POST", "/api/auth/anonymous/", json={})
        reader.given["access"] = answer.json()["tokens"]["access"]
        for place, (kind, example) in enumerate(EXAMPLES):
            if place == 1:
                del reader.given["access"]
            try:
                await (reader.http(example) if kind == "http" else reader.ws(example))
            except Exception as problem:
                raise AssertionError(f"{problem!r} in the example\n{example}") from problem


def test_every_code_is_on_the_page() -> None:
    assert [code for code in (*STATUS, *REPLY_SENTENCES) if f"`{code}`" not in PAGE] == []
    for code, status in STATUS.items():
        row = next(line for line in PAGE.splitlines() if line.startswith("|") and f"`{code}`" in line)
        assert str(status) in row.split("|")[1], code


def test_every_route_is_written_down_and_nothing_else() -> None:
    """In PROTOCOL.md, or with the pages in the README."""
    text = PAGE + (ROOT / "README.md").read_text()
    named = re.findall(r"(?<=[`\s])/(?:[\w.{}$<>-]+/?)*", re.sub(r"<[^>\s]+>", "{}", text))
    paths = {path.rstrip("/") or "/" for path in named}
    table = [*routes.table, *consumers.table]
    assert [route.path for route in table if not any(route.path_regex.match(path) for path in paths)] == []
    served = [path for path in paths if path.startswith(("/api/", "/v1/", "/ws/", "/widget/"))]
    assert [path for path in served if not any(route.path_regex.match(path) for route in table)] == []
