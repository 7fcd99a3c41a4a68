"""Dialects of a turn: tellings in, bytes out. Pure; each file is one dialect.

A dialect has no memory: all followers in step share its bytes, and a reader that comes back is told the rest by the
same function. Each telling holds all the history a dialect needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from msgspec import Meta

from ..errors import REPLY_SENTENCES, invalid
from .tellings import Message, Telling

Id = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]  # `$` would let a line end through, into event streams


class Format:
    """How an HTTP response speaks: its headers, first and last bytes, and the dialect of what is between."""

    content_type = "text/plain; charset=utf-8"
    headers: ClassVar[dict[str, str]] = {}
    opening = b""
    closing = b""
    ping = b""

    @staticmethod
    def resumed(turn_id: str, cursor: str) -> bytes:
        """Return what follows the opening of a stream that goes on from a cursor: not of one told from its start."""
        return b""

    @staticmethod
    def dialect(turn_id: str, tellings: list[Telling]) -> list[bytes]:
        raise NotImplementedError

    @staticmethod
    def broken_off(problem: str, sides: Sequence[str]) -> bytes:
        """Return the end of a stream that ends before its turn: nothing where clients come back with their cursor.

        sides: those whose ending was not told.
        """
        return b""


class EventFormat(Format):
    """Server-sent events. The first comment opens the stream at once: some proxies wait for a byte."""

    content_type = "text/event-stream; charset=utf-8"
    opening = b": ok\n\n"
    ping = b": ping\n\n"


def sentence(reply: Message) -> str:
    """Return what a reader is told of a reply that did not end well; "" for one that did."""
    if reply["status"] not in ("failed", "interrupted"):
        return ""
    reason = reply["failure_reason"] or ("interrupted" if reply["status"] == "interrupted" else "internal")
    return REPLY_SENTENCES.get(reason, REPLY_SENTENCES["internal"])


def problem_of(replies: tuple[Message, ...]) -> str:
    """Return what a reader is told of a turn of which something did not end well, "" where all of it did."""
    problems = [(f"Model {reply['participant'].upper()}: ", sentence(reply)) for reply in replies]
    if len(problems) == 1:
        return problems[0][1]
    return " ".join([side + problem for side, problem in problems if problem])


def last_of_user(roles: Sequence[str]) -> int:
    """Return the place of a conversation's last user message. Raises `invalid`."""
    if "user" not in roles:
        raise invalid("messages", "there is no user message")
    return len(roles) - 1 - roles[::-1].index("user")


LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


def one_line(data: bytes) -> bytes:
    """Escape what JSON may hold and many clients (Python's `splitlines`, httpx) take for the end of a line."""
    for plain, escaped in LINE_ENDS:
        data = data.replace(plain, escaped)
    return data
