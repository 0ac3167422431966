"""A scheduler that a test moves by hand, on a memory that keeps every cell."""

from __future__ import annotations

from dataclasses import replace

from services.engine.batching import Limits
from services.engine.scheduler import Scheduler
from services.engine.sequence import Sequence
from tests.support.cell_memory import PlainMemory

LIMITS = Limits(
    max_sequences=3,
    cells=64,
    batch_tokens=24,
    block_tokens=8,
    chunk_tokens=4,
    max_waiting=4,
    # Above every prompt of the tests of batches, so that these are cut at blocks only.
    min_shared=100,
)
SHARING = replace(
    LIMITS,
    cells=200,
    min_shared=4,
    residents=2,
    resident_cells=100,
    session_s=60,
    swap_bytes=10_000,
)


class Rig:
    """A scheduler on a plain memory; `run` is one turn of the decode thread."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.memory = PlainMemory(limits.slots, limits.cells)
        self.scheduler: Scheduler[str] = Scheduler(limits, self.memory)
        self.now = 0.0
        self.prefilled = 0

    def add(
        self, prompt: int | list[int], most_new: int = 8, *, session: str = "", salt: bytes = b""
    ) -> Sequence[str]:
        """Submits a prompt; one given as tokens may share its state."""
        tokens = list(range(prompt)) if isinstance(prompt, int) else prompt
        sequence = Sequence(
            "",
            tokens,
            most_new,
            sharable=not isinstance(prompt, int),
            session_id=session,
            salt=salt,
        )
        self.scheduler.submit(sequence, self.now)
        return sequence

    def run(self) -> list[tuple[int, list[int], int]]:
        """Every sampled sequence gets a token; returns slot, positions and outputs per span."""
        step = self.scheduler.plan(self.now)
        if step is None:
            return []
        spans, row, batch = [], 0, step.batch
        for sequence, count in step.spans:
            wanted = sum(1 for output in batch.outputs if output in range(row, row + count))
            spans.append((sequence.slot, batch.positions[row : row + count], wanted))
            row += count
        for slot, position, token in zip(batch.slots, batch.positions, batch.tokens, strict=True):
            self.memory.append(slot, position, token)
        self.prefilled += step.prefill_tokens
        self.scheduler.computed(step)
        for sequence in step.sampled:
            sequence.tokens.append(1000 + len(sequence.tokens))
        return spans

    def finish(self, sequence: Sequence[str], tokens: int = 0) -> list[int]:
        """Runs until it has so many tokens of answer, and ends it; returns what its KV held."""
        while len(sequence.tokens) < sequence.prompt_length + tokens or sequence.computed == 0:
            self.run()
        held = sequence.tokens[: sequence.computed]
        self.scheduler.end(sequence, self.now, keep=True)
        return held
