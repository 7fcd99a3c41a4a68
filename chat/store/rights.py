"""The right by which a reader reads a session: its admission, which runs again for every snapshot, write and change."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ChatError, not_found
from . import accounts, sessions
from .accounts import Account
from .database import Database
from .sessions import Session


@dataclass(frozen=True, slots=True)
class Right:
    """A reader's right to a session, and its ground: a member's, a share link's, the public's or the operator's.

    `session` is the session as it was at the admission. expires_at: of the credential, Unix seconds; 0: never.
    """

    database: Database
    session: Session
    account: Account | None = None
    share_token: str = ""
    member: bool = True  # may write as well
    operator: bool = False  # reads any session, and speaks in one that was taken over
    expires_at: float = 0.0

    @property
    def account_id(self) -> str:
        return accounts.account_id(self.account)

    @property
    def grounds(self) -> tuple[str, int, bool, str, bool]:
        """Return what the admission stands on: readers with the same grounds keep or lose the right together."""
        version = self.account.token_version if self.account is not None else 0
        return self.account_id, version, self.member, self.share_token, self.operator

    def writer(self) -> Account:
        """Return who may write. Raises `forbidden` for a reader of a share."""
        if self.account is None or not self.member:
            raise ChatError("forbidden", "This is a read-only view of the session.")
        return self.account

    async def select(self) -> Session:
        """Return the session as it is now. Raises `not_found` when the right has ended or the id is used again."""
        if self.operator:
            session = await sessions.select_unchecked(self.database, self.session.id)
        elif self.share_token:
            session = await sessions.select_shared(self.database, self.share_token)
        elif self.member and self.account is not None:
            session = await sessions.select_session(self.database, self.session.id, self.account.id)
        else:
            session = await sessions.select_readable(self.database, self.session.id, self.account_id)
        if session.key != self.session.key:
            raise not_found("session")
        return session

    async def check(self) -> Session:
        """Admit again and return the session. Raises as `select`, and `token_invalid` when the tokens were revoked."""
        if self.account is not None:
            await accounts.select_account(self.database, self.account.id, self.account.token_version)
        return await self.select()
