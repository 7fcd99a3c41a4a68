"""A service in miniature for the harness's own tests: it speaks the contract's events about one and the same turn.

The name of a session says which rule is broken: a gap, a duplicate, a connection that ends in the middle, …
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

TOKENS = 20
TEXT = "".join(f"⟨m:{n}⟩ " for n in range(TOKENS))
TURN = "turn-1"
Event = dict[str, Any]


BREAKING = ("break", "crash", "crash-lost", "forget", "badresume", "overlap")
CUTS = dict.fromkeys(BREAKING, 11) | {"cut": 1}  # events of the first connection, which ends then


def turn_log(name: str = "good") -> list[Event]:
    """One direct turn: two announcements, twenty chunks as the events 2 … 21, the end as 22, the turn's end as 23."""
    user = {"id": "u1", "role": "user", "content": "hello", "status": "success", "participant": None}
    reply = {"id": "r1", "role": "assistant", "content": "", "status": "pending", "participant": "a"}
    events: list[Event] = [
        {"type": "message_update", "action": "created", "message": user, **at("start")},
        {"type": "message_update", "action": "created", "message": reply, **at(0)},
    ]
    length = 0
    for n in range(TOKENS):
        chunk = {"type": "message_chunk", "message_id": "r1", "participant": "a", "offset": length, "chunk": f"⟨m:{n}⟩ "}
        length += len(chunk["chunk"])
        events.append(chunk | at(length))
    events.append(complete(content="⟨m:0⟩ something else" if name == "differs" else TEXT))
    return [*events, {"type": "turn_complete", **at("end")}]


def at(place: int | str) -> Event:
    """What every event of the turn carries."""
    return {"turn_id": TURN, "cursor": f"{TURN}.{place}", "requestId": TURN}


def complete(status: str = "success", content: str = TEXT, reason: str | None = None) -> Event:
    message = {"id": "r1", "role": "assistant", "content": content, "status": status, "participant": "a"}
    event = {"type": "message_complete", "message_id": "r1", "participant": "a", "status": status}
    return event | {"failure_reason": reason, "latency_ms": 1, "first_token_ms": 1, "message": message} | at("e")


def merged(log: list[Event], first: int, last: int) -> Event:
    text = "".join(event["chunk"] for event in log[first : last + 1])
    return {**log[last], "offset": log[first]["offset"], "chunk": text}


def as_sent(name: str) -> list[Event]:
    """The log as a service with this fault sends it."""
    log = turn_log(name)
    match name:
        case "merge":
            return [*log[:2], *(merged(log, n, n + 4) for n in range(2, 22, 5)), *log[22:]]
        case "inside":
            return [*log[:6], merged(log, 4, 8), *log[9:]]
        case "duplicate":
            return [*log[:6], log[5], *log[6:]]
        case "gap":
            return [*log[:7], *log[8:]]
        case "swap":
            return [*log[:7], log[8], log[7], *log[9:]]
        case "second":
            return [*log[:23], {**log[22], "status": "failed", "failure_reason": "interrupted"}, log[23]]
        case "retold":
            return [log[0], *log]
        case "begun":
            return [log[0], {**log[1], "message": {**log[1]["message"], "content": "so"}}, *log[2:]]
        case "claims":
            return [*log[:7], {**log[7], **at(log[7]["offset"] + 7)}, *log[8:]]
        case "back":
            return [*log[:9], {**log[9], "cursor": log[7]["cursor"]}, *log[10:]]
        case "untyped":
            return [*log[:5], {"type": "error", "code": "oops", "requestId": TURN}, *log[5:]]
        case "unknown":
            return [*log[:5], {"type": "surprise"}, *log[5:]]
        case "early":
            return [*log[:10], log[23]]
        case "late":
            return [*log, log[5]]
        case "after-end":
            return [*log[:23], {**log[21], **at("e")}, log[23]]
        case "reason":
            return [*log[:22], complete("failed", TEXT, "the vendor said: no"), log[23]]
        case "canary":
            return [*log[:4], {**log[4], "chunk": "sk-CANARY"}, *log[5:]]
    return log


def snapshot(told: list[Event]) -> Event:
    """`session_state` after these events; after none, an empty session."""
    state: Event = {"type": "session_state", "requestId": "session", "session": {}, "messages": [], "turn": None}
    if not told:
        return state
    text = "".join(event.get("chunk", "") for event in told)
    user, reply = told[0]["message"], {**told[1]["message"], "content": text, "status": "streaming"}
    return state | {"messages": [user, reply], "turn": {"id": TURN, "cursor": told[-1]["cursor"]}}


