"""The vocabulary between the core and the dialects: what a reader can be told of a turn. Pure.

Every telling carries `cursor`, the text a reader holds once the telling has been applied. A Message is the dictionary
of the wire contract (`id`, `role`, `content`, `participant`, `status`, `failure_reason`, …), masked already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

Message = dict[str, Any]

# The fields of a reply's Message, and of its row, that change while the reply runs, as they are when its turn begins.
BLANK: Message = {
    "content": "",
    "status": "pending",
    "failure_reason": None,
    "latency_ms": None,
    "first_token_ms": None,
}


class Begun(msgspec.Struct, frozen=True, gc=False):
    """A message of the turn's beginning: the user's, whole, or an empty reply. Idempotent for readers."""

    cursor: str
    message: Message


class Words(msgspec.Struct, frozen=True, gc=False):
    """Text of a reply that begins `offset` characters (code points) into it."""

    cursor: str
    participant: str
    message_id: str
    offset: int
    text: str


class Ended(msgspec.Struct, frozen=True, gc=False):
    """A reply has ended; `message` is the final Message with the whole text."""

    cursor: str
    participant: str
    message: Message


class Over(msgspec.Struct, frozen=True, gc=False):
    """Every reply has ended: the turn's last telling. `messages` are the final Messages, side a first."""

    cursor: str
    messages: tuple[Message, ...]


Telling = Begun | Words | Ended | Over
Dialect = Callable[[str, list[Telling]], list[bytes]]  # a turn's id and what is owed → pieces of bytes
