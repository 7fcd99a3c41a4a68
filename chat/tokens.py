"""Signed tokens: the proof of a caller's identity. The one door to itsdangerous.

A token is `{id, kind, tv, exp, jti}` in the clear, signed; it carries ids only. Keys are a list, oldest → newest: all
verify, the last one signs, so that a key is rotated by adding one and later dropping the oldest. Each kind has its own
salt: a ticket is no access token. `exp` stands in the payload because itsdangerous' own timestamps refuse a token that
a worker with a clock one second ahead has signed.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Sequence

import msgspec
from itsdangerous import BadData, URLSafeSerializer

from .errors import ChatError

LIFETIMES = {"access": 3600, "refresh": 30 * 86400, "anonymous": 30 * 86400, "ticket": 30, "admin": 8 * 3600}  # seconds
SKEW = 60  # seconds two workers' clocks may be apart
GRACE = {"ticket": 0}  # seconds a token is good beyond its end, where that is not SKEW: tickets are short on purpose


class Token(msgspec.Struct, frozen=True):
    """The contents of a verified token. `tv` is the account's token version at creation; `jti`: notes its use."""

    id: str
    kind: str
    tv: int
    exp: int
    jti: str


class Tokens:
    """Makes and verifies tokens with the service's keys."""

    def __init__(self, keys: Sequence[str], clock: Callable[[], float] = time.time) -> None:
        """clock: Unix seconds, the same on every worker as far as can be."""
        self._clock = clock
        self._oldest = keys[0].encode()
        self._serializers = {
            kind: URLSafeSerializer(list(keys), salt=f"parley.{kind}") for kind in LIFETIMES
        }

    def make(self, kind: str, account_id: str, version: int = 1) -> str:
        exp = int(self._clock()) + LIFETIMES[kind]
        body = {"id": account_id, "tv": version, "exp": exp, "jti": secrets.token_hex(8)}
        return str(self._serializers[kind].dumps(body))

    def verify(self, text: str, *kinds: str) -> Token:
        """Return the token if it is one of `kinds`. Raises `token_expired` or `token_invalid`."""
        return self.fresh(self.read(text, *kinds))

    def read(self, text: str, *kinds: str) -> Token:
        """Return the token if it is one of `kinds`, however old. Raises `token_invalid`."""
        for kind in kinds:
            try:
                return msgspec.convert(self._serializers[kind].loads(text) | {"kind": kind}, Token)
            except (BadData, msgspec.ValidationError, TypeError):
                continue
        raise ChatError("token_invalid", "This token is not valid here.")

    def fresh(self, token: Token) -> Token:
        """Return the token if it is still good. Raises `token_expired`."""
        if token.exp + GRACE.get(token.kind, SKEW) < self._clock():
            raise ChatError("token_expired", "This token has expired. Get a new one and try again.")
        return token

    def pseudonym(self, purpose: str, text: str) -> str:
        """A name for an id or an address that nobody can trace back to it, or to its name for another purpose.

        The pseudonym stays the same while the oldest key is kept.
        """
        return hmac.new(self._oldest, f"parley.{purpose}:{text}".encode(), hashlib.sha256).hexdigest()[:24]


def operator_version(admin_token: str) -> int:
    """Return the token version of the operator, another one for each ADMIN_TOKEN: a new one revokes the old one's."""
    return int.from_bytes(hashlib.sha256(admin_token.encode()).digest()[:6])
