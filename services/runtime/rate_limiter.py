"""Requests per minute, tokens per minute and requests at a time, all of them or nothing (S3.13). Pure.

A reservation counts what a request is expected to use, and is settled with what it did use: the difference is given back, or is a
debt for which later requests wait (W27).

The rate is chosen such that rate and burst together keep the limit: with L a minute and a burst of B = 4 % of L, at least 1, the
rate is L - B + 1 a minute. So no span of a minute, wherever it begins, has more than L (W26): with the rate L it could have
L + B. Only a single cost larger than the burst can pass the limit, by what it is larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from services.runtime.gcra import Gcra
from services.runtime.slowdown import Slowdown

BURST: Final = 0.04
"""Part of a minute's limit that may come at once."""
_TUNED_S: Final = 0.25
"""Time between two looks at how much of a lowered pace has come back."""
REQUESTS, TOKENS, CONCURRENT, PAUSE = (
    "requests_per_minute",
    "tokens_per_minute",
    "concurrent_requests",
    "provider",
)


@dataclass(frozen=True, slots=True)
class Quota:
    """What is allowed in a minute, and at a time. 0: without limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrent_requests: int = 0


@dataclass(frozen=True, slots=True)
class Denial:
    """Why a request cannot go now: the name of the limit, and in how many seconds it can; None: when another one ends."""

    limit: str
    wait_s: float | None


def burst_of(per_minute: int) -> float:
    """Units that may come at once, of a limit of so many in a minute."""
    return max(1.0, BURST * per_minute)


def rate_of(per_minute: int) -> float:
    """Units per second at which the limit is kept in every minute, its burst included."""
    return (per_minute - burst_of(per_minute) + 1) / 60


def meter(per_minute: int) -> Gcra | None:
    """A meter for so many units in a minute; None where they are not limited."""
    return Gcra(rate_of(per_minute), burst_of(per_minute)) if per_minute else None


class RateLimiter:
    """Counts what goes through. `requests_share` and `tokens_share` are the part of the quota that is this one's, within (0, 1]."""

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self._requests = meter(quota.requests_per_minute)
        self._tokens = meter(quota.tokens_per_minute)
        self._requests_share = self._tokens_share = 1.0
        self._slowdown = Slowdown()
        self._tuned_at = -math.inf
        self.running = 0

    @property
    def quota(self) -> Quota:
        """What is configured."""
        return self._quota

    @property
    def concurrent_max(self) -> int:
        """Requests at a time, its share of them, at least 1; 0: without limit."""
        most = self._quota.concurrent_requests
        return max(1, math.floor(most * self._requests_share + 1e-9)) if most else 0

    def factor(self, now: float) -> float:
        """The part of the pace that is left after the provider has said that there were too many requests, 0.1 to 1."""
        return self._slowdown.factor(now)

    def change(self, quota: Quota, now: float) -> None:
        """Another quota from now on; what was counted stays counted."""
        if quota == self._quota:
            return
        self._quota = quota
        self._requests = _changed(self._requests, quota.requests_per_minute)
        self._tokens = _changed(self._tokens, quota.tokens_per_minute)
        self._tune(now)

    def share(self, requests_share: float, tokens_share: float, now: float) -> None:
        """Keeps to other shares from now on."""
        self._requests_share, self._tokens_share = requests_share, tokens_share
        self._tune(now)

    def find_denial(
        self, tokens: int, now: float, ahead_requests: int = 0, ahead_tokens: int = 0
    ) -> Denial | None:
        """Why a request of so many tokens cannot go now, the longest wait first; None: it can.

        `ahead_requests`, with `ahead_tokens` together, go before it.
        """
        if (pause_s := self._slowdown.pause_s(now)) > 0:
            return Denial(PAUSE, pause_s)
        if now - self._tuned_at >= _TUNED_S:
            self._tune(now)
        requests_s = _wait_s(self._requests, 1, ahead_requests, now)
        tokens_s = _wait_s(self._tokens, tokens, ahead_tokens, now)
        if tokens_s > requests_s:
            return Denial(TOKENS, tokens_s)
        if requests_s > 0:
            return Denial(REQUESTS, requests_s)
        if self.concurrent_max and self.running + ahead_requests >= self.concurrent_max:
            return Denial(CONCURRENT, None)
        return None

    def reserve(self, tokens: int, now: float) -> None:
        """Counts a request that goes now."""
        self.running += 1
        if self._requests is not None:
            self._requests.take(1, now)
        if self._tokens is not None:
            self._tokens.take(tokens, now)

    def settle(self, reserved: int, used: int, now: float) -> None:
        """A request has ended that had reserved so many tokens."""
        self.running -= 1
        if self._tokens is not None:
            if used > reserved:
                self._tokens.take(used - reserved, now)
            else:
                self._tokens.give_back(reserved - used)

    def withdraw(self, reserved: int, now: float) -> None:
        """A request that had reserved so many tokens was never sent."""
        self.settle(reserved, 0, now)
        if self._requests is not None:
            self._requests.give_back(1)

    def throttled(self, retry_after_s: float | None, now: float) -> None:
        """The provider has said that there were too many requests; `retry_after_s` is the time that it named, or None."""
        self._slowdown.throttled(retry_after_s, now)
        self._tune(now)

    def fill(self, part: float, now: float) -> None:
        """As if this part of a burst had just gone through: for one who does not know what went before."""
        for gauge in (self._requests, self._tokens):
            if gauge is not None:
                gauge.take(max(0.0, part * gauge.burst - gauge.level(now)), now)

    def _tune(self, now: float) -> None:
        self._tuned_at = now
        factor = self._slowdown.factor(now)
        _tune(self._requests, self._quota.requests_per_minute, self._requests_share * factor, now)
        _tune(self._tokens, self._quota.tokens_per_minute, self._tokens_share * factor, now)


def _tune(gauge: Gcra | None, per_minute: int, share: float, now: float) -> None:
    if gauge is not None:
        burst = max(1.0, share * burst_of(per_minute))
        gauge.retune(share * rate_of(per_minute), burst, now)


def _changed(gauge: Gcra | None, per_minute: int) -> Gcra | None:
    return meter(per_minute) if gauge is None or not per_minute else gauge


def _wait_s(gauge: Gcra | None, cost: int, ahead: int, now: float) -> float:
    return 0.0 if gauge is None else gauge.wait_s(cost, now, ahead)
