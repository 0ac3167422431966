"""What this engine may send to its provider now: its share of the limits, and what all engines together have left. Pure.

Two meters stand in a row. The engine's own keeps to its share of each limit. The one of all engines counts what this one and, as
soon as it is told, the others have let through; where shares have been too large for a moment, because demand or engines have
changed, everybody waits until the sum is back on its line. So a deviation is made good and does not grow.

Bounds in approximate mode, for a limit of L a minute and `n` engines, in any span of 60 s: L and one request of each engine while
what they know of each other is true. Where demand moves or engines come, more by at most (n - 1) * L * D / 60, where D is the age of
what they know: 1 s to 2 s in service, and at most AGE_MAX_S, because an engine that has heard nothing for STALE_S keeps to a tenth,
and nobody is answered who was not heard. Limits that are so small that a few requests matter want the strict mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.engine.remote.shared_limits import STALE_S, SharedLimits
from services.runtime.gcra import Gcra
from services.runtime.rate_limiter import (
    REQUESTS,
    TOKENS,
    Denial,
    Quota,
    RateLimiter,
    burst_of,
    meter,
    rate_of,
)

AGE_MAX_S: Final = 2 * STALE_S + 2.0
"""The others know of an engine as of its last report, at most STALE_S ago, and may have heard that STALE_S ago; and messages take time."""
SHARED_S: Final = 0.25
"""Time between two looks at the shares."""
FIRST_FILL: Final = 0.5
"""Part of a burst that an engine does without when it hears of the others for the first time (chosen by bench/limits.py)."""
DEBT_MAX_S: Final = 10.0
"""Use of others beyond what drains within this time is not waited for."""


class EngineLimits:
    """The limits of one engine. Times are monotonic seconds, `wall` is seconds since 1970.

    `shared` is None for an engine without a coordinator: it is alone.
    """

    def __init__(self, quota: Quota, shared: SharedLimits | None, now: float) -> None:
        self._own = RateLimiter(quota)
        self._shared = shared
        self._all_requests = meter(quota.requests_per_minute)
        self._all_tokens = meter(quota.tokens_per_minute)
        self._shared_at = -math.inf
        self._share(now)

    @property
    def running(self) -> int:
        """Requests that run."""
        return self._own.running

    def want(self, tokens: int, now: float, wall: float) -> None:
        """A request that is expected to use so many tokens asks for the first time."""
        if self._shared is not None:
            self._shared.want(tokens, now, wall)

    def find_denial(
        self, tokens: int, now: float, ahead_requests: int = 0, ahead_tokens: int = 0
    ) -> Denial | None:
        """Why a request cannot go now, the longest wait first; None: it can. Others may go ahead of it."""
        if now - self._shared_at >= SHARED_S:
            self._share(now)
        denial = self._own.find_denial(tokens, now, ahead_requests, ahead_tokens)
        if denial is not None and now > self._shared_at:
            # What asks now is demand too, and may have made the share larger.
            self._share(now)
            denial = self._own.find_denial(tokens, now, ahead_requests, ahead_tokens)
        if self._shared is None or not self._shared.peers():
            return denial
        wait_s = 0.0 if denial is None or denial.wait_s is None else denial.wait_s
        for name, gauge in ((REQUESTS, self._all_requests), (TOKENS, self._all_tokens)):
            if gauge is None:
                continue
            # What all have used is known late: the level may pass the burst, but nobody adds to what has.
            over_s = gauge.wait_for_level_s(gauge.burst, now)
            if over_s > wait_s:
                denial, wait_s = Denial(name, over_s), over_s
        return denial

    def reserve(self, tokens: int, now: float, wall: float) -> None:
        """Counts a request that goes now."""
        self._own.reserve(tokens, now)
        self._use(1, tokens, now, wall)

    def settle(self, reserved: int, used: int, now: float, wall: float) -> None:
        """A request has ended that had reserved so many tokens."""
        self._own.settle(reserved, used, now)
        if used > reserved:
            self._use(0, used - reserved, now, wall)
        else:
            self._give_back(0, reserved - used)

    def withdraw(self, reserved: int, now: float) -> None:
        """A request that had reserved so many tokens was never sent."""
        self._own.withdraw(reserved, now)
        self._give_back(1, reserved)

    def throttled(self, retry_after_s: float | None, now: float, wall: float) -> None:
        """The provider has said that there were too many requests; `retry_after_s` is the time that it named, or None."""
        self._own.throttled(retry_after_s, now)
        if self._shared is not None:
            self._shared.throttled(wall)

    def counters(
        self, waiting_requests: int, waiting_tokens: int, now: float, wall: float
    ) -> list[pb.LimitCounter]:
        """What to report now; so many requests and tokens wait."""
        if self._shared is None:
            return []
        return self._shared.counters(waiting_requests, waiting_tokens, now, wall)

    def merge(self, counters: Iterable[pb.LimitCounter], now: float) -> None:
        """Learns what the others have used."""
        if self._shared is None:
            return
        is_first = not self._shared.has_heard
        news = self._shared.merge(counters, now)
        if news.throttled:
            self._own.throttled(None, now)
        for gauge, used in self._gauges(news.requests, news.tokens):
            gauge.take(used, now)
            gauge.cap(gauge.burst + gauge.rate * DEBT_MAX_S, now)
        self._share(now)
        if is_first:
            # A burst of the larger share that it has now would come on top of what others have just used.
            self._own.fill(FIRST_FILL, now)

    def pace(self, now: float) -> tuple[float, float]:
        """Requests and tokens in a minute that this engine may send at present; 0: without limit."""
        shares = (1.0, 1.0)
        if self._shared is not None:
            told = self._shared.shares(self._own.quota, now)
            shares = (told.requests, told.tokens)
        factor, quota = self._own.factor(now), self._own.quota
        return (
            quota.requests_per_minute * shares[0] * factor,
            quota.tokens_per_minute * shares[1] * factor,
        )

    def _use(self, requests: int, tokens: int, now: float, wall: float) -> None:
        for gauge, used in self._gauges(requests, tokens):
            gauge.take(used, now)
        if self._shared is not None:
            self._shared.use(requests, tokens, wall)

    def _give_back(self, requests: int, tokens: int) -> None:
        for gauge, unused in self._gauges(requests, tokens):
            gauge.give_back(unused)
        if self._shared is not None:
            self._shared.give_back(requests, tokens)

    def _gauges(self, requests: int, tokens: int) -> Sequence[tuple[Gcra, int]]:
        both = ((self._all_requests, requests), (self._all_tokens, tokens))
        return [(gauge, units) for gauge, units in both if gauge is not None and units]

    def _share(self, now: float) -> None:
        self._shared_at = now
        if self._shared is None:
            return
        shares = self._shared.shares(self._own.quota, now)
        self._own.share(shares.requests, shares.tokens, now)
        factor, quota = self._own.factor(now), self._own.quota
        _slow(self._all_requests, quota.requests_per_minute, factor, now)
        _slow(self._all_tokens, quota.tokens_per_minute, factor, now)


def _slow(gauge: Gcra | None, per_minute: int, factor: float, now: float) -> None:
    if gauge is not None:
        gauge.retune(factor * rate_of(per_minute), max(1.0, factor * burst_of(per_minute)), now)
