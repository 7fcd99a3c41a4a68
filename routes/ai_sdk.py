"""The AI SDK's `useChat`: its requests → our turns. https://ai-sdk.dev/docs/ai-sdk-ui/transport

The chat's id is the session's; a session that does not exist is made by the first message. The client sends its whole
conversation each time; the one we have is what counts, and the last user message is what is new.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from chat.formats import Id
from chat.formats.ui_messages import UIMessage, UIMessages, last_words
from chat.live.answers import start_of
from chat.store import sessions, turns
from chat.store.accounts import account_id
from chat.store.database import new_id
from chat.store.rights import Right
from chat.store.turns import Ask

from . import inputs, messages
from .messages import Wish


class ChatRequest(Wish, kw_only=True):
    """A request of `useChat`. The `body` of its options stands beside these fields, and may choose the models."""

    id: Id  # of the chat
    messages: Annotated[list[UIMessage], Meta(max_length=1000)]
    trigger: Literal["submit-message", "regenerate-message"] = "submit-message"
    messageId: str | None = None  # of a message that was sent before and says something else now


async def chat(request: Request) -> Response:
    """Start the turn of the last user message and tell it as chunks.

    Where that message was edited, or is to be answered again, the turn takes the place of the old one and all after it.
    """
    known = await messages.speaker(request)
    wish = inputs.with_query(request, await inputs.body(request, ChatRequest))
    wish.session_id = wish.id
    message_id, text = last_words(wish.messages)
    again = wish.trigger == "regenerate-message"
    reply_ids = {"a": new_id()} if again else {}  # of a reply that is not there yet: an answer made again is a new one
    ask = Ask(message_id or new_id(), text, reply_ids, replaces=again or wish.messageId == message_id)
    return await messages.start(request, known, wish, ask, makes=True, spoken=UIMessages)


async def stream(request: Request) -> Response:
    """Tell the running turn again from its start; 204 when none runs, also where there is no such chat yet.

    These clients cannot go on in the middle, whatever number of chunks they say they have.
    """
    account = await messages.speaker(request)
    database, id = inputs.state(request).database, request.path_params["session_id"]
    session = await sessions.find_session(database, id, account_id(account))
    if session is None or not (turn_id := await turns.select_running_turn(database, session)):
        return Response(status_code=204)
    return await messages.follow(request, Right(database, session, account), start_of(turn_id), spoken=UIMessages)
