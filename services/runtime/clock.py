"""Time and ids as arguments, so that tests and simulations can own them (invariant I8)."""

from __future__ import annotations

import secrets
import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary point, never going back."""
        ...

    def wall(self) -> float:
        """Seconds since the Unix epoch, UTC."""
        ...


class SystemClock:
    """The clock of the machine."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


class ManualClock:
    """A clock that a test moves by hand; it starts at 1000 s, and at the epoch plus 1000 s."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self._wall_ahead_s = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + self._wall_ahead_s

    def jump(self, seconds: float) -> None:
        """Sets the wall clock alone, forwards or back."""
        self._wall_ahead_s += seconds

    def advance(self, seconds: float) -> None:
        """Moves on by `seconds`, which must not be negative."""
        if seconds < 0:
            raise ValueError("a clock does not go back")
        self.now += seconds


class IdSource(Protocol):
    """Makes ids that do not repeat."""

    def __call__(self, prefix: str) -> str:
        """Returns a new id that starts with `prefix` and a hyphen."""
        ...


def random_id(prefix: str) -> str:
    """An id with 96 random bits, such as `req-3f9c...`."""
    return f"{prefix}-{secrets.token_hex(12)}"


def random_seed() -> int:
    """A seed for a request that gave none: 32 random bits."""
    return secrets.randbits(32)


def random_fraction() -> float:
    """A number within [0, 1), for jitter."""
    return secrets.randbits(53) / (1 << 53)


class CountingIds:
    """Ids `prefix-1`, `prefix-2`, ... for tests and simulations."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}-{self._count}"