def tiny_app(seen: dict[str, int]) -> Starlette:
    """`seen` counts how often each session was connected to."""

    def start_of(name: str, cursor: str | None) -> int:
        seen[name] = seen.get(name, 0) + 1
        told = [event["cursor"] for event in turn_log(name)]
        return told.index(cursor) + 1 if cursor and cursor != told[0] else 0

    async def socket_route(socket: WebSocket) -> None:
        name = socket.path_params["session_id"]
        cursor = socket.query_params.get("cursor")
        start = start_of(name, cursor)
        await socket.accept("parley.v1" if socket.scope["subprotocols"] else None)
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # RuntimeError: sent after the client had gone
            await speak(socket, name, cursor, start)

    async def speak(socket: WebSocket, name: str, cursor: str | None, start: int) -> None:
        log = as_sent(name)
        if name in ("4401", "4404", "4429"):
            await socket.close(int(name), "not you")
            return
        await socket.send_json({"type": "connection_established", "requestId": "session", "user": {}, "version": 1})
        if name == "forget" and start:
            start = 16
            await socket.send_json(snapshot(log[:start]))
        elif cursor is not None:
            claimed = log[start]["cursor"] if name == "badresume" else cursor
            await socket.send_json({"type": "resumed", "turn_id": TURN, "cursor": claimed, "requestId": "session"})
        else:
            await socket.send_json(snapshot([]))
        if cursor is None and name != "hello-first":
            await socket.receive_json()  # the message that starts the turn
        if name.startswith("crash") and seen[name] > 1:
            await end_for_the_dead(socket, name)
            return
        for n, event in enumerate(log[start - 2 * (name == "overlap" and start > 0) :], start):
            if seen[name] == 1 and n == CUTS.get(name):
                await socket.close(1012, "restart")
                return
            await socket.send_json(event)
            await asyncio.sleep(0.001)
        if name == "abandon":
            await socket.close(1011, "internal error")
            return
        while True:
            await socket.receive_text()

    async def end_for_the_dead(socket: WebSocket, name: str) -> None:
        kept = 5 if name == "crash-lost" else 12
        content = "".join(f"⟨m:{n}⟩ " for n in range(kept))
        await socket.send_json(complete("interrupted", content, "interrupted"))
        await socket.send_json({"type": "turn_complete", **at("end")})
        await socket.receive_text()

    async def post(request: Request) -> Response:
        body = await request.json()
        name = body["session_id"]
        if name == "busy":
            sentence = "A turn is running."
            return JSONResponse({"error": "busy", "message": sentence, "detail": sentence}, 409)
        accept = request.headers["accept"]
        if accept == "text/event-stream":
            return stream(name, start_of(name, None))
        log = as_sent(name)
        if accept == "application/x-ndjson":
            return PlainTextResponse("".join(json.dumps(event) + "\n" for event in log))
        if accept == "text/plain;format=text":
            return PlainTextResponse(TEXT)
        lines = ['a0:"one \\\\ two\\n"', 'b0:"say "hi""', 'a0:"end"', 'ad:{"finishReason":"stop"}']
        return PlainTextResponse("".join(f"{line}\n" for line in lines), headers={"X-Turn-Id": TURN})

    async def follow(request: Request) -> Response:
        name = request.path_params["session_id"]
        if name == "nothing":
            return Response(status_code=204)
        return stream(name, start_of(name, request.headers.get("last-event-id")))

    def stream(name: str, start: int) -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield b"retry: 1000\n: ok\n\n"
            for n, event in enumerate(as_sent(name)[start:], start):
                if seen[name] == 1 and n == CUTS.get(name):
                    return
                id = f"{TURN}.7" if name == "misnamed" else event["cursor"]
                data = f"id: {id}\nevent: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
                yield data[:7]
                await asyncio.sleep(0.001)
                yield data[7:]
            yield b"event: done\ndata: {}\n\n"

        return StreamingResponse(body(), media_type="text/event-stream")

    async def anonymous(request: Request) -> Response:
        tokens = {"access": "t0k", "refresh": "r", "token_type": "Bearer", "expires_in": 3600}
        name = (await request.json()).get("display_name", "Anonymous_0")
        return JSONResponse({"user": {"id": "g1", "display_name": name}, "tokens": tokens, "anonymous_token": "at"})

    async def models(request: Request) -> Response:
        return JSONResponse([{"id": "demo"}])

    async def sessions(request: Request) -> Response:
        if request.headers.get("authorization") != "Bearer t0k":
            return JSONResponse({"error": "authentication_required", "message": "x", "detail": "x"}, 401)
        return JSONResponse({"id": "good", **await request.json()}, 201)

    async def stopped(request: Request) -> Response:
        return JSONResponse({"stopped": True})

    async def listing(request: Request) -> Response:
        return JSONResponse([{"id": request.query_params["session_id"]}])

    async def give_ticket(request: Request) -> Response:
        return JSONResponse({"ticket": "tick", "expires_in": 30})

    return Starlette(
        routes=[
            WebSocketRoute("/ws/chat/session/{session_id}/", socket_route),
            Route("/api/messages/stream/", post, methods=["POST"]),
            Route("/api/sessions/{session_id}/stream/", follow),
            Route("/api/sessions/{session_id}/stop/", stopped, methods=["POST"]),
            Route("/api/auth/anonymous/", anonymous, methods=["POST"]),
            Route("/api/auth/ticket/", give_ticket, methods=["POST"]),
            Route("/api/models/", models),
            Route("/api/sessions/", sessions, methods=["POST"]),
            Route("/api/messages/", listing),
        ]
    )
