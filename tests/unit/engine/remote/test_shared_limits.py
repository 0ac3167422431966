"""Shares that follow demand, counters that only grow, and clocks that jump."""

from __future__ import annotations

import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from services.engine.remote.shared_limits import (
    DEMAND_S,
    FORGET_S,
    STALE_S,
    UNHEARD_SHARE,
    SharedLimits,
)
from services.runtime.limit_counters import Use
from services.runtime.rate_limiter import Quota

WALL = 1_750_000_000.0
QUOTA = Quota(60, 6000)


def counter(life: str, *, wanted: int = 0, requests: int = 0, epoch: int = 9) -> pb.LimitCounter:
    """What a peer has told."""
    return pb.LimitCounter(
        key="key", incarnation=life, epoch=epoch, wanted_requests=wanted, requests=requests
    )


def engine() -> SharedLimits:
    """An engine that has not heard anything."""
    return SharedLimits("key", "mine", 0.0)


def want(shared: SharedLimits, requests: int, now: float) -> None:
    """So many ask."""
    for _ in range(requests):
        shared.want(100, now, WALL + now)


def test_who_has_not_heard_anything_keeps_to_a_small_part() -> None:
    """It cannot know with how many it shares; who hears that it is alone has it all."""
    shared = engine()
    want(shared, 10, 0.0)
    assert shared.shares(QUOTA, 0.0).requests == UNHEARD_SHARE
    shared.merge([], 1.0)
    assert shared.shares(QUOTA, 1.0).requests == 1.0
    assert shared.shares(QUOTA, 1.0 + STALE_S + 0.1).requests == UNHEARD_SHARE


def test_shares_follow_demand_and_add_up() -> None:
    """70/10/10/10 of the demand is nearly that of the limit, and together it is all of it."""
    demand = {"a": 70, "b": 10, "c": 10, "d": 10}
    shares = []
    for mine, wanted in demand.items():
        shared = SharedLimits("key", mine, 0.0)
        want(shared, wanted, 0.0)
        shared.merge([counter(life, wanted=n) for life, n in demand.items()], 0.5)
        shares.append(shared.shares(QUOTA, 0.5).requests)
    assert shares[0] == pytest.approx(0.7, abs=0.02)
    assert sum(shares) == pytest.approx(1.0)


def test_what_nobody_wants_is_shared_evenly() -> None:
    """While all want less than the limit, each has what it wants and room for more."""
    shared = engine()
    want(shared, 1, 0.0)
    shared.merge([counter("a", wanted=15)], 0.0)
    # Of 30 within the time of demand: 1, and half of the 14 that nobody wants.
    assert shared.shares(Quota(600), 0.0).requests == pytest.approx(8 / 30, abs=0.01)


def test_nobody_who_asks_gives_an_even_share() -> None:
    """Three who all rest could begin at once."""
    shared = engine()
    shared.merge([counter("a"), counter("b")], 0.0)
    assert shared.shares(QUOTA, 0.0).requests == pytest.approx(1 / 3)


def test_demand_is_forgotten_and_peers_too() -> None:
    """A peer that asks no more leaves its share; one of whom nothing is heard does not count as one that shares."""
    shared = engine()
    want(shared, 10, 0.0)
    shared.merge([counter("a", wanted=90)], 0.0)
    assert shared.shares(QUOTA, 0.0).requests < 0.15
    later = DEMAND_S + 0.5
    want(shared, 10, later)
    shared.merge([counter("a", wanted=90)], later)
    assert shared.shares(QUOTA, later).requests > 0.95
    shared.merge([], later + STALE_S + 1)
    assert shared.peers() == 0
    assert shared.shares(QUOTA, later + STALE_S + 1).requests == 1.0


def test_only_the_increase_is_news_and_the_first_hearing_is_none() -> None:
    """Repeated and late counters are no news; what was used before one came has been used without it."""
    shared = engine()
    assert shared.merge([counter("a", requests=50)], 0.0) == Use()
    assert shared.merge([counter("a", requests=53)], 1.0) == Use(requests=3)
    assert shared.merge([counter("a", requests=51)], 2.0) == Use()
    assert shared.merge([counter("b", requests=2)], 3.0) == Use(requests=2)
    assert shared.merge([counter("mine", requests=70)], 4.0) == Use()
    other = counter("a", requests=99)
    other.key = "another"
    assert shared.merge([other], 5.0) == Use()


def test_a_peer_that_comes_back_is_not_news_again() -> None:
    """It is remembered for much longer than news take."""
    shared = engine()
    shared.merge([], 0.0)
    shared.merge([counter("a", requests=50)], 1.0)
    shared.merge([], 1.0 + STALE_S + 1)
    assert shared.merge([counter("a", requests=51)], FORGET_S / 2) == Use(requests=1)


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["use", "back", "want"]), st.integers(0, 50)), max_size=40
    ),
    jumps=st.lists(st.sampled_from([-90_000.0, -11.0, 0.0, 0.5, 10.0, 90_000.0]), max_size=40),
)
def test_what_is_told_of_an_epoch_only_grows(
    steps: list[tuple[str, int]], jumps: list[float]
) -> None:
    """Refunds and a wall clock that jumps lower no counter and reopen no epoch, and in the end all use is told."""
    shared, wall = engine(), WALL
    told: dict[int, pb.LimitCounter] = {}
    newest = used = 0
    for i, (what, n) in enumerate(steps):
        wall += jumps[i % len(jumps)] if jumps else 0.0
        if what == "use":
            shared.use(0, n, wall)
            used += n
        elif what == "back":
            shared.give_back(0, min(n, used))
            used -= min(n, used)
        else:
            shared.want(n, float(i), wall)
        counters = shared.counters(0, 0, float(i), wall)
        assert len(counters) <= 2
        assert counters[-1].epoch >= newest
        newest = counters[-1].epoch
        for one in counters:
            before = told.get(one.epoch)
            assert before is None or before.tokens <= one.tokens
            told[one.epoch] = one
    assert sum(one.tokens for one in told.values()) >= used


def test_what_comes_back_is_taken_off_what_is_used_next() -> None:
    """A counter must not shrink, so it grows the less."""
    shared, told = engine(), []
    for used, back in ((100, 60), (50, 0), (20, 0)):
        shared.use(1, used, WALL)
        shared.give_back(0, back)
        told += [one.tokens for one in shared.counters(0, 0, 0.0, WALL)]
    assert told == [100, 100, 110]


def test_what_waits_is_wanted_again() -> None:
    """A backlog without new arrivals keeps its share."""
    shared = engine()
    shared.merge([counter("a", wanted=1)], 0.0)
    for second in range(20):
        shared.counters(50, 5000, float(second), WALL + second)
        shared.merge([counter("a", wanted=1 + second)], second + 0.5)
        if second > DEMAND_S:
            assert shared.shares(QUOTA, second + 0.9).requests > 0.8
