"""Which engine of a model gets a request (S1.10-S1.12, W5). Pure.

A policy is told of every change of an engine, and keeps just what its choice needs. The load is what the coordinator has
granted, not what engines report: reports are a second old, and a burst within that second would all go to one engine.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from services.coordinator.engines import EngineRecord
from services.coordinator.waiting import Want

_SLACK = 64  # Entries of former loads that are always allowed to stay.


class Policy(Protocol):
    """Chooses among the engines of one model that have room."""

    def offer(self, engine: EngineRecord) -> None:
        """The engine has room; called again whenever its load changes."""

    def withdraw(self, engine: EngineRecord) -> None:
        """The engine has no room any more, or is gone. It may not have been offered."""

    def choose(self, want: Want, mean_load: float) -> EngineRecord:
        """The engine for a request; at least one is offered. `mean_load` is the share of all sequences in use, this included."""

    def note_finish(self, affinity: tuple[bytes, ...], finish_key: bytes) -> None:
        """A request with these prefixes of its prompt has left KV state under this key."""


class LeastLoaded:
    """The engine with the least load; among equals the one whose last grant is the oldest. O(log engines)."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, EngineRecord]] = []
        self._current: dict[str, int] = {}
        self._count = itertools.count()

    def offer(self, engine: EngineRecord) -> None:
        """See Policy."""
        number = self._current[engine.engine_id] = next(self._count)
        heapq.heappush(self._heap, (*load_order(engine), number, engine))
        if len(self._heap) > 2 * len(self._current) + _SLACK:
            self._heap = [entry for entry in self._heap if self._is_current(entry)]
            heapq.heapify(self._heap)

    def withdraw(self, engine: EngineRecord) -> None:
        """See Policy."""
        self._current.pop(engine.engine_id, None)

    def choose(self, want: Want, mean_load: float) -> EngineRecord:
        """See Policy."""
        while not self._is_current(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][3]

    def note_finish(self, affinity: tuple[bytes, ...], finish_key: bytes) -> None:
        """See Policy. It does not matter here."""

    def _is_current(self, entry: tuple[float, int, int, EngineRecord]) -> bool:
        return self._current.get(entry[3].engine_id) == entry[2]


class RoundRobin:
    """Each engine in turn, whatever its load. O(1)."""

    def __init__(self) -> None:
        self._ring: OrderedDict[str, EngineRecord] = OrderedDict()

    def offer(self, engine: EngineRecord) -> None:
        """See Policy."""
        self._ring[engine.engine_id] = engine

    def withdraw(self, engine: EngineRecord) -> None:
        """See Policy."""
        self._ring.pop(engine.engine_id, None)

    def choose(self, want: Want, mean_load: float) -> EngineRecord:
        """See Policy."""
        engine_id, engine = next(iter(self._ring.items()))
        self._ring.move_to_end(engine_id)
        return engine

    def note_finish(self, affinity: tuple[bytes, ...], finish_key: bytes) -> None:
        """See Policy. It does not matter here."""


class PowerOfTwo:
    """The less loaded of two random engines: nearly as even as the least loaded, without a crowd on one. O(1)."""

    def __init__(self, fraction: Callable[[], float]) -> None:
        """`fraction` gives random numbers within [0, 1)."""
        self._fraction = fraction
        self._engines: list[EngineRecord] = []
        self._places: dict[str, int] = {}

    def find(self, engine_id: str) -> EngineRecord | None:
        """The engine, if it has room."""
        place = self._places.get(engine_id)
        return None if place is None else self._engines[place]

    def some_of(self, engine_ids: Sequence[str], most: int) -> Iterator[EngineRecord]:
        """Those of the engines that have room; of more than `most` just so many, from a random one on."""
        if len(engine_ids) > most:
            first = int(self._fraction() * len(engine_ids))
            engine_ids = [engine_ids[(first + n) % len(engine_ids)] for n in range(most)]
        return filter(None, map(self.find, engine_ids))

    def offer(self, engine: EngineRecord) -> None:
        """See Policy."""
        if engine.engine_id not in self._places:
            self._places[engine.engine_id] = len(self._engines)
            self._engines.append(engine)

    def withdraw(self, engine: EngineRecord) -> None:
        """See Policy."""
        place = self._places.pop(engine.engine_id, None)
        if place is None:
            return
        last = self._engines.pop()
        if last is not engine:
            self._engines[place] = last
            self._places[last.engine_id] = place

    def choose(self, want: Want, mean_load: float) -> EngineRecord:
        """See Policy."""
        engines = self._engines
        if len(engines) == 1:
            return engines[0]
        one = int(self._fraction() * len(engines))
        other = int(self._fraction() * (len(engines) - 1))
        if other >= one:  # Two different ones.
            other += 1
        return min(engines[one], engines[other], key=load_order)

    def note_finish(self, affinity: tuple[bytes, ...], finish_key: bytes) -> None:
        """See Policy. It does not matter here."""


def load_order(engine: EngineRecord) -> tuple[float, int]:
    """The smaller is the better choice: by load, then by how long ago it was given something."""
    return engine.held / engine.capacity, engine.last_grant
