"""When a process that died is started again. Pure."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class BackoffPolicy:
    """Delays in seconds: `first`, then twice as long each time up to `most`; after `stable` seconds of life, `first` again.

    Each delay is drawn from its upper half, so that processes which died together do not come back together. What dies of itself does
    so while it starts, within `stable`; a process that is ended again and again, each time after it has served, is needed at once.
    """

    first: float = 0.25
    most: float = 15.0
    stable: float = 5.0


@dataclass(frozen=True)
class Restart:
    """The process is to be started again after `delay` seconds; `deaths` are those in a row, this one included."""

    delay: float
    deaths: int


class Backoff:
    """The deaths of one process. `draw` returns a number within [0, 1)."""

    def __init__(self, policy: BackoffPolicy, draw: Callable[[], float]) -> None:
        self._policy = policy
        self._draw = draw
        self._deaths = 0
        self._started_at = 0.0

    def started(self, now: float) -> None:
        """The process was started."""
        self._started_at = now

    def died(self, now: float) -> Restart:
        """The process ended without being asked to."""
        if now - self._started_at >= self._policy.stable:
            self._deaths = 0
        self._deaths += 1
        # The exponent is bounded, so that a process which dies for days does not overflow a float.
        longest = min(self._policy.most, self._policy.first * 2.0 ** min(self._deaths - 1, 32))
        return Restart(longest * (0.5 + self._draw() / 2), self._deaths)


def describe_exit(code: int) -> str:
    """What happened to a process, for people; a negative code is a signal, as in subprocess.Popen."""
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
