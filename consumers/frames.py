"""The frames a client may send on a socket: text in, typed frame or `ChatError` out. Pure."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from chat.decoding import wrong_field
from chat.errors import ChatError
from chat.formats import Id
from chat.formats.ui_messages import UIMessage
from chat.live.choices import Choice

RequestId = Annotated[str, Meta(min_length=1, max_length=100)]
Echo = msgspec.Raw  # said back as it came: what need not be decoded cannot fail to be encoded again


class Ping(msgspec.Struct, tag="ping"):
    timestamp: Echo = Echo(b"null")


class Test(msgspec.Struct, tag="test"):
    message: Echo = Echo(b"null")


class NewMessage(Choice, tag="message", kw_only=True):
    """A user's message. A choice of models may only repeat the session's own."""

    content: str
    id: Id | None = None


class Stop(msgspec.Struct, tag="stop"):
    pass


class Typing(msgspec.Struct, tag="typing_indicator"):
    is_typing: bool


class RequestState(msgspec.Struct, tag="request_state"):
    pass


class Resume(msgspec.Struct, tag="resume"):
    """Ours has a cursor; the AI SDK's a `requestId`, and in `id` its chat: it is told the whole running answer."""

    cursor: Annotated[str, Meta(max_length=100)] | None = None
    requestId: RequestId | None = None
    id: str = ""


class Send(msgspec.Struct, tag="send", kw_only=True):
    """The AI SDK's: start a turn, for a new message, an edited one, or one that is to be answered again."""

    requestId: RequestId
    id: str  # of the chat
    messages: Annotated[list[UIMessage], Meta(max_length=1000)]
    trigger: Literal["submit-message", "regenerate-message"] = "submit-message"
    messageId: str | None = None  # of a message that was sent before and says something else now
    body: Choice = msgspec.field(default_factory=Choice)


class Abort(msgspec.Struct, tag="abort"):
    """The AI SDK's: whoever made this request wants no more of it."""

    requestId: RequestId


class Auth(msgspec.Struct, tag="auth"):
    token: str


Frame = Ping | Test | NewMessage | Stop | Typing | RequestState | Resume | Auth | Send | Abort
_decode = msgspec.json.Decoder(Frame).decode


def parse(text: str) -> Frame:
    """Raises `bad_request` with what was expected; the connection goes on."""
    try:
        frame: Frame = _decode(text)
        if isinstance(frame, Resume) and frame.cursor is None and frame.requestId is None:
            raise msgspec.ValidationError("Object missing required field `cursor`")
        return frame
    except msgspec.ValidationError as problem:
        path, what = wrong_field(problem, Frame)
        raise ChatError("bad_request", f"This frame was not understood: {path or 'frame'}: {what}.") from None
    except (msgspec.DecodeError, RecursionError) as problem:
        raise ChatError("bad_request", f"A frame is JSON text; this is not: {problem}.") from None
