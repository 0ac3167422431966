"""The statistics that the benches use. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed. Raises ValueError if empty."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the middle two. Raises ValueError if empty."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios of rounds that were run side by side, so that a slow minute hits both."""
    return median([a / b for a, b in zip(ours, theirs, strict=True)])


def gaps(times: Sequence[float]) -> list[float]:
    """The times between neighbours."""
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def rotated(items: Sequence[T], turns: int) -> list[T]:
    """The items, beginning `turns` places later, so that over the rounds no one is always first."""
    start = turns % len(items)
    return [*items[start:], *items[:start]]
