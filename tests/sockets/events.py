"""What every event of the contract looks like (§6)."""

from __future__ import annotations

from typing import Any

from chat.errors import STATUS

OF_A_TURN = {"turn_id", "cursor"}
EVENTS = {
    "connection_established": {"user", "session_id", "version"},
    "session_state": {"session", "messages", "turn"},
    "resumed": {"turn_id", "cursor"},
    "message_update": OF_A_TURN | {"message", "action"},
    "message_chunk": OF_A_TURN | {"message_id", "participant", "chunk", "offset"},
    "message_complete": OF_A_TURN
    | {"message_id", "participant", "status", "failure_reason", "latency_ms", "first_token_ms", "message"},
    "turn_complete": OF_A_TURN,
    "session_update": {"session", "action", "version"},
    "typing_indicator": {"user_id", "is_typing"},
    "pong": {"timestamp"},
    "test": {"message"},
    "error": {"code", "message", "retryable"},
}
OPTIONAL = {"error": {"retry_after", "message_id"}}
MESSAGE = set(
    "id session role content model parent_message_ids child_ids position participant status failure_reason attachments "
    "metadata feedback created_at latency_ms first_token_ms has_feedback".split()
)
SESSION = set(
    "id user mode title model_a model_b is_public share_token share_url created_at updated_at metadata expires_at "
    "message_count last_message_at is_pinned version voted".split()
)
# To whoever reads without an account of the session's owner.
SHARED = SESSION - set("user is_public share_token share_url metadata expires_at is_pinned".split())
SAID = MESSAGE - set("metadata feedback has_feedback latency_ms first_token_ms".split())


def odd(event: dict[str, Any]) -> str:
    """What about an event is not as the contract says; empty when nothing is."""
    kind = event["type"]
    needed = EVENTS[kind] | {"type", "requestId"}
    if not needed <= event.keys() <= needed | OPTIONAL.get(kind, set()):
        return f"expected the fields {sorted(needed)}"
    if event["requestId"] != (event["turn_id"] if EVENTS[kind] >= OF_A_TURN and kind != "resumed" else "session"):
        return "whose request is this?"
    parts = {
        "connection_established": lambda: event["user"].keys() == {"id", "display_name", "is_anonymous"},
        "session_state": lambda: _is_state(event),
        "message_update": lambda: event["message"].keys() == MESSAGE and event["action"] == "created",
        "message_complete": lambda: event["message"].keys() == MESSAGE,
        "session_update": lambda: event["session"].keys() in ([{"id"}] if event["action"] == "deleted" else [SESSION, SHARED]),
        "error": lambda: event["code"] in STATUS,
    }
    return "" if parts.get(kind, lambda: True)() else "a part of it has other fields"


def _is_state(event: dict[str, Any]) -> bool:
    session, turn = event["session"], event["turn"]
    cards = [session["model_a"], session["model_b"]]
    return (
        session.keys() == {"id", "mode", "title", "model_a", "model_b", "version", "voted"}
        and all(card is None or card.keys() == {"id", "display_name"} for card in cards)
        and (all(m.keys() == MESSAGE for m in event["messages"]) or all(m.keys() == SAID for m in event["messages"]))
        and (turn is None or turn.keys() == {"id", "cursor"})
    )
