"""The accounting of shared cells, against a model that keeps every cell."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.engine.cells import Cells

SLOTS = 5
TOTAL = 60
slot_numbers = st.integers(0, SLOTS - 1)


class Machine(RuleBasedStateMachine):
    """Each slot is a list of cell numbers; a cell is used while some list has it."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = Cells(SLOTS, TOTAL)
        self.model: list[list[int]] = [[] for _ in range(SLOTS)]
        self.next_cell = 0

    @rule(slot=slot_numbers, count=st.integers(0, 25))
    def extend(self, slot: int, count: int) -> None:
        if count > TOTAL - len(self.used()):
            with pytest.raises(ValueError, match="free"):
                self.cells.extend(slot, count)
            return
        self.cells.extend(slot, count)
        self.model[slot] += range(self.next_cell, self.next_cell + count)
        self.next_cell += count

    @rule(giver=slot_numbers, taker=slot_numbers, data=st.data())
    def share(self, giver: int, taker: int, data: st.DataObject) -> None:
        end = data.draw(st.integers(0, len(self.model[giver])))
        if self.model[taker]:
            with pytest.raises(ValueError, match="not empty"):
                self.cells.share(giver, taker, end)
            return
        self.cells.share(giver, taker, end)
        self.model[taker] = self.model[giver][:end]

    @rule(slot=slot_numbers, data=st.data())
    def cut(self, slot: int, data: st.DataObject) -> None:
        end = data.draw(st.integers(0, len(self.model[slot])))
        self.cells.cut(slot, end)
        del self.model[slot][end:]

    def used(self) -> set[int]:
        return {cell for cells in self.model for cell in cells}

    @invariant()
    def counts_agree(self) -> None:
        assert self.cells.used == len(self.used())
        assert self.cells.free == TOTAL - len(self.used())
        for slot, cells in enumerate(self.model):
            others = {
                cell for other, held in enumerate(self.model) if other != slot for cell in held
            }
            assert self.cells.length(slot) == len(cells)
            assert self.cells.exclusive(slot) == len(set(cells) - others)
        for first in range(SLOTS):
            pair = (first, (first + 2) % SLOTS)
            assert self.cells.distinct(pair) == len({c for slot in pair for c in self.model[slot]})

    @invariant()
    def lists_stay_short(self) -> None:
        """Neighbouring segments differ in their holders, so a slot has no more of them than there are slots."""
        for segments in self.cells._segments:
            assert len(segments) <= SLOTS


TestCells = Machine.TestCase
TestCells.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_cells_beyond_the_end_cannot_be_shared() -> None:
    """A share of more than the source holds is a mistake of the caller."""
    cells = Cells(2, 10)
    cells.extend(0, 4)
    with pytest.raises(ValueError, match="holds 4"):
        cells.share(0, 1, 5)
