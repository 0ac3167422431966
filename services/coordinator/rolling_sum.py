"""A sum over the hour or the day that ends now. Pure.

Amounts are kept in buckets of a minute, or of a quarter of an hour, and leave bucket by bucket: each counts for at least the
whole span, and for at most one bucket longer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """How long amounts count: `buckets` of `bucket_s` seconds."""

    bucket_s: int
    buckets: int


HOUR = Span(60, 60)
DAY = Span(900, 96)


class RollingSum:
    """The sum of what was added within a span. Times are in seconds since the epoch, on a clock that does not go back."""

    def __init__(
        self, span: Span, numbers: Iterable[int] = (), amounts: Iterable[int] = ()
    ) -> None:
        """`numbers` and `amounts` are those of a former `buckets()`."""
        self._span = span
        # Two rows of numbers, so that many of them are copied in little time.
        self._numbers = deque(numbers)
        self._amounts = deque(amounts)
        if len(self._numbers) != len(self._amounts):
            raise ValueError("there are not as many numbers as amounts")
        self._sum = sum(self._amounts)

    def add(self, amount: int, now: float) -> None:
        """Adds an amount, not below 0. O(1), amortised."""
        self._expire(now)
        number = int(now // self._span.bucket_s)
        if self._numbers and self._numbers[-1] >= number:
            self._amounts[-1] += amount
        else:
            self._numbers.append(number)
            self._amounts.append(amount)
        self._sum += amount

    def sum(self, now: float) -> int:
        """What counts now. O(1), amortised."""
        self._expire(now)
        return self._sum

    def seconds_until_below(self, limit: int, now: float) -> float:
        """When so much has left, if nothing is added, that the sum is below a limit above 0; 0 where it is. O(buckets)."""
        left = self.sum(now)
        leaves_at = now
        for number, amount in zip(self._numbers, self._amounts, strict=True):
            if left < limit:
                break
            left -= amount
            leaves_at = float((number + self._span.buckets + 1) * self._span.bucket_s)
        return max(0.0, leaves_at - now)

    def buckets(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The numbers of the buckets, counted from the epoch, and their amounts, oldest first."""
        return tuple(self._numbers), tuple(self._amounts)

    def _expire(self, now: float) -> None:
        oldest = int(now // self._span.bucket_s) - self._span.buckets
        while self._numbers and self._numbers[0] < oldest:
            self._numbers.popleft()
            self._sum -= self._amounts.popleft()
