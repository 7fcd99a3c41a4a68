"""AG-UI's events over server-sent events, as TanStack AI and AG-UI's own client read them: https://docs.ag-ui.com

A run is a turn; its id is the first reply's, because a client chooses it. A client drops an event whose id it has
seen, and the id of an event must stand right before its data: one that shares its cursor with the next has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import EventFormat, one_line, problem_of
from .events import encode
from .tellings import Begun, Ended, Over, Telling, Words

Event = tuple[str, dict[str, Any]]  # its id, "" for none


class AgUi(EventFormat):
    @staticmethod
    def dialect(turn_id: str, tellings: list[Telling]) -> list[bytes]:
        return [b"".join([_sse(id, event) for id, event in _events(tellings)])]


def _sse(id: str, event: dict[str, Any]) -> bytes:
    data = b"data: %b\n\n" % one_line(encode(event))
    return b"id: %b\n%b" % (id.encode(), data) if id else data


def _events(tellings: list[Telling]) -> Iterator[Event]:
    started = False
    for telling in tellings:
        match telling:
            case Begun(cursor, {"role": "assistant"} as reply) if not started:
                started = True
                yield cursor, {"type": "RUN_STARTED", "threadId": reply["session"], "runId": reply["id"]}
            case Words(cursor, _, id, offset, text):
                if offset == 0:
                    yield _start(id)
                yield cursor, {"type": "TEXT_MESSAGE_CONTENT", "messageId": id, "delta": text}
            case Ended(cursor, _, reply):
                if not reply["content"]:
                    yield _start(reply["id"])
                yield cursor, {"type": "TEXT_MESSAGE_END", "messageId": reply["id"]}
            case Over(cursor, replies):
                yield cursor, _last(replies)


def _start(id: str) -> Event:
    return "", {"type": "TEXT_MESSAGE_START", "messageId": id, "role": "assistant"}


def _last(replies: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    if problem := problem_of(replies):
        return {"type": "RUN_ERROR", "message": problem}
    return {"type": "RUN_FINISHED", "threadId": replies[0]["session"], "runId": replies[0]["id"]}
