"""Every series of the gateway. Label values come from enums, and from the names of models within a bound."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Final

from caravan.coordinator.v1 import deployment_pb2
from caravan.core.v1 import generation_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.gateway.fallback import REASONS, FallbackReason
from services.gateway.migration import MOVED
from services.gateway.requests import Api

_FIRST_TOKEN_S: Final = (
    0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0,
)  # fmt: skip
_INTER_TOKEN_S: Final = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
)  # fmt: skip
_DURATION_S: Final = (
    0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
_MIGRATION_S: Final = (
    0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0,
)  # fmt: skip

MODEL_LABELS_MAX: Final = 64
"""Models with series of their own; the others share one."""
OTHER_MODELS: Final = "(others)"

_HITS: Final = {
    generation_pb2.CACHE_HIT_PARTIAL: "partial",
    generation_pb2.CACHE_HIT_EXACT: "exact",
    generation_pb2.CACHE_HIT_RESIDENT: "resident",
}


class Outcome(Enum):
    """How a request ended."""

    FINISHED = "finished"
    CANCELLED = "cancelled"
    """By CancelRequest, or its client left."""
    REFUSED = "refused"
    """For what it asked, or for lack of capacity."""
    FAILED = "failed"


class MigrationResult(Enum):
    """What became of a request that left its engine."""

    MOVED = "moved"
    """Another engine went on with it."""
    FAILED = "failed"
    """None took it, or the next one was lost too."""
    CANCELLED = "cancelled"
    """It was ended on the way."""


class GatewayMetrics:
    """The series, registered with one registry."""

    def __init__(self, registry: CollectorRegistry, in_flight: Callable[[], int]) -> None:
        self._requests = Counter(
            "caravan_requests_total", "Requests that ended.", ["api", "outcome"], registry=registry
        )
        self._first_token = Histogram(
            "caravan_time_to_first_token_seconds",
            "From the arrival of a request to its first tokens, or to the first piece of a provider's answer.",
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self._inter_token = Histogram(
            "caravan_inter_token_seconds",
            "Time between tokens, or between pieces of a provider's answer; those that come together share the time since those before.",
            buckets=_INTER_TOKEN_S,
            registry=registry,
        )
        self._duration = Histogram(
            "caravan_request_duration_seconds",
            "From the arrival of a request to its end.",
            buckets=_DURATION_S,
            registry=registry,
        )
        Gauge(
            "caravan_gateway_requests", "Requests in flight in this gateway.", registry=registry
        ).set_function(in_flight)
        self._joined = Gauge(
            "caravan_gateway_joined",
            "Whether the coordinator knows this gateway: 1 or 0.",
            registry=registry,
        )
        self._releases_failed = Counter(
            "caravan_gateway_releases_failed_total",
            "Releases of leases that no session has surely told the coordinator, and that the next one tells again.",
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "caravan_gateway_prompt_tokens_total",
            "Tokens of the prompts of finished requests.",
            ["model"],
            registry=registry,
        )
        self._cached_tokens = Counter(
            "caravan_gateway_cached_prompt_tokens_total",
            "Those of them whose KV state was reused.",
            ["model", "hit"],
            registry=registry,
        )
        self._models: set[str] = set()
        for api in Api:
            for outcome in Outcome:
                self._requests.labels(api.value, outcome.value)
        self._register_ways_on(registry)

    def _register_ways_on(self, registry: CollectorRegistry) -> None:
        """The series of requests that go on elsewhere."""
        self._migrations = Counter(
            "caravan_migrations_total",
            "Moves of requests to another engine, by why the one before was left and what became of it.",
            ["reason", "result"],
            registry=registry,
        )
        self._migration = Histogram(
            "caravan_migration_seconds",
            "From the loss of a request's engine to the first token of the next one.",
            buckets=_MIGRATION_S,
            registry=registry,
        )
        self._fallbacks = Counter(
            "caravan_fallbacks_total",
            "Requests whose deployment got no answer of its provider and for which a fallback was asked for, by why.",
            ["reason"],
            registry=registry,
        )
        for reason in MOVED:
            for result in MigrationResult:
                self._migrations.labels(reason, result.value)
        for why in REASONS.values():
            self._fallbacks.labels(_fallback_label(why))

    def count_request(self, api: Api, outcome: Outcome, duration_s: float) -> None:
        """One request that ended."""
        self._requests.labels(api.value, outcome.value).inc()
        self._duration.observe(duration_s)

    def count_prompt(self, model: str, finished: engine_pb.Finished) -> None:
        """A request of this model finished; an engine answered, so the model exists."""
        if model not in self._models and len(self._models) >= MODEL_LABELS_MAX:
            model = OTHER_MODELS
        self._models.add(model)
        self._prompt_tokens.labels(model).inc(finished.usage.prompt_tokens)
        hit = _HITS.get(finished.cache_hit)
        if hit is not None:
            self._cached_tokens.labels(model, hit).inc(finished.usage.cached_tokens)

    def observe_first_token(self, seconds: float) -> None:
        """The first tokens of a request came."""
        self._first_token.observe(seconds)

    def observe_tokens(self, seconds: float, tokens: int) -> None:
        """`tokens` more tokens came, `seconds` after those before."""
        share = seconds / tokens
        for _ in range(tokens):
            self._inter_token.observe(share)

    def set_joined(self, joined: bool) -> None:
        """Whether the coordinator knows this gateway."""
        self._joined.set(joined)

    def count_migration(self, reason: str, result: MigrationResult) -> None:
        """A request left its engine for a reason of migration.MOVED."""
        self._migrations.labels(reason, result.value).inc()

    def observe_migration(self, seconds: float) -> None:
        """A request that left its engine got its next tokens."""
        self._migration.observe(seconds)

    def count_fallback(self, reason: FallbackReason) -> None:
        """A deployment got no answer of its provider, for a reason of fallback.REASONS."""
        self._fallbacks.labels(_fallback_label(reason)).inc()

    def count_failed_releases(self, releases: int) -> None:
        """Leases could not be released in a session with the coordinator."""
        self._releases_failed.inc(releases)


def _fallback_label(reason: FallbackReason) -> str:
    name = deployment_pb2.FallbackReason.Name(reason)
    return name.removeprefix("FALLBACK_REASON_").lower()
