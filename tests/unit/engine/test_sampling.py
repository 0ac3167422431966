"""Sampling parameters, noise seeds and log probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from caravan.core.v1 import generation_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.sampling import logprobs, noise_seed, parse_sampling
from services.runtime.errors import CaravanError

# The machine of a test run is busy: no deadline per example.
QUICK = settings(deadline=None, max_examples=60)


def parse(**fields: Any) -> Any:
    message = generation_pb2.Sampling(**fields)
    return parse_sampling(message, vocabulary_tokens=512, fresh_seed=7)


def test_defaults_are_those_of_the_contract() -> None:
    """Unset fields mean what the comments of core.v1.Sampling say."""
    spec = parse()
    assert (spec.temperature, spec.top_p, spec.top_k, spec.min_p) == (1, 1, 0, 0)
    assert (spec.presence_penalty, spec.frequency_penalty, spec.repeat_penalty) == (0, 0, 1)
    assert (spec.seed, spec.greedy) == (7, False)
    assert parse(temperature=0).greedy
    assert parse(top_k=1).greedy
    assert not parse(temperature=0, presence_penalty=1).greedy


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", 1_000_001),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repeat_penalty", 0.0),
        ("repeat_penalty", math.inf),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    """INVALID_VALUE names the field; nothing is clipped in silence."""
    with pytest.raises(CaravanError) as caught:
        parse(**{field: value})
    assert (caught.value.reason, caught.value.param) == ("INVALID_VALUE", f"sampling.{field}")


@pytest.mark.parametrize(
    ("entries", "param"),
    [
        ([(512, 1.0)], "sampling.logit_bias[0]"),
        ([(1, 1.0), (1, 2.0)], "sampling.logit_bias[1]"),
        ([(1, 101.0)], "sampling.logit_bias[0]"),
        ([(1, math.nan)], "sampling.logit_bias[0]"),
        ([(0, 0.0)] * 1025, "sampling.logit_bias"),
    ],
)
def test_a_wrong_bias_is_refused(entries: list[tuple[int, float]], param: str) -> None:
    """Unknown tokens, doubles, values out of range and too many entries."""
    with pytest.raises(CaravanError) as caught:
        parse(logit_bias=[generation_pb2.LogitBias(token_id=t, bias=b) for t, b in entries])
    assert (caught.value.reason, caught.value.param) == ("INVALID_VALUE", param)


@QUICK
@given(st.integers(0, 2**64 - 1), st.integers(0, 1 << 20))
def test_noise_depends_on_seed_and_position_and_is_never_left_to_llama_cpp(
    seed: int, position: int
) -> None:
    """The seed of a token's noise is a 32-bit number other than llama.cpp's "choose yourself"."""
    value = noise_seed(seed, position)
    assert value == noise_seed(seed, position)
    assert 0 <= value < 0xFFFFFFFF


def test_neighbouring_seeds_and_positions_share_no_noise() -> None:
    """Seeds 0, 1, 2 and positions 0 to 99 give 300 different values."""
    assert len({noise_seed(s, p) for s in range(3) for p in range(100)}) == 300


def test_log_probabilities_are_those_of_the_softmax() -> None:
    """Against the definition, in double precision; ties are ordered by id."""
    row = np.array([1.0, 3.0, -2.0, 3.0, 0.5], np.float32)
    exact = np.log(np.exp(row.astype(float)) / np.exp(row.astype(float)).sum())
    result = logprobs(row, 2, 3)
    assert result.chosen == pytest.approx(exact[2], abs=1e-6)
    assert [token for token, _ in result.top] == [1, 3, 0]
    assert [value for _, value in result.top] == pytest.approx(exact[[1, 3, 0]], abs=1e-6)
    assert len(logprobs(row, 0, 20).top) == 5
    assert logprobs(row, 0, 0).top == ()
