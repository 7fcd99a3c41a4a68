"""What a client may say on a socket: text in, typed frame or `ChatError` out. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from chat.errors import ChatError

Id = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]  # `$` would let a line end through
Echo = msgspec.Raw  # said back as it came: what need not be decoded cannot fail to be encoded again


class Ping(msgspec.Struct, tag="ping"):
    timestamp: Echo = Echo(b"null")


class Test(msgspec.Struct, tag="test"):
    message: Echo = Echo(b"null")


class Message(msgspec.Struct, tag="message"):
    content: str
    id: Id | None = None


class Stop(msgspec.Struct, tag="stop"):
    pass


class Typing(msgspec.Struct, tag="typing_indicator"):
    is_typing: bool


class RequestState(msgspec.Struct, tag="request_state"):
    pass


class Resume(msgspec.Struct, tag="resume"):
    cursor: Annotated[str, Meta(max_length=100)]


class Auth(msgspec.Struct, tag="auth"):
    token: str


Frame = Ping | Test | Message | Stop | Typing | RequestState | Resume | Auth
_decode = msgspec.json.Decoder(Frame).decode


def parse(text: str) -> Frame:
    """Raises `bad_request` with what was expected; the connection goes on."""
    try:
        frame: Frame = _decode(text)
        return frame
    except msgspec.ValidationError as problem:
        raise ChatError("bad_request", f"This frame was not understood: {problem}.") from None
    except (msgspec.DecodeError, RecursionError) as problem:
        raise ChatError("bad_request", f"A frame is JSON text; this is not: {problem}.") from None
