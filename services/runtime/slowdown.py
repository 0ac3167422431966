"""How much slower to go after a provider has said that there were too many requests. Pure.

A limit that is configured may be wrong, or shared with somebody who is not one of us. Each 429 lowers the pace by a part, and
time without one raises it again little by little; a time that the provider names is kept as a pause.
"""

from __future__ import annotations

import math
from typing import Final

DECREASE: Final = 0.7
"""Part of the pace that is left after a 429."""
FLOOR: Final = 0.1
"""Least part of the configured pace."""
APART_S: Final = 5.0
"""429s within this time are one: calls that were under way together fail together, and peers tell of them later."""
HOLD_S: Final = 10.0
"""Time at the lower pace before it rises."""
RECOVERY_PER_S: Final = 0.01
"""Part of the configured pace that comes back each second."""
PAUSE_MAX_S: Final = 600.0
"""Longest pause; a provider that names a longer one is asked again after this."""


class Slowdown:
    """The pace as a part of the configured one."""

    def __init__(self) -> None:
        self._factor = 1.0
        self._lowered_at = -math.inf
        self._paused_until = -math.inf

    def factor(self, now: float) -> float:
        """The part, from FLOOR to 1."""
        risen = RECOVERY_PER_S * max(0.0, now - self._lowered_at - HOLD_S)
        return min(1.0, self._factor + risen)

    def pause_s(self, now: float) -> float:
        """Seconds until the time that the provider has named."""
        return max(0.0, self._paused_until - now)

    def throttled(self, retry_after_s: float | None, now: float) -> None:
        """The provider has said that there were too many requests; `retry_after_s` is the time that it named, or None."""
        if retry_after_s is not None:
            until = now + min(retry_after_s, PAUSE_MAX_S)
            self._paused_until = max(self._paused_until, until)
        if now - self._lowered_at >= APART_S:
            self._factor = max(FLOOR, DECREASE * self.factor(now))
            self._lowered_at = now
