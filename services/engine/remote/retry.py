"""Whether and when a failed call is made again (S3.8-S3.10; W25). Pure.

Waits are spread by real chance, so that those who failed together do not come back together; they end before the deadline; and a
budget that all requests of an engine share keeps retries from multiplying the load on a provider that has too much of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from services.engine.remote.failure import ProviderError

_UNIT: Final = 1000
"""Budgets count in thousandths of a retry: sums of whole numbers do not drift."""


class Jitter(Enum):
    """How waits are spread."""

    NONE = "none"
    """Not at all."""
    EQUAL = "equal"
    """Between half and all of the backoff."""
    FULL = "full"
    """Between nothing and all of the backoff."""


@dataclass(frozen=True, slots=True)
class RetryConfig:
    """How often and how long to wait. `max_retries` are attempts after the first; times are in seconds.

    0 retries are for requests that must not run twice: a call that failed may have begun.
    """

    max_retries: int = 3
    initial_backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    multiplier: float = 2.0
    jitter: Jitter = Jitter.EQUAL
    respect_retry_after: bool = True


class RetryBudget:
    """Retries that are left to all requests together: `initial`, and `ratio` (0 to 1) more for each request.

    What quiet times leave over is kept up to `most`, so that it cannot be spent on one storm.
    """

    def __init__(self, ratio: float = 0.2, initial: int = 10, most: int = 100) -> None:
        self._per_request = round(ratio * _UNIT)
        self._most = max(most, initial) * _UNIT
        self._left = initial * _UNIT

    @property
    def left(self) -> float:
        """Retries that may be made now."""
        return self._left / _UNIT

    def earn(self) -> None:
        """A request makes its first attempt."""
        self._left = min(self._left + self._per_request, self._most)

    def spend(self) -> bool:
        """Takes a retry; False where none is left."""
        if self._left < _UNIT:
            return False
        self._left -= _UNIT
        return True


class Retry:
    """Decides for all requests of an engine."""

    def __init__(self, config: RetryConfig, budget: RetryBudget) -> None:
        self._config = config
        self._budget = budget

    def first_attempt(self) -> None:
        """To be called once for each request whose first call is made."""
        self._budget.earn()

    def decide(
        self, attempt: int, failure: ProviderError, remaining_s: float | None, fraction: float
    ) -> float | None:
        """How long to wait before the next attempt, in seconds; None: give up. A wait is paid from the budget.

        `attempt` counts from 0, `remaining_s` is left until the deadline (None: there is none), and `fraction` is drawn from [0, 1).
        A provider that asks for a longer wait than the deadline or the longest backoff allows is not waited for at all: the caller
        gets the error with its retry time at once.
        """
        config = self._config
        if attempt >= config.max_retries or not failure.may_pass:
            return None
        wait = self._wait(attempt, failure.retry_after_s, fraction)
        if wait is None or (remaining_s is not None and wait >= remaining_s):
            return None
        return wait if self._budget.spend() else None

    def _wait(self, attempt: int, retry_after_s: float | None, fraction: float) -> float | None:
        config = self._config
        if retry_after_s is None or not config.respect_retry_after:
            return spread(backoff(config, attempt), config.jitter, fraction)
        if retry_after_s > config.max_backoff_s:
            return None
        # Never sooner than asked, and not all who were asked the same at the same moment.
        extra = 0.0 if config.jitter is Jitter.NONE else fraction * config.initial_backoff_s
        return retry_after_s + extra


def backoff(config: RetryConfig, attempt: int) -> float:
    """The longest wait after an attempt, counted from 0, in seconds."""
    # Waits that stopped growing are not computed: the power would overflow.
    wait = config.initial_backoff_s
    for _ in range(attempt):
        if wait >= config.max_backoff_s or wait == 0:
            break
        wait *= config.multiplier
    return min(wait, config.max_backoff_s)


def spread(backoff_s: float, jitter: Jitter, fraction: float) -> float:
    """A wait of at most `backoff_s` seconds; `fraction` is drawn from [0, 1)."""
    if jitter is Jitter.NONE:
        return backoff_s
    least = backoff_s / 2 if jitter is Jitter.EQUAL else 0.0
    return least + fraction * (backoff_s - least)
