"""What engines tell each other of limits through the coordinator: the newest of each, to those who share, not too often."""

from __future__ import annotations

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.coordinator.shared_limits import KEYS_MAX, LIVES_MAX, SharedLimits
from services.runtime.limit_counters import EPOCH_S


def counter(key: str, requests: int, epoch: int = 1) -> pb.LimitCounter:
    """What an engine has used."""
    return pb.LimitCounter(key=key, epoch=epoch, requests=requests)


def joined(limits: SharedLimits, *sessions: int) -> None:
    """Engines that have joined; the life of session 1 is "life-1"."""
    for session in sessions:
        limits.joined(session, f"life-{session}")


def shown(limits: SharedLimits, session: int) -> list[tuple[str, str, int, int]]:
    """What the engine of a session is told."""
    return [(c.key, c.incarnation, c.epoch, c.requests) for c in limits.told(session)]


def test_engines_hear_of_the_others_that_share() -> None:
    """Not of themselves, not of other limits, and of the newest counters only."""
    limits = SharedLimits()
    joined(limits, 1, 2, 3)
    for epoch in (1, 2, 3):
        assert limits.take(1, [counter("a", 10 * epoch, epoch)], float(epoch))
    assert limits.take(1, [counter("a", 5, 3)], 10.0)  # Late, and smaller.
    assert limits.take(2, [counter("a", 1)], 10.0)
    assert limits.take(3, [counter("b", 7)], 10.0)
    assert shown(limits, 1) == [("a", "life-2", 1, 1)]
    assert shown(limits, 2) == [("a", "life-1", 2, 20), ("a", "life-1", 3, 30)]
    assert shown(limits, 3) == []


def test_a_counter_counts_for_the_life_that_sends_it() -> None:
    """Whatever it says: nobody can speak for another one."""
    limits = SharedLimits()
    joined(limits, 1, 2)
    forged = pb.LimitCounter(key="a", incarnation="life-2", epoch=1, requests=9)
    limits.take(1, [forged], 0.0)
    limits.take(2, [counter("a", 0)], 0.0)
    assert shown(limits, 2) == [("a", "life-1", 1, 9)]


def test_nobody_is_told_more_than_once_a_second() -> None:
    """But reports that come a second apart, give or take, are all answered."""
    limits = SharedLimits()
    joined(limits, 1)
    assert sum(limits.take(1, [counter("a", i)], 0.01 * i) for i in range(300)) <= 3 + 2
    assert all(limits.take(1, [counter("a", 0)], 10 + i + (0.1 if i % 2 else 0)) for i in range(20))
    assert not limits.take(1, [], 100.0)


def test_what_one_that_left_has_used_is_told_for_an_epoch() -> None:
    """Then it is forgotten, and the limit with the last of its engines."""
    limits = SharedLimits()
    joined(limits, 1, 2)
    for session in (1, 2):
        limits.take(session, [counter("a", session)], 0.0)
    limits.left(1, 1.0)
    limits.expire(1.0 + EPOCH_S - 0.1)
    assert shown(limits, 2) == [("a", "life-1", 1, 1)]
    limits.expire(1.0 + EPOCH_S)
    assert shown(limits, 2) == []
    limits.left(2, 12.0)
    limits.expire(12.0 + EPOCH_S)
    assert len(limits) == 0
    assert limits.told(2) == []


def test_one_that_joins_again_is_not_forgotten() -> None:
    """The same life in another session goes on with its counters."""
    limits = SharedLimits()
    joined(limits, 1, 2)
    limits.take(2, [counter("a", 0)], 0.0)
    limits.take(1, [counter("a", 4)], 0.0)
    limits.left(1, 1.0)
    limits.joined(9, "life-1")
    limits.expire(60.0)
    assert shown(limits, 2) == [("a", "life-1", 1, 4)]


def test_tables_are_bounded() -> None:
    """Who finds a table full is not told anything, and so keeps to a small part of its limit (I4)."""
    limits = SharedLimits()
    joined(limits, 1, 2)
    for i in range(KEYS_MAX):
        limits.take(1, [counter(f"key-{i}", 1)], float(i))
    assert not limits.take(2, [counter("one more", 1)], 5000.0)
    assert limits.take(2, [counter("key-0", 1)], 5001.0)
    lives = SharedLimits()
    for session in range(LIVES_MAX + 1):
        lives.joined(session, f"life-{session}")
        assert lives.take(session, [counter("a", 1)], 0.0) is (session < LIVES_MAX)
    lives.check_integrity()


SESSIONS = st.integers(1, 6)


class SharedLimitsMachine(RuleBasedStateMachine):
    """Engines come, report, go and come back in the same life; two sessions may claim one life."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = SharedLimits()
        self.now = 0.0
        self.live: dict[int, str] = {}
        self.sessions = 0

    @rule(life=st.sampled_from("abc"))
    def join(self, life: str) -> None:
        """A session begins."""
        self.sessions += 1
        self.live[self.sessions] = life
        self.limits.joined(self.sessions, life)

    @rule(which=SESSIONS)
    def leave(self, which: int) -> None:
        """A session ends, perhaps one that was never there."""
        self.live.pop(which, None)
        self.limits.left(which, self.now)

    @rule(which=SESSIONS, key=st.sampled_from("xyz"), epoch=st.integers(0, 4))
    def report(self, which: int, key: str, epoch: int) -> None:
        """An engine reports, and is told."""
        if which in self.live:
            self.limits.take(which, [counter(key, which, epoch)], self.now)
            told = self.limits.told(which)
            assert all(one.incarnation != self.live[which] for one in told)

    @rule(seconds=st.floats(0.0, 12.0))
    def wait(self, seconds: float) -> None:
        """Time passes, and the sweeper runs."""
        self.now += seconds
        self.limits.expire(self.now)

    @invariant()
    def nothing_is_left_over(self) -> None:
        """Every counter belongs to somebody."""
        self.limits.check_integrity()


TestSharedLimitsMachine = SharedLimitsMachine.TestCase
TestSharedLimitsMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
