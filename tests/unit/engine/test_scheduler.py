"""The scheduler, case by case: how batches are cut, who is admitted, who is swapped out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.batching import Limits
from services.engine.scheduler import QueueFullError, TooLargeError
from services.engine.sequence import Phase
from tests.support.scheduler import LIMITS, SHARING, Rig

# The machine of a test run is busy: no deadline per example.
QUICK = settings(deadline=None, max_examples=60)


def test_a_whole_block_when_nothing_decodes_and_a_chunk_beside_others() -> None:
    """Prompts are cut at block boundaries; beside decoding sequences in chunks that bound their wait."""
    rig = Rig()
    rig.add(20)
    assert [rig.run()[0][1] for _ in range(3)] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 20)),
    ]
    rig.add(10)
    steps = [rig.run() for _ in range(3)]
    assert [step[0][1] for step in steps] == [[20], [21], [22]], "the first goes on in each step"
    assert [step[1][1] for step in steps] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_many_who_wait_for_one_start_together() -> None:
    """Beside one that decodes, each of several prompts gets its chunk in the same batch; beside as many, one does."""
    rig = Rig()
    rig.add(2)
    rig.run()
    for _ in range(2):
        rig.add(4)
    assert [span[1] for span in rig.run()] == [[2], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_many_who_decode_are_not_stalled_for_one() -> None:
    """One prompt beside two that decode gets one chunk, however long it is."""
    rig = Rig()
    for _ in range(2):
        rig.add(2)
    rig.run()
    rig.add(20)
    assert [span[1] for span in rig.run()] == [[2], [2], [0, 1, 2, 3]]


def test_a_chunk_ends_at_the_block_boundary_wherever_it_starts() -> None:
    """A prompt that began in chunks and goes on alone is back on the boundaries at once."""
    rig = Rig()
    first = rig.add(2)
    rig.run()
    rig.add(20)
    assert rig.run()[1][1] == [0, 1, 2, 3]
    rig.scheduler.end(first, 0)
    assert rig.run()[0][1] == [4, 5, 6, 7]
    assert rig.run()[0][1] == list(range(8, 16))


def test_only_the_last_token_of_a_prompt_wants_logits() -> None:
    """Logits are computed where a token is chosen, and nowhere else."""
    rig = Rig()
    rig.add(10)
    assert [step[0][2] for step in (rig.run(), rig.run())] == [0, 1]


def test_what_can_never_fit_is_refused_at_once() -> None:
    """A request larger than all cells would wait for ever."""
    with pytest.raises(TooLargeError):
        Rig().add(60, 5)


def test_the_last_token_of_a_prompt_is_a_batch_of_its_own() -> None:
    """A warm start computes just that token, and must repeat the arithmetic of the cold one."""
    rig = Rig(SHARING)
    rig.add(18)
    assert [len(rig.run()[0][1]) for _ in range(4)] == [8, 8, 1, 1]
    rig = Rig(SHARING)
    rig.add(3)
    assert len(rig.run()[0][1]) == 3, "a prompt that is never cached is computed at once"


def test_what_is_admitted_leaves_cells_to_go_on() -> None:
    """Admission counts what others are still to compute, and a few tokens for each."""
    rig = Rig(replace(LIMITS, max_waiting=1))
    first = rig.add(30, 20)
    rig.add(30, 20)
    assert (rig.scheduler.active, rig.scheduler.waiting) == (1, 1)
    with pytest.raises(QueueFullError):
        rig.add(1, 1)
    rig.scheduler.end(first, 0)
    rig.run()
    assert (rig.scheduler.active, rig.scheduler.waiting) == (1, 0)


def test_what_runs_is_counted_by_what_it_holds() -> None:
    """Also once its prompt is computed, so that nothing is admitted only to be swapped out."""
    rig = Rig()
    rig.add(30, 20)
    while rig.scheduler.prefilling:
        rig.run()
    rig.add(20, 20)
    assert (rig.scheduler.active, rig.scheduler.waiting) == (1, 1)
    rig.add(1, 0)
    assert rig.scheduler.waiting == 2, "nobody overtakes"


def test_an_answer_needs_no_cells_in_advance() -> None:
    """Two whose longest answers would not fit together run together."""
    rig = Rig()
    rig.add(5, 50)
    rig.add(5, 50)
    assert rig.scheduler.active == 2


def test_the_youngest_is_swapped_out_and_goes_on_before_anything_new() -> None:
    """Its state comes back as it was, and it goes on with its next token."""
    rig = Rig(replace(LIMITS, swap_bytes=1000))
    old, young = rig.add(10, 50), rig.add([*range(100, 110)], 50)
    while not rig.scheduler.swapped:
        rig.run()
    assert young.phase is Phase.SWAPPED
    tokens = list(young.tokens)
    new = rig.add(1, 1)
    assert new.phase is Phase.WAITING
    rig.scheduler.end(old, 0)
    assert rig.run()[0] == (young.slot, [len(tokens) - 1], 1), "one row, as if nothing had happened"
    assert rig.memory.tokens(young.slot) == tokens
    assert new.phase is not Phase.WAITING


@QUICK
@given(st.integers(1, 60), st.integers(1, 8))
def test_every_token_of_a_prompt_is_computed_once(prompt: int, chunk: int) -> None:
    """Whatever the chunk size, the positions of a prompt are 0, 1, 2, ..."""
    rig = Rig(replace(LIMITS, chunk_tokens=chunk))
    rig.add(prompt, 4)
    seen: list[int] = []
    while len(seen) < prompt:
        seen += rig.run()[0][1]
    assert seen == list(range(prompt))


@pytest.mark.parametrize("bad", [{"batch_tokens": 7}, {"batch_tokens": 6}, {"cells": 0}])
def test_limits_that_cannot_work_are_refused(bad: dict[str, int]) -> None:
    """A batch must hold a block, and a row of every sequence beside a chunk."""
    values: dict[str, Any] = {
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
