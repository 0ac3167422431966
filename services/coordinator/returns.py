"""When a request goes back to an engine that lost it: where no other is there, and it has been heard of since. Pure.

An engine that stood still for a while is the same life afterwards. While another can serve the request it is avoided, because
what failed once may fail again; but a request that can go nowhere else is better served by it than refused.
"""

from __future__ import annotations

from collections.abc import Collection

from services.coordinator.engines import EngineRecord
from services.coordinator.waiting import Want

NONE: frozenset[str] = frozenset()


def lives_to_return_to(
    want: Want, ready: Collection[EngineRecord], now: float, after_s: float
) -> frozenset[str]:
    """The lives that a request need avoid no longer: it avoids all engines that are `ready`, and has waited for `after_s` seconds.

    Only those that have reported since it began to wait, and that can go on with its answer. O(lives that are avoided).
    """
    if now - want.arrived_at < after_s:
        return NONE
    if any(engine.incarnation not in want.avoid for engine in ready):
        return NONE
    return frozenset(
        engine.incarnation
        for engine in ready
        if engine.reported_at > want.arrived_at
        and (not want.revisions or engine.revision in want.revisions)
    )
