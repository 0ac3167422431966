"""The engines of one model that have room, and which of them a request gets. Pure.

Two policies of the same kind: an engine that has let a request down is a suspect, and is chosen only where no other has room.
Engines that a request must avoid are taken out of both for the length of its choice, so no policy needs to know of either.
"""

from __future__ import annotations

from collections.abc import Callable, Set

from services.coordinator.engines import EngineRecord
from services.coordinator.grouping import Groups
from services.coordinator.routing import Policy
from services.coordinator.waiting import Want


class EngineChoice:
    """Engines with room. A choice costs what the policy takes, and O(log engines) for each engine that is avoided."""

    def __init__(self, new_policy: Callable[[], Policy]) -> None:
        self._trusted, self._suspects = new_policy(), new_policy()
        self._trusted_ids: set[str] = set()
        self._suspect_ids: set[str] = set()
        self._lives: Groups[EngineRecord] = Groups()

    def offer(self, engine: EngineRecord) -> None:
        """The engine has room; to be called again whenever its load changes, or it becomes a suspect or is none any more."""
        self._lives.add(engine.incarnation, engine.engine_id, engine)
        if engine.is_suspect:
            self._trusted.withdraw(engine)
            self._suspects.offer(engine)
            self._trusted_ids.discard(engine.engine_id)
            self._suspect_ids.add(engine.engine_id)
        else:
            self._suspects.withdraw(engine)
            self._trusted.offer(engine)
            self._suspect_ids.discard(engine.engine_id)
            self._trusted_ids.add(engine.engine_id)

    def withdraw(self, engine: EngineRecord) -> None:
        """The engine has no room any more, or is gone. It may not have been offered."""
        self._lives.discard(engine.incarnation, engine.engine_id)
        for policy, ids in self._both():
            policy.withdraw(engine)
            ids.discard(engine.engine_id)

    def has_room_for(self, avoid: Set[str]) -> bool:
        """Whether an engine has room whose life is not among those. O(lives that are avoided)."""
        room = len(self._trusted_ids) + len(self._suspect_ids)
        return room > sum(map(self._lives.count, avoid))

    def choose(self, want: Want, mean_load: float) -> EngineRecord:
        """The engine for a request for which there is room; see Policy.choose."""
        avoided = [engine for life in want.avoid for engine in self._lives.items(life)]
        for engine in avoided:
            self.withdraw(engine)
        policy = self._trusted if self._trusted_ids else self._suspects
        chosen = policy.choose(want, mean_load)
        for engine in avoided:
            self.offer(engine)
        return chosen

    def note_finish(self, affinity: tuple[bytes, ...], finish_key: bytes) -> None:
        """See Policy.note_finish. One policy is told: what they remember of prompts is shared by all of a kind."""
        self._trusted.note_finish(affinity, finish_key)

    def _both(self) -> tuple[tuple[Policy, set[str]], ...]:
        return (self._trusted, self._trusted_ids), (self._suspects, self._suspect_ids)

    def check_integrity(self, open_engines: list[EngineRecord]) -> None:
        """Asserts that just these engines are offered, each to its policy. O(n), for tests."""
        ids = {engine.engine_id: engine.is_suspect for engine in open_engines}
        assert self._trusted_ids == {name for name, suspect in ids.items() if not suspect}
        assert self._suspect_ids == {name for name, suspect in ids.items() if suspect}
        assert sum(self._lives.counts().values()) == len(ids)
