"""Limits that every call asks for, so that engines never pass them together (strict mode, S3.14). Pure.

A permit belongs to a life of an engine. It ends when it is settled, or with the engine's session (I6): a session that broke may
come back, and its calls still run, so that its permits are kept for the time in which engines rejoin. A coordinator that has just
started does not know what went before, so for its first minute a limit begins as if a burst had just gone through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from services.coordinator import refusals
from services.runtime.rate_limiter import Quota, RateLimiter

KEYS_MAX: Final = 1024
PERMITS_MAX: Final = 100_000
PERMIT_AGE_MAX_S: Final = 3600.0
"""Longest time that a permit is held: one that old was granted in an answer that never arrived."""
IDLE_S: Final = 120.0
"""Time after which a limit that nobody uses is forgotten; all of it has drained by then."""
RUNNING_RETRY_S: Final = 0.25
"""Retry time while as many requests run as may run at a time."""


@dataclass(frozen=True, slots=True)
class _Permit:
    key: str
    incarnation: str
    tokens: int
    granted_at: float


@dataclass(slots=True)
class _Limit:
    limiter: RateLimiter
    used_at: float


@dataclass(slots=True)
class _Life:
    permits: set[str] = field(default_factory=set)
    sessions: int = 0
    left_at: float = math.inf


class StrictLimits:
    """Limiters by key, and the permits that are held. Times are monotonic seconds.

    `unsure_until` is when nothing that went before can matter any more, `rejoin_s` for how long the permits of a session that is
    over are kept.
    """

    def __init__(self, unsure_until: float, rejoin_s: float) -> None:
        self._unsure_until = unsure_until
        self._rejoin_s = rejoin_s
        self._limits: dict[str, _Limit] = {}
        self._permits: dict[str, _Permit] = {}
        self._lives: dict[str, _Life] = {}

    def __len__(self) -> int:
        """How many permits are held."""
        return len(self._permits)

    @property
    def keys(self) -> int:
        """How many limits there are."""
        return len(self._limits)

    def joined(self, incarnation: str) -> None:
        """An engine has joined, perhaps again in the same life."""
        life = self._lives.setdefault(incarnation, _Life())
        life.sessions += 1
        life.left_at = math.inf

    def left(self, incarnation: str, now: float) -> None:
        """The session of an engine is over."""
        life = self._lives[incarnation]
        life.sessions -= 1
        if not life.sessions:
            life.left_at = now
            if not life.permits:
                del self._lives[incarnation]

    def acquire(
        self,
        permit_id: str,
        key: str,
        incarnation: str,
        *,
        quota: Quota,
        tokens: int,
        now: float,
    ) -> float:
        """Grants a permit for a request of so many tokens and returns 0.0, or returns after how many seconds to ask again.

        Raises CaravanError: SESSION_UNKNOWN; CAPACITY_EXHAUSTED where PERMITS_MAX or KEYS_MAX are reached.
        """
        life = self._lives.get(incarnation)
        if life is None or not life.sessions:
            raise refusals.unknown_session(incarnation)
        if len(self._permits) >= PERMITS_MAX:
            raise refusals.table_full("permits", PERMITS_MAX)
        limit = self._limit(key, quota, now)
        limit.used_at = now
        denial = limit.limiter.find_denial(tokens, now)
        if denial is not None:
            return RUNNING_RETRY_S if denial.wait_s is None else denial.wait_s
        limit.limiter.reserve(tokens, now)
        self._permits[permit_id] = _Permit(key, incarnation, tokens, now)
        life.permits.add(permit_id)
        return 0.0

    def settle(
        self, permit_id: str, used: int | None, now: float, *, throttled_s: float | None = None
    ) -> bool:
        """Ends a permit; `used` None: as many tokens as expected. Returns whether it was held.

        `throttled_s` is given where the provider has said that there were too many: when to try again, or 0.0.
        """
        permit = self._permits.get(permit_id)
        if permit is None:
            return False
        if throttled_s is not None:
            self._limits[permit.key].limiter.throttled(throttled_s or None, now)
        self._end(permit_id, permit.tokens if used is None else used, now)
        return True

    def expire(self, now: float) -> int:
        """Ends the permits of engines that did not come back, and those too old to be true; returns how many."""
        gone = [i for i, life in self._lives.items() if now - life.left_at >= self._rejoin_s]
        ended = [
            permit_id for incarnation in gone for permit_id in self._lives[incarnation].permits
        ]
        # Permits are kept in the order of their granting.
        for permit_id, permit in self._permits.items():
            if now - permit.granted_at < PERMIT_AGE_MAX_S:
                break
            if permit.incarnation not in gone:
                ended.append(permit_id)
        for permit_id in ended:
            self._end(permit_id, self._permits[permit_id].tokens, now)
        for incarnation in gone:
            del self._lives[incarnation]
        for key, limit in list(self._limits.items()):
            if not limit.limiter.running and now - limit.used_at >= IDLE_S:
                del self._limits[key]
        return len(ended)

    def _limit(self, key: str, quota: Quota, now: float) -> _Limit:
        limit = self._limits.get(key)
        if limit is None:
            if len(self._limits) >= KEYS_MAX:
                raise refusals.table_full("limits", KEYS_MAX)
            limit = self._limits[key] = _Limit(RateLimiter(quota), now)
            if now < self._unsure_until:
                limit.limiter.fill(1.0, now)
        limit.limiter.change(quota, now)
        return limit

    def _end(self, permit_id: str, used: int, now: float) -> None:
        permit = self._permits.pop(permit_id)
        self._lives[permit.incarnation].permits.discard(permit_id)
        limit = self._limits[permit.key]
        limit.used_at = now
        limit.limiter.settle(permit.tokens, used, now)

    def check_integrity(self) -> None:
        """Asserts that every permit belongs to a life and counts in its limit, within the bounds. O(n), for tests."""
        assert len(self._permits) <= PERMITS_MAX
        assert len(self._limits) <= KEYS_MAX
        assert sum(len(life.permits) for life in self._lives.values()) == len(self._permits)
        for permit_id, permit in self._permits.items():
            assert permit_id in self._lives[permit.incarnation].permits
        for key, limit in self._limits.items():
            held = sum(permit.key == key for permit in self._permits.values())
            assert limit.limiter.running == held, key
