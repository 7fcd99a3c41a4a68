"""The caller of a connection: the credential and the address of a connection, the same over HTTP and sockets.

Plain values in, plain values out: this file knows neither requests nor accounts.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType

NOTHING: Mapping[str, str] = MappingProxyType({})
PORT = re.compile(r"^(?:\[([^]]*)\]|([^:]*))(?::\d{1,5})?\Z")  # `1.2.3.4:567`, `[::1]:567`, `[::1]`
IN_SUBPROTOCOLS = {"t.": "access", "a.": "anonymous"}  # prefix, kind of token
IN_QUERY = (("ticket", "ticket"), ("token", "access"), ("anonymous_token", "anonymous"))  # parameter, kind of token


def credential(
    headers: Mapping[str, str],
    query: Mapping[str, str] = NOTHING,
    subprotocols: Iterable[str] = (),
    *,
    token_in_query: bool = False,
) -> tuple[str, str] | None:
    """Return the kind and text of the first credential present, or None.

    A bad credential counts as well: a good one further on does not make up for it. `token_in_query` says whether the
    query may hold lasting tokens too; a ticket is good once and may always stand there.
    """
    scheme, _, text = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return "access", text.strip()
    if "x-anonymous-token" in headers:
        return "anonymous", headers["x-anonymous-token"]
    for offered in subprotocols:
        if offered[:2] in IN_SUBPROTOCOLS:
            return IN_SUBPROTOCOLS[offered[:2]], offered[2:]
    allowed = IN_QUERY if token_in_query else IN_QUERY[:1]
    return next(((kind, query[name]) for name, kind in allowed if name in query), None)


def address(client: tuple[str, int] | None, forwarded: Iterable[str], trusted: int) -> str:
    """Return the caller's address as limits count it.

    client: the ASGI scope's, whoever opened the connection; forwarded: the X-Forwarded-For lines, of which only as many
    last entries count as there are trusted proxies in front of us: a caller may have made up those left of them.
    """
    hops = [hop.strip() for line in forwarded for hop in line.split(",")]
    return counted(hops[-trusted] if trusted and len(hops) >= trusted else client[0] if client else "")


@lru_cache(1024)  # 8 µs, and a turn is counted three times by one address
def counted(text: str) -> str:
    """Return the name under which an address is counted: one IPv6 customer has a whole /64 to pick from.

    Some proxies write the port behind it, which is another one for each connection. On a socket that listens on both,
    an IPv4 caller shows as `::ffff:1.2.3.4`: as IPv6 all of them would be one.
    """
    try:
        ip = ipaddress.ip_address(PORT.sub(r"\1\2", text))
    except ValueError:
        return text[:64] or "unknown"
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    return str(ip.ipv4_mapped or ipaddress.ip_network(f"{ip}/64", strict=False))
