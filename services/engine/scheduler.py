"""What is decoded next: pure continuous batching over sequence slots and KV cells.

Every sequence that decodes gets its row in every batch; what is left of the budget goes to prompts, by arrival, in chunks
that never cross a block boundary. A sequence is admitted only when the cells that it may ever need can be reserved, so
that a decode cannot run out of cells half-way through an answer.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from services.engine.backend import Batch

Owner = TypeVar("Owner")


class Phase(Enum):
    """Where a sequence stands."""

    NEW = "new"
    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    ENDED = "ended"


class QueueFullError(Exception):
    """The waiting queue holds as many requests as it may."""


class TooLargeError(Exception):
    """The request needs more cells than there are."""


@dataclass(frozen=True)
class Limits:
    """Sizes in tokens, except sequences and waiting requests.

    `chunk_tokens` is the most of one prompt in a batch beside rows that decode, and of all prompts together unless more
    sequences prefill than decode: it bounds inter-token time.
    """

    max_sequences: int
    cells: int
    batch_tokens: int
    block_tokens: int
    chunk_tokens: int
    max_waiting: int

    def __post_init__(self) -> None:
        if self.batch_tokens < self.block_tokens:
            raise ValueError("a batch must hold a whole block")
        if self.batch_tokens < self.max_sequences + self.chunk_tokens:
            raise ValueError("a batch must hold a token of every sequence and a chunk")
        if min(self.max_sequences, self.cells, self.block_tokens, self.chunk_tokens) < 1:
            raise ValueError("limits are at least 1")


class Sequence(Generic[Owner]):
    """One request's tokens. `tokens[:computed]` is exactly what its KV holds (S2.47, W48)."""

    __slots__ = ("cells", "computed", "owner", "phase", "prompt_length", "slot", "tokens")

    def __init__(self, owner: Owner, prompt: Tokens[int], most_new_tokens: int) -> None:
        self.owner = owner
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.cells = len(prompt) + most_new_tokens
        self.computed = 0
        self.slot = -1
        self.phase = Phase.NEW


class Step(Generic[Owner]):
    """One batch: `spans` say how many tokens of which sequence it computes, `sampled` whose logits it yields, in order."""

    __slots__ = ("batch", "prefill_tokens", "sampled", "spans")

    def __init__(self) -> None:
        self.batch = Batch([], [], [], [])
        self.spans: list[tuple[Sequence[Owner], int]] = []
        self.sampled: list[Sequence[Owner]] = []
        self.prefill_tokens = 0


class Scheduler(Generic[Owner]):
    """Owns slots, cells and the order of requests. Every method is O(sequences) or better."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.free_cells = limits.cells
        self._free_slots = list(range(limits.max_sequences))
        self._waiting: deque[Sequence[Owner]] = deque()
        self._prefilling: dict[int, Sequence[Owner]] = {}
        self._decoding: dict[int, Sequence[Owner]] = {}

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def prefilling(self) -> int:
        """Sequences whose prompt is being computed."""
        return len(self._prefilling)

    @property
    def decoding(self) -> int:
        """Sequences that generate."""
        return len(self._decoding)

    @property
    def active(self) -> int:
        """Sequences that hold a slot."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._prefilling or self._decoding)

    def owners(self) -> list[Owner]:
        """Owners of all sequences that have not ended."""
        groups = (self._decoding.values(), self._prefilling.values(), self._waiting)
        return [sequence.owner for group in groups for sequence in group]

    def submit(self, sequence: Sequence[Owner]) -> None:
        """Queues a sequence. Raises QueueFullError or TooLargeError."""
        if not sequence.tokens:
            raise ValueError("a prompt has at least one token")
        if sequence.cells > self.limits.cells:
            raise TooLargeError
        would_wait = bool(self._waiting) or not self._admissible(sequence)
        if would_wait and len(self._waiting) >= self.limits.max_waiting:
            raise QueueFullError
        sequence.phase = Phase.WAITING
        self._waiting.append(sequence)
        self.admit()

    def admit(self) -> list[Sequence[Owner]]:
        """Gives slots to the sequences that waited longest; stops at the first that does not fit (FIFO)."""
        admitted = []
        while self._waiting and self._admissible(self._waiting[0]):
            sequence = self._waiting.popleft()
            sequence.slot = heapq.heappop(self._free_slots)
            sequence.phase = Phase.PREFILLING
            self.free_cells -= sequence.cells
            self._prefilling[sequence.slot] = sequence
            admitted.append(sequence)
        return admitted

    def _admissible(self, sequence: Sequence[Owner]) -> bool:
        return bool(self._free_slots) and sequence.cells <= self.free_cells

    def next_step(self) -> Step[Owner] | None:
        """The next batch; None if there is nothing to compute."""
        self.admit()
        if not (self._prefilling or self._decoding):
            return None
        step: Step[Owner] = Step()
        if self._decoding:
            self._add_decode_rows(step)
        if self._prefilling:
            self._add_prefill_chunks(step)
        return step

    def _add_decode_rows(self, step: Step[Owner]) -> None:
        batch = step.batch
        sequences = self._decoding.values()
        batch.tokens = [sequence.tokens[-1] for sequence in sequences]
        batch.positions = [sequence.computed for sequence in sequences]
        batch.slots = list(self._decoding)
        batch.outputs = list(range(len(batch.slots)))
        step.spans = [(sequence, 1) for sequence in sequences]
        step.sampled = list(sequences)

    def _add_prefill_chunks(self, step: Step[Owner]) -> None:
        limits = self.limits
        if self._decoding:
            most = limits.chunk_tokens
            # A share by heads: where many wait for few, a longer stall of the few is the shorter wait of all.
            decoding = len(self._decoding)
            share = limits.chunk_tokens * max(decoding, len(self._prefilling)) // decoding
            budget = min(share, limits.batch_tokens - decoding)
        else:
            budget, most = limits.batch_tokens, limits.block_tokens
        batch = step.batch
        for sequence in self._prefilling.values():
            start = sequence.computed
            block_end = (start // limits.block_tokens + 1) * limits.block_tokens
            end = min(start + most, block_end, sequence.prompt_length)
            # A chunk that does not fit whole waits for the next batch: where a prompt is cut must not depend on the
            # company it happens to be in.
            if end - start > budget:
                break
            budget -= end - start
            step.prefill_tokens += end - start
            batch.tokens += sequence.tokens[start:end]
            batch.positions += range(start, end)
            batch.slots += [sequence.slot] * (end - start)
            step.spans.append((sequence, end - start))
            if end == sequence.prompt_length:
                batch.outputs.append(len(batch.tokens) - 1)
                step.sampled.append(sequence)

    def computed(self, step: Step[Owner]) -> None:
        """The batch was decoded: its tokens are in the KV."""
        for sequence, count in step.spans:
            sequence.computed += count
            if sequence.phase is Phase.PREFILLING and sequence.computed == sequence.prompt_length:
                sequence.phase = Phase.DECODING
                self._decoding[sequence.slot] = self._prefilling.pop(sequence.slot)

    def end(self, sequence: Sequence[Owner]) -> int | None:
        """Takes a sequence out, wherever it stands. Returns the slot that it held, whose KV must now be cleared."""
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
        if sequence.slot < 0 or sequence.phase is Phase.ENDED:
            sequence.phase = Phase.ENDED
            return None
        holders = self._prefilling if sequence.phase is Phase.PREFILLING else self._decoding
        del holders[sequence.slot]
        sequence.phase = Phase.ENDED
        self.free_cells += sequence.cells
        heapq.heappush(self._free_slots, sequence.slot)
        return sequence.slot
