"""The engine's own meter behind the gate: answers at once, from what the engine knows (approximate mode)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.engine.remote.limits import EngineLimits
from services.runtime.clock import Clock
from services.runtime.rate_limiter import Denial


class EngineMeter:
    """EngineLimits with a clock, and with a sign for those who wait."""

    def __init__(self, limits: EngineLimits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self.changed = asyncio.Event()

    def want(self, tokens: int) -> None:
        """See Meter."""
        self._limits.want(tokens, self._clock.monotonic(), self._clock.wall())

    def foresee(self, tokens: int, ahead_requests: int, ahead_tokens: int) -> Denial | None:
        """See Meter."""
        now = self._clock.monotonic()
        return self._limits.find_denial(tokens, now, ahead_requests, ahead_tokens)

    async def ask(self, tokens: int) -> EnginePermit | Denial:
        """See Meter. It never suspends."""
        now = self._clock.monotonic()
        denial = self._limits.find_denial(tokens, now)
        if denial is not None:
            return denial
        self._limits.reserve(tokens, now, self._clock.wall())
        return EnginePermit(self, tokens)

    def settle(self, reserved: int, used: int) -> None:
        """A call has ended."""
        self._limits.settle(reserved, used, self._clock.monotonic(), self._clock.wall())
        self.changed.set()

    def withdraw(self, reserved: int) -> None:
        """A call was never made."""
        self._limits.withdraw(reserved, self._clock.monotonic())
        self.changed.set()

    def throttled(self, retry_after_s: float | None) -> None:
        """The provider has said that there were too many."""
        self._limits.throttled(retry_after_s, self._clock.monotonic(), self._clock.wall())

    def counters(self, waiting_requests: int, waiting_tokens: int) -> list[pb.LimitCounter]:
        """See Meter."""
        now, wall = self._clock.monotonic(), self._clock.wall()
        return self._limits.counters(waiting_requests, waiting_tokens, now, wall)

    def merge(self, counters: Iterable[pb.LimitCounter]) -> None:
        """See Meter."""
        self._limits.merge(counters, self._clock.monotonic())
        self.changed.set()

    def pace(self) -> tuple[float, float]:
        """See Meter."""
        return self._limits.pace(self._clock.monotonic())

    async def close(self) -> None:
        """See Meter: there is nothing to tell."""


class EnginePermit:
    """A call that the engine's meter has let through."""

    def __init__(self, meter: EngineMeter, tokens: int) -> None:
        self._meter = meter
        self._tokens = tokens

    def settle(self, used: int | None) -> None:
        """See Permit."""
        self._meter.settle(self._tokens, self._tokens if used is None else used)

    def throttled(self, retry_after_s: float | None) -> None:
        """See Permit."""
        # First the brake: who waits is woken by the end of this one.
        self._meter.throttled(retry_after_s)
        self._meter.settle(self._tokens, 0)

    def withdraw(self) -> None:
        """See Permit."""
        self._meter.withdraw(self._tokens)
