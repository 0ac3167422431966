"""Restarts: when, and how they are told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cli.backoff import Backoff, BackoffPolicy, describe_exit

POLICY = BackoffPolicy(first=0.25, most=15.0, stable=30.0)


def test_delays_double_up_to_the_most() -> None:
    """A process that dies at once waits twice as long each time, up to the limit."""
    backoff = Backoff(POLICY, lambda: 1.0)
    delays = []
    for _ in range(9):
        backoff.started(0.0)
        delays.append(backoff.died(0.1).delay)
    assert delays == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0]


def test_a_stable_life_forgives() -> None:
    """A process that ran long enough starts from the first delay again."""
    backoff = Backoff(POLICY, lambda: 1.0)
    for _ in range(5):
        backoff.started(0.0)
        backoff.died(1.0)
    backoff.started(100.0)
    assert backoff.died(129.9).deaths == 6
    backoff.started(200.0)
    restart = backoff.died(230.0)
    assert (restart.deaths, restart.delay) == (1, 0.25)


@given(draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=2000))
def test_delays_are_bounded_for_ever(draws: list[float]) -> None:
    """However often it dies, the delay is positive and never above the most (I4)."""
    source = iter(draws)
    backoff = Backoff(POLICY, lambda: next(source))
    for number in range(1, len(draws) + 1):
        backoff.started(0.0)
        restart = backoff.died(0.0)
        assert POLICY.first / 2 <= restart.delay <= POLICY.most
        assert restart.deaths == number


@pytest.mark.parametrize(
    ("code", "text"),
    [(0, "ended with code 0"), (-9, "was ended by SIGKILL"), (-250, "was ended by signal 250")],
)
def test_exits_are_told(code: int, text: str) -> None:
    """An exit code or signal is said in words."""
    assert describe_exit(code) == text
