"""How many KV cells are in use when sequences share them. Pure.

llama.cpp counts a cell once however many sequences hold it. Each slot is a list of segments, runs of cells with the same
holders; sharing a prefix adds a holder, and only the last holder's leaving frees a segment. Every operation takes time in
the order of the segments, never of the cells.
"""

from __future__ import annotations

from collections.abc import Iterable


class _Segment:
    """A run of cells and the slots that hold all of them."""

    __slots__ = ("holders", "length")

    def __init__(self, length: int, holders: set[int]) -> None:
        self.length = length
        self.holders = holders


class Cells:
    """The cells of one context, seen from `slots` slots. Positions are in tokens."""

    def __init__(self, slots: int, total: int) -> None:
        self.total = total
        self.used = 0
        """Distinct cells that some slot holds."""
        self._segments: list[list[_Segment]] = [[] for _ in range(slots)]

    @property
    def free(self) -> int:
        """Cells that no slot holds."""
        return self.total - self.used

    def length(self, slot: int) -> int:
        """Tokens of a slot."""
        return sum(segment.length for segment in self._segments[slot])

    def extend(self, slot: int, count: int) -> None:
        """Appends `count` new cells to a slot. Raises ValueError where they are not free."""
        used = self.used + count
        if used > self.total:
            raise ValueError(f"{count} cells are wanted, {self.free} are free")
        self.used = used
        segments = self._segments[slot]
        if segments and len(segments[-1].holders) == 1:
            segments[-1].length += count
        elif count:
            segments.append(_Segment(count, {slot}))

    def share(self, source: int, target: int, end: int) -> None:
        """Lets the empty slot `target` hold the first `end` cells of `source` too."""
        if self._segments[target]:
            raise ValueError(f"slot {target} is not empty")
        shared = self._segments[source][: self._split(source, end)]
        for segment in shared:
            segment.holders.add(target)
        self._segments[target] = shared

    def cut(self, slot: int, end: int) -> None:
        """Takes the cells from position `end` on from a slot."""
        at = self._split(slot, end)
        segments = self._segments[slot]
        dropped, self._segments[slot] = segments[at:], segments[:at]
        others: set[int] = set()
        for segment in dropped:
            segment.holders.discard(slot)
            others |= segment.holders
            if not segment.holders:
                self.used -= segment.length
        # Runs that differed only in this holder are one again: slots that live long stay short lists.
        for other in others:
            self._merge(other)
        self._merge(slot)

    def clear(self, slot: int) -> None:
        """Takes all cells from a slot."""
        self.cut(slot, 0)

    def exclusive(self, slot: int) -> int:
        """Cells that clearing the slot would free."""
        return sum(segment.length for segment in self._segments[slot] if len(segment.holders) == 1)

    def distinct(self, slots: Iterable[int]) -> int:
        """Cells that at least one of the slots holds."""
        # A segment is one object in all its holders' lists.
        return sum({s: s.length for slot in slots for s in self._segments[slot]}.values())

    def _split(self, slot: int, end: int) -> int:
        """Index of the segment that begins at position `end`, cut there if it began before."""
        position = 0
        for index, segment in enumerate(self._segments[slot]):
            if position == end:
                return index
            if position + segment.length > end:
                rest = _Segment(position + segment.length - end, set(segment.holders))
                segment.length = end - position
                for holder in rest.holders:
                    segments = self._segments[holder]
                    segments.insert(segments.index(segment) + 1, rest)
                return index + 1
            position += segment.length
        if position != end:
            raise ValueError(f"slot {slot} holds {position} cells, not {end}")
        return len(self._segments[slot])

    def _merge(self, slot: int) -> None:
        """Joins neighbours with the same holders. They are neighbours in every holder: what is shared is a prefix."""
        segments = self._segments[slot]
        index = 1
        while index < len(segments):
            before, segment = segments[index - 1], segments[index]
            if before.holders != segment.holders:
                index += 1
                continue
            before.length += segment.length
            for holder in tuple(segment.holders):
                self._segments[holder].remove(segment)
