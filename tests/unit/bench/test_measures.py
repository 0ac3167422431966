"""The statistics that every figure goes through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.measures import gaps, median, paired_ratio, percentile, rotated

VALUES = st.lists(st.floats(0.001, 1e6), min_size=1, max_size=50)


def test_p99_of_a_hundred_is_the_second_longest() -> None:
    """p99 of 100 trials leaves one outlier out, not two and not none."""
    assert percentile(list(range(1, 101)), 0.99) == 99
    assert percentile(list(range(1, 101)), 1.0) == 100
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0


@given(VALUES, st.floats(0.01, 1))
def test_percentile_covers_its_share(values: list[float], share: float) -> None:
    """At least the share of the values is at most the percentile, and it is one of them."""
    found = percentile(values, share)
    assert found in values
    assert sum(v <= found for v in values) >= share * len(values) - 1e-9


def test_median_of_an_even_number_is_between_the_middle_two() -> None:
    """The usual definition."""
    assert median([4.0, 1.0, 3.0, 2.0]) == 2.5
    assert median([9.0, 1.0, 2.0]) == 2.0


def test_nothing_has_no_percentile() -> None:
    """An empty measurement is a mistake, not a zero that passes a ceiling."""
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)
    with pytest.raises(ValueError, match="no values"):
        median([])


def test_a_slow_round_cancels_out() -> None:
    """Ratios are taken within a round: a round in which everything is slow says the same as the others."""
    assert paired_ratio([10.0, 1.0, 10.0], [5.0, 0.5, 5.0]) == 2.0


def test_rounds_of_different_number_cannot_be_paired() -> None:
    """A lost round must not shift the pairs."""
    with pytest.raises(ValueError, match="zip"):
        paired_ratio([1.0, 2.0], [1.0])


def test_gaps_are_between_neighbours() -> None:
    """Three tokens have two gaps; the wait for the first is not one of them."""
    assert gaps([1.0, 1.5, 3.0]) == [0.5, 1.5]


def test_everybody_begins_a_round_in_turn() -> None:
    """Over as many rounds as contestants each is first once, and nobody is left out."""
    rounds = [rotated(["a", "b", "c"], turn) for turn in range(3)]
    assert [order[0] for order in rounds] == ["a", "b", "c"]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
