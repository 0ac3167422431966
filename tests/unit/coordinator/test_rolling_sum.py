"""Sums over the hour that ends now."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.rolling_sum import DAY, HOUR, RollingSum, Span

SPANS = st.sampled_from([HOUR, DAY, Span(10, 3)])
STEPS = st.lists(st.tuples(st.floats(0, 5_000), st.integers(0, 100)), min_size=1, max_size=60)


@given(span=SPANS, steps=STEPS)
def test_what_counts_is_at_least_the_span_and_at_most_a_bucket_more(
    span: Span, steps: list[tuple[float, int]]
) -> None:
    """Against a list of all amounts; never below 0, and no more buckets than the span has, but one."""
    rolling, now, past = RollingSum(span), 1e9, list[tuple[float, int]]()
    length = span.bucket_s * span.buckets
    for wait, amount in steps:
        now += wait
        rolling.add(amount, now)
        past.append((now, amount))
        least = sum(one for at, one in past if at > now - length)
        most = sum(one for at, one in past if at >= now - length - span.bucket_s)
        assert 0 <= least <= rolling.sum(now) <= most
        assert len(rolling.buckets()[0]) <= span.buckets + 1


@given(span=SPANS, steps=STEPS, limit=st.integers(1, 500))
def test_it_tells_when_it_falls_below_a_limit(
    span: Span, steps: list[tuple[float, int]], limit: int
) -> None:
    """Just then, and not before; at once where it is below."""
    rolling, now = RollingSum(span), 1e9
    for wait, amount in steps:
        now += wait
        rolling.add(amount, now)
    wait = rolling.seconds_until_below(limit, now)
    assert (wait == 0) == (rolling.sum(now) < limit)
    copy = RollingSum(span, *rolling.buckets())
    assert wait == 0 or copy.sum(now + wait - 0.01) >= limit
    assert copy.sum(now + wait) < limit


def test_a_clock_that_goes_back_moves_nothing_into_the_past() -> None:
    """What is added then counts with the latest bucket."""
    rolling = RollingSum(HOUR)
    rolling.add(3, 10_000)
    rolling.add(4, 5_000)
    assert rolling.buckets() == ((166,), (7,))
    assert rolling.sum(10_000 + 3_500) == 7
