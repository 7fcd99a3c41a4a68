"""An answer: the replies of one turn as texts that only grow, and what a reader with a cursor is owed of them. Pure.

The text of a reply never changes; the text gets longer, and then the reply ends. Learning is a merge: the longest text
wins, and an ending beats any text. The merge is commutative, associative and idempotent, so the `learn_…` functions may
be called in any order, any number of times, with news from the provider, Redis, a checkpoint or a duplicate. Telling is
a slice: a reader that has `n` characters of a reply is owed `text[n:]`, then the reply's ending.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

import msgspec

from ..formats.tellings import BLANK, Begun, Ended, Message, Over, Telling, Words

ENDED = ("success", "stopped", "interrupted", "failed")  # the statuses a reply can end with
TOLD = -1  # in a cursor, in place of a number of characters: the reader was told how this reply ended
START, END = "start", "end"
CURSOR = re.compile(r"([A-Za-z0-9_-]{1,64})\.(start|end|(?:e|[0-9]{1,9})(?:\.(?:e|[0-9]{1,9}))?)")


class Cursor(msgspec.Struct, frozen=True, gc=False):
    """How much of a turn a reader has.

    `parts`: the characters of each reply, side a first, or `TOLD`; `begun`: whether the reader knows the turn's
    messages; `over`: whether the turn's end was told. As text (`str`): `<turn_id>.<a>.<b>`, one part in direct mode,
    each a number or `e`; `<turn_id>.start` and `<turn_id>.end`.
    """

    turn_id: str
    parts: tuple[int, ...] = ()
    begun: bool = True
    over: bool = False

    def __str__(self) -> str:
        if self.over or not self.begun:
            return f"{self.turn_id}.{END if self.over else START}"
        if len(self.parts) == 1:
            return f"{self.turn_id}.{self.parts[0] if self.parts[0] >= 0 else 'e'}"
        return f"{self.turn_id}.{'.'.join([str(n) if n >= 0 else 'e' for n in self.parts])}"


NOTHING = Cursor("", over=True)  # the cursor before a session's first turn: "the turn before it" is over


def start_of(turn_id: str) -> Cursor:
    return Cursor(turn_id, begun=False)


def end_of(turn_id: str) -> Cursor:
    return Cursor(turn_id, over=True)


def parse_cursor(text: str | None) -> Cursor | None:
    """Return the cursor a client gave back, or None for a text that is no cursor."""
    found = CURSOR.fullmatch(text or "")
    if found is None:
        return None
    turn_id, rest = found.groups()
    if rest in (START, END):
        return end_of(turn_id) if rest == END else start_of(turn_id)
    return Cursor(turn_id, tuple(TOLD if part == "e" else int(part) for part in rest.split(".")))


Offset = Annotated[int, msgspec.Meta(ge=0)]  # characters
Piece = tuple[str, Offset, str]  # participant, offset into the reply, text


class Reply:
    """A reply: its Message as it began, its text so far, and the final Message once it has ended."""

    __slots__ = ("ending", "message", "text")

    def __init__(self, message: Message) -> None:
        self.message = message
        self.text = ""
        self.ending: Message | None = None


class Answer:
    """The text of a turn so far. `position` orders the turns of a session; `previous` is the turn before this one."""

    def __init__(self, turn_id: str, position: int, previous: str, messages: Sequence[Message]) -> None:
        """messages: the turn's, as stored or as they began. A turn of an operator's own words has no user message."""
        self.turn_id = turn_id
        self.position = position
        self.previous = previous
        self.user_messages = [message for message in messages if message["participant"] is None]
        said = [message for message in messages if message["participant"] is not None]
        replies = sorted(said, key=lambda message: str(message["participant"]))
        self.replies = {message["participant"]: Reply(message | BLANK) for message in replies}
        for message in replies:
            if message["status"] in ENDED:
                self.learn_ending(message["participant"], message)
            else:
                self.learn_text(message["participant"], message["content"])

    @property
    def over(self) -> bool:
        return all(reply.ending is not None for reply in self.replies.values())

    @property
    def messages(self) -> list[Message]:
        """The turn's Messages with the text and the endings known so far."""
        return [*self.user_messages, *(reply.ending or _running(reply) for reply in self.replies.values())]

    # -- learning

    def learn_words(self, side: str, offset: int, text: str) -> bool:
        """Learn text that begins `offset` characters into the reply. False at a gap: nothing is learned then."""
        reply = self.replies.get(side)
        if reply is None or reply.ending is not None:
            return True
        known = len(reply.text)
        if offset > known:
            return False
        if offset + len(text) > known:
            reply.text += text[known - offset :]
        return True

    def learn_pieces(self, pieces: Sequence[Piece]) -> bool:
        """Learn several pieces of text. False when one of them begins beyond the known text."""
        return min([self.learn_words(*piece) for piece in pieces], default=True)

    def learn_text(self, side: str, text: str) -> None:
        """Learn a reply's text from its start."""
        reply = self.replies.get(side)
        if reply is not None and reply.ending is None and len(text) > len(reply.text):
            reply.text = text

    def learn_ending(self, side: str, message: Message) -> None:
        """Learn how a reply ended. The first ending stays: later ones are ignored."""
        reply = self.replies.get(side)
        if reply is not None and reply.ending is None:
            reply.ending, reply.text = message, message["content"]

    def learn(self, other: Answer) -> None:
        """Learn everything another answer of the same turn knows."""
        for side, reply in other.replies.items():
            self.learn_text(side, reply.text)
            if reply.ending is not None:
                self.learn_ending(side, reply.ending)

    # -- telling

    def fits(self, cursor: Cursor) -> bool:
        """Whether a cursor of this turn can be served: a client may have made it up."""
        return not cursor.begun or cursor.over or len(cursor.parts) == len(self.replies)

    def latest_cursor(self) -> Cursor:
        """Return the cursor of a reader that has everything so far."""
        if self.over:
            return end_of(self.turn_id)
        parts = [len(reply.text) if reply.ending is None else TOLD for reply in self.replies.values()]
        return Cursor(self.turn_id, tuple(parts))

    def owed(self, cursor: Cursor) -> tuple[list[Telling], Cursor]:
        """Return what a reader at `cursor` has not been told, and its cursor afterwards."""
        if cursor.over:
            return [], cursor
        tellings: list[Telling] = []
        parts = list(cursor.parts or (0,) * len(self.replies))
        if not cursor.begun:
            tellings += self._beginning(cursor, Cursor(self.turn_id, tuple(parts)))
        for place, (side, reply) in enumerate(self.replies.items()):
            have = parts[place]
            if have == TOLD:
                continue
            if len(reply.text) > have:
                parts[place] = len(reply.text)
                cursor = Cursor(self.turn_id, tuple(parts))
                tellings.append(Words(str(cursor), side, reply.message["id"], have, reply.text[have:]))
            if reply.ending is not None:
                parts[place] = TOLD
                cursor = Cursor(self.turn_id, tuple(parts))
                tellings.append(Ended(str(cursor), side, reply.ending))
        endings = [reply.ending for reply in self.replies.values() if reply.ending is not None]
        if parts.count(TOLD) == len(parts) == len(endings):  # a reader may know of endings that are not known here
            end = end_of(self.turn_id)
            return [*tellings, Over(str(end), tuple(endings))], end
        return tellings, cursor if cursor.begun else Cursor(self.turn_id, tuple(parts))

    def _beginning(self, before: Cursor, after: Cursor) -> list[Telling]:
        """Return the turn's messages as they began, but no reply whose ending the reader has.

        Only the last one moves the cursor: a reader that is cut before it is told the whole beginning again.
        """
        replies = zip(self.replies.values(), after.parts, strict=True)
        messages = [*self.user_messages, *(reply.message for reply, part in replies if part != TOLD)]
        last = len(messages) - 1
        return [Begun(str(after if n == last else before), message) for n, message in enumerate(messages)]


def _running(reply: Reply) -> Message:
    return reply.message | {"content": reply.text, "status": "streaming" if reply.text else "pending"}
