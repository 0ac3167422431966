"""Carries out on the backend what the scheduler decides about cells, and has saved what jobs compute."""

from __future__ import annotations

import logging
from typing import Final, Protocol

from services.engine.backend import Backend, CacheSupport, StateError
from services.engine.job import Job
from services.engine.kv.keys import BLOCK_TOKENS
from services.engine.kv.store import BlockStore, SaveReason
from services.engine.saving import Saver
from services.engine.sequence import Piece, Sequence
from services.engine.whole_saving import WholeSaver
from services.runtime.clock import Clock

_LOG = logging.getLogger(__name__)
BLOCKS_BESIDE_ROWS: Final = 1
"""Blocks packed between two steps while others decode: about two milliseconds."""
BLOCKS_WHEN_IDLE: Final = 4
"""Blocks packed at a time when there is nothing else to do; a new request is heard in between."""
_ALL: Final = 1 << 30


class StateObserver(Protocol):
    """Told what happens to saved state, on the decode thread; must be quick."""

    def restored(self, seconds: float) -> None:
        """A piece of state was joined."""
        ...

    def refused(self) -> None:
        """llama.cpp did not take a piece of state."""
        ...

    def packed(self, seconds: float, reason: SaveReason) -> None:
        """A block was packed to be saved."""
        ...


class JobMemory:
    """The KV memory of the scheduler's jobs. Until `attach`, nothing is saved."""

    def __init__(self, backend: Backend, clock: Clock, observer: StateObserver) -> None:
        self._backend = backend
        self._clock = clock
        self._observer = observer
        self._store: BlockStore | None = None
        self._saver: Saver | None = None
        self._whole_saver: WholeSaver[Job] | None = None

    # What the scheduler decides.

    def share(self, source: int, target: int, end: int) -> None:
        """Lets an empty slot hold the first `end` tokens of another too."""
        self._backend.share(source, target, end)

    def clear(self, slot: int) -> None:
        """Forgets a slot; what is still to be saved of it is packed first."""
        if self._saver is not None:
            self._saver.flush(slot)
        self._backend.clear(slot)

    def prefilled(self, sequence: Sequence[Job]) -> None:
        """A chunk of a prompt is computed: state that cannot be cut is saved now or never."""
        if self._whole_saver is not None and sequence.owner.chain is not None:
            self._whole_saver.prefilled(sequence, sequence.owner.chain)

    def pack(self, sequence: Sequence[Job], most_bytes: int) -> list[Piece]:
        """All that is computed, in blocks, so that the store may keep the same bytes."""
        facts = self._backend.facts
        if facts.cache_support is CacheSupport.OFF:
            return []
        if facts.cache_support is CacheSupport.WHOLE:
            return self._pack_whole(sequence, most_bytes)
        if sequence.computed * facts.cell_bytes > most_bytes:
            return []
        saving = sequence.owner.saving
        pieces = []
        try:
            for start in range(0, sequence.computed, BLOCK_TOKENS):
                end = min(start + BLOCK_TOKENS, sequence.computed)
                state = self._backend.pack(sequence.slot, start, end)
                pieces.append(Piece(start, end, end, state))
                if saving is not None and self._saver is not None:
                    self._saver.keep(saving, start, end, state)
        except StateError as error:
            _LOG.warning("a sequence could not be packed: %s", error)
            return []
        return pieces

    def _pack_whole(self, sequence: Sequence[Job], most_bytes: int) -> list[Piece]:
        if most_bytes <= 0:
            return []
        # How large a state is that is not made of cells is known only once it is packed.
        end = sequence.computed
        try:
            state = self._backend.pack(sequence.slot, 0, end)
        except StateError as error:
            _LOG.warning("a sequence could not be packed: %s", error)
            return []
        return [Piece(0, end, end, state)] if len(state) <= most_bytes else []

    def join(self, sequence: Sequence[Job], piece: Piece, end: int) -> bool:
        """Restores tokens up to `end`. A state that is refused is withdrawn from the store."""
        began = self._clock.monotonic()
        try:
            self._backend.join(sequence.slot, piece.state, sequence.computed, end, piece.whole_end)
        except StateError as error:
            _LOG.warning("a saved state was refused: %s", error)
            self._observer.refused()
            if piece.saved and self._store is not None:
                self._store.bad(piece.key)
            return False
        seconds = self._clock.monotonic() - began
        sequence.owner.restore_s += seconds
        self._observer.restored(seconds)
        return True

    # What jobs compute.

    def attach(self, store: BlockStore) -> None:
        """From now on blocks, or states that cannot be cut, are saved into this store."""
        self._store = store
        whole = self._backend.facts.cache_support is CacheSupport.WHOLE
        packed, monotonic = self._observer.packed, self._clock.monotonic
        if whole:
            self._whole_saver = WholeSaver(self._backend, store, packed, monotonic)
        else:
            self._saver = Saver(self._backend, store, packed, monotonic)

    @property
    def saves_pending(self) -> bool:
        """Whether blocks wait to be packed."""
        return self._saver is not None and self._saver.pending

    def offer(self, job: Job) -> None:
        """Blocks of the job may be saved as far as it is computed."""
        if self._saver is not None and job.saving is not None:
            self._saver.offer(job.saving, job.sequence.slot, job.sequence.computed)

    def finish(self, job: Job, reason: SaveReason) -> None:
        """Has all that is computed saved, and sets the finish key. A prompt that was left is kept up to its last whole
        block.

        The key promises nothing: blocks are packed later, and a queue that is full drops them.
        """
        sequence, saving = job.sequence, job.saving
        if saving is None or sequence.slot < 0:
            return
        answered = sequence.computed >= sequence.prompt_length
        kept = answered
        if self._saver is not None:
            last = reason if answered else None
            self._saver.offer(saving, sequence.slot, sequence.computed, last)
        elif self._whole_saver is not None:
            kept = answered and self._whole_saver.finished(sequence, saving.chain, reason)
        else:
            return
        if kept:
            job.finish_key = saving.chain.key(sequence.tokens, sequence.computed)

    def forget(self, job: Job) -> None:
        """The job failed: nobody knows what its cells hold."""
        if self._saver is not None and job.sequence.slot >= 0:
            self._saver.forget(job.sequence.slot)

    def save_some(self, *, rows: bool, idle: bool) -> None:
        """Between steps: packs a block beside `rows` that decode, more when the engine is idle, none beside a prefill
        alone, whose client waits for its first token."""
        if self._saver is not None and (rows or idle):
            self._saver.work(BLOCKS_BESIDE_ROWS if rows else BLOCKS_WHEN_IDLE)

    def save_all(self) -> None:
        """Packs everything that waits; when the engine stops."""
        if self._saver is not None:
            self._saver.work(_ALL)
