"""The generic cell rate algorithm: what conforms, for how long to wait, and the bound over any span."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.gcra import Gcra


def test_a_burst_goes_at_once_and_then_the_rate_counts() -> None:
    """Two a second with a burst of three: three now, the next in half a second."""
    gauge = Gcra(2.0, 3.0)
    for _ in range(3):
        assert gauge.wait_s(1, 10.0) == 0
        gauge.take(1, 10.0)
    assert gauge.wait_s(1, 10.0) == pytest.approx(0.5)
    assert gauge.wait_s(1, 10.5) == 0


def test_a_cost_above_the_burst_goes_alone_and_is_paid_for_afterwards() -> None:
    """It waits until nothing is left to drain, and those behind wait until it has drained (W27)."""
    gauge = Gcra(1.0, 2.0)
    gauge.take(1, 0.0)
    assert gauge.wait_s(10, 0.0) == pytest.approx(1.0)
    assert gauge.wait_s(10, 1.0) == 0
    gauge.take(10, 1.0)
    assert gauge.wait_s(1, 1.0) == pytest.approx(9.0)


def test_those_ahead_drain_first() -> None:
    """The wait behind others is what it will be once they have gone."""
    gauge, later = Gcra(2.0, 3.0), Gcra(2.0, 3.0)
    foreseen = gauge.wait_s(1, 0.0, ahead=7)
    now = 0.0
    for _ in range(7):
        now += later.wait_s(1, now)
        later.take(1, now)
    assert foreseen == pytest.approx(now + later.wait_s(1, now))


def test_what_is_given_back_makes_room_but_no_more_than_the_burst() -> None:
    """A refund shortens the wait; it does not become a burst above the burst."""
    gauge = Gcra(1.0, 2.0)
    gauge.take(2, 0.0)
    gauge.give_back(1)
    assert gauge.wait_s(1, 0.0) == 0
    gauge.give_back(50)
    gauge.take(2, 0.0)
    assert gauge.wait_s(1, 0.0) == pytest.approx(1.0)


def test_another_rate_keeps_the_level() -> None:
    """What has not drained drains at the new rate."""
    gauge = Gcra(1.0, 4.0)
    gauge.take(4, 0.0)
    gauge.retune(4.0, 4.0, 0.0)
    assert gauge.level(0.0) == pytest.approx(4.0)
    assert gauge.level(1.0) == 0


def test_a_debt_can_be_capped() -> None:
    """What is beyond is forgotten, what is below stays."""
    gauge = Gcra(1.0, 2.0)
    gauge.take(100, 0.0)
    gauge.cap(10, 0.0)
    assert gauge.level(0.0) == pytest.approx(10.0)
    gauge.cap(50, 0.0)
    assert gauge.level(0.0) == pytest.approx(10.0)


@given(
    rate=st.floats(0.05, 50.0),
    burst=st.integers(1, 30),
    asks=st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(1, 30)), max_size=60),
    span=st.floats(0.1, 30.0),
)
def test_no_span_has_more_than_rate_and_burst(
    rate: float, burst: int, asks: list[tuple[float, int]], span: float
) -> None:
    """Whatever asks when: with costs within the burst, any half-open span of s has at most rate * s + burst."""
    gauge, now, went = Gcra(rate, burst), 0.0, []
    for pause, cost in asks:
        now += pause
        if cost <= burst and gauge.wait_s(cost, now) == 0:
            gauge.take(cost, now)
            went.append((now, cost))
    for begin, _ in went:
        within = sum(cost for at, cost in went if begin <= at < begin + span)
        assert within <= rate * span + burst + 1e-6


@given(
    rate=st.floats(0.05, 50.0),
    burst=st.integers(1, 10),
    before=st.lists(st.tuples(st.floats(0.0, 2.0), st.integers(1, 40)), max_size=20),
    cost=st.integers(1, 40),
)
def test_the_wait_is_exact(
    rate: float, burst: int, before: list[tuple[float, int]], cost: int
) -> None:
    """After the wait the cost conforms, and just before it does not: nobody waits too long or asks in vain."""
    gauge, now = Gcra(rate, burst), 0.0
    for pause, taken in before:
        now += pause
        gauge.take(taken, now)
    wait_s = gauge.wait_s(cost, now)
    assert gauge.wait_s(cost, now + wait_s + 1e-6) == 0
    if wait_s > 1e-3:
        assert gauge.wait_s(cost, now + wait_s - 1e-4) > 0
