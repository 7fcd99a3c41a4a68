"""The writer for the peers that are brokers: publishes over TCP to NATS, Mosquitto or nchan, as a service in front
of one would. It is no part of the server that is measured.

    brokers.py nats|mqtt|nchan <broker port>        listens on $PORT for GET /write
"""

import asyncio
import json
import os
import sys

import writer

kind, port = sys.argv[1], int(sys.argv[2])


def nats(session: str, payload: bytes) -> bytes:
    return b"PUB %s %d\r\n%s\r\n" % (session.encode(), len(payload), payload)


def mqtt(session: str, payload: bytes) -> bytes:
    """A PUBLISH packet with QoS 0."""
    body = len(session).to_bytes(2, "big") + session.encode() + payload
    size, length = len(body), b""
    while True:
        length += bytes([size % 128 + 128 * (size > 127)])
        size //= 128
        if not size:
            return b"\x30" + length + body


def nchan(session: str, payload: bytes) -> bytes:
    return b"POST /pub/%s HTTP/1.1\r\nHost: bench\r\nContent-Length: %d\r\n\r\n%s" % (
        session.encode(),
        len(payload),
        payload,
    )


packet = {"nats": nats, "mqtt": mqtt, "nchan": nchan}[kind]
hello = {
    "nats": b'CONNECT {"verbose":false,"pedantic":false}\r\n',
    "mqtt": b"\x10\x12\x00\x04MQTT\x04\x02\x00\x00\x00\x06writer",
    "nchan": b"",
}[kind]


async def main() -> None:
    answers, broker = await asyncio.open_connection("127.0.0.1", port)
    broker.write(hello)

    async def read_answers():
        while data := await answers.read(65536):
            if data.endswith(b"PING\r\n"):  # NATS asks now and then
                broker.write(b"PONG\r\n")

    async def publish(session, event):
        broker.write(packet(session, json.dumps(event).encode()))
        await broker.drain()

    async def control(request, response):
        line = await request.readline()
        if not line:  # somebody looked whether we listen
            response.close()
            return
        path = line.split(b" ")[1].decode()
        tasks.append(writer.start(publish, path.partition("?")[2]))
        response.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nConnection: close\r\n\r\nwriting")
        response.close()

    tasks = [asyncio.ensure_future(read_answers())]
    server = await asyncio.start_server(control, "127.0.0.1", int(os.environ["PORT"]))
    await server.serve_forever()


asyncio.run(main())
