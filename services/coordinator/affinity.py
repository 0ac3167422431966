"""Requests go to where their prompt was computed before, as long as that engine is not much busier than the others. Pure.

Bounded loads: an engine is taken for affinity while it holds no more than its share of all leases times a factor, so one
popular system prompt cannot crowd one engine. Both tables are hints: losing an entry costs a cold prompt, nothing else.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Generic, TypeVar

from services.coordinator.engines import EngineRecord
from services.coordinator.routing import PowerOfTwo
from services.coordinator.waiting import Want

PREFIXES_MAX = 65_536
"""Prompt prefixes whose engine is remembered; beyond it those that were not used for longest are forgotten."""
SESSIONS_MAX = 16_384
"""Conversations whose engine is remembered, in the same way."""

Key = TypeVar("Key")


class _Recent(Generic[Key]):
    """The engine of each key, for the keys that were used last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._engines: OrderedDict[Key, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._engines)

    def get(self, key: Key) -> str:
        return self._engines.get(key, "")

    def put(self, key: Key, engine_id: str) -> None:
        self._engines[key] = engine_id
        self._engines.move_to_end(key)
        if len(self._engines) > self._most:
            self._engines.popitem(last=False)


class Whereabouts:
    """Which engine last served each prefix and each conversation, of all models."""

    def __init__(self, prefixes_max: int = PREFIXES_MAX, sessions_max: int = SESSIONS_MAX) -> None:
        self.prefixes: _Recent[bytes] = _Recent(prefixes_max)
        self.sessions: _Recent[tuple[str, str]] = _Recent(sessions_max)


class Affinity:
    """The conversation's engine; else that of the longest known prefix, within the bound; else the less loaded of two."""

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
            known.prefixes.put(prefix, engine.engine_id)
        return engine

    def _of_session(self, want: Want) -> EngineRecord | None:
        if not want.session_id:
            return None
        return self._others.find(self._whereabouts.sessions.get((want.model, want.session_id)))

    def _of_prefix(self, want: Want, mean_load: float) -> EngineRecord | None:
        for prefix in reversed(want.affinity):
            engine = self._others.find(self._whereabouts.prefixes.get(prefix))
            if engine is not None and engine.held < self._bound(engine, mean_load):
                return engine
        return None

    def _bound(self, engine: EngineRecord, mean_load: float) -> int:
        return math.ceil(self._load_factor * mean_load * engine.capacity)
