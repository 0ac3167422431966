"""What a request costs (S1.30, W12): the price table, and a request's cost by the tokens that the provider counted. Pure.

Prices are whole trillionths of a dollar for one token, which is what a price of up to six decimals for a million tokens comes to;
so sums are exact, and a request's cost is rounded once, up to a billionth.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from importlib import resources
from typing import Any, Final

from caravan.core.v1 import generation_pb2
from caravan.engine.v1 import remote_options_pb2 as pb

_PACKAGE: Final = "services.engine.remote"
_FILE: Final = "prices.toml"
_PICO_PER_USD_PER_MILLION: Final = 1_000_000
_PICO_PER_NANO: Final = 1_000
# A proxy's models go by the names of those who made them; what else serves OpenAI's API sets its own prices.
_MAKERS: Final[Mapping[str, tuple[str, ...]]] = {"litellm": ("openai", "anthropic", "gemini")}


@dataclass(frozen=True, slots=True)
class Rates:
    """Trillionths of a US dollar for one token of a prompt, of a prompt that was in the provider's cache, of an answer."""

    input: int
    cached_input: int
    output: int


@dataclass(frozen=True, slots=True)
class Price:
    """What a model costs. Where a prompt has more than `long_above_tokens`, the `long` rates hold for the whole request."""

    rates: Rates
    long_above_tokens: int = 0
    long: Rates | None = None

    @classmethod
    def from_message(cls, told: pb.Price) -> Price:
        """The price that a deployment sets. Its numbers have been checked: finite, not below 0."""
        cached = told.cached_input_usd if told.HasField("cached_input_usd") else told.input_usd
        return cls(Rates(_pico(told.input_usd), _pico(cached), _pico(told.output_usd)))

    def to_message(self) -> pb.Price:
        """The price as status tells it; that of long prompts is left out."""
        rates = self.rates
        return pb.Price(
            input_usd=rates.input / _PICO_PER_USD_PER_MILLION,
            output_usd=rates.output / _PICO_PER_USD_PER_MILLION,
            cached_input_usd=rates.cached_input / _PICO_PER_USD_PER_MILLION,
        )


def cost_nanousd(price: Price | None, usage: generation_pb2.Usage) -> int:
    """What a request with these tokens costs, in billionths of a US dollar, rounded up. Without a price: 0."""
    if price is None:
        return 0
    prompt = usage.prompt_tokens
    cached = min(usage.cached_tokens, prompt)
    rates = price.rates
    if price.long is not None and prompt > price.long_above_tokens:
        rates = price.long
    pico = (
        (prompt - cached) * rates.input
        + cached * rates.cached_input
        + usage.completion_tokens * rates.output
    )
    return -(-pico // _PICO_PER_NANO)


class PriceTable:
    """Prices by provider and name of the model, as of `date` (such as "2026-11-01")."""

    def __init__(self, date: str, prices: Mapping[str, Mapping[str, Price]]) -> None:
        self.date = date
        self._prices = prices

    @classmethod
    def load(cls) -> PriceTable:
        """The table that comes with the program."""
        return cls.parse((resources.files(_PACKAGE) / _FILE).read_text(encoding="utf-8"))

    @classmethod
    def parse(cls, text: str) -> PriceTable:
        """A table in TOML; see prices.toml. Raises ValueError or KeyError for what is none."""
        found = tomllib.loads(text, parse_float=Decimal)
        date = found.pop("date")
        prices = {
            provider: {name: _price(row) for name, row in rows.items()}
            for provider, rows in found.items()
        }
        return cls(date, prices)

    def price_of(self, provider: str, model: str) -> Price | None:
        """The price of what the provider calls `model`; None where the table does not know it.

        The longest known name counts with which the model's begins, at its end or before a "-"; a path before the name, such as
        "models/" or "anthropic/", does not matter.
        """
        name = model.rpartition("/")[2].lower()
        for maker in _MAKERS.get(provider, (provider,)):
            rows = self._prices.get(maker, {})
            known = name
            while known:
                if known in rows:
                    return rows[known]
                known = known.rpartition("-")[0]
        return None


@dataclass(frozen=True, slots=True)
class Tariff:
    """The price that holds for an engine; `date` is the table's, empty where the deployment sets the price."""

    price: Price | None
    date: str = ""


def tariff(table: PriceTable, options: pb.RemoteOptions, provider: str, model: str) -> Tariff:
    """The price for an engine: the deployment's own, else the table's."""
    if options.HasField("price"):
        return Tariff(Price.from_message(options.price))
    return Tariff(table.price_of(provider, model), table.date)


def _price(row: Mapping[str, Any]) -> Price:
    long = row.get("long_prompt")
    if long is None:
        return Price(_rates(row))
    return Price(_rates(row), long["above_tokens"], _rates(long))


def _rates(row: Mapping[str, Any]) -> Rates:
    cached = row.get("cached_input", row["input"])
    return Rates(_pico(row["input"]), _pico(cached), _pico(row["output"]))


def _pico(usd_per_million: Decimal | float) -> int:
    # By its shortest decimal form, a float means what was written.
    return round(Decimal(str(usd_per_million)) * _PICO_PER_USD_PER_MILLION)
