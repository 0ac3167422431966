"""How a request wants its tokens chosen: validation of core.v1.Sampling, noise keyed by position, log probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from caravan.core.v1 import generation_pb2
from numpy.typing import NDArray

from services.runtime.errors import CaravanError

LOGIT_BIAS_MAX: Final = 1024
TOP_LOGPROBS_MAX: Final = 20
_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """A validated core.v1.Sampling; `grammar` is GBNF with the root rule `root`, "" for none."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repeat_penalty: float
    seed: int
    logit_bias: tuple[tuple[int, float], ...]
    grammar: str = ""

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is simply taken, so that no sampler is needed."""
        return not (self.drawn or self.logit_bias or self.grammar or self.penalized)

    @property
    def drawn(self) -> bool:
        """Whether noise chooses; else the likeliest token of those that are allowed is taken."""
        return self.temperature != 0 and self.top_k != 1

    @property
    def penalized(self) -> bool:
        """Whether tokens of the answer count against themselves."""
        return (self.presence_penalty, self.frequency_penalty, self.repeat_penalty) != (0, 0, 1)


def parse_sampling(
    message: generation_pb2.Sampling, *, vocabulary_tokens: int, fresh_seed: int
) -> SamplingSpec:
    """The sampling of a request, without its grammar. Raises INVALID_VALUE, which names the field."""

    def number(name: str, default: float, low: float, high: float, *, open_low: bool) -> float:
        value = getattr(message, name) if message.HasField(name) else default  # type: ignore[arg-type]
        above = value > low if open_low else value >= low
        if not (math.isfinite(value) and above and value <= high):
            interval = f"{'(' if open_low else '['}{low:g}, {high:g}]"
            raise CaravanError(
                "INVALID_VALUE",
                f"{name} must be within {interval}; it is {value:g}.",
                param=f"sampling.{name}",
            )
        return float(value)

    return SamplingSpec(
        temperature=number("temperature", 1, 0, 2, open_low=False),
        top_p=number("top_p", 1, 0, 1, open_low=True),
        top_k=int(number("top_k", 0, 0, 1_000_000, open_low=False)),
        min_p=number("min_p", 0, 0, 1, open_low=False),
        presence_penalty=number("presence_penalty", 0, -2, 2, open_low=False),
        frequency_penalty=number("frequency_penalty", 0, -2, 2, open_low=False),
        repeat_penalty=number("repeat_penalty", 1, 0, 2, open_low=True),
        seed=message.seed if message.HasField("seed") else fresh_seed,
        logit_bias=_parse_bias(message.logit_bias, vocabulary_tokens),
    )


def _parse_bias(
    entries: Sequence[generation_pb2.LogitBias], vocabulary_tokens: int
) -> tuple[tuple[int, float], ...]:
    def invalid(index: int, what: str) -> CaravanError:
        return CaravanError(
            "INVALID_VALUE",
            f"logit_bias[{index}]: {what}.",
            param=f"sampling.logit_bias[{index}]",
        )

    if len(entries) > LOGIT_BIAS_MAX:
        raise CaravanError(
            "INVALID_VALUE",
            f"logit_bias has {len(entries)} entries; the most is {LOGIT_BIAS_MAX}.",
            param="sampling.logit_bias",
        )
    biases: dict[int, float] = {}
    for index, entry in enumerate(entries):
        if entry.token_id >= vocabulary_tokens:
            raise invalid(index, f"the vocabulary has no token {entry.token_id}")
        if not -100 <= entry.bias <= 100:
            raise invalid(index, "the bias must be within [-100, 100]")
        if entry.token_id in biases:
            raise invalid(index, f"token {entry.token_id} is given twice")
        # -100 bans: no finite logit may outweigh it.
        biases[entry.token_id] = -math.inf if entry.bias <= -100 else entry.bias
    return tuple(biases.items())


def noise_seed(seed: int, position: int) -> int:
    """The 32-bit seed of the noise of one token.

    It depends on the seed of the request and on the token's place in the sequence only, so that an answer resumed from
    its own tokens goes on as it would have. The mixer is splitmix64's (Steele, Lea, Flood 2014).
    """
    mixed = _mix(seed, position) & 0xFFFFFFFF
    # llama.cpp takes 0xFFFFFFFF (LLAMA_DEFAULT_SEED) for "choose one yourself".
    return mixed if mixed != 0xFFFFFFFF else 0


def noise_unit(seed: int, position: int) -> float:
    """The noise of one token as a number in [0, 1), keyed as `noise_seed` is."""
    return (_mix(seed, position) >> 11) * 2.0**-53


def _mix(seed: int, position: int) -> int:
    state = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probability of a chosen token and of the likeliest ones, best first."""

    chosen: float
    top: tuple[tuple[int, float], ...]


def logprobs(row: NDArray[np.float32], token: int, top: int) -> TokenLogprobs:
    """Log-softmax of a row of logits, before any sampling step."""
    largest = float(row.max())
    total = largest + math.log(float(np.exp(row - largest, dtype=np.float32).sum(dtype=np.float64)))
    if top == 0:
        return TokenLogprobs(float(row[token]) - total, ())
    count = min(top, len(row))
    best = np.argpartition(row, len(row) - count)[-count:]
    # By logit, then by id, so that ties do not depend on the partition.
    ordered = best[np.lexsort((best, -row[best]))]
    return TokenLogprobs(
        float(row[token]) - total,
        tuple((int(token_id), float(row[token_id]) - total) for token_id in ordered),
    )
