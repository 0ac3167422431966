"""The scheduler under random arrivals, endings, swaps and sharing, against a memory that keeps every cell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.engine.batching import Limits, Step
from services.engine.scheduler import QueueFullError, Scheduler, TooLargeError
from services.engine.sequence import Phase, Piece, Sequence
from tests.support.cell_memory import PlainMemory, piece

LIMITS = Limits(
    max_sequences=4,
    cells=64,
    batch_tokens=24,
    block_tokens=8,
    chunk_tokens=4,
    max_waiting=6,
    min_shared=4,
    residents=3,
    resident_cells=40,
    session_s=50,
    swap_bytes=120,
)
# Prompts are beginnings of three texts, which begin alike, so that they share often.
TEXTS = [
    list(range(40)),
    [*range(12), *range(100, 128)],
    [*range(25), *range(200, 215)],
]
prompts = st.builds(lambda text, length: text[:length], st.sampled_from(TEXTS), st.integers(1, 40))


class Machine(RuleBasedStateMachine):
    """What every order of events must keep."""

    limits = LIMITS

    def __init__(self) -> None:
        super().__init__()
        self.memory = PlainMemory(
            self.limits.slots, self.limits.cells, whole=self.limits.whole_states
        )
        self.scheduler: Scheduler[str] = Scheduler(self.limits, self.memory)
        self.live: list[Sequence[str]] = []
        self.now = 0.0

    @rule(
        prompt=prompts,
        most_new=st.integers(0, 24),
        sharable=st.booleans(),
        salt=st.sampled_from([b"", b"", b"tenant"]),
        session=st.sampled_from(["", "s", "t"]),
        saved=st.integers(0, 5),
    )
    def submit(
        self,
        prompt: list[int],
        most_new: int,
        sharable: bool,
        salt: bytes,
        session: str,
        saved: int,
    ) -> None:
        sequence = Sequence("", prompt, most_new, sharable=sharable, salt=salt, session_id=session)
        if sharable:
            sequence.pieces.extend(self._saved(prompt, saved))
        try:
            self.scheduler.submit(sequence, self.now)
        except QueueFullError:
            assert self.scheduler.waiting == self.limits.max_waiting
        except TooLargeError:
            assert len(prompt) + most_new > self.limits.cells
        else:
            self.live.append(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), keep=st.booleans())
    def end(self, data: st.DataObject, keep: bool) -> None:
        self._end(data.draw(st.sampled_from(self.live)), keep=keep)

    @rule(salt=st.sampled_from([b"", b"tenant"]), session=st.sampled_from(["s", "t", "u"]))
    def end_session(self, salt: bytes, session: str) -> None:
        others = [r for r in self.scheduler._space.residents if r.salt != salt]
        self.scheduler.end_session(salt, session)
        assert not self.scheduler.end_session(salt, session), "what is let go is gone"
        assert [r for r in self.scheduler._space.residents if r.salt != salt] == others

    @rule(seconds=st.sampled_from([1, 60]))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule(refuse=st.booleans())
    def state_is_refused(self, refuse: bool) -> None:
        self.memory.refuse = refuse

    @rule(times=st.integers(1, 6))
    def steps(self, times: int) -> None:
        for _ in range(times):
            self._step()

    def _end(self, sequence: Sequence[str], *, keep: bool) -> None:
        self.live.remove(sequence)
        self.scheduler.end(sequence, self.now, keep=keep)
        assert not self.scheduler.end(sequence, self.now, keep=keep), "ending twice is harmless"

    def _step(self) -> bool:
        """One turn of the decode thread; False if there was nothing to compute."""
        step = self.scheduler.plan(self.now)
        if step is None:
            return False
        self._check(step)
        batch = step.batch
        rows = zip(batch.tokens, batch.positions, batch.slots, strict=True)
        for token, position, slot in rows:
            self.memory.append(slot, position, token)
        self.scheduler.computed(step)
        for sequence in step.sampled:
            if len(sequence.tokens) < sequence.most_tokens:
                sequence.tokens.append(1000 + len(sequence.tokens))
            else:
                self._end(sequence, keep=True)
        return True

    def _check(self, step: Step[str]) -> None:
        batch = step.batch
        assert 0 < len(batch.tokens) <= self.limits.batch_tokens
        assert self.memory.used + len(batch.tokens) <= self.limits.cells, (
            "cells for the whole batch"
        )
        decoding = {s for s in self.live if s.phase is Phase.DECODING}
        assert {s for s, _ in step.spans[: len(decoding)]} == decoding, "each decodes, rows first"
        assert len({s for s, _ in step.spans}) == len(step.spans)
        for sequence, count in step.spans:
            first, last = sequence.computed, sequence.computed + count - 1
            assert first // self.limits.block_tokens == last // self.limits.block_tokens
            if sequence.target >= self.limits.min_shared and last == sequence.target - 1:
                assert count == 1, "the last token of a prompt has a row of its own"

    @invariant()
    def cells_are_counted_as_they_are(self) -> None:
        assert self.scheduler.free_cells == self.limits.cells - self.memory.used >= 0
        assert self.scheduler.residents <= self.limits.residents

    @invariant()
    def kv_is_what_the_sequences_say(self) -> None:
        holding = [s for s in self.live if s.slot >= 0]
        assert len({s.slot for s in holding}) == len(holding) <= self.limits.max_sequences
        for sequence in holding:
            assert self.memory.tokens(sequence.slot) == sequence.tokens[: sequence.computed]
        for resident in self.scheduler._space.residents:
            assert self.memory.tokens(resident.slot) == resident.tokens.tolist()
            assert resident.slot not in {s.slot for s in holding}
        for sequence in self.live:
            if sequence.slot < 0:
                assert sequence.computed == 0

    @invariant()
    def first_come_first_served(self) -> None:
        """Nobody overtakes one who waits, and nothing is admitted beside one who was swapped out and is older."""
        phases = [s.phase is Phase.WAITING for s in sorted(self.live, key=lambda s: s.order)]
        assert phases == sorted(phases)
        assert self.scheduler.waiting == sum(phases)

    @invariant()
    def swapped_state_is_bounded(self) -> None:
        taken = [len(p.state) for s in self.live for p in s.pieces if not p.saved]
        assert sum(taken) <= self.limits.swap_bytes

    def teardown(self) -> None:
        """Whatever stands here, everybody ends, without anybody's help."""
        for _ in range(4000):
            if not self.live:
                break
            oldest = min(self.live, key=lambda s: s.order)
            before = (oldest.computed, oldest.phase, len(oldest.tokens), self.memory.joins)
            assert self._step() or before != (
                oldest.computed,
                oldest.phase,
                len(oldest.tokens),
                self.memory.joins,
            ), "a turn without a batch restores something, or starts somebody"
        assert not self.live, "everybody ends"
        assert self.scheduler.idle
        while self.scheduler._space.drop_one(self.now):
            pass
        assert self.memory.used == 0
        assert self.scheduler.free_cells == self.limits.cells

    def _saved(self, prompt: list[int], saved: int) -> Iterator[Piece]:
        """Blocks from some block boundary on, as a store finds them beyond what was resident a moment ago."""
        first = 8 * (saved % 3)
        for start in range(first, min(len(prompt), first + 8 * saved), 8):
            tokens = prompt[start : start + 8]
            yield piece(tokens, start, saved=True, beyond=8 - len(tokens))


