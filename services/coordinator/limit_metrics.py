"""The series of the limits of providers."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from services.coordinator.state import CoordinatorState

GRANTED = "granted"
REFUSED = "refused"


class LimitMetrics:
    """The series, registered with one registry."""

    def __init__(self, registry: CollectorRegistry, state: CoordinatorState) -> None:
        rates = state.rates
        self._answers = Counter(
            "caravan_limit_answers_total",
            "Answers to AcquireLimit: granted, or refused for now.",
            ["result"],
            registry=registry,
        )
        for result in (GRANTED, REFUSED):
            self._answers.labels(result)
        Gauge(
            "caravan_limit_permits", "Permits of strict limits that are held.", registry=registry
        ).set_function(lambda: len(rates.strict))
        Gauge(
            "caravan_limit_keys",
            "Limits of providers, those that engines share and those for which they ask.",
            registry=registry,
        ).set_function(lambda: len(rates.shared) + rates.strict.keys)

    def count(self, *, is_granted: bool) -> None:
        """One answer to AcquireLimit."""
        self._answers.labels(GRANTED if is_granted else REFUSED).inc()
