"""Everything that can be measured: how each peer is started, where a socket of a session connects, how its writer is
set off. Parley itself is in parley.py, with the same four verbs.
"""

import json
import os
import socket
from pathlib import Path
from urllib.parse import urlencode

from machine import (
    CACHE,
    CLIENT,
    HERE,
    SERVER,
    Load,
    Missing,
    Process,
    Redis,
    compiled,
    free_port,
    node,
    tool,
    venv,
    wait_for_port,
)

PEERS = HERE / "peers"


class Target:
    """A started server. `label` is its name in tables; `load_options` say how its stream is read."""

    label = ""
    load_options: tuple[str, ...] = ()
    probe = "/api/health/"  # answered at once by a loop that has nothing else to do
    in_scenarios: tuple[str, ...] = ("S1", "S2", "S3", "idle", "memory", "growth")

    def __init__(self, redis: Redis, **attributes: object) -> None:
        self.redis = redis
        vars(self).update(attributes)
        self.port = self.write_port = free_port()
        self.processes: list[Process] = []  # those whose cost counts
        self.helpers: list[Process] = []  # those whose cost does not
        self.triggers: list[socket.socket] = []
        try:
            self.start()
        except BaseException:
            self.stop()
            raise

    def start(self) -> None:
        raise NotImplementedError

    def serve(self, *command: object, **environment: object) -> None:
        """Start the server on its core, told its port and its Redis, and wait until it listens."""
        env = {**os.environ, "PORT": self.port, "REDIS_URL": self.redis.url, **environment}
        env = {name: str(value) for name, value in env.items()}
        process = Process(*command, cores=SERVER, log=type(self).__name__.lower(), env=env)
        self.processes.append(process)
        wait_for_port(self.port, process)

    def upstream(self) -> str:
        """Start a model vendor on the client's cores; its address."""
        port = free_port()
        env = {**os.environ, "PORT": str(port)}
        python = venv("peers", PEERS / "requirements.txt")
        vendor = Process(python, "upstream.py", cores=CLIENT, log="upstream", env=env)
        self.helpers.append(vendor)
        wait_for_port(port, vendor)
        return f"http://127.0.0.1:{port}"

    def socket(self, session: int) -> str:
        """The line of load.c's targets file that opens one socket in this session."""
        return f"/ws/s{session}"

    def prepare(self, sessions: int) -> None:
        """Make the sessions that sockets will join; peers need none."""

    def write(self, load: Load, sessions: int, rate: float, seconds: float, pad: int = 0) -> None:
        """Set the writer off: so many tokens a second in each session. A saturated peer answers late: nobody waits."""
        trigger = socket.create_connection(("127.0.0.1", self.write_port), 5)
        query = urlencode({"sessions": sessions, "rate": rate, "seconds": seconds, "pad": pad})
        trigger.sendall(f"GET /write?{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        self.triggers.append(trigger)

    def cpu(self) -> float:
        return sum(process.cpu() for process in self.processes)

    def memory(self) -> float:
        return sum(process.memory() for process in self.processes)

    def stop(self) -> None:
        for trigger in self.triggers:
            trigger.close()
        for process in self.processes + self.helpers:
            process.stop()


class PythonTarget(Target):
    app = ""

    def start(self) -> None:
        python = venv("peers", PEERS / "requirements.txt")
        command = ["-m", "uvicorn", "--port", self.port, "--log-level", "warning", "--no-access-log"]
        self.serve(python, *command, self.app)


class Channels(PythonTarget):
    label = "Channels + channels_redis, uvicorn"
    app = "channels_app:app"


class ChannelsDaphne(Target):
    label = "Channels + channels_redis, daphne"

    def start(self) -> None:
        python = venv("peers", PEERS / "requirements.txt")
        self.serve(python, "-m", "daphne", "-b", "127.0.0.1", "-p", self.port, "-v", "0", "channels_app:app")


class ChannelsPubSub(Target):
    label = "Channels, pub/sub layer, uvicorn"

    def start(self) -> None:
        python = venv("peers", PEERS / "requirements.txt")
        layer = "channels_redis.pubsub.RedisPubSubChannelLayer"
        command = ["-m", "uvicorn", "--port", self.port, "--log-level", "warning", "--no-access-log"]
        self.serve(python, *command, "channels_app:app", CHANNEL_LAYER=layer)


class Broadcaster(PythonTarget):
    label = "broadcaster as in its README, uvicorn"
    app = "broadcaster_app:app"


class PythonSocketIO(PythonTarget):
    label = "python-socketio, Redis manager"
    app = "socketio_app:asgi"
    load_options = ("--answer", "2=3")

    def socket(self, session: int) -> str:
        return f"/socket.io/?EIO=4&transport=websocket&session=s{session}\ttext=40"


class NodeWs(Target):
    label = "Node ws + ioredis"

    def start(self) -> None:
        self.serve(node(), "ws_app.js", NODE_PATH=CACHE / "node/node_modules")


class NodeSocketIO(PythonSocketIO):
    label = "Node socket.io + Redis adapter"

    def start(self) -> None:
        self.serve(node(), "socketio_app.js", NODE_PATH=CACHE / "node/node_modules")


class Broker(Target):
    """A server that is published to from outside: its writer is a process of its own, whose cost is not counted."""

    kind = ""

    def write_from_outside(self, publish_port: int) -> None:
        python = venv("peers", PEERS / "requirements.txt")
        self.write_port = free_port()
        env = {**os.environ, "PORT": str(self.write_port)}
        writer = Process(python, "brokers.py", self.kind, publish_port, cores=CLIENT, log="brokers", env=env)
        self.helpers.append(writer)
        wait_for_port(self.write_port, writer)

    def configuration(self, name: str, text: str) -> Path:
        path = CACHE / name
        path.write_text(text)
        return path


class Nats(Broker):
    label = "NATS server, WebSocket listener"
    kind = "nats"
    load_options = ("--answer", "PING\r\n=PONG\r\n")

    def start(self) -> None:
        program, port = tool("nats-server", "nats-server"), free_port()
        text = f"listen: 127.0.0.1:{port}\nwebsocket {{ listen: 127.0.0.1:{self.port}, no_tls: true }}\n"
        self.serve(program, "-c", self.configuration("nats.conf", text))
        self.write_from_outside(port)

    def socket(self, session: int) -> str:
        lines = b'CONNECT {"verbose":false,"pedantic":false}\r\n', f"SUB s{session} 1\r\n".encode()
        return "/\t" + "\t".join(f"hex={line.hex()}" for line in lines)


class Mosquitto(Broker):
    label = "Mosquitto, MQTT over WebSocket"
    kind = "mqtt"

    def start(self) -> None:
        program, port = tool("mosquitto", "mosquitto"), free_port()
        text = f"allow_anonymous true\nlistener {port} 127.0.0.1\nlistener {self.port} 127.0.0.1\nprotocol websockets\n"
        self.serve(program, "-c", self.configuration("mosquitto.conf", text))
        self.write_from_outside(port)
        self.clients = 0

    def socket(self, session: int) -> str:
        """CONNECT with a client id of its own, SUBSCRIBE with QoS 0."""
        self.clients += 1
        name, topic = f"c{self.clients:07}".encode(), f"s{session}".encode()
        connect = b"\x10\x14\x00\x04MQTT\x04\x02\x00\x00\x00\x08" + name
        subscribe = bytes([0x82, 5 + len(topic), 0, 1, 0, len(topic)]) + topic + b"\x00"
        return f"/\tprotocol=mqtt\thex={connect.hex()}\thex={subscribe.hex()}"


class Nchan(Broker):
    label = "nginx + nchan"
    kind = "nchan"

    def start(self) -> None:
        program, module = tool("nginx", "nginx"), Path("/usr/lib/nginx/modules/ngx_nchan_module.so")
        if not module.exists():
            raise Missing("install libnginx-mod-nchan")
        user = "user root;" if os.getuid() == 0 else ""
        kinds = "client_body", "proxy", "fastcgi", "uwsgi", "scgi"
        scratch = " ".join(f"{kind}_temp_path {CACHE}/nginx;" for kind in kinds)
        text = f"""
            load_module {module};
            daemon off; worker_processes 1; pid {CACHE}/nginx.pid; error_log {CACHE}/nginx.log; {user}
            events {{ worker_connections 16384; }}
            http {{
                access_log off; keepalive_requests 1000000000; {scratch}
                server {{
                    listen 127.0.0.1:{self.port};
                    location ~ ^/ws/(.+)$ {{ nchan_subscriber websocket; nchan_channel_id $1; }}
                    location ~ ^/pub/(.+)$ {{ nchan_publisher; nchan_channel_id $1; }}
                }}
            }}
        """
        self.serve(program, "-c", self.configuration("nginx.conf", text))
        self.write_from_outside(self.port)


class Loop(Target):
    label = "raw asyncio + uvloop, no service"

    def start(self) -> None:
        self.serve(venv("peers", PEERS / "requirements.txt"), "loop.py")


class Limit(Target):
    label = "C, epoll, one send per token"
    in_scenarios = (
        "S1",
        "S2",
        "S3",
        "idle",
        "growth",
    )  # not memory: it waits for a blocked reader, so there is nothing to measure

    def start(self) -> None:
        self.serve(compiled(PEERS / "limit.c"), self.port)


class Relay(PythonTarget):
    label = "Starlette + httpx relay"
    in_scenarios = ("upstream-streams",)
    app = "relay:app"
    model = "m"

    def start(self) -> None:
        os.environ["UPSTREAM"] = self.upstream()
        super().start()

    def turns(self, count: int, tokens: int, rate: float) -> list:
        message = {"role": "user", "content": f"/count {tokens} {rate:g}"}
        asked = {"model": self.model, "stream": True, "messages": [message]}
        return [["POST", "/v1/chat/completions", {}, asked]] * count


class LiteLLM(Relay):
    label = "LiteLLM's proxy"
    probe = "/health/liveliness"

    def start(self) -> None:
        python = venv("litellm", PEERS / "litellm.txt")
        parameters = {"model": "openai/m", "api_base": f"{self.upstream()}/v1", "api_key": "none"}
        text = json.dumps({"model_list": [{"model_name": "m", "litellm_params": parameters}]})
        path = CACHE / "litellm.yaml"
        path.write_text(text)
        command = ["--config", path, "--host", "127.0.0.1", "--port", self.port, "--num_workers", 1]
        self.serve(python.parent / "litellm", *command, LITELLM_LOG="ERROR", LITELLM_LOCAL_MODEL_COST_MAP="True")
