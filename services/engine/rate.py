"""A rate from a counter that only grows."""

from __future__ import annotations

from typing import Final

WINDOW_S: Final = 1.0


class Rate:
    """Growth per second over at least the last WINDOW_S seconds. Pure."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._count = 0
        self._rate = 0.0

    def sample(self, now: float, count: int) -> float:
        """The rate, given that the counter stands at `count` at `now`."""
        if self._since is None:
            self._since, self._count = now, count
        elif now - self._since >= WINDOW_S:
            self._rate = (count - self._count) / (now - self._since)
            self._since, self._count = now, count
        return self._rate
