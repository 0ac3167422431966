"""Requests that wait for a worker: by priority, those who wait rise, first come first served within a class (S3.3; W17). Pure.

Everybody rises equally fast, so the order of two requests never changes, and one heap by `arrival + rank * aging_s` is enough.
Nothing starves: what arrives later than `LOWEST_RANK * aging_s` after a request is never served before it.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

from caravan.core.v1 import scheduling_pb2

from services.runtime.errors import CaravanError

Item = TypeVar("Item", bound=Hashable)

AGING_S: Final = 10.0
"""So long a wait is worth one step of priority."""
_RANKS: Final = {
    scheduling_pb2.PRIORITY_CRITICAL: 0,
    scheduling_pb2.PRIORITY_HIGH: 1,
    scheduling_pb2.PRIORITY_NORMAL: 2,
    scheduling_pb2.PRIORITY_BACKGROUND: 3,
}
_NORMAL: Final = 2
LOWEST_RANK: Final = 3
_SLACK: Final = 64  # Entries of removed items that are always allowed to stay.
_RETRY_S: Final = 1.0


class RequestQueue(Generic[Item]):
    """Items that wait, each at most once. Times are monotonic seconds. Operations are O(log n) amortized."""

    def __init__(self, capacity: int, model: str, aging_s: float = AGING_S) -> None:
        """`capacity`: most items that wait; `model` is told to whom it is full."""
        self._capacity = capacity
        self._model = model
        self._aging_s = aging_s
        self._count = itertools.count()
        self._numbers: dict[Item, int] = {}
        self._waiting: dict[int, Item] = {}
        self._late: dict[Item, None] = {}
        # Both hold (time, number); entries whose number does not wait any more are skipped when they are met.
        self._order: list[tuple[float, int]] = []
        self._deadlines: list[tuple[float, int]] = []

    def __len__(self) -> int:
        """Items that wait, and those that have expired and were not fetched."""
        return len(self._numbers) + len(self._late)

    def push(
        self,
        item: Item,
        priority: scheduling_pb2.Priority.ValueType,
        arrived: float,
        deadline: float = math.inf,
    ) -> None:
        """Adds an item, which must not be there. Raises CaravanError (CAPACITY_EXHAUSTED) when full.

        `arrived` is earlier than now for one that comes back, which then has its old place.
        """
        if item in self._numbers or item in self._late:
            raise ValueError("the item waits already")
        if len(self) >= self._capacity:
            raise CaravanError(
                "CAPACITY_EXHAUSTED",
                f"No more than {self._capacity} requests may wait for the provider of the model.",
                retry_after_s=_RETRY_S,
                model=self._model,
                queued=str(len(self)),
                max_queued=str(self._capacity),
            )
        number = next(self._count)
        self._numbers[item] = number
        self._waiting[number] = item
        rank = _RANKS.get(priority, _NORMAL)
        heapq.heappush(self._order, (arrived + rank * self._aging_s, number))
        if deadline < math.inf:
            heapq.heappush(self._deadlines, (deadline, number))

    def pop(self, now: float) -> Item | None:
        """Removes and returns the item whose turn it is, or None. What has expired is left to `expired`."""
        self._expire(now)
        while self._order and self._order[0][1] not in self._waiting:
            heapq.heappop(self._order)
        if not self._order:
            return None
        item = self._waiting[heapq.heappop(self._order)[1]]
        self._forget(item)
        return item

    def remove(self, item: Item) -> bool:
        """Removes an item that nobody waits for any more; whether it was there."""
        if item in self._late:
            del self._late[item]
            return True
        if item not in self._numbers:
            return False
        self._forget(item)
        return True

    def expired(self, now: float) -> list[Item]:
        """Removes and returns the items whose deadline has passed, in the order in which that was seen."""
        self._expire(now)
        items = list(self._late)
        self._late.clear()
        return items

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            item = self._waiting.get(heapq.heappop(self._deadlines)[1])
            if item is not None:
                self._forget(item)
                self._late[item] = None

    def _forget(self, item: Item) -> None:
        del self._waiting[self._numbers.pop(item)]
        self._order = self._compact(self._order)
        self._deadlines = self._compact(self._deadlines)

    def _compact(self, heap: list[tuple[float, int]]) -> list[tuple[float, int]]:
        # Entries of items that went must not outnumber the others.
        if len(heap) <= 2 * len(self._waiting) + _SLACK:
            return heap
        kept = [entry for entry in heap if entry[1] in self._waiting]
        heapq.heapify(kept)
        return kept
