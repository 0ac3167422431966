"""What the engine needs of a model: the boundary between the decode thread and llama.cpp, or its scripted stand-in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.engine.sampling import SamplingSpec

Logits = NDArray[np.float32]
Progress = Callable[[float], None]
"""Told the share of the model that is loaded, 0 to 1; called on the decode thread."""


@dataclass(slots=True)
class Batch:
    """Tokens for one decode call, as parallel lists; `outputs` are the rows whose logits are wanted, ascending."""

    tokens: list[int]
    positions: list[int]
    slots: list[int]
    outputs: list[int]


class CacheSupport(IntEnum):
    """How the KV state of a model can be cached; the numbers are those of engine.v1.CacheSupport.

    WHOLE: the state of a sequence can be had and restored only as a whole, at the length that it has.
    """

    BLOCKS = 1
    WHOLE = 2
    OFF = 3


@dataclass(frozen=True)
class ModelFacts:
    """What is fixed once a model is loaded. Sizes are in tokens, except those in bytes.

    `quant` names the type of the weights, such as "q8_0". `context_identity` is all that a KV state depends on besides the
    model file and the tokens. `cache_note` says why the state is not cached in blocks, "" if it is. `cell_bytes` is what
    packing one token takes, about.
    """

    description: str
    context_tokens: int
    vocabulary_tokens: int
    weight_bytes: int
    max_sequences: int
    cells: int
    batch_tokens: int
    chat_template: str | None
    bos_text: str
    eos_text: str
    quant: str
    context_identity: Mapping[str, str]
    cache_support: CacheSupport
    cache_note: str
    cell_bytes: int


class DecodeError(Exception):
    """The batch was not decoded. `code` is llama_decode's: 1 no cells, 2 aborted, below 0 fatal for the batch."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class StateError(Exception):
    """A KV state was refused: it is damaged, of another model, or has no room. Nothing has changed."""


class ModelError(Exception):
    """The model cannot be served; the message says why, without the path."""


class Vocabulary(Protocol):
    """Text to tokens and back. Safe to call from any thread."""

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        """Tokens of `text`, without BOS. Texts of control tokens become tokens only with `parse_special`."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Bytes of a token; b"" for control tokens. Not always whole characters."""
        ...

    @property
    def size(self) -> int:
        """Number of tokens; ids are 0 to size - 1."""
        ...

    @property
    def eog_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ...

    @property
    def bos_token(self) -> int | None:
        """The token that the model wants before every prompt, None if it wants none."""
        ...

    @property
    def control_texts(self) -> Sequence[str]:
        """Texts of the control tokens, such as "<|im_end|>"."""
        ...


class TokenSampler(Protocol):
    """Chooses the tokens of one request. Lives on the decode thread."""

    def choose(self, output: int, position: int) -> int:
        """The next token, from logits row `output` of the last decode, for the place `position` of the sequence.

        Raises DecodeError where nothing may be chosen.
        """
        ...

    def resume(self, tokens: Sequence[int]) -> None:
        """Goes on behind tokens of the answer that were chosen elsewhere; before the first `choose`.

        Raises INVALID_VALUE where they could not have been chosen.
        """
        ...

    def close(self) -> None:
        """Frees it."""
        ...


class Backend(Protocol):
    """A loaded model with its context. Only the thread that loaded it may call it, except for `vocabulary`."""

    @property
    def facts(self) -> ModelFacts:
        """What the model is."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """Its vocabulary."""
        ...

    def decode(self, batch: Batch) -> None:
        """Computes the batch. Raises DecodeError."""
        ...

    def logits(self) -> Logits:
        """Logits of the last decode, (outputs, vocabulary), in the order of `Batch.outputs`; valid until the next."""
        ...

    def sampler(self, spec: SamplingSpec) -> TokenSampler:
        """A sampler for a request that is not greedy. Raises CaravanError where the spec cannot be honoured."""
        ...

    def check(self, spec: SamplingSpec) -> None:
        """Raises CaravanError where `sampler` would. Safe to call from any thread."""
        ...

    def clear(self, slot: int) -> None:
        """Forgets the KV of a sequence."""
        ...

    def cut(self, slot: int, end: int) -> None:
        """Forgets the KV of a sequence from token `end` on."""
        ...

    def share(self, source: int, target: int, end: int) -> None:
        """Lets the empty sequence `target` hold the first `end` tokens of `source` too. Nothing is copied."""
        ...

    def pack(self, slot: int, start: int, end: int) -> memoryview:
        """The state of tokens [start, end) of a sequence, in memory of its own. Raises StateError.

        A state that cannot be cut is packed from 0 to the end of what the sequence holds.
        """
        ...

    def join(self, slot: int, state: memoryview, start: int, end: int, whole_end: int) -> None:
        """Restores tokens [start, end) of a sequence, which holds exactly those before `start`.

        `state` was packed from a sequence with the same tokens; it holds those from `start` or earlier to `whole_end`.
        Takes free cells for all of the state while it runs. A state that cannot be cut is joined to an empty sequence, with
        `start` 0 and `end` as `whole_end`. Raises StateError.
        """
        ...

    def close(self) -> None:
        """Frees the context and the model."""
        ...


class Loader(Protocol):
    """Loads a model on the decode thread. Raises ModelError."""

    def __call__(self, progress: Progress) -> Backend: ...
