"""Measure Parley and its peers side by side: see README.md.

scripts/bench [S1 S2 S3 idle memory growth http streams turnover upstream-S2 upstream-streams waits]
              [--peers parley,ws,…] [--seconds n] [--rounds n] [--beside checkout] [--quick]
"""

import argparse
import json
import resource
import sys
from pathlib import Path

import report
import targets
from machine import CLIENT, HERE, SERVER, Missing, busy, python
from parley import Bare, Parley, ParleyAnthropic, ParleyInProcess, ParleyOpenAI, of
from scenarios import SCENARIOS, Sample
from targets import Target

TARGETS = {
    "parley": Parley,
    "parley-alone": ParleyInProcess,
    "channels": targets.Channels,
    "daphne": targets.ChannelsDaphne,
    "pubsub": targets.ChannelsPubSub,
    "broadcaster": targets.Broadcaster,
    "python-socketio": targets.PythonSocketIO,
    "ws": targets.NodeWs,
    "socketio": targets.NodeSocketIO,
    "nats": targets.Nats,
    "mosquitto": targets.Mosquitto,
    "nchan": targets.Nchan,
    "loop": targets.Loop,
    "limit": targets.Limit,
    "bare": Bare,
    "parley-openai": ParleyOpenAI,
    "parley-anthropic": ParleyAnthropic,
    "relay": targets.Relay,
    "litellm": targets.LiteLLM,
}

RESULTS = HERE / "results"
QUIET = 0.05  # of all cores, before anything of ours runs


def measure(scenario: str, kinds: list[type[Target]], rounds: int, seconds: float) -> dict[str, list[Sample]]:
    """Every target once, then every target again: what disturbs the machine for a while disturbs them all."""
    samples: dict[str, list[Sample]] = {}
    absent: set[type[Target]] = set()
    for round_ in range(1, rounds + 1):
        for target in kinds:
            if scenario not in target.in_scenarios or target in absent:
                continue
            print(f"{scenario} {round_}/{rounds} {target.label}", file=sys.stderr, flush=True)
            try:
                samples.setdefault(target.label, []).append(SCENARIOS[scenario](target, seconds))
            except Missing as missing:
                absent.add(target)
                samples.pop(target.label, None)
                print(f"*** LEFT OUT: {target.label}: {missing} ***", file=sys.stderr)
            except (OSError, RuntimeError) as error:  # one peer's failure is a line, not the end of an hour's run
                print(f"*** FAILED: {target.label}: {error!r} ***", file=sys.stderr)
    return {label: taken for label, taken in samples.items() if taken}


def main() -> None:
    parser = argparse.ArgumentParser(description="Parley and its peers, side by side")
    parser.add_argument("scenarios", nargs="*", metavar="scenario", help=f"of {' '.join(SCENARIOS)}; all if none")
    parser.add_argument("--peers", help=f"of {','.join(TARGETS)}; all if none")
    parser.add_argument("--seconds", type=float, default=10, help="how long one measurement lasts (10)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each target is measured (3)")
    parser.add_argument("--beside", type=Path, help="another checkout, whose Parley takes turns with ours")
    parser.add_argument("--quick", action="store_true", help="one round of 3 s: does it work, not how fast is it")
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.seconds = 1, 3.0
    if given.beside:
        ours = [(name, kind) for name, kind in TARGETS.items() if issubclass(kind, Parley)]
        TARGETS.update({f"{name}-beside": of(kind, given.beside.resolve()) for name, kind in ours})
    scenarios = given.scenarios or list(SCENARIOS)
    names = given.peers.split(",") if given.peers else list(TARGETS)
    unknown = [name for name in scenarios if name not in SCENARIOS] + [name for name in names if name not in TARGETS]
    if unknown:
        parser.error(f"expected scenarios of {' '.join(SCENARIOS)} and peers of {','.join(TARGETS)}, got {unknown}")
    if SERVER == CLIENT:
        print("*** ONE CORE: server and client share it, no number here means anything ***", file=sys.stderr)
    if (used := busy()) > QUIET:
        print(f"*** BUSY MACHINE: others use {used:.0%} of its cores, costs and latencies are not to be trusted ***")
    print(python())
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    RESULTS.mkdir(exist_ok=True)
    for scenario in scenarios:
        samples = measure(scenario, [TARGETS[name] for name in names], given.rounds, given.seconds)
        if not samples:
            continue
        print(report.table(scenario, samples), flush=True)
        if not given.quick:
            (RESULTS / f"{scenario}.json").write_text(json.dumps(samples, indent=1) + "\n")
    if not given.quick:
        (RESULTS / "results.svg").write_text(report.picture(RESULTS))


if __name__ == "__main__":
    main()
