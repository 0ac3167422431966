"""What the requests of each tenant have cost on this engine, for its reports to the coordinator. Pure.

The counters only grow, so a report that is lost, late or repeated does no harm: the coordinator takes the difference.
"""

from __future__ import annotations

from typing import Final

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.core.v1 import generation_pb2

TENANTS_MAX: Final = 1_024
"""Most counters, that of all others included."""
OTHERS: Final = "*"


class SpendCounters:
    """One counter for each tenant; once there are `TENANTS_MAX`, those that are new share the one named "*"."""

    def __init__(self) -> None:
        self._counters: dict[str, pb.SpendCounter] = {}

    def add(
        self, tenant: str, cost_nanousd: int, usage: generation_pb2.Usage | None = None
    ) -> None:
        """One request that has ended, whatever became of it; `usage` is None where no token was counted."""
        counter = self._counters.get(tenant)
        if counter is None:
            if len(self._counters) >= TENANTS_MAX - 1:
                tenant = OTHERS
            counter = self._counters.setdefault(tenant, pb.SpendCounter(tenant=tenant))
        counter.requests += 1
        counter.nanousd += cost_nanousd
        if usage is not None:
            counter.prompt_tokens += usage.prompt_tokens
            counter.cached_tokens += min(usage.cached_tokens, usage.prompt_tokens)
            counter.completion_tokens += usage.completion_tokens

    def report(self) -> list[pb.SpendCounter]:
        """All counters, to be copied into a report."""
        return list(self._counters.values())
