"""What engines have told of the limits that they share, and who is to hear it (approximate mode, S3.14). Pure.

The coordinator decides nothing here: it keeps the newest counters of each engine and answers a report with those of the others, so
that engines which share a limit know of each other within about a second. An answer is also the sign that the engine is heard;
without it it keeps to a small part of the limit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.runtime.gcra import Gcra
from services.runtime.limit_counters import EPOCH_S, EngineUse, to_counters, use_of

KEYS_MAX: Final = 1024
"""Most limits. Of more no counters are kept and nothing is told, so that their engines keep to a small part of them."""
LIVES_MAX: Final = 1024
"""Most lives of engines that share one limit; for more, the same."""
TELLINGS_PER_S: Final = 1.0
_TELLINGS_BURST: Final = 1.25
"""Reports come a second apart, give or take: one that comes up to a quarter early is answered too."""


@dataclass(slots=True)
class _Session:
    incarnation: str
    keys: set[str] = field(default_factory=set)
    tellings: Gcra = field(default_factory=lambda: Gcra(TELLINGS_PER_S, _TELLINGS_BURST))


class SharedLimits:
    """Counters by limit and life of an engine. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._keys: dict[str, dict[str, EngineUse]] = {}
        self._sessions: dict[int, _Session] = {}
        self._left: dict[str, float] = {}

    def __len__(self) -> int:
        """How many limits there are."""
        return len(self._keys)

    def joined(self, session: int, incarnation: str) -> None:
        """An engine has joined."""
        self._sessions[session] = _Session(incarnation)
        self._left.pop(incarnation, None)

    def left(self, session: int, now: float) -> None:
        """The session of an engine is over. What it has used stays for an epoch: the others have to hear of it."""
        gone = self._sessions.pop(session, None)
        if gone is not None and all(
            session.incarnation != gone.incarnation for session in self._sessions.values()
        ):
            self._left[gone.incarnation] = now

    def take(self, session: int, counters: Iterable[pb.LimitCounter], now: float) -> bool:
        """Learns of the counters of an engine; returns whether it is to hear of the others now. O(counters)."""
        mine = self._sessions[session]
        is_known = False
        for counter in counters:
            use = self._use(counter.key, mine.incarnation)
            if use is not None:
                use.merge(counter.epoch, use_of(counter))
                mine.keys.add(counter.key)
                is_known = True
        if not is_known or mine.tellings.wait_s(1, now):
            return False
        mine.tellings.take(1, now)
        return True

    def told(self, session: int) -> list[pb.LimitCounter]:
        """What the others have used of the limits of an engine. O(engines that share them)."""
        mine = self._sessions.get(session)
        if mine is None:
            return []
        return [
            counter
            for key in sorted(mine.keys)
            for incarnation, use in self._keys[key].items()
            if incarnation != mine.incarnation
            for counter in to_counters(key, incarnation, use)
        ]

    def expire(self, now: float) -> None:
        """Forgets the engines that left an epoch ago, and the limits that nobody has."""
        for incarnation in [i for i, left in self._left.items() if now - left >= EPOCH_S]:
            del self._left[incarnation]
            for key in [key for key, lives in self._keys.items() if incarnation in lives]:
                del self._keys[key][incarnation]
                if not self._keys[key]:
                    del self._keys[key]

    def _use(self, key: str, incarnation: str) -> EngineUse | None:
        lives = self._keys.get(key)
        if lives is None:
            if len(self._keys) >= KEYS_MAX:
                return None
            lives = self._keys[key] = {}
        use = lives.get(incarnation)
        if use is None and len(lives) < LIVES_MAX:
            use = lives[incarnation] = EngineUse()
        return use

    def check_integrity(self) -> None:
        """Asserts that every counter belongs to a live session or to one that has just left, within the bounds. O(n), for tests."""
        live = {session.incarnation for session in self._sessions.values()}
        assert len(self._keys) <= KEYS_MAX
        for lives in self._keys.values():
            assert lives
            assert len(lives) <= LIVES_MAX
            assert set(lives) <= live | set(self._left)
        for session in self._sessions.values():
            assert all(session.incarnation in self._keys[key] for key in session.keys)
