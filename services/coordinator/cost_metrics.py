"""The series of the costs of deployments. They are read at each scrape; the ledger bounds their labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from services.coordinator.deployment import Budget
from services.coordinator.effects import BudgetCrossing
from services.coordinator.state import CoordinatorState


class _Costs(Collector):
    """What deployments have cost, and whether their budgets are spent."""

    def __init__(self, state: CoordinatorState) -> None:
        self._state = state

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        cost = CounterMetricFamily(
            "caravan_cost_usd_total",
            "US dollars that providers charge for requests.",
            labels=["deployment"],
        )
        costs = self._state.costs
        for name, spend in costs.ledger:
            cost.add_metric([name], spend.own.total.nanousd / 1e9)
        yield cost
        exceeded = GaugeMetricFamily(
            "caravan_budget_exceeded",
            "Whether the deployment's own budget is spent.",
            labels=["deployment"],
        )
        for model in self._state.models:
            if model.rules is not None and model.rules.budget != Budget():
                exceeded.add_metric([model.name], float(costs.is_over(model.name)))
        yield exceeded


class CostMetrics:
    """The series, registered with one registry."""

    def __init__(self, registry: CollectorRegistry, state: CoordinatorState) -> None:
        registry.register(_Costs(state))
        self._crossings = Counter(
            "caravan_budget_crossings_total",
            "Times that a budget was spent: of a deployment, or a tenant's part of it.",
            ["part"],
            registry=registry,
        )
        for part in ("deployment", "tenant"):
            self._crossings.labels(part)

    def count(self, crossings: Iterable[BudgetCrossing]) -> None:
        """Budgets that are spent, or not any more."""
        for crossing in crossings:
            if crossing.is_over:
                part = "deployment" if crossing.tenant is None else "tenant"
                self._crossings.labels(part).inc()
