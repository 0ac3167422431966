"""Which rows a batch gets: one of every sequence that decodes, then chunks of prompts. Pure.

Chunks never cross a block boundary, and the last token of a prompt is a chunk of its own. So a prompt whose state was saved
up to any block boundary, or up to its last token, goes on with exactly the batches of the cold run, and repeats its
arithmetic to the last bit where the same cells and no company are given.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Generic

from services.engine.backend import Batch
from services.engine.sequence import Owner, Sequence


@dataclass(frozen=True)
class Limits:
    """Sizes in tokens, except sequences, waiting requests, residents, bytes and seconds.

    `chunk_tokens` is the most of one prompt in a batch beside rows that decode, and of all prompts together unless more
    sequences prefill than decode: it bounds inter-token time. Prefixes shorter than `min_shared` are not shared, prompts
    shorter than it are computed in one piece. At most `residents` finished sequences stay, in at most `resident_cells`;
    one that was computed while twice that many cells were in use does not: llama.cpp fills cells from the front, and every
    step of others costs time for all cells up to the last one in use. With `whole_states`, state cannot be cut: a sequence
    goes on only from exactly what another one holds.
    """

    max_sequences: int
    cells: int
    batch_tokens: int
    block_tokens: int
    chunk_tokens: int
    max_waiting: int
    min_shared: int = 64
    residents: int = 0
    resident_cells: int = 0
    session_s: float = 600.0
    swap_bytes: int = 0
    whole_states: bool = False

    def __post_init__(self) -> None:
        if self.batch_tokens < self.block_tokens:
            raise ValueError("a batch must hold a whole block")
        if self.batch_tokens < self.max_sequences + self.chunk_tokens:
            raise ValueError("a batch must hold a token of every sequence and a chunk")
        if min(self.max_sequences, self.cells, self.block_tokens, self.chunk_tokens) < 1:
            raise ValueError("limits are at least 1")
        if min(self.min_shared, self.residents, self.resident_cells, self.swap_bytes) < 0:
            raise ValueError("limits are not below 0")

    @property
    def near_cells(self) -> int:
        """Cells in use up to which what is computed lies near enough to the front to stay."""
        return 2 * self.resident_cells

    @property
    def slots(self) -> int:
        """Sequences that llama.cpp must know at a time."""
        return self.max_sequences + self.residents


class Step(Generic[Owner]):
    """One batch: `spans` say how many tokens of which sequence it computes, `sampled` whose logits it yields, in order."""

    __slots__ = ("batch", "prefill_tokens", "sampled", "spans")

    def __init__(self) -> None:
        self.batch = Batch([], [], [], [])
        self.spans: list[tuple[Sequence[Owner], int]] = []
        self.sampled: list[Sequence[Owner]] = []
        self.prefill_tokens = 0

    def add_decode_rows(self, sequences: Collection[Sequence[Owner]]) -> None:
        """A row of each sequence that decodes; before any prefill."""
        batch = self.batch
        batch.tokens = [sequence.tokens[-1] for sequence in sequences]
        batch.positions = [sequence.computed for sequence in sequences]
        batch.slots = [sequence.slot for sequence in sequences]
        batch.outputs = list(range(len(batch.slots)))
        self.spans = [(sequence, 1) for sequence in sequences]
        self.sampled = list(sequences)

    def add_prefill(self, sequence: Sequence[Owner], end: int) -> None:
        """The tokens of a prompt from where it stands up to `end`."""
        batch, start = self.batch, sequence.computed
        self.prefill_tokens += end - start
        batch.tokens += sequence.tokens[start:end]
        batch.positions += range(start, end)
        batch.slots += [sequence.slot] * (end - start)
        self.spans.append((sequence, end - start))
        if end == sequence.target:
            batch.outputs.append(len(batch.tokens) - 1)
            self.sampled.append(sequence)


def chunk_end(sequence: Sequence[Owner], limits: Limits, *, beside_rows: bool) -> int:
    """Where the next chunk of a prompt ends, given whether others decode in the same batch."""
    start, target = sequence.computed, sequence.target
    most = limits.chunk_tokens if beside_rows else limits.block_tokens
    block_end = (start // limits.block_tokens + 1) * limits.block_tokens
    alone = target >= limits.min_shared and start < target - 1
    return min(start + most, block_end, target - 1 if alone else target)


def prefill_budget(limits: Limits, prefilling: int, decoding: int) -> int:
    """Most prompt tokens of a batch."""
    if not decoding:
        return limits.batch_tokens
    # A share by heads: where many wait for few, a longer stall of the few is the shorter wait of all.
    share = limits.chunk_tokens * max(decoding, prefilling) // decoding
    return min(share, limits.batch_tokens - decoding)
