"""Requests, tokens and concurrency together, settled with what was used, and slower after a 429."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.runtime import slowdown
from services.runtime.rate_limiter import (
    CONCURRENT,
    PAUSE,
    REQUESTS,
    TOKENS,
    Denial,
    Quota,
    RateLimiter,
    burst_of,
    rate_of,
)


def admitted(limiter: RateLimiter, tokens: int, now: float) -> bool:
    """Asks, and goes if it can."""
    if limiter.find_denial(tokens, now) is not None:
        return False
    limiter.reserve(tokens, now)
    return True


@settings(deadline=None, max_examples=60)
@given(
    per_minute=st.sampled_from([1, 2, 7, 30, 60, 600]),
    rest=st.sampled_from([0.0, 5.0, 59.0, 61.0]),
    pauses=st.lists(st.sampled_from([0.0, 0.01, 0.05, 0.5]), min_size=1, max_size=7),
)
def test_no_minute_wherever_it_begins_has_more_than_the_limit(
    per_minute: int, rest: float, pauses: list[float]
) -> None:
    """Rate and burst together keep the limit in every half-open span of 60 s, also after a rest (W26)."""
    limiter, now, went = RateLimiter(Quota(per_minute)), 1000.0, list[float]()
    for i in range(150):
        now += 0.8 + pauses[i % len(pauses)] + (rest if i == 75 else 0)
        while admitted(limiter, 0, now):
            went.append(now)
    for begin in went:
        assert sum(begin <= at < begin + 60.0 - 1e-6 for at in went) <= per_minute


def test_most_of_the_limit_can_be_used() -> None:
    """Who asks all the time gets more than 95 % of it, and all of a limit of one."""
    for per_minute in (1, 10, 60, 600, 100_000):
        assert 60 * rate_of(per_minute) > 0.95 * per_minute
        assert burst_of(per_minute) >= 1


def test_all_or_nothing() -> None:
    """What tokens refuse takes no request, and the limit that waits longest is named."""
    limiter = RateLimiter(Quota(60, 6000))
    assert admitted(limiter, 240, 0.0)
    denial = limiter.find_denial(240, 0.0)
    assert denial is not None
    assert denial.limit == TOKENS
    assert denial.wait_s == pytest.approx(240 / rate_of(6000))
    # Asking has not counted anything.
    assert [admitted(limiter, 0, 0.0) for _ in range(3)] == [True, False, False]
    refused = limiter.find_denial(0, 0.0)
    assert refused is not None
    assert refused.limit == REQUESTS


def test_a_request_larger_than_the_limit_goes_when_nothing_else_has() -> None:
    """W27: upstream could never admit it; here it goes alone, and what follows waits for all of it."""
    limiter = RateLimiter(Quota(0, 1000))
    assert admitted(limiter, 5000, 0.0)
    denial = limiter.find_denial(1, 0.0)
    assert denial is not None
    assert denial.wait_s is not None
    assert denial.wait_s > 290


def test_settling_gives_back_or_makes_a_debt() -> None:
    """What was used counts, not what was expected (W27)."""
    low, high = RateLimiter(Quota(0, 60_000)), RateLimiter(Quota(0, 60_000))
    for limiter, used in ((low, 100), (high, 12_400)):
        assert admitted(limiter, 2400, 0.0)
        limiter.settle(2400, used, 0.0)
        assert limiter.running == 0
    assert low.find_denial(2200, 0.0) is None
    denial = high.find_denial(1, 0.0)
    assert denial is not None
    assert denial.wait_s == pytest.approx((12_400 - 2400 + 1) / rate_of(60_000))


def test_requests_at_a_time() -> None:
    """One more waits for another's end, nobody knows how long; what was never sent counts nothing at all."""
    limiter = RateLimiter(Quota(60, 0, 2))
    assert admitted(limiter, 0, 0.0)
    limiter.withdraw(0, 0.0)
    assert admitted(limiter, 0, 0.0)
    assert admitted(limiter, 0, 30.0)
    assert limiter.find_denial(0, 60.0) == Denial(CONCURRENT, None)
    limiter.settle(0, 0, 60.0)
    assert limiter.find_denial(0, 60.0) is None


def test_a_429_lowers_the_pace_once_and_it_comes_back_slowly() -> None:
    """Those that were under way together count once; the floor holds; time without a 429 raises it to what is configured."""
    limiter = RateLimiter(Quota(600))
    for i in range(20):
        limiter.throttled(None, 0.001 * i)
    assert limiter.factor(1.0) == pytest.approx(slowdown.DECREASE)
    for i in range(50):
        limiter.throttled(None, 10.0 * (i + 1))
    now = 500.0
    assert limiter.factor(now) == pytest.approx(slowdown.FLOOR, abs=0.05)
    assert limiter.find_denial(0, now) is None
    went = sum(admitted(limiter, 0, now + 0.1 * i) for i in range(100))
    assert 5 <= went <= 15  # A tenth of a hundred.
    assert limiter.factor(now + slowdown.HOLD_S + 60) == pytest.approx(0.7, abs=0.05)
    assert limiter.factor(now + 3600) == 1.0


def test_a_named_retry_time_is_a_pause_for_all() -> None:
    """Nothing goes before it, and it has a longest."""
    limiter = RateLimiter(Quota())
    limiter.throttled(7.0, 0.0)
    limiter.throttled(2.0, 1.0)
    assert limiter.find_denial(0, 2.0) == Denial(PAUSE, 5.0)
    assert limiter.find_denial(0, 7.0) is None
    limiter.throttled(1e9, 10.0)
    assert limiter.find_denial(0, 10.0) == Denial(PAUSE, slowdown.PAUSE_MAX_S)


def test_another_quota_keeps_what_was_counted() -> None:
    """A limit that is lowered is not a new one: what went through before still counts."""
    limiter = RateLimiter(Quota(600))
    while admitted(limiter, 0, 0.0):
        pass
    limiter.change(Quota(60, 1000), 0.0)
    denial = limiter.find_denial(0, 0.0)
    assert denial is not None
    assert denial.wait_s is not None
    assert denial.wait_s > 1.0
    limiter.change(Quota(), 0.0)
    assert limiter.find_denial(10**9, 0.0) is None


def test_without_limits_everything_goes() -> None:
    """0 is no limit."""
    limiter = RateLimiter(Quota())
    assert all(admitted(limiter, 10**9, 0.0) for _ in range(1000))


def test_a_share_of_concurrency_is_at_least_one() -> None:
    """Shares are rounded down, so that they never add up to more; but nobody is shut out."""
    limiter = RateLimiter(Quota(0, 0, 10))
    for share, most in ((0.25, 2), (1.0, 10), (0.01, 1)):
        limiter.share(share, share, 0.0)
        assert limiter.concurrent_max == most
