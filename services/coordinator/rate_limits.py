"""The limits of providers, in both modes, beside the sessions of engines. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.coordinator.effects import NOTHING, Effects, TellLimits
from services.coordinator.engines import EngineRecord
from services.coordinator.limits import Limits
from services.coordinator.shared_limits import SharedLimits
from services.coordinator.strict_limits import StrictLimits

WINDOW_S: Final = 60.0
"""Providers count in minutes: what is older does not matter."""


class RateLimits:
    """`shared` are those of which engines tell each other, `strict` those for which they ask.

    `learning_until` is when all engines of an earlier coordinator have joined, in monotonic seconds.
    """

    def __init__(self, limits: Limits, learning_until: float = -math.inf) -> None:
        self.shared = SharedLimits()
        started_at = learning_until - limits.rejoin_s
        self.strict = StrictLimits(started_at + WINDOW_S, limits.rejoin_s)

    def joined(self, engine: EngineRecord) -> None:
        """An engine has joined."""
        self.shared.joined(engine.session, engine.incarnation)
        self.strict.joined(engine.incarnation)

    def left(self, engine: EngineRecord, now: float) -> None:
        """The session of an engine is over."""
        self.shared.left(engine.session, now)
        self.strict.left(engine.incarnation, now)

    def report(
        self, engine: EngineRecord, counters: Sequence[pb.LimitCounter], now: float
    ) -> Effects:
        """Learns of the counters of an engine, which may be told those of the others in return."""
        if counters and self.shared.take(engine.session, counters, now):
            return Effects(tellings=(TellLimits(engine.session),))
        return NOTHING

    def expire(self, now: float) -> None:
        """Ends what belongs to engines that have left. To be called about once a second."""
        self.shared.expire(now)
        self.strict.expire(now)

    def check_integrity(self) -> None:
        """Asserts that what is kept belongs to engines, within its bounds. O(n), for tests."""
        self.shared.check_integrity()
        self.strict.check_integrity()
