"""A KV memory for tests of the scheduler: it keeps each cell's token, so it knows what is really held."""

from __future__ import annotations

from array import array

from services.engine.sequence import Piece, Sequence


class PlainMemory:
    """Each slot is a list of cells; a cell is used while a list has it. `refuse` makes every join fail; with `whole`, state
    cannot be cut."""

    def __init__(self, slots: int, cells: int, *, whole: bool = False) -> None:
        self.total = cells
        self.whole = whole
        self.refuse = False
        self.packs = 0
        self.joins = 0
        self._slots: list[list[tuple[int, int]]] = [[] for _ in range(slots)]
        self._next = 0

    @property
    def used(self) -> int:
        """Cells that some slot holds."""
        return len({cell for cells in self._slots for cell in cells})

    def tokens(self, slot: int) -> list[int]:
        """What a slot holds."""
        return [token for _, token in self._slots[slot]]

    def append(self, slot: int, position: int, token: int) -> None:
        """A row of a batch."""
        assert position == len(self._slots[slot]), "no position is skipped or repeated"
        self._slots[slot].append((self._next, token))
        self._next += 1

    def share(self, source: int, target: int, end: int) -> None:
        """Cells of two slots."""
        assert not self._slots[target], "only an empty slot takes over"
        assert len(self._slots[source]) >= end
        assert not self.whole or len(self._slots[source]) == end, "all of it"
        self._slots[target] = self._slots[source][:end]

    def clear(self, slot: int) -> None:
        """Empties a slot."""
        self._slots[slot] = []

    def prefilled(self, sequence: Sequence[str]) -> None:
        """A chunk is computed: nothing is saved here."""
        assert len(self._slots[sequence.slot]) == sequence.computed

    def pack(self, sequence: Sequence[str], most_bytes: int) -> list[Piece]:
        """The tokens, four bytes each."""
        held = self.tokens(sequence.slot)
        assert held == sequence.tokens[: sequence.computed]
        if 4 * len(held) > most_bytes:
            return []
        self.packs += 1
        return [piece(held)] if held else []

    def join(self, sequence: Sequence[str], saved: Piece, end: int) -> bool:
        """Takes cells for all of the state while it runs, as llama.cpp does."""
        self.joins += 1
        state = array("i", bytes(saved.state))
        assert self.used + len(state) <= self.total, "the scratch sequence has its cells"
        assert saved.start <= sequence.computed < end <= saved.end
        if self.whole:
            assert (sequence.computed, end) == (0, len(state)), "as it is, into an empty slot"
        if self.refuse:
            return False
        for position in range(sequence.computed, end):
            self.append(sequence.slot, position, state[position - saved.start])
        return True


def piece(tokens: list[int], start: int = 0, *, saved: bool = False, beyond: int = 0) -> Piece:
    """State of these tokens, which begin at position `start`, and of `beyond` others that are of no use."""
    end = start + len(tokens)
    state = memoryview(array("i", [*tokens, *[-1] * beyond]).tobytes())
    return Piece(start, end, end + beyond, state, b"key" if saved else b"")
