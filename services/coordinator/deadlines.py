"""Keys by the time at which they are due. Pure."""

from __future__ import annotations

import heapq
import itertools

_SLACK = 64  # Entries of removed keys that are always allowed to stay.


class Deadlines:
    """One time per key, in monotonic seconds. All operations are O(log keys) amortized."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str]] = []
        self._current: dict[str, int] = {}
        self._count = itertools.count()

    def __len__(self) -> int:
        return len(self._current)

    def add(self, key: str, at: float) -> None:
        """Adds a key, which must not be there."""
        number = self._current[key] = next(self._count)
        heapq.heappush(self._heap, (at, number, key))

    def discard(self, key: str) -> None:
        """Removes a key, if it is there."""
        if self._current.pop(key, None) is None:
            return
        # The entry stays until it is due; entries of keys that went must not outnumber the others.
        if len(self._heap) > 2 * len(self._current) + _SLACK:
            self._heap = [entry for entry in self._heap if self._is_current(entry)]
            heapq.heapify(self._heap)

    def due(self, now: float) -> list[str]:
        """Removes and returns the keys that are due, by time."""
        keys: list[str] = []
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            if self._is_current(entry):
                del self._current[entry[2]]
                keys.append(entry[2])
        return keys

    def _is_current(self, entry: tuple[float, int, str]) -> bool:
        return self._current.get(entry[2]) == entry[1]
