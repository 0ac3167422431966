"""What the scheduler holds, and what others may ask of it."""

from __future__ import annotations

from collections import deque
from typing import Generic

from services.engine.batching import Limits
from services.engine.kv_space import KvMemory, KvSpace
from services.engine.sequence import Owner, Phase, Sequence, TokenArray, common_prefix


class SchedulerState(Generic[Owner]):
    """The sequences by where they stand, each group by arrival, and the space they share."""

    def __init__(self, limits: Limits, memory: KvMemory[Owner]) -> None:
        self.limits = limits
        self.swapped_out = 0
        """Times that a sequence was swapped out."""
        self.known: tuple[tuple[bytes, TokenArray], ...] = ()
        """Salts and tokens of what the cells hold or will hold; replaced, never changed: any thread may read it."""
        self._space: KvSpace[Owner] = KvSpace(memory, limits.slots, limits.cells, limits.session_s)
        self._waiting: deque[Sequence[Owner]] = deque()
        self._swapped: list[Sequence[Owner]] = []
        self._running: list[Sequence[Owner]] = []

    @property
    def waiting(self) -> int:
        """Requests that have not been admitted."""
        return len(self._waiting)

    @property
    def swapped(self) -> int:
        """Sequences that were swapped out and wait to go on."""
        return len(self._swapped)

    @property
    def active(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def decoding(self) -> int:
        """Sequences that generate."""
        return sum(sequence.phase is Phase.DECODING for sequence in self._running)

    @property
    def prefilling(self) -> int:
        """Sequences whose prompt is being waited for, restored or computed."""
        return sum(sequence.phase is not Phase.DECODING for sequence in self._running)

    @property
    def free_cells(self) -> int:
        """Cells that nobody holds."""
        return self._space.free

    @property
    def resident_cells(self) -> int:
        """Cells that only finished sequences hold. Decode thread only."""
        return self._space.cells.used - self._space.cells.distinct(self._slots())

    @property
    def residents(self) -> int:
        """Finished sequences that stay."""
        return len(self._space.residents)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._running or self._swapped)

    def owners(self) -> list[Owner]:
        """Owners of all sequences that have not ended."""
        groups = (self._running, self._swapped, self._waiting)
        return [sequence.owner for group in groups for sequence in group]

    def reusable(self, salt: bytes, prompt: TokenArray) -> int:
        """How many first tokens of a prompt the cells hold or will hold, as far as it could go on from there. Any thread."""
        held = (tokens for other, tokens in self.known if other == salt)
        if not self.limits.whole_states:
            return max((common_prefix(tokens, prompt) for tokens in held), default=0)
        wanted = prompt[:-1]
        whole = (len(tokens) for tokens in held if common_prefix(tokens, wanted) == len(tokens))
        return max(whole, default=0)

    def _slots(self) -> list[int]:
        return [sequence.slot for sequence in self._running]

    def _publish(self) -> None:
        held = [(resident.salt, resident.tokens) for resident in self._space.residents]
        # Where state is whole, what runs passes the lengths at which others could use it.
        groups = () if self.limits.whole_states else (self._running, self._waiting)
        coming = [
            (sequence.salt, sequence.prompt)
            for group in groups
            for sequence in group
            if sequence.sharable
        ]
        self.known = (*held, *coming)
