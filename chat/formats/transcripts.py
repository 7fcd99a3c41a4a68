"""A session as a file, piece by piece: a head, then its messages in the order they were said, then an end. Pure."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any, Literal

import msgspec

Message = dict[str, Any]
Kind = Literal["json", "markdown", "txt"]
EXTENSIONS: dict[Kind, str] = {"json": "json", "markdown": "md", "txt": "txt"}
MEDIA: dict[Kind, str] = {"json": "application/json", "markdown": "text/markdown", "txt": "text/plain"}
MARKUP = re.compile(r"([\\`*_{}\[\]()<>#!|~])")


async def transcript(kind: Kind, session: dict[str, Any], pages: AsyncIterator[list[Message]]) -> AsyncIterator[bytes]:
    """The bytes of the file, as the pages of messages come. session: as its reader may see it."""
    if kind == "json":
        yield b'{"session":' + msgspec.json.encode(session) + b',"messages":['
        comma = b"\n"
        async for page in pages:
            yield comma + b",\n".join(map(msgspec.json.encode, page))
            comma = b",\n"
        yield b"\n]}\n"
        return
    title = one_line(session["title"] or "Chat")
    heading = "# " + MARKUP.sub(r"\\\1", title) if kind == "markdown" else title
    yield f"{heading}\n".encode()
    async for page in pages:
        yield "".join(_said(kind, message) for message in page).encode()


def one_line(text: str) -> str:
    """Text without line breaks of any script: a title of two lines would write a heading, or a speaker, of its own."""
    return " ".join(text.split())


def _said(kind: Kind, message: Message) -> str:
    speaker = "You" if message["role"] == "user" else (message["model"] or {}).get("display_name", "Model")
    ended = "" if message["status"] == "success" else f" [{message['status']}]"
    heading = f"## {speaker}" if kind == "markdown" else f"{speaker}:"
    return f"\n{heading}\n\n{message['content']}{ended}\n"
