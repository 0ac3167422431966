"""Which engines reach which saved KV blocks, as far as the cache service has told. Pure.

A hint for routing, nothing more: what is not known here is not said to be gone, and a wrong entry costs a cold prompt.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

BLOCKS_MAX = 65_536
"""Blocks that are remembered; beyond it those that changed longest ago are forgotten."""
PLACES_MAX = 16
"""Places of one block that are remembered; of a block that is in more, the others are counted."""
DEPTH_MAX = 32
"""Blocks of a chain that are looked at, from its end."""
GROUPS_MAX = 8
"""Groups of engines that an answer names."""


@dataclass(slots=True, eq=False)
class _Place:
    """The RAM of an engine, or a root: `engines` reach it, `copies` of known blocks are in it. A lower tier is faster."""

    name: tuple[str, str]
    tier: int
    engines: tuple[str, ...]
    copies: int = 0


@dataclass(slots=True)
class _Block:
    """A block and where it is, fastest first; without any it was somewhere, and is not any more."""

    parent: bytes
    places: tuple[_Place, ...] = ()
    others: int = 0


class PublishedBlocks:
    """Blocks by key, and where they are."""

    def __init__(self, blocks_max: int = BLOCKS_MAX) -> None:
        self._max = blocks_max
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()
        self._places: dict[tuple[str, str], _Place] = {}
        # Whether a block that is not known here is nowhere.
        self._complete = False

    def __len__(self) -> int:
        return len(self._blocks)

    def clear(self) -> None:
        """Forgets everything: nobody tells any more what changes."""
        self._blocks.clear()
        self._places.clear()
        self._complete = False

    def complete(self) -> None:
        """All that is present was told since the last `clear`, or there was too much of it to be remembered."""
        self._complete = len(self._blocks) < self._max

    def published(
        self, key: bytes, parent: bytes, tier: int, root_id: str, engines: Sequence[str]
    ) -> None:
        """A copy is there: in a root, or without a `root_id` in the RAM of the only engine."""
        block = self._touch(key, parent)
        name = _place_name(root_id, engines)
        place = self._places.get(name)
        if place is not None:
            # Engines come to a root and leave it without a word of their own: the last change tells.
            place.engines = tuple(engines)
            if place in block.places:
                return
        if len(block.places) == PLACES_MAX:
            block.others += 1
            return
        if place is None:
            place = self._places[name] = _Place(name, tier, tuple(engines))
        block.places = tuple(sorted((*block.places, place), key=_speed))
        place.copies += 1

    def evicted(self, key: bytes, parent: bytes, root_id: str, engines: Sequence[str]) -> None:
        """A copy is gone. That it was there is remembered, so that it is known to be gone."""
        block = self._touch(key, parent)
        place = self._places.get(_place_name(root_id, engines))
        if place is not None and place in block.places:
            block.places = tuple(other for other in block.places if other is not place)
            self._count_out(place)
        elif block.others:
            block.others -= 1

    def holders(self, key: bytes) -> list[tuple[str, ...]] | None:
        """Engines that reach the block or what comes before it, in groups: the nearest block and its fastest places first.

        Empty where the block and all before it are gone; None where that is not known.
        """
        block = self._blocks.get(key)
        if block is None:
            return None
        groups: list[tuple[str, ...]] = []
        seen: set[_Place] = set()
        certain = self._complete
        for _ in range(DEPTH_MAX):
            fresh = [place for place in block.places if place not in seen]
            seen.update(fresh)
            for _, places in itertools.groupby(fresh, _speed):
                groups.append(tuple(name for place in places for name in place.engines))
            certain = certain and not block.others
            before = self._blocks.get(block.parent)
            if before is None or len(groups) >= GROUPS_MAX:
                break
            block = before
        else:
            certain = False  # The chain goes on.
        return groups if groups or certain else None

    def _touch(self, key: bytes, parent: bytes) -> _Block:
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = _Block(parent)
            if len(self._blocks) > self._max:
                self._complete = False
                _, oldest = self._blocks.popitem(last=False)
                for place in oldest.places:
                    self._count_out(place)
        else:
            self._blocks.move_to_end(key)
        return block

    def _count_out(self, place: _Place) -> None:
        place.copies -= 1
        if not place.copies:
            # Ids of engines may be new after each start: a place that nothing is in is not kept.
            del self._places[place.name]

    def check_integrity(self) -> None:
        """Asserts that places and counts agree with the blocks. O(n), for tests."""
        counts: dict[_Place, int] = {}
        for block in self._blocks.values():
            for place in block.places:
                counts[place] = counts.get(place, 0) + 1
        assert counts == {place: place.copies for place in self._places.values()}
        assert len(self._blocks) <= self._max


def _speed(place: _Place) -> int:
    return place.tier


def _place_name(root_id: str, engines: Sequence[str]) -> tuple[str, str]:
    return (root_id, "") if root_id else ("", engines[0] if engines else "")
