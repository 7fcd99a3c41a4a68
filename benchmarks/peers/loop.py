"""No service at all: an asyncio protocol on uvloop that frames each token once and writes it to every socket.

What a Python service could reach if everything around the send were free. No Redis, no authentication, no limits.
"""

import asyncio
import base64
import hashlib
import json
import os
from collections import defaultdict

import uvloop
import writer

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
rooms = defaultdict(set)


class Socket(asyncio.Protocol):
    head = b""
    room = None

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        if self.room is not None:  # nothing a client says matters here
            return
        self.head += data
        if b"\r\n\r\n" not in self.head:
            return
        path = self.head.split(b" ", 2)[1].decode()
        if path.startswith("/write"):
            self.writer = writer.start(publish, path.partition("?")[2])
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nwriting")
            return
        headers = dict(line.split(b": ", 1) for line in self.head.split(b"\r\n")[1:] if b": " in line)
        accept = base64.b64encode(hashlib.sha1(headers[b"Sec-WebSocket-Key"] + GUID).digest())
        self.transport.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )
        self.room = rooms[path.rpartition("/")[2]]
        self.room.add(self.transport)

    def connection_lost(self, error):
        if self.room is not None:
            self.room.discard(self.transport)


def frame(text: bytes) -> bytes:
    if len(text) < 126:
        return bytes([0x81, len(text)]) + text
    return bytes([0x81, 126]) + len(text).to_bytes(2, "big") + text


async def publish(session, event):
    data = frame(json.dumps(event).encode())
    for transport in rooms[session]:
        transport.write(data)


async def main():
    server = await asyncio.get_running_loop().create_server(Socket, "127.0.0.1", int(os.environ["PORT"]), backlog=1024)
    await server.serve_forever()


uvloop.run(main())
