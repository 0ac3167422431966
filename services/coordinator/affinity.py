"""Requests go to where their prompt was computed before, as long as that engine is not much busier than the others. Pure.

Bounded loads: an engine is taken for affinity while it holds no more than its share of all leases times a factor, so one
popular system prompt cannot crowd one engine. Where the cache service tells what is saved (published.py), an engine that can
read the state takes the place of a busy one, and a prefix whose state is gone everywhere binds nobody. All tables are hints:
losing an entry costs a cold prompt, nothing else.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from services.coordinator.engines import EngineRecord
from services.coordinator.published import PublishedBlocks
from services.coordinator.routing import PowerOfTwo, load_order
from services.coordinator.waiting import Want

PREFIXES_MAX = 65_536
"""Prompt prefixes whose engine is remembered; beyond it those that were not used for longest are forgotten."""
SESSIONS_MAX = 16_384
"""Conversations whose engine is remembered, in the same way."""
LOOKS_MAX = 4
"""Prefixes of one prompt whose blocks are looked for: the longest that are known."""
HOLDERS_MAX = 16
"""Engines that are compared of those which reach a place."""

SLACK = 1
"""Requests beyond its bound that an engine may hold. While there are few, one engine soon has twice the mean: what one more
request costs its neighbours there is less than computing a prompt anew elsewhere."""

Key = TypeVar("Key")
Value = TypeVar("Value")


class _Recent(Generic[Key, Value]):
    """A value for each key, for the keys that were used last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Key) -> Value | None:
        return self._values.get(key)

    def put(self, key: Key, value: Value) -> None:
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._most:
            self._values.popitem(last=False)

    def drop(self, key: Key) -> None:
        self._values.pop(key, None)


@dataclass(slots=True)
class Served:
    """The engine that last served a prefix, and the key of the KV state that the last request with it left; empty: none yet."""

    engine_id: str
    key: bytes = b""


class Whereabouts:
    """Who last served each prefix and each conversation, of all models, and what is saved where."""

    def __init__(
        self,
        prefixes_max: int = PREFIXES_MAX,
        sessions_max: int = SESSIONS_MAX,
        published: PublishedBlocks | None = None,
    ) -> None:
        self.prefixes: _Recent[bytes, Served] = _Recent(prefixes_max)
        self.sessions: _Recent[tuple[str, str], str] = _Recent(sessions_max)
        self.published = PublishedBlocks() if published is None else published


class Affinity:
    """The conversation's engine; else one with the longest known prefix, within the bound; else the less loaded of two."""

    def __init__(self, others: PowerOfTwo, whereabouts: Whereabouts, load_factor: float) -> None:
        self._others = others
        self._whereabouts = whereabouts
        self._load_factor = load_factor

    def offer(self, engine: EngineRecord) -> None:
        """See Policy."""
        self._others.offer(engine)

    def withdraw(self, engine: EngineRecord) -> None:
        """See Policy."""
        self._others.withdraw(engine)

    def choose(self, want: Want, mean_load: float) -> EngineRecord:
        """See Policy."""
        engine = (
            self._of_session(want)
            or self._of_prefix(want, mean_load)
            or self._others.choose(want, mean_load)
        )
        known = self._whereabouts
        if want.session_id:
            known.sessions.put((want.model, want.session_id), engine.engine_id)
        for prefix in want.affinity:
            served = known.prefixes.get(prefix) or Served(engine.engine_id)
            served.engine_id = engine.engine_id
            known.prefixes.put(prefix, served)
        return engine

    def note_finish(self, affinity: tuple[bytes, ...], finish_key: bytes) -> None:
        """See Policy."""
        for prefix in affinity:
            served = self._whereabouts.prefixes.get(prefix)
            if served is not None:
                served.key = finish_key

    def _of_session(self, want: Want) -> EngineRecord | None:
        if not want.session_id:
            return None
        engine_id = self._whereabouts.sessions.get((want.model, want.session_id))
        return None if engine_id is None else self._others.find(engine_id)

    def _of_prefix(self, want: Want, mean_load: float) -> EngineRecord | None:
        known = self._whereabouts
        looks = 0
        for prefix in reversed(want.affinity):
            served = known.prefixes.get(prefix)
            if served is None:
                continue
            groups: list[tuple[str, ...]] | None = None
            if served.key and looks < LOOKS_MAX:
                groups = known.published.holders(served.key)
                looks += 1
            if groups is not None and not groups:
                known.prefixes.drop(prefix)
                continue
            # First who served it: the state may still be in its cells.
            for group in ((served.engine_id,), *(groups or ())):
                engine = self._least_loaded(group, mean_load)
                if engine is not None:
                    return engine
        return None

    def _least_loaded(self, engine_ids: tuple[str, ...], mean_load: float) -> EngineRecord | None:
        """The least loaded of those which have room within the bound."""
        engines: Iterable[EngineRecord] = (
            engine
            for engine in self._others.some_of(engine_ids, HOLDERS_MAX)
            if engine.held < self._bound(engine, mean_load)
        )
        return min(engines, key=load_order, default=None)

    def _bound(self, engine: EngineRecord, mean_load: float) -> int:
        return math.ceil(self._load_factor * mean_load * engine.capacity) + SLACK
