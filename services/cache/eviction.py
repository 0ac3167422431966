"""Which copies of a place go first: a cost-aware score, decayed, over the leaves of the chains (GDSF).

Pure. A copy's priority is `clock + frequency * worth`. The clock of a place rises to the priority of each copy that it drops,
so what is not used any more sinks. The frequency halves with every HALF_LIFE_S, and a use never lowers a priority (W32).

The cost of a block over its size is its worth: the work that its bytes save. How fast a model computes is not known here, but
within a model both grow with the tokens, and between models the bytes of a token grow with the work for it; what remains is
that a later token costs more, because attention looks back further.

Only leaves go: a block in front of others that are kept would leave a hole that makes them unreachable.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush, heapreplace
from typing import Final

from services.cache.rows import NOT_QUEUED, Copy

HALF_LIFE_S: Final = 3600.0
ATTENTION_TOKENS: Final = 32_768
"""Position at which attention is taken to cost as much as all else."""
FREQUENCY_MAX: Final = 64.0
"""Uses that count, so that what was popular long ago can be overtaken."""
_SLACK: Final = 64
_IDLE_S: Final = 1.0
"""Below this, the decay is not worth its computation."""


def worth(end: int) -> float:
    """Cost over size of a block that ends at position `end`, relative to one at the start."""
    return 1.0 + end / ATTENTION_TOKENS


def worth_now(copy: Copy) -> tuple[float, float]:
    """What tells copies of different places apart, whose clocks say nothing of each other: uses times worth, then age."""
    return copy.frequency * worth(copy.row.end), copy.last_used


class EvictionOrder:
    """The copies of one place that may go, least worth keeping first.

    The heap is lazy: a copy that was used since it was queued has a higher priority than it is queued under, and is queued
    again when it comes up; one that may not go any more is skipped then. So a use costs no heap operation.
    """

    def __init__(self) -> None:
        self.clock = 0.0
        self._heap: list[Copy] = []

    def __len__(self) -> int:
        return len(self._heap)

    def begin(self, copy: Copy, hits: int, now: float) -> None:
        """Gives a copy that became available its first score, from its earlier uses."""
        copy.frequency = min(1.0 + hits, FREQUENCY_MAX)
        copy.last_used = now
        copy.priority = self.clock + copy.frequency * worth(copy.row.end)
        self.offer(copy)

    def offer(self, copy: Copy) -> None:
        """Queues a copy if it may go; to be called whenever it begins to be so."""
        if copy.queued == NOT_QUEUED and copy.may_go:
            copy.queued = copy.priority
            heappush(self._heap, copy)

    def first(self) -> Copy | None:
        """The copy that goes next, left in the order; None if none may go. Amortised O(log n)."""
        heap = self._heap
        while heap:
            copy = heap[0]
            if not copy.may_go:
                heappop(heap).queued = NOT_QUEUED
            elif copy.priority > copy.queued:
                copy.queued = copy.priority
                heapreplace(heap, copy)
            else:
                return copy
        return None

    def take(self) -> Copy | None:
        """Removes and returns the copy that goes next; None if none may go."""
        copy = self.first()
        if copy is not None:
            heappop(self._heap).queued = NOT_QUEUED
        return copy

    def dropped(self, copy: Copy) -> None:
        """A copy is dropped for want of room: the clock rises to its priority."""
        self.clock = max(self.clock, copy.priority)

    def shrink(self, copies: int) -> None:
        """Forgets skipped entries once they outnumber the `copies` of the place: the heap stays O(copies)."""
        if len(self._heap) > 2 * copies + _SLACK:
            kept = [copy for copy in self._heap if copy.may_go]
            for copy in self._heap:
                copy.queued = NOT_QUEUED
            for copy in kept:
                copy.queued = copy.priority
            heapify(kept)
            self._heap = kept

    def clear(self) -> None:
        """Forgets everything: its place is gone."""
        self._heap.clear()


def touch(copies: Iterable[Copy], now: float) -> None:
    """Counts one use of each copy. On the path of every Acquire, so it calls nothing and leaves the heap alone."""
    place = None
    clock = 0.0
    used_at, decay = now, 1.0
    for copy in copies:
        row = copy.row
        row.uses += 1
        if copy.place is not place:  # Rarely: the blocks of a chain mostly lie together.
            place = copy.place
            clock = place.order.clock
        if copy.last_used != used_at:  # Rarely: they were mostly used together before.
            used_at = copy.last_used
            idle_s = now - used_at
            decay = 0.5 ** (idle_s / HALF_LIFE_S) if idle_s > _IDLE_S else 1.0
        frequency = copy.frequency * decay
        if frequency < FREQUENCY_MAX:
            frequency += 1.0
        copy.frequency = frequency
        copy.last_used = now
        priority = clock + frequency * (1.0 + row.end / ATTENTION_TOKENS)
        if priority > copy.priority:  # noqa: PLR1730 - half the time of max()
            copy.priority = priority
