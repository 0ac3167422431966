"""The price table, and what requests cost by it."""

from __future__ import annotations

import datetime as dt
from decimal import ROUND_CEILING, Decimal

import pytest
from caravan.core.v1 import generation_pb2
from caravan.engine.v1 import remote_options_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from services.engine.remote.prices import Price, PriceTable, Rates, cost_nanousd, tariff

TABLE = PriceTable.load()
COUNTS = st.integers(0, 2**32 - 1)
USD = st.decimals(0, 1_000, places=6)


def usage(prompt: int, cached: int, completion: int) -> generation_pb2.Usage:
    """Tokens as a provider counted them."""
    return generation_pb2.Usage(
        prompt_tokens=prompt, cached_tokens=cached, completion_tokens=completion
    )


def test_the_table_is_dated_and_sound() -> None:
    """A date, about all models of today, and no cached token dearer than others: the likely slips of a hand."""
    assert dt.date.fromisoformat(TABLE.date) <= dt.date(2030, 1, 1)
    assert {provider: len(rows) > 10 for provider, rows in TABLE._prices.items()} == {
        "openai": True,
        "anthropic": True,
        "gemini": True,
    }
    for rows in TABLE._prices.values():
        for name, price in rows.items():
            assert name == name.lower()
            assert 0 < price.rates.cached_input <= price.rates.input < price.rates.output
            if price.long is not None:
                assert price.long_above_tokens > 0
                assert price.long.input > price.rates.input
                assert price.long.output > price.rates.output


@pytest.mark.parametrize(
    ("provider", "model", "usd"),
    [
        ("openai", "gpt-4o", (2.5, 10)),
        ("openai", "gpt-4o-2024-08-06", (2.5, 10)),
        ("openai", "gpt-4o-mini", (0.15, 0.6)),
        ("openai", "GPT-4o-mini-2024-07-18", (0.15, 0.6)),
        ("anthropic", "claude-sonnet-4-20250514", (3, 15)),
        ("anthropic", "claude-opus-4-20250514", (15, 75)),
        ("anthropic", "claude-opus-4-5-20251101", (5, 25)),
        ("gemini", "models/gemini-2.0-flash-001", (0.1, 0.4)),
        ("gemini", "gemini-2.0-flash-lite", (0.075, 0.3)),
        ("litellm", "anthropic/claude-sonnet-4-5", (3, 15)),
        ("litellm", "gpt-4.1-mini", (0.4, 1.6)),
    ],
)
def test_models_are_found_by_the_longest_name(
    provider: str, model: str, usd: tuple[float, float]
) -> None:
    """With a date behind, a path before, in capitals; a sibling's line is never taken for a longer name's own."""
    price = TABLE.price_of(provider, model)
    assert price is not None
    told = price.to_message()
    assert (told.input_usd, told.output_usd) == usd


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("openai", "gpt-4omni"),
        ("openai", "gpt"),
        ("openai", "ft:gpt-4o-mini:org::id"),
        ("openai", "claude-sonnet-4"),
        ("openai_compatible", "gpt-4o"),
        ("anthropic", ""),
        ("nobody", "gpt-4o"),
    ],
)
def test_what_is_not_known_has_no_price(provider: str, model: str) -> None:
    """A name goes on with "-" only; a fine-tuned model, another provider's and a server of one's own have other prices."""
    assert TABLE.price_of(provider, model) is None
    assert cost_nanousd(None, usage(1_000, 0, 1_000)) == 0


@given(prompt=COUNTS, cached=COUNTS, completion=COUNTS, usd=st.tuples(USD, USD, USD))
def test_costs_are_exact(
    prompt: int, cached: int, completion: int, usd: tuple[Decimal, Decimal, Decimal]
) -> None:
    """Decimal arithmetic says the same, to the billionth, rounded up; prices go through the doubles of the contract."""
    told = pb.Price(
        input_usd=float(usd[0]), cached_input_usd=float(usd[1]), output_usd=float(usd[2])
    )
    known = min(cached, prompt)
    exact = ((prompt - known) * usd[0] + known * usd[1] + completion * usd[2]) * 1_000
    cost = cost_nanousd(Price.from_message(told), usage(prompt, cached, completion))
    assert cost == int(exact.to_integral_value(ROUND_CEILING))


def test_cached_tokens_cost_what_others_do_where_nothing_is_said() -> None:
    """In a deployment's price and in the table."""
    price = Price.from_message(pb.Price(input_usd=2, output_usd=8))
    assert price.rates == Rates(2_000_000, 2_000_000, 8_000_000)
    assert cost_nanousd(price, usage(10, 10, 1)) == 28_000
    assert Price.from_message(pb.Price(input_usd=2, cached_input_usd=0)).rates.cached_input == 0


def test_a_long_prompt_makes_the_whole_request_dearer() -> None:
    """From one token above the bound on, answers included."""
    table = PriceTable.parse(
        """date = "2026-01-01"
        [openai]
        "m" = { input = 1, output = 2, long_prompt = { above_tokens = 100, input = 3, output = 4 } }"""
    )
    price = table.price_of("openai", "m")
    assert cost_nanousd(price, usage(100, 0, 10)) == 120_000
    assert cost_nanousd(price, usage(101, 0, 10)) == 343_000


def test_a_deployment_s_price_goes_before_the_table() -> None:
    """Then there is no date of the table; without any price there is nothing."""
    own = tariff(TABLE, pb.RemoteOptions(price=pb.Price(input_usd=7)), "openai", "gpt-4o")
    assert own.price is not None
    assert (own.price.rates.input, own.date) == (7_000_000, "")
    found = tariff(TABLE, pb.RemoteOptions(), "openai", "gpt-4o")
    assert (found.price, found.date) == (TABLE.price_of("openai", "gpt-4o"), TABLE.date)
    assert tariff(TABLE, pb.RemoteOptions(), "openai", "unheard-of").price is None
