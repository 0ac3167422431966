"""The scheduler: what every sequence of requests, cancels and steps must keep."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.engine.scheduler import (
    Limits,
    Phase,
    QueueFullError,
    Scheduler,
    Sequence,
    TooLargeError,
)

LIMITS = Limits(
    max_sequences=3,
    cells=64,
    batch_tokens=24,
    block_tokens=8,
    chunk_tokens=4,
    max_waiting=4,
)

# The machine of a test run is busy: no deadline per example.
QUICK = settings(deadline=None, max_examples=60)


def new(prompt: int, most_new: int = 4, owner: str = "") -> Sequence[str]:
    return Sequence(owner, range(prompt), most_new)


def run_step(scheduler: Scheduler[str]) -> list[tuple[int, list[int], int]]:
    """Runs a step in which every sampled sequence gets a token; returns slot, positions and outputs per span."""
    step = scheduler.next_step()
    if step is None:
        return []
    spans, row = [], 0
    for sequence, count in step.spans:
        rows = range(row, row + count)
        wanted = sum(1 for output in step.batch.outputs if output in rows)
        spans.append((sequence.slot, step.batch.positions[row : row + count], wanted))
        row += count
    scheduler.computed(step)
    for sequence in step.sampled:
        sequence.tokens.append(1000 + len(sequence.tokens))
    return spans


class Machine(RuleBasedStateMachine):
    """Random arrivals, steps and endings against the rules of the scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler: Scheduler[str] = Scheduler(LIMITS)
        self.live: list[Sequence[str]] = []
        self.kv: dict[int, list[int]] = {}
        self.arrived: list[Sequence[str]] = []

    @rule(prompt=st.integers(1, 40), most_new=st.integers(1, 20))
    def submit(self, prompt: int, most_new: int) -> None:
        sequence = new(prompt, most_new)
        try:
            self.scheduler.submit(sequence)
        except QueueFullError:
            assert self.scheduler.waiting == LIMITS.max_waiting
            assert self.scheduler.end(sequence) is None
            return
        self.live.append(sequence)
        self.arrived.append(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        self._end(sequence)

    def _end(self, sequence: Sequence[str]) -> None:
        slot = self.scheduler.end(sequence)
        self.live.remove(sequence)
        if slot is not None:
            self.kv.pop(slot, None)
        assert self.scheduler.end(sequence) is None, "ending twice frees nothing twice"

    @rule()
    def step(self) -> None:
        decoding = [s for s in self.live if s.phase is Phase.DECODING]
        step = self.scheduler.next_step()
        if step is None:
            assert not self.live, "what is left always makes progress"
            return
        batch = step.batch
        assert 0 < len(batch.tokens) <= LIMITS.batch_tokens
        first = {sequence for sequence, _ in step.spans[: len(decoding)]}
        assert first == set(decoding), "every decoding sequence has its row, before any prompt"
        if decoding:
            waiting = sum(s.phase is Phase.PREFILLING for s in self.live)
            share = LIMITS.chunk_tokens * max(1.0, waiting / len(decoding))
            assert step.prefill_tokens <= share
        self._check_spans(step.spans, batch.positions)
        for token, position, slot in zip(batch.tokens, batch.positions, batch.slots, strict=True):
            held = self.kv.setdefault(slot, [])
            assert position == len(held), "no position is skipped or repeated"
            held.append(token)
        self.scheduler.computed(step)
        for sequence in step.sampled:
            sequence.tokens.append(len(sequence.tokens))
            if len(sequence.tokens) - sequence.prompt_length >= sequence.cells - (
                sequence.prompt_length
            ):
                self._end(sequence)

    def _check_spans(
        self, spans: Iterable[tuple[Sequence[str], int]], positions: list[int]
    ) -> None:
        row = 0
        for sequence, count in spans:
            first, last = positions[row], positions[row + count - 1]
            assert first // LIMITS.block_tokens == last // LIMITS.block_tokens
            assert sequence.phase in {Phase.PREFILLING, Phase.DECODING}
            row += count

    @invariant()
    def cells_and_slots_are_conserved(self) -> None:
        holding = [s for s in self.live if s.phase in {Phase.PREFILLING, Phase.DECODING}]
        assert self.scheduler.free_cells == LIMITS.cells - sum(s.cells for s in holding)
        assert self.scheduler.free_cells >= 0
        assert len({s.slot for s in holding}) == len(holding) <= LIMITS.max_sequences
        assert self.scheduler.active == len(holding)
        assert self.scheduler.waiting == len(self.live) - len(holding)

    @invariant()
    def kv_is_what_the_sequence_says(self) -> None:
        for sequence in self.live:
            if sequence.slot >= 0:
                assert self.kv.get(sequence.slot, []) == sequence.tokens[: sequence.computed]

    @invariant()
    def first_come_first_served(self) -> None:
        phases = [s.phase is Phase.WAITING for s in self.arrived if s in self.live]
        assert phases == sorted(phases), "nobody overtakes one who waits"


TestScheduler = Machine.TestCase
TestScheduler.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_a_whole_block_when_nothing_decodes_and_a_chunk_beside_others() -> None:
    """Prompts are cut at block boundaries; beside decoding sequences in chunks that bound their wait."""
    scheduler: Scheduler[str] = Scheduler(LIMITS)
    scheduler.submit(new(20, 8))
    assert [run_step(scheduler)[0][1] for _ in range(3)] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 20)),
    ]
    scheduler.submit(new(10, 8))
    steps = [run_step(scheduler) for _ in range(3)]
    assert [step[0][1] for step in steps] == [[20], [21], [22]], "the first goes on in each step"
    assert [step[1][1] for step in steps] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_many_who_wait_for_one_start_together() -> None:
    """Beside one that decodes, each of several prompts gets its chunk in the same batch; beside as many, one does."""
    scheduler: Scheduler[str] = Scheduler(LIMITS)
    scheduler.submit(new(2, 8))
    run_step(scheduler)
    for _ in range(2):
        scheduler.submit(new(4, 8))
    assert [span[1] for span in run_step(scheduler)] == [[2], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_many_who_decode_are_not_stalled_for_one() -> None:
    """One prompt beside two that decode gets one chunk, however long it is."""
    scheduler: Scheduler[str] = Scheduler(LIMITS)
    for _ in range(2):
        scheduler.submit(new(2, 8))
    run_step(scheduler)
    scheduler.submit(new(20, 8))
    assert [span[1] for span in run_step(scheduler)] == [[2], [2], [0, 1, 2, 3]]


def test_a_chunk_ends_at_the_block_boundary_wherever_it_starts() -> None:
    """A prompt that began in chunks and goes on alone is back on the boundaries at once."""
    scheduler: Scheduler[str] = Scheduler(LIMITS)
    first = new(2, 8)
    scheduler.submit(first)
    run_step(scheduler)
    scheduler.submit(new(20, 8))
    assert run_step(scheduler)[1][1] == [0, 1, 2, 3]
    scheduler.end(first)
    assert run_step(scheduler)[0][1] == [4, 5, 6, 7]
    assert run_step(scheduler)[0][1] == list(range(8, 16))


def test_only_the_last_token_of_a_prompt_wants_logits() -> None:
    """Logits are computed where a token is chosen, and nowhere else."""
    scheduler: Scheduler[str] = Scheduler(LIMITS)
    scheduler.submit(new(10))
    assert [step[0][2] for step in (run_step(scheduler), run_step(scheduler))] == [0, 1]


def test_what_can_never_fit_is_refused_at_once() -> None:
    """A request larger than all cells would wait for ever."""
    with pytest.raises(TooLargeError):
        Scheduler[str](LIMITS).submit(new(60, 5))


def test_cells_hold_a_request_back_until_they_are_free() -> None:
    """Admission reserves prompt and answer, so that a decode cannot run out of cells."""
    scheduler: Scheduler[str] = Scheduler(LIMITS)
    first, second = new(30, 20), new(10, 10)
    scheduler.submit(first)
    scheduler.submit(second)
    assert scheduler.waiting == 1
    scheduler.end(first)
    assert scheduler.admit() == [second]


@QUICK
@given(st.integers(1, 60), st.integers(1, 8))
def test_every_token_of_a_prompt_is_computed_once(prompt: int, chunk: int) -> None:
    """Whatever the chunk size, the positions of a prompt are 0, 1, 2, ..."""
    limits = Limits(2, 64, 24, 8, chunk, 2)
    scheduler: Scheduler[str] = Scheduler(limits)
    scheduler.submit(new(prompt, 4))
    seen: list[int] = []
    while len(seen) < prompt:
        seen += run_step(scheduler)[0][1]
    assert seen == list(range(prompt))


@pytest.mark.parametrize("bad", [{"batch_tokens": 7}, {"batch_tokens": 6}, {"cells": 0}])
def test_limits_that_cannot_work_are_refused(bad: dict[str, int]) -> None:
    """A batch must hold a block, and a row of every sequence beside a chunk."""
    values = {
        "max_sequences": 3,
        "cells": 64,
        "batch_tokens": 24,
        "block_tokens": 8,
        "chunk_tokens": 4,
        "max_waiting": 4,
        **bad,
    }
    with pytest.raises(ValueError):
        Limits(**values)