class WholeMachine(Machine):
    """The same where state cannot be cut."""

    limits = replace(LIMITS, whole_states=True)

    def _saved(self, prompt: list[int], saved: int) -> Iterator[Piece]:
        """A state of at most all tokens but the last, as a store finds it."""
        end = min(7 * saved, len(prompt) - 1)
        if end:
            yield piece(prompt[:end], saved=True)


TestSchedulerMachine = Machine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestWholeMachine = WholeMachine.TestCase
TestWholeMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("swap_bytes", [0, 400])
def test_a_crowd_that_needs_far_more_cells_than_there_are_ends(swap_bytes: int) -> None:
    """Ten long answers in cells for one: they are swapped in and out, all end in order, and each has its own tokens;
    also where there is no room for what was swapped out and it is computed again."""
    memory = PlainMemory(LIMITS.slots, LIMITS.cells)
    scheduler: Scheduler[str] = Scheduler(replace(LIMITS, swap_bytes=swap_bytes), memory)
    crowd = [Sequence("", range(50 * n, 50 * n + 10), 40) for n in range(10)]
    for sequence in crowd[:6]:
        scheduler.submit(sequence, 0)
    late, finished, swapped = crowd[6:], [], 0
    for _ in range(5000):
        step = scheduler.plan(0)
        swapped = max(swapped, scheduler.swapped)
        if step is not None:
            for row in zip(step.batch.slots, step.batch.positions, step.batch.tokens, strict=True):
                memory.append(*row)
            scheduler.computed(step)
            for sequence in step.sampled:
                if len(sequence.tokens) < sequence.most_tokens:
                    sequence.tokens.append(len(sequence.tokens))
                    continue
                assert memory.tokens(sequence.slot) == sequence.tokens
                finished.append(sequence)
                scheduler.end(sequence, 0)
        if late and scheduler.waiting < LIMITS.max_waiting:
            scheduler.submit(late.pop(0), 0)
        if len(finished) == len(crowd):
            break
    assert finished == sorted(finished, key=lambda s: s.order), "the oldest always progresses"
    assert len(finished) == len(crowd)
    assert swapped > 0
    assert (memory.packs > 0) == (swap_bytes > 0)
