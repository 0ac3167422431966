"""The series that every kind of engine has, so that one dashboard shows them all."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_QUEUE_BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class RequestMetrics:
    """The series, in a registry of their own, to which each kind of engine adds its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.queue_seconds = Histogram(
            "caravan_queue_seconds",
            "From the arrival of a request to its first prefill, or to the first call of its provider.",
            buckets=_QUEUE_BUCKETS,
            registry=self.registry,
        )
        self.active_sequences = Gauge(
            "caravan_engine_active_sequences",
            "Sequences that prefill or generate.",
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "caravan_queue_depth", "Requests that wait for a sequence.", registry=self.registry
        )
        self.prompt_tokens = Counter(
            "caravan_prompt_tokens_total",
            "Prompt tokens computed, or counted by a provider.",
            registry=self.registry,
        )
        self.generated_tokens = Counter(
            "caravan_generated_tokens_total", "Tokens generated.", registry=self.registry
        )
        self.requests_moved = Counter(
            "caravan_engine_requests_moved_total",
            "Requests that a drain ended, so that other engines go on with them.",
            registry=self.registry,
        )
