"""The JSON of events that belong to a session and to no turn, and the messages that travel on the bus. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from ..errors import ChatError
from ..formats.tellings import Message
from .answers import Piece

encode = msgspec.json.encode


class TurnBegun(msgspec.Struct, array_like=True, tag="begun", frozen=True):
    """A turn has begun; `previous` is the turn before it, "" before the first."""

    turn_id: str
    position: int
    previous: str
    messages: list[Message]


class TurnWords(msgspec.Struct, array_like=True, tag="words", frozen=True):
    turn_id: str
    pieces: list[Piece]


class ReplyEnded(msgspec.Struct, array_like=True, tag="ended", frozen=True):
    turn_id: str
    participant: str
    message: Message


class SessionNotice(msgspec.Struct, array_like=True, tag="notice", frozen=True):
    """An event of the session itself: its JSON for members, and for read-only readers ("": they are not sent any).

    `version`: the session's version after the event, 0 for an event without one; `author`: the account that caused the
    event and is not sent it.
    """

    json: str
    public_json: str = ""
    version: int = 0
    author: str = ""


class LearnAgain(msgspec.Struct, array_like=True, tag="again", frozen=True):
    """Messages of this channel may be lost: a room learns again from Redis and the database, and checks all rights."""


class RightsChanged(msgspec.Struct, array_like=True, tag="rights", frozen=True):
    """Followers are to be admitted again: on a session's channel all; on the workers' channel those of an account.

    These are the account's own, and all readers of its sessions: these end with the account.
    """

    account_id: str = ""


class StopTurn(msgspec.Struct, array_like=True, tag="stop", frozen=True):
    """The owner of this turn is to end it."""

    turn_id: str


BusMessage = TurnBegun | TurnWords | ReplyEnded | SessionNotice | LearnAgain | RightsChanged | StopTurn
_decode = msgspec.json.Decoder(BusMessage).decode


def decode_bus(payload: str) -> BusMessage:
    """Return a message of the bus; the name of its worker may stand before it.

    Raises `msgspec.DecodeError` for a message that no worker sends: other programs may publish to the same Redis.
    """
    try:
        message: BusMessage = _decode(payload[payload.find("[") :])
    except RecursionError:
        raise msgspec.DecodeError("nested too deeply") from None
    if isinstance(message, TurnBegun) and not (message.messages and all(map(_sound, message.messages))):
        raise msgspec.ValidationError("a beginning that cannot be shown")
    if isinstance(message, ReplyEnded) and not _sound(message.message):
        raise msgspec.ValidationError("an ending that cannot be shown")
    return message


def _sound(message: Message) -> bool:
    names = ("id", "role", "content", "status")
    known = isinstance(message.get("participant", 0), str | None)  # a key of the answer's replies
    return known and all(isinstance(message.get(name), str) for name in names)


def session_event(kind: str, **fields: Any) -> bytes:
    """Return the JSON of an event that is not part of any turn."""
    return encode({"type": kind, "requestId": "session", **fields})


def error_event(problem: ChatError, message_id: str | None = None) -> bytes:
    fields: dict[str, Any] = {
        "code": problem.code,
        "message": problem.message,
        "retryable": problem.retryable,
    }
    if problem.retry_after is not None:
        fields["retry_after"] = problem.retry_after
    if message_id is not None:
        fields["message_id"] = message_id
    return session_event("error", **fields)
