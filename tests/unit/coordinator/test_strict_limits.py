"""Limits for which every call asks: never passed, and every permit belongs to a live session."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.coordinator import strict_limits
from services.coordinator.limits import Limits
from services.coordinator.rate_limits import RateLimits
from services.coordinator.strict_limits import IDLE_S, PERMIT_AGE_MAX_S, StrictLimits
from services.runtime.errors import CaravanError
from services.runtime.rate_limiter import Quota

REJOIN_S = 8.0


def limits_of(*lives: str, unsure_until: float = -1.0) -> StrictLimits:
    """Limits with engines that have joined."""
    limits = StrictLimits(unsure_until, REJOIN_S)
    for life in lives:
        limits.joined(life)
    return limits


def acquire(
    limits: StrictLimits, permit: str, quota: Quota, now: float, *, life: str = "a", tokens: int = 0
) -> float:
    """Asks for a permit of the one limit."""
    return limits.acquire(permit, "key", life, quota=quota, tokens=tokens, now=now)


def test_no_minute_has_more_than_the_limit_whoever_asks() -> None:
    """Four engines that ask in turn, each as fast as it can, for three minutes."""
    limits, quota, went = limits_of("a", "b", "c", "d"), Quota(60), list[float]()
    for i in range(3 * 60 * 50):
        now = i / 50
        if not acquire(limits, f"p{i}", quota, now, life="abcd"[i % 4]):
            went.append(now)
            limits.settle(f"p{i}", 0, now)
    assert max(sum(begin <= at < begin + 60 for at in went) for begin in went) <= 60
    assert len(went) > 2.9 * 57


def test_a_coordinator_that_has_just_started_counts_on_what_went_before() -> None:
    """Its predecessor may have let a burst through a moment ago (I6): the first minute has the rate without the burst."""
    quota, went = Quota(600), 0
    limits = limits_of("a", unsure_until=60.0)
    for i in range(100):
        went += not acquire(limits, f"p{i}", quota, 0.01 * i)
    assert went <= 10
    later = limits_of("a", unsure_until=60.0)
    assert sum(not acquire(later, f"p{i}", quota, 61.0) for i in range(100)) == 24


def test_the_first_minute_is_that_of_the_process() -> None:
    """The state is told until when it learns of engines, and counts its minute from its start."""
    started_at, bounds = 500.0, Limits()
    rates = RateLimits(bounds, started_at + bounds.rejoin_s)
    rates.strict.joined("a")
    for now, most in ((started_at, 5), (started_at + 59.9, 5), (started_at + 60.0, 30)):
        went = sum(
            not rates.strict.acquire(
                f"{now}-{i}", f"{now}", "a", quota=Quota(600), tokens=0, now=now + 0.01 * i
            )
            for i in range(50)
        )
        assert most - 2 <= went <= most


def test_an_engine_that_has_not_joined_gets_nothing() -> None:
    """Nobody would sweep its permits."""
    limits = limits_of("a")
    with pytest.raises(CaravanError) as caught:
        acquire(limits, "p", Quota(60), 0.0, life="unknown")
    assert caught.value.reason == "SESSION_UNKNOWN"
    limits.left("a", 0.0)
    with pytest.raises(CaravanError):
        acquire(limits, "p", Quota(60), 0.0)
    assert len(limits) == 0


def test_permits_end_with_the_session_but_not_before_it_can_come_back() -> None:
    """The calls of a session that broke still run; those of one that stays away are given up (I6)."""
    quota = Quota(0, 0, 1)
    limits = limits_of("a", "b")
    assert acquire(limits, "p1", quota, 0.0) == 0
    assert acquire(limits, "p2", quota, 0.0, life="b") > 0
    limits.left("a", 1.0)
    limits.joined("a")
    limits.expire(1.0 + 2 * REJOIN_S)
    assert acquire(limits, "p2", quota, 20.0, life="b") > 0
    limits.left("a", 20.0)
    assert limits.expire(20.0 + REJOIN_S - 0.1) == 0
    assert acquire(limits, "p2", quota, 27.0, life="b") > 0
    assert limits.expire(20.0 + REJOIN_S) == 1
    assert acquire(limits, "p2", quota, 28.0, life="b") == 0
    assert not limits.settle("p1", None, 28.0)


def test_settling_once_counts() -> None:
    """What was used instead of what was expected; the second time nothing."""
    quota = Quota(0, 60_000)
    limits = limits_of("a")
    assert acquire(limits, "p1", quota, 0.0, tokens=2400) == 0
    assert acquire(limits, "p2", quota, 0.0, tokens=2400) > 0
    assert limits.settle("p1", 0, 0.0)
    assert acquire(limits, "p2", quota, 0.0, tokens=2400) == 0
    assert not limits.settle("p1", 0, 0.0)
    assert acquire(limits, "p3", quota, 0.0, tokens=2400) > 0
    limits.check_integrity()


def test_a_429_at_one_engine_stops_all() -> None:
    """For the time that the provider names, or at a lower pace."""
    quota = Quota(600)
    limits = limits_of("a", "b")
    assert acquire(limits, "p1", quota, 0.0) == 0
    assert limits.settle("p1", 0, 0.0, throttled_s=9.0)
    assert acquire(limits, "p2", quota, 1.0, life="b") == pytest.approx(8.0)
    assert acquire(limits, "p2", quota, 9.0, life="b") == 0


def test_what_is_told_last_counts() -> None:
    """A deployment with another limit changes it for all."""
    limits = limits_of("a", "b")
    assert acquire(limits, "p1", Quota(0, 0, 1), 0.0) == 0
    assert acquire(limits, "p2", Quota(0, 0, 2), 0.0, life="b") == 0
    assert acquire(limits, "p3", Quota(0, 0, 2), 0.0, life="b") > 0


def test_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """More limits or permits than there may be are refused with a reason (I4); unused limits are forgotten."""
    monkeypatch.setattr(strict_limits, "PERMITS_MAX", 3)
    monkeypatch.setattr(strict_limits, "KEYS_MAX", 2)
    limits = limits_of("a")
    for i in range(2):
        assert limits.acquire(f"p{i}", f"k{i}", "a", quota=Quota(), tokens=0, now=0.0) == 0
    for permit, key in (("p2", "k2"), ("p3", "k0"), ("p4", "k0")):
        if permit == "p3":
            assert limits.acquire(permit, key, "a", quota=Quota(), tokens=0, now=0.0) == 0
            continue
        with pytest.raises(CaravanError) as caught:
            limits.acquire(permit, key, "a", quota=Quota(), tokens=0, now=0.0)
        assert caught.value.reason == "CAPACITY_EXHAUSTED"
    for i in (0, 1, 3):
        limits.settle(f"p{i}", None, 1.0)
    limits.expire(1.0 + IDLE_S)
    assert limits.keys == 0


def test_a_permit_whose_answer_was_lost_is_not_held_for_ever() -> None:
    """The engine lives, but does not know of it."""
    limits = limits_of("a")
    acquire(limits, "p1", Quota(0, 0, 1), 0.0)
    assert limits.expire(PERMIT_AGE_MAX_S - 1) == 0
    assert limits.expire(PERMIT_AGE_MAX_S) == 1
    assert len(limits) == 0


class StrictLimitsMachine(RuleBasedStateMachine):
    """Engines come, go and come back, ask and settle in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = StrictLimits(-1.0, REJOIN_S)
        self.now = 0.0
        self.sessions: list[str] = []
        self.asked = 0

    @rule(life=st.sampled_from("abc"))
    def join(self, life: str) -> None:
        """A session begins, perhaps a second one of a life."""
        self.sessions.append(life)
        self.limits.joined(life)

    @rule(which=st.integers(0, 5))
    def leave(self, which: int) -> None:
        """A session ends."""
        if which < len(self.sessions):
            self.limits.left(self.sessions.pop(which), self.now)

    @rule(life=st.sampled_from("abc"), key=st.sampled_from("xy"), tokens=st.integers(0, 500))
    def ask(self, life: str, key: str, tokens: int) -> None:
        """An engine asks for a permit."""
        self.asked += 1
        permit, quota = f"p{self.asked}", Quota(600, 6000, 3)
        if life in self.sessions:
            self.limits.acquire(permit, key, life, quota=quota, tokens=tokens, now=self.now)
        else:
            with pytest.raises(CaravanError):
                self.limits.acquire(permit, key, life, quota=quota, tokens=tokens, now=self.now)

    @rule(back=st.integers(0, 8), used=st.none() | st.integers(0, 900))
    def settle(self, back: int, used: int | None) -> None:
        """A call ends, or one that has ended already."""
        self.limits.settle(f"p{self.asked - back}", used, self.now)

    @rule(seconds=st.sampled_from([1 / 64, 1.0, 5.0, 9.0, 130.0]))
    def wait(self, seconds: float) -> None:
        """Time passes, by amounts whose sums are exact, and the sweeper runs."""
        self.now += seconds
        self.limits.expire(self.now)

    @invariant()
    def counts_are_a_recount(self) -> None:
        """Every permit has an owner and counts in its limit."""
        self.limits.check_integrity()

    def teardown(self) -> None:
        """When all have left for long enough, nothing is held."""
        while self.sessions:
            self.limits.left(self.sessions.pop(), self.now)
        self.limits.expire(self.now + REJOIN_S)
        assert len(self.limits) == 0


TestStrictLimitsMachine = StrictLimitsMachine.TestCase
TestStrictLimitsMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
