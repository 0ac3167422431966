"""Requests that go before all others: they had an engine, and lost it. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable


class AheadLine:
    """Keys in the order of arrival, each with the lives of engines that it avoids.

    One line for each different set of them: who may not go to an engine that has room holds up nobody in another line. There
    are few: each is a set of engines that were lost together.
    """

    def __init__(self) -> None:
        self._lines: dict[frozenset[str], dict[str, int]] = {}
        self._places: dict[str, frozenset[str]] = {}
        self._arrivals = itertools.count()

    def __len__(self) -> int:
        return len(self._places)

    def add(self, key: str, avoid: frozenset[str]) -> None:
        """Adds a key, which must not be there."""
        assert key not in self._places
        self._places[key] = avoid
        self._lines.setdefault(avoid, {})[key] = next(self._arrivals)

    def discard(self, key: str) -> None:
        """Removes a key, if it is there."""
        avoid = self._places.pop(key, None)
        if avoid is None:
            return
        line = self._lines[avoid]
        del line[key]
        if not line:
            del self._lines[avoid]

    def change(self, key: str, avoid: frozenset[str]) -> None:
        """A key that is there avoids other lives now; its place is that of its arrival."""
        arrival = self._lines[self._places[key]][key]
        self.discard(key)
        self._places[key] = avoid
        line = self._lines.get(avoid, {}) | {key: arrival}
        self._lines[avoid] = dict(sorted(line.items(), key=lambda item: item[1]))

    def everybody(self) -> tuple[str, ...]:
        """All keys, in no order."""
        return tuple(self._places)

    def first(self, has_room_for: Callable[[frozenset[str]], bool]) -> str | None:
        """The key that came first among those for which there is room; None where there is none. O(lines)."""
        heads = [
            (arrival, key)
            for avoid, line in self._lines.items()
            for key, arrival in itertools.islice(line.items(), 1)
            if has_room_for(avoid)
        ]
        return min(heads)[1] if heads else None
