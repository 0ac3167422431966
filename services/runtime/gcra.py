"""The generic cell rate algorithm: a rate with a burst, as virtual scheduling (ITU-T I.371, the leaky bucket as a meter).

Pure. One number is kept: the theoretical arrival time, at which all that was let through will have drained at the rate. What has
not drained yet is the level; a cost conforms while the level and the cost fit into the burst. A cost larger than the burst
conforms alone, when the level is 0, and what comes after it waits the longer (W27): nothing is refused for ever.

With costs within the burst, no half-open span of `s` seconds gets more than rate * s + burst.
"""

from __future__ import annotations

from typing import Final

ROUNDING_S: Final = 1e-9
"""Waits below this come from rounding, and are none."""


class Gcra:
    """A meter in units such as requests or tokens. `rate` is units per second, `burst` units; both are above 0."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._drained_at = -float("inf")

    @property
    def rate(self) -> float:
        """Units per second."""
        return self._rate

    @property
    def burst(self) -> float:
        """Units."""
        return self._burst

    def retune(self, rate: float, burst: float, now: float) -> None:
        """Goes on at another rate; the level stays."""
        level = self.level(now)
        self._rate, self._burst = rate, burst
        self._drained_at = now + level / rate

    def level(self, now: float) -> float:
        """Units that have not drained yet."""
        return max(0.0, self._drained_at - now) * self._rate

    def wait_s(self, cost: float, now: float, ahead: float = 0.0) -> float:
        """Seconds until `cost` conforms, behind `ahead` units that go before it; 0.0: now."""
        room = max(0.0, self._burst - cost)
        return self.wait_for_level_s(room - ahead, now)

    def wait_for_level_s(self, level: float, now: float) -> float:
        """Seconds until no more than `level` units are left to drain; 0.0: now."""
        wait_s = max(0.0, self._drained_at - now) - level / self._rate
        return wait_s if wait_s > ROUNDING_S else 0.0

    def take(self, cost: float, now: float) -> None:
        """Counts `cost` units, whether they conform or not: those beyond the burst are a debt, for which others wait."""
        self._drained_at = max(self._drained_at, now) + cost / self._rate

    def give_back(self, cost: float) -> None:
        """Takes back `cost` units that were counted and not used. The level does not go below 0."""
        self._drained_at -= cost / self._rate

    def cap(self, level: float, now: float) -> None:
        """Forgets what is beyond `level` units."""
        self._drained_at = min(self._drained_at, now + level / self._rate)
