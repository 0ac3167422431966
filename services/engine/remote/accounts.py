"""What requests have used and cost: per tenant for the coordinator, and in all for the metrics. Pure."""

from __future__ import annotations

from caravan.core.v1 import generation_pb2

from services.engine.remote.metrics import RemoteMetrics
from services.engine.remote.prices import Tariff, cost_nanousd
from services.engine.remote.spend import SpendCounters


class Accounts:
    """One for an engine; `pieces` counts those of all answers as they come."""

    def __init__(self, tariff: Tariff, spend: SpendCounters, metrics: RemoteMetrics) -> None:
        self.tariff = tariff
        self.spend = spend
        self.pieces = 0
        self._metrics = metrics

    def cost_nanousd(self, usage: generation_pb2.Usage) -> int:
        """What these tokens cost, in billionths of a US dollar; 0 where no price is known."""
        return cost_nanousd(self.tariff.price, usage)

    def ended(self, tenant: str, usage: generation_pb2.Usage, cost: int, outcome: str) -> None:
        """A request has ended, whatever became of it; `cost` is in billionths of a US dollar."""
        self.spend.add(tenant, cost, usage)
        metrics = self._metrics
        metrics.requests.labels(outcome).inc()
        metrics.prompt_tokens.inc(usage.prompt_tokens)
        metrics.cached_prompt_tokens.inc(usage.cached_tokens)
        metrics.generated_tokens.inc(usage.completion_tokens)
        metrics.cost_usd.inc(cost / 1e9)
