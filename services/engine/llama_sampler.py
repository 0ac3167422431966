"""Chooses tokens with llama.cpp's samplers: filters, temperature, noise keyed by position, grammar.

Bias and penalties are few numbers and are applied here, with numpy. What looks at every token is done by whoever is
faster at it: llama.cpp's chain where top_k leaves few tokens, draw.py where it does not.
A grammar is asked about the chosen token first, which costs microseconds, and filters the whole vocabulary only if it
rejects that one. It is never told to accept what it rejects: llama.cpp would end the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import llama_cpp
import numpy as np

from services.engine.backend import DecodeError, Logits
from services.engine.draw import NothingToDrawError, draw
from services.engine.sampling import SamplingSpec, noise_seed, noise_unit
from services.runtime.errors import CaravanError

Pointer = Any
_CANDIDATE: Final = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
_NOTHING_ALLOWED: Final = 3


class LlamaSampler:
    """The sampler of one request. Lives on the decode thread."""

    def __init__(
        self, vocab: Pointer, size: int, logits: Callable[[], Logits], spec: SamplingSpec
    ) -> None:
        self._logits = logits
        self._spec = spec
        self._counts: dict[int, int] = {}
        self._ids = np.arange(size, dtype=np.int32)
        self._biased = np.array([token for token, _ in spec.logit_bias], np.int64)
        self._biases = np.array([bias for _, bias in spec.logit_bias], np.float32)
        self._chain: Pointer = None
        self._grammar: Pointer = None
        if spec.drawn and spec.top_k > 0:
            self._chain, self._candidates = _make_chain(spec), np.empty(size, _CANDIDATE)
        if spec.grammar:
            self._grammar = _make_grammar(vocab, spec.grammar)

    def choose(self, output: int, position: int) -> int:
        """The next token. Raises DecodeError where the grammar allows none."""
        row = self._adjusted(self._logits()[output])
        token = self._pick(row, position)
        if self._grammar is not None and not self._allowed(token):
            row = self._filtered(row)
            token = self._pick(row, position)
            if not self._allowed(token):
                raise DecodeError(_NOTHING_ALLOWED, "the grammar allows no token")
        self._accept(token)
        return token

    def resume(self, tokens: Sequence[int]) -> None:
        """Goes on behind tokens that were chosen elsewhere. Raises INVALID_VALUE where the grammar does not allow them."""
        for index, token in enumerate(tokens):
            if self._grammar is not None and not self._allowed(token):
                raise CaravanError(
                    "INVALID_VALUE",
                    f"The grammar does not allow token {token} here.",
                    param=f"resume.token_ids[{index}]",
                )
            self._accept(token)

    def _accept(self, token: int) -> None:
        if self._grammar is not None:
            llama_cpp.llama_sampler_accept(self._grammar, token)
        if self._spec.penalized:
            self._counts[token] = self._counts.get(token, 0) + 1

    def close(self) -> None:
        """Frees the samplers of llama.cpp."""
        for sampler in (self._chain, self._grammar):
            if sampler is not None:
                llama_cpp.llama_sampler_free(sampler)
        self._chain = self._grammar = None

    def _adjusted(self, row: Any) -> Any:
        """The row after bias and penalties, which see the tokens of the answer only."""
        spec = self._spec
        if not (spec.logit_bias or self._counts):
            return row
        row = row.copy()
        if spec.logit_bias:
            row[self._biased] += self._biases
        if self._counts:
            seen = np.fromiter(self._counts, np.int64, len(self._counts))
            times = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            values = row[seen]
            repeat = np.float32(spec.repeat_penalty)
            # A negative logit is multiplied, so that a penalty never makes a token likelier.
            values = np.where(values <= 0, values * repeat, values / repeat)
            row[seen] = values - spec.presence_penalty - times * spec.frequency_penalty
        return row

    def _pick(self, row: Any, position: int) -> int:
        if not self._spec.drawn:
            token = int(row.argmax())
            if row[token] == -math.inf:
                raise DecodeError(_NOTHING_ALLOWED, "no token may be chosen")
            return token
        if self._chain is None:
            return self._draw(row, position)
        candidates = self._candidates
        candidates["id"] = self._ids
        candidates["logit"] = row
        array = _array(candidates)
        _reseed(self._chain, noise_seed(self._spec.seed, position))
        llama_cpp.llama_sampler_apply(self._chain, array)
        if not 0 <= array.selected < array.size:
            raise DecodeError(_NOTHING_ALLOWED, "no token may be chosen")
        token = int(array.data[array.selected].id)
        if row[token] == -math.inf:
            raise DecodeError(_NOTHING_ALLOWED, "no token may be chosen")
        return token

    def _draw(self, row: Any, position: int) -> int:
        spec = self._spec
        try:
            return draw(
                row,
                temperature=spec.temperature,
                top_p=spec.top_p,
                min_p=spec.min_p,
                unit=noise_unit(spec.seed, position),
            )
        except NothingToDrawError as error:
            raise DecodeError(_NOTHING_ALLOWED, "no token may be chosen") from error

    def _allowed(self, token: int) -> bool:
        one = np.zeros(1, _CANDIDATE)
        one["id"] = token
        array = _array(one)
        llama_cpp.llama_sampler_apply(self._grammar, array)
        return bool(one["logit"][0] != -math.inf)

    def _filtered(self, row: Any) -> Any:
        candidates = np.empty(len(row), _CANDIDATE)
        candidates["id"] = self._ids
        candidates["logit"] = row
        llama_cpp.llama_sampler_apply(self._grammar, _array(candidates))
        return candidates["logit"].copy()


def check_grammar(vocab: Pointer, grammar: str) -> None:
    """Raises INVALID_VALUE where llama.cpp does not take the grammar."""
    llama_cpp.llama_sampler_free(_make_grammar(vocab, grammar))


def _make_grammar(vocab: Pointer, grammar: str) -> Pointer:
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
    if not sampler:
        raise CaravanError(
            "INVALID_VALUE", "llama.cpp does not take the grammar.", param="sampling.grammar"
        )
    return sampler


def _make_chain(spec: SamplingSpec) -> Pointer:
    parameters = llama_cpp.llama_sampler_chain_default_params()
    parameters.no_perf = True
    chain = llama_cpp.llama_sampler_chain_init(parameters)
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_k(spec.top_k))
    if spec.top_p < 1:
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_p(spec.top_p, 1))
    if spec.min_p > 0:
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_min_p(spec.min_p, 1))
    if spec.temperature != 1:
        llama_cpp.llama_sampler_chain_add(
            chain, llama_cpp.llama_sampler_init_temp(spec.temperature)
        )
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(0))
    return chain


def _reseed(chain: Pointer, seed: int) -> None:
    """Puts a fresh noise source at the end of the chain; its state is its seed alone."""
    last = llama_cpp.llama_sampler_chain_n(chain) - 1
    llama_cpp.llama_sampler_free(llama_cpp.llama_sampler_chain_remove(chain, last))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(seed))


def _array(candidates: Any) -> Any:
    array = llama_cpp.llama_token_data_array()
    array.data = candidates.ctypes.data_as(llama_cpp.llama_token_data_p)
    array.size = len(candidates)
    array.selected = -1
    array.sorted = False
    return array
