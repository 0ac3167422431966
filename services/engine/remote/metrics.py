"""Every series of an engine in front of a provider, beside those that all engines have."""

from __future__ import annotations

from typing import Final

from caravan.engine.v1 import remote_service_pb2 as pb
from prometheus_client import Counter, Gauge, Histogram

from services.engine.request_metrics import RequestMetrics

SUCCEEDED: Final = "succeeded"
CANCELLED: Final = "cancelled"
_STATES: Final = {
    pb.BREAKER_STATE_CLOSED: "closed",
    pb.BREAKER_STATE_OPEN: "open",
    pb.BREAKER_STATE_HALF_OPEN: "half_open",
}
# From a provider next door to one that thinks for minutes.
_FIRST_BYTE_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 20, 40, 60)


class RemoteMetrics(RequestMetrics):
    """The series. Labels take values of this program only, never what a provider or client says."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = Counter(
            "caravan_remote_requests_total",
            "Requests that ended: succeeded, cancelled, or the reason of their error in lower case.",
            ["outcome"],
            registry=self.registry,
        )
        self.attempts = Counter(
            "caravan_remote_attempts_total",
            "Calls of the provider, by what became of them: succeeded, cancelled, or the reason of the failure in lower case.",
            ["outcome"],
            registry=self.registry,
        )
        self.retries = Counter(
            "caravan_remote_retries_total",
            "Calls that were made again after a failure that may pass.",
            registry=self.registry,
        )
        self.first_byte_seconds = Histogram(
            "caravan_remote_first_byte_seconds",
            "From the start of a call to the first event of its answer.",
            buckets=_FIRST_BYTE_BUCKETS,
            registry=self.registry,
        )
        self.cached_prompt_tokens = Counter(
            "caravan_remote_cached_prompt_tokens_total",
            "Prompt tokens that the provider had in its cache.",
            registry=self.registry,
        )
        self.cost_usd = Counter(
            "caravan_remote_cost_usd_total",
            "What requests have cost in US dollars, by the price table.",
            registry=self.registry,
        )
        self._add_protection()

    def _add_protection(self) -> None:
        self.breaker_state = Gauge(
            "caravan_remote_breaker_state",
            "1 for the state in which the breaker is, 0 for the others.",
            ["state"],
            registry=self.registry,
        )
        self.breaker_transitions = Counter(
            "caravan_remote_breaker_transitions_total",
            "Changes of the breaker, by the state that it came to.",
            ["state"],
            registry=self.registry,
        )
        self.limit = Gauge(
            "caravan_remote_limit",
            "What is configured of requests_per_minute, tokens_per_minute and concurrent_requests; 0: without limit.",
            ["limit"],
            registry=self.registry,
        )
        self.limit_used = Gauge(
            "caravan_remote_limit_used",
            "What this engine has used of it: within the last minute, or at present.",
            ["limit"],
            registry=self.registry,
        )
        self.workers = Gauge(
            "caravan_remote_workers",
            "Workers that are busy, and those that are idle.",
            ["state"],
            registry=self.registry,
        )
        self.workers_replaced = Counter(
            "caravan_remote_workers_replaced_total",
            "Workers that were replaced after a defect.",
            registry=self.registry,
        )
        self.credential_generation = Gauge(
            "caravan_remote_credential_generation",
            "Counts replacements of the credential, from 1; 0: none is sent.",
            registry=self.registry,
        )

    def show(self, status: pb.GetRemoteStatusResponse) -> None:
        """Sets the gauges."""
        self.active_sequences.set(status.busy_workers)
        self.queue_depth.set(status.queued)
        for state, name in _STATES.items():
            self.breaker_state.labels(name).set(state == status.breaker.state)
        limits = status.limits
        self.workers.labels("busy").set(status.busy_workers)
        self.workers.labels("idle").set(status.workers - status.busy_workers)
        self.credential_generation.set(status.credential.generation)
        used = {
            "requests_per_minute": limits.requests_used,
            "tokens_per_minute": limits.tokens_used,
            "concurrent_requests": limits.concurrent_requests,
        }
        for name, value in used.items():
            self.limit.labels(name).set(getattr(limits.configured, name))
            self.limit_used.labels(name).set(value)

    def breaker_changed(self, state: pb.BreakerState.ValueType) -> None:
        """The breaker has come to this state."""
        self.breaker_transitions.labels(_STATES[state]).inc()
        for other, name in _STATES.items():
            self.breaker_state.labels(name).set(other == state)
