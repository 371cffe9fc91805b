"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "arena_requests", "Requests, by path and status.", ["path", "status"], registry=registry
        )
        self.latency = Histogram(
            "arena_request_seconds", "From a request to its answer.", ["path"], buckets=SECONDS, registry=registry
        )
        self.rows = Counter("arena_rows", "Rows that were judged.", ["judge"], registry=registry)
        self.tokens = Counter(
            "arena_tokens", "Tokens of prompts: computed, and shared with a computed one.", ["judge", "kind"],
            registry=registry,
        )  # fmt: skip
        self.batch_rows = Histogram("arena_batch_rows", "Rows judged together.", buckets=ROWS, registry=registry)
        self.batch_seconds = Histogram(
            "arena_batch_seconds", "The time that they took.", buckets=SECONDS, registry=registry
        )
        self.cancelled = Counter("arena_cancelled", "Requests that were given up while waiting.", registry=registry)

    def watch(self, waiting_rows: Callable[[], float]) -> None:
        """Shows the length of the queue."""
        gauge = Gauge("arena_waiting_rows", "Rows of requests that wait.", registry=self.registry)
        gauge.set_function(waiting_rows)

    def page(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)
