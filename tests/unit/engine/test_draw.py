"""Drawing a token: against the definition of top-p, min-p and temperature."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.draw import NothingToDrawError, draw
from services.engine.sampling import noise_unit

LOGITS = st.lists(st.integers(-12, 12), min_size=1, max_size=30)


def expected(logits: list[int], temperature: float, top_p: float, min_p: float) -> dict[int, float]:
    """Probability of each token that may come, in double precision."""
    weights = {token: math.exp(logit - max(logits)) for token, logit in enumerate(logits)}
    total = sum(weights.values())
    kept, reached = list[int](), 0.0
    for token in sorted(weights, key=lambda token: (-weights[token], token)):
        if kept and reached >= top_p * total:
            break
        reached += weights[token]
        if weights[token] >= min_p:
            kept.append(token)
    hot = {token: math.exp((logits[token] - max(logits)) / temperature) for token in kept}
    return {token: value / sum(hot.values()) for token, value in hot.items()}


@settings(deadline=None, max_examples=60)
@given(
    LOGITS,
    st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from([0.05, 0.5, 0.93, 1.0]),
    st.sampled_from([0.0, 0.07, 0.9]),
)
def test_tokens_come_as_often_as_their_probability(
    logits: list[int], temperature: float, top_p: float, min_p: float
) -> None:
    """Over evenly spread noise, each token's share is its probability, and others never come."""
    row = np.array(logits, np.float32)
    units = (np.arange(400) + 0.5) / 400
    drawn = [
        draw(row, temperature=temperature, top_p=top_p, min_p=min_p, unit=float(unit))
        for unit in units
    ]
    probabilities = expected(logits, temperature, top_p, min_p)
    assert set(drawn) <= set(probabilities)
    for token, probability in probabilities.items():
        assert drawn.count(token) / 400 == pytest.approx(probability, abs=0.006)


def test_a_large_vocabulary_is_drawn_by_blocks_as_it_would_be_whole() -> None:
    """The two steps land on the token of one cumulated sum."""
    row = np.random.default_rng(1).normal(size=5000).astype(np.float32) * 3
    cumulated = np.cumsum(np.exp(row.astype(np.float64) - float(row.max())))
    for number in range(500):
        unit = noise_unit(7, number)
        whole = int(np.searchsorted(cumulated, unit * cumulated[-1], side="right"))
        assert abs(draw(row, temperature=1, top_p=1, min_p=0, unit=unit) - whole) <= 1


@pytest.mark.parametrize("unit", [0.0, 1 - 2**-53])
def test_the_ends_of_the_noise_choose_tokens_that_are_allowed(unit: float) -> None:
    """A banned token at either end is never chosen."""
    row = np.full(3000, -np.inf, np.float32)
    row[1500] = 1.0
    for top_p, min_p in ((1, 0), (0.9, 0), (1, 0.1)):
        assert draw(row, temperature=1, top_p=top_p, min_p=min_p, unit=unit) == 1500


def test_where_all_is_banned_nothing_is_drawn() -> None:
    """The caller is told, instead of getting some token."""
    with pytest.raises(NothingToDrawError):
        draw(np.full(10, -np.inf, np.float32), temperature=1, top_p=1, min_p=0, unit=0.5)
