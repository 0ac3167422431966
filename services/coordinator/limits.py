"""Bounds of every table of the coordinator, and its times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from services.coordinator.tasks import Boundary

SILENT_INTERVALS_MAX = 3
"""Intervals without a word after which a peer is taken for dead."""
BACKOFF_MAX_S = 5.0
"""Longest pause of an engine or gateway between two tries to join."""

RETURN_S = 5.0
"""Seconds that a request which lost its engine waits for another, before it goes back to one that lost it."""


@dataclass(frozen=True)
class Limits:
    """Counts, and times in seconds. `tenant_weights` are shares above 0; a tenant without one has 1."""

    interval_s: float = 1.0
    model_memory_s: float = 600.0
    engines_max: int = 256
    gateways_max: int = 256
    leases_max: int = 16_384
    leases_per_engine_max: int = 1_024
    queued_max: int = 256
    queue_s: float = 30.0
    cancel_budget_s: float = 10.0
    rollout_grace_s: float = 600.0
    return_s: float = RETURN_S
    tenant_weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def known_max(self) -> int:
        """Most requests that hold a lease or wait: beyond `leases_max` only those that ran before, resumed or relearned."""
        return 2 * self.leases_max

    @property
    def rejoin_s(self) -> float:
        """How long leases wait for an engine or a gateway whose session ended to join again: a silent one is noticed after three
        intervals, and tries again after its back-off.
        """
        return SILENT_INTERVALS_MAX * self.interval_s + BACKOFF_MAX_S

    def boundary(self) -> Boundary:
        """Of a model without engines. A request that has ended is forgotten at once: its id may come again."""
        return Boundary(
            max_in_flight=0,
            max_queued=self.queued_max,
            cancellation_budget_s=self.cancel_budget_s,
            max_finished=0,
        )
