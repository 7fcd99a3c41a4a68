"""Every WebSocket route."""

from starlette.routing import WebSocketRoute

from . import session

table = [
    WebSocketRoute("/ws/chat/session/{session_id}", session.session),
]
