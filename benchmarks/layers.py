"""Where Parley's microseconds go, by layer, in one fan-out scenario: py-spy's samples on the measured cost.

    python benchmarks/layers.py S1|S2|S3 [seconds] [--functions]

A sample counts for the innermost of our own files on its stack, so what a layer asks of the standard library is its
own cost; a `send(2)` is the cost of whoever wrote to the socket. py-spy has to be on the PATH.
"""

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from machine import CLIENT, Process, tool
from parley import Parley
from scenarios import join, phase, with_target

SHAPES = {"S1": (1, 500, 50), "S2": (200, 3, 30), "S3": (1, 500, 1000)}  # sessions, sockets in each, tokens/s in each
LAYERS = {
    "chat/providers/": "demo model",
    "chat/live/voice.py": "voice: gather, wait for Redis",
    "chat/live/answers.py": "answer, JSON",
    "chat/live/events.py": "answer, JSON",
    "chat/live/rooms.py": "room: who is in step",
    "chat/live/relay.py": "room: who is in step",
    "chat/live/bus.py": "bus: pack, write, read, parse",
    "chat/live/wire.py": "bus: pack, write, read, parse",
    "Direct": "frame, send(2) to sockets",  # the classes of servers.py: every stack begins in that file
    "chat/formats/": "answer, JSON",
    "consumers/": "socket's own coroutines",
    "chat/live/": "generation",
    "chat/": "storage: checkpoints, leases",
    "aiosqlite": "storage: checkpoints, leases",
    "sqlite": "storage: checkpoints, leases",
}


def layer(stack: list[str]) -> str:
    for frame in reversed(stack):
        for file, name in LAYERS.items():
            if file in frame:
                return name
    return "event loop, uvicorn"


def profile(scenario: str, seconds: float, functions: bool) -> Counter[str]:
    """µs per delivered token by layer."""
    sessions, sockets, rate = SHAPES[scenario]
    samples: Counter[str] = Counter()

    def measure(target: Parley) -> dict[str, float]:
        load = join(target, sessions, sockets)
        phase(target, load, sessions, rate, 2)
        with tempfile.NamedTemporaryFile() as file:
            command = tool("py-spy", "py-spy"), "record", "--nonblocking", "-r", 400, "-d", int(seconds), "-f", "raw"
            pid = target.processes[0].popen.pid
            spy = Process(*command, "-o", file.name, "-p", pid, "-F", cores=CLIENT, stdout=subprocess.DEVNULL)
            sample = phase(target, load, sessions, rate, seconds)
            spy.popen.wait()
            for line in Path(file.name).read_text().splitlines():
                stack, _, count = line.rpartition(" ")
                name = stack.split(";")[-1] if functions else layer(stack.split(";"))
                samples[name] += int(count)
        load.close()
        return sample

    sample = with_target(Parley, measure)
    cost = 1_000_000 / sample["per_cpu_second"]
    print(f"{scenario}: {cost:.1f} µs a token, {sample['tokens_per_frame']:.1f} tokens a frame, while being watched")
    whole = sum(samples.values())
    return Counter({name: count / whole * cost for name, count in samples.items()})


def main() -> None:
    functions = "--functions" in sys.argv
    scenario, *rest = [word for word in sys.argv[1:] if word != "--functions"]
    for name, cost in profile(scenario, float(rest[0]) if rest else 8, functions).most_common(40):
        print(f"| {name.ljust(60)} | {cost:6.2f} |")


if __name__ == "__main__":
    main()
