"""The metrics of this worker, in Prometheus' format. Names of model metrics are OpenTelemetry's for generative AI:
https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/

Model names are labels here, so it is for operators' eyes only. This file does not check the caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .live.turn import Result

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
COUNTED = {  # what the relay counts → its metric
    "gaps_filled": ("chat_gaps_filled", "Times a room read again what it may have missed"),
    "readers_cut": ("chat_readers_cut", "Readers cut because they took nothing"),
    "taken_over": ("chat_turns_taken_over", "Turns ended here because their worker died"),
    "fenced": ("chat_turns_fenced", "Turns that another worker took from this one"),
    "foreign": ("chat_foreign_messages", "Messages on the bus that no worker sent"),
    "votes": ("arena_votes", "Votes stored"),
}


class Metrics:
    """Counters and histograms of one worker; `gauges` are read when somebody looks."""

    def __init__(self, counts: dict[str, int], gauges: dict[str, tuple[str, Callable[[], float]]]) -> None:
        self._registry = CollectorRegistry()
        self._counts = counts
        self._gauges = gauges
        self._registry.register(self)
        model = ["gen_ai_request_model", "error_type"]
        self._duration = Histogram(
            "gen_ai_client_operation_duration_seconds", "Whole replies", model, buckets=SECONDS, registry=self._registry
        )
        self._first = Histogram(
            "gen_ai_client_time_to_first_chunk_seconds",
            "First tokens",
            model[:1],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._tokens = Counter(
            "gen_ai_client_token_usage",
            "Tokens as the provider counts them",
            ["gen_ai_request_model", "gen_ai_token_type"],
            registry=self._registry,
        )

    def reply(self, model: str, result: Result) -> None:
        """Count one reply that ended."""
        self._duration.labels(model, result.reason or "").observe(time.monotonic() - result.started)
        if result.first_token is not None:
            self._first.labels(model).observe(result.first_token)
        for kind in ("input", "output"):
            if count := getattr(result.finish, f"{kind}_tokens", None):
                self._tokens.labels(model, kind).inc(count)

    def collect(self) -> Iterable[Metric]:
        for name, (metric, words) in COUNTED.items():
            yield CounterMetricFamily(metric, words, value=self._counts.get(name, 0))
        for metric, (words, value) in self._gauges.items():
            yield GaugeMetricFamily(metric, words, value=value())

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self._registry)
