"""The one mask between what is stored and what anyone is shown.

Every session and message that leaves the service is made here, key by key: a field that is new in storage reaches its
owner only after a line here, and other readers only after a word in `READABLE` or `SAID`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from ..settings import Model
from .accounts import iso
from .queries import Row
from .sessions import SIDES, Session
from .turns import PERSON

# owner: whose session it is, the voter of a blind battle included; reader: whoever else may read it, by its link or
# because its owner has made it public.
Audience = Literal["owner", "reader"]

READABLE = (
    "id", "mode", "title", "model_a", "model_b", "created_at", "updated_at", "message_count", "last_message_at",
    "version", "voted",
)  # fmt: skip
SAID = (
    "id", "session", "role", "content", "model", "parent_message_ids", "child_ids", "position", "participant",
    "status", "failure_reason", "attachments", "created_at",
)  # fmt: skip


def audience(session: Session, account_id: str) -> Audience:
    """Return the role of this account, "" for a caller without one, in a session that it may read."""
    return "owner" if account_id == session.account_id else "reader"


def model_card(model: Model) -> dict[str, Any]:
    return {
        "id": model.id,
        "provider": model.vendor or model.provider,
        "model_code": model.model_code or model.id,
        "display_name": model.display_name or model.id,
        "capabilities": ["text"],
        "supported_languages": [],
        "is_active": True,
        "release_date": None,
        "model_type": "LLM",
        "is_thinking_model": model.thinks,
        "url": None,
        "random_only": False,
    }


class Mask:
    """Turns sessions and messages into what a reader may see."""

    def __init__(self, models: Mapping[str, Model], base_url: str = "") -> None:
        """models: those of the settings, offered or not; base_url: where this service is met, "" if nobody said."""
        self._cards = {id: model_card(model) for id, model in models.items()}
        self._base_url = base_url

    def model(self, id: str) -> dict[str, Any]:
        """The card of a model, which the settings may not have any more."""
        return self._cards.get(id) or model_card(Model(id=id, provider="unknown")) | {"is_active": False}

    def card(self, session: Session, side: str | None) -> dict[str, Any] | None:
        """The model on one side: its card, or in a blind battle a slot that says nothing about it."""
        hidden = {"a": session.model_a, "b": session.model_b}.get(side or "")
        if hidden is None:
            return None
        if session.blind:
            slot = hashlib.sha256(f"{session.id}:{side}".encode()).hexdigest()[:32]
            name = "Model A" if side == "a" else "Model B"
            return {"id": slot, "display_name": name, "provider": "Random", "is_thinking_model": False}
        return self.model(hidden.for_server())

    def _author(self, session: Session, row: Row) -> dict[str, Any] | None:
        """Return the card of whoever said a message: of its side's model, or of a person; None for the user's."""
        model = row["model"] or ""
        if model.startswith(PERSON):
            return model_card(Model(id="person", provider="person", display_name=model[len(PERSON) :]))
        return self.card(session, row["participant"]) if row["role"] == "assistant" else None

    def share_url(self, session: Session) -> str | None:
        return f"{self._base_url}/shared/{session.share_token}" if session.share_token else None

    def session(self, session: Session, audience: Audience = "owner") -> dict[str, Any]:
        """The session as this audience may read it."""
        whole = {
            "id": session.id,
            "user": {"id": session.account_id, "display_name": session.display_name},
            "mode": session.mode,
            "title": session.title,
            "model_a": self.card(session, "a"),
            "model_b": self.card(session, "b"),
            "is_public": session.is_public,
            "share_token": session.share_token,
            "share_url": self.share_url(session),
            "created_at": iso(session.created_at),
            "updated_at": iso(session.updated_at),
            "metadata": msgspec.json.decode(session.metadata),
            "expires_at": None,
            "message_count": session.message_count,
            "last_message_at": iso(session.last_message_at),
            "is_pinned": session.is_pinned,
            "version": session.version,
            "voted": session.voted_at is not None,
        }
        return whole if audience == "owner" else {name: whole[name] for name in READABLE}

    def state(self, session: Session) -> dict[str, Any]:
        """The session as `session_state` carries it, to whoever may read it."""
        whole = self.session(session, "reader")
        for side in ("model_a", "model_b"):
            whole[side] = whole[side] and {name: whole[side][name] for name in ("id", "display_name")}
        return {name: whole[name] for name in ("id", "mode", "title", "version", "voted", "model_a", "model_b")}

    def summary(self, session: Session) -> dict[str, Any]:
        """The session as a line of its owner's list."""
        whole = self.session(session)
        names = ("id", "mode", "title", "created_at", "updated_at", "message_count", "is_pinned")
        cards = {f"model_{side}_name": (whole[f"model_{side}"] or {}).get("display_name") for side in SIDES}
        return {name: whole[name] for name in names} | cards | {"session_type": session.session_type}

    def message(self, session: Session, row: Row, audience: Audience = "owner") -> dict[str, Any]:
        """A row of `messages` as a Message. In a blind battle, times that could reveal a model are left out."""
        blind = session.blind and row["role"] == "assistant"
        whole = {
            "id": row["id"],
            "session": session.id,
            "role": row["role"],
            "content": row["content"],
            "model": self._author(session, row),
            "parent_message_ids": msgspec.json.decode(row["parent_ids"]),
            "child_ids": [],
            "position": row["position"],
            "participant": row["participant"],
            "status": row["status"],
            "failure_reason": _coarse(row["failure_reason"]) if blind else row["failure_reason"],
            "attachments": [],
            "metadata": {},
            "feedback": _preference(row["feedback"]),
            "created_at": iso(row["created_at"]),
            "latency_ms": None if blind else row["latency_ms"],
            "first_token_ms": None if blind else row["first_token_ms"],
            "has_feedback": row["feedback"] is not None,
        }
        return whole if audience == "owner" else self.shared(whole)

    def shared(self, message: dict[str, Any]) -> dict[str, Any]:
        """An owner's Message as any other reader may read it."""
        return {name: message[name] for name in SAID}

    def messages(self, session: Session, rows: list[Row], audience: Audience = "owner") -> list[dict[str, Any]]:
        """Messages with their children filled in from each other."""
        messages = [self.message(session, row, audience) for row in rows]
        by_id = {message["id"]: message for message in messages}
        for message in messages:
            for parent in message["parent_message_ids"]:
                if parent in by_id:
                    by_id[parent]["child_ids"].append(message["id"])
        return messages


def _preference(feedback: str | None) -> str | None:
    """A turn's vote, which its user message keeps, or the like of a reply; never the words of a report."""
    kept = None if feedback is None else msgspec.json.decode(feedback)
    if isinstance(kept, dict):
        return kept["preference"] if kept["preference"] in ("like", "dislike") else None
    return kept


def _coarse(reason: str | None) -> str | None:
    """How a blind battle's side failed: vendors fail in ways of their own."""
    return "provider_unavailable" if reason and reason.startswith("provider_") else reason
