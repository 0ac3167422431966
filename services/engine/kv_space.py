"""The slots and cells of the context: what is decided is counted and carried out in one place, so neither can drift."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Generic, Protocol

from services.engine.cells import Cells
from services.engine.residents import Resident, Residents
from services.engine.sequence import Owner, Piece, Sequence


class KvMemory(Protocol[Owner]):
    """The KV memory itself. Calls come in the order in which they must take effect."""

    def share(self, source: int, target: int, end: int) -> None:
        """Lets the empty slot `target` hold the first `end` tokens of `source` too; nothing is copied."""
        ...

    def clear(self, slot: int) -> None:
        """Forgets a slot."""
        ...

    def prefilled(self, sequence: Sequence[Owner]) -> None:
        """A chunk of its prompt is computed: `sequence.computed` says how far. The next batch goes on from there."""
        ...

    def pack(self, sequence: Sequence[Owner], most_bytes: int) -> list[Piece]:
        """The state of all computed tokens of a sequence; [] where it has more bytes, or cannot be packed."""
        ...

    def join(self, sequence: Sequence[Owner], piece: Piece, end: int) -> bool:
        """Restores tokens [computed, end) of a sequence. False where the state is refused; nothing has changed then."""
        ...


class KvSpace(Generic[Owner]):
    """Who holds which slot and how many cells."""

    def __init__(self, memory: KvMemory[Owner], slots: int, cells: int, session_s: float) -> None:
        self.cells = Cells(slots, cells)
        self.residents = Residents(session_s)
        self._memory = memory
        self._free_slots = list(range(slots))

    @property
    def free(self) -> int:
        """Cells that nobody holds."""
        return self.cells.free

    def take(self) -> int:
        """An empty slot."""
        return heapq.heappop(self._free_slots)

    def give(self, slot: int) -> None:
        """Empties a slot and takes it back."""
        self._memory.clear(slot)
        self.cells.clear(slot)
        heapq.heappush(self._free_slots, slot)

    def share(self, source: int, target: int, end: int) -> None:
        """Lets an empty slot hold the first `end` tokens of another."""
        self._memory.share(source, target, end)
        self.cells.share(source, target, end)

    def join(self, sequence: Sequence[Owner], piece: Piece, end: int) -> bool:
        """Restores tokens [computed, end) of a sequence; False where the state is refused."""
        if not self._memory.join(sequence, piece, end):
            return False
        self.cells.extend(sequence.slot, end - sequence.computed)
        sequence.restored_tokens += end - sequence.computed if piece.saved else 0
        sequence.computed = end
        return True

    def prefilled(self, sequence: Sequence[Owner]) -> None:
        """A chunk of a prompt is computed."""
        self._memory.prefilled(sequence)

    def pack(self, sequence: Sequence[Owner], most_bytes: int) -> list[Piece]:
        """The state of all computed tokens of a sequence."""
        return self._memory.pack(sequence, most_bytes)

    def keep(self, resident: Resident, most: int, most_cells: int, running: Iterable[int]) -> bool:
        """Lets a slot that finished stay, at the price of others. False: something else holds its tokens, or there is no
        room, and the slot was given back. `running` are the slots of sequences that run."""
        known = self.residents.covering(resident.salt, resident.tokens)
        if known is not None and most:
            known.session_id = resident.session_id or known.session_id
            self.residents.use(known, resident.used_at)
            self.give(resident.slot)
            return False
        for other in self.residents.covered_by(resident.salt, resident.tokens):
            self.drop(other)
        # A session has one conversation: what its last turn left is no longer continued.
        if resident.session_id:
            for other in self.residents.of_session(resident.salt, resident.session_id):
                self.drop(other)
        self.residents.add(resident)
        held_by_running = self.cells.distinct(running)
        while len(self.residents) > most or self.cells.used - held_by_running > most_cells:
            victim = self.residents.victim(resident.used_at)
            if victim is None:
                break
            self.drop(victim)
        return any(kept is resident for kept in self.residents)

    def drop(self, resident: Resident) -> None:
        """Gives the slot of a finished sequence back."""
        self.residents.remove(resident)
        self.give(resident.slot)

    def drop_one(self, now: float) -> bool:
        """Gives up the finished sequence that is worth least; False if there is none."""
        victim = self.residents.victim(now)
        if victim is not None:
            self.drop(victim)
        return victim is not None
