"""The pages and the widget: files of `widget/` as they are, compressed once; their headers let nothing else run."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from chat.errors import REPLY_SENTENCES, not_found
from chat.settings import HERE

from . import inputs

FOLDER = HERE / "widget"
TYPES = {".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
STYLE = FOLDER / "pages.css"
LINK = '<link rel="stylesheet" href="/widget/pages.css">'  # becomes the style: another request delays the first paint
GZIP = re.compile(r"\bgzip\b(?! *; *q=0(\.0*)?( *,| *$))", re.IGNORECASE)  # `q=0` says that it is not understood
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'sha256-{}'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'self'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
PAGE = {
    "Referrer-Policy": "no-referrer",  # the address of a shared session is what lets somebody read it
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
# A window that opened one of these pages cannot reach it. A browser starts a new process for such a page only when the
# answer is there, which costs 20 to 40 ms: pages without a secret in their address or fields do without.
SECRET = PAGE | {"Cross-Origin-Opener-Policy": "same-origin"}
ANYWHERE = {"Cross-Origin-Resource-Policy": "cross-origin"}  # pages that isolate themselves embed the widget, too


@dataclass(frozen=True)
class File:
    """A file as it is sent: whole, and compressed; `policy` lets a page have its one style."""

    plain: bytes
    packed: bytes
    tag: str
    media: str
    policy: dict[str, str]


@functools.lru_cache(maxsize=64)
def _read(path: Path, *changed: int) -> File:
    """The file, with the style in a page, as it was then (nanoseconds): who works on it sees it after a reload."""
    plain, policy = path.read_bytes(), {}
    if path.suffix == ".html":
        style = STYLE.read_bytes()
        plain = plain.replace(LINK.encode(), b"<style>%s</style>" % style)
        policy["Content-Security-Policy"] = POLICY.format(base64.b64encode(hashlib.sha256(style).digest()).decode())
    media = f"{TYPES[path.suffix]}; charset=utf-8"
    return File(plain, gzip.compress(plain, 9, mtime=0), f'"{hashlib.sha256(plain).hexdigest()[:20]}"', media, policy)


async def _send(name: str, more: dict[str, str], request: Request) -> Response:
    path = FOLDER / name
    file = _read(path, path.stat().st_mtime_ns, STYLE.stat().st_mtime_ns)
    headers = {"ETag": file.tag, "Cache-Control": "no-cache", "Vary": "Accept-Encoding"} | file.policy | more
    known = request.headers.get("if-none-match", "")
    if known == "*" or file.tag in known:  # in a list, and marked as weak, as well
        return Response(status_code=304, headers=headers)
    if GZIP.search(request.headers.get("accept-encoding", "")):
        return Response(file.packed, headers=headers | {"Content-Encoding": "gzip"}, media_type=file.media)
    return Response(file.plain, headers=headers, media_type=file.media)


index = functools.partial(_send, "index.html", PAGE)
arena = functools.partial(_send, "arena.html", PAGE)
leaderboard = functools.partial(_send, "leaderboard.html", PAGE)
# The page is the same for every token: its script asks whether there is such a session.
shared = functools.partial(_send, "shared.html", SECRET | {"X-Robots-Tag": "noindex"})
widget = functools.partial(_send, "widget.js", ANYWHERE)


async def debug(request: Request) -> Response:
    """A session's events as they come; on a local start only."""
    if inputs.state(request).settings.production:
        raise not_found("page")
    return await _send("debug.html", SECRET, request)


async def admin(request: Request) -> Response:
    """The operator's page, where ADMIN_TOKEN is set: its script asks for the token and keeps it in its memory."""
    if not inputs.state(request).settings.admin_token:
        raise not_found("page")
    return await _send("admin.html", SECRET, request)


async def asset(request: Request) -> Response:
    """The files that the pages are made of. Only names that were there at the start: no path can lead elsewhere."""
    name = request.path_params["name"]
    if name not in ASSETS:
        raise not_found("file")
    return await _send(name, {}, request)


ASSETS = {path.name for path in FOLDER.iterdir() if path.suffix in (".js", ".svg")} - {"widget.js"}


WORDS: dict[str, Any] = REPLY_SENTENCES | {
    "connecting": "Connecting",
    "syncing": "Catching up",
    "greeting": "Ask me anything",
    "battle": "Two models answer, and you judge",
    "log": "Conversation",
    "earlier": "Earlier messages",
    "you": "You",
    "model": "Assistant",
    "pending": "Thinking",
    "sending": "Waiting to be sent",
    "unread": "Open chat, new answer",
    "reset": "New chat",
    "stop": "Stop",
    "latest": "Latest",
    "copy": "Copy",
    "done": "Answer finished.",
    "stopped": "Stopped",
    "failed": "No answer came",
    "more": "Continue",
    "like": "Good answer",
    "dislike": "Bad answer",
    "which": "Which answer is better?",
    "model_a": "A is better",
    "model_b": "B is better",
    "tie": "Tie",
    "both_bad": "Both are bad",
    "voted": "Thanks for your vote",
}


async def widget_settings(request: Request) -> Response:
    """The first words of a widget as the operator wants them, and those that stand beside answers.

    The widget asks when it is first opened.
    """
    settings = inputs.state(request).settings
    # A script counts UTF-16 units, of at most three bytes; the rest of a frame is for what JSON escapes.
    longest = min(settings.prompt_max, settings.frame_max // 4)
    wishes = WORDS | {"title": settings.name, "suggestions": settings.suggestions, "longest": longest}
    wishes["too_large"] = f"A message has at most {longest} characters."
    wishes |= {"greeting": settings.greeting} if settings.greeting else {}
    return inputs.answer(wishes, headers={"Cache-Control": "max-age=60"})
