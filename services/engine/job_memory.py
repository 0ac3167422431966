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
        self._saver: Saver | None = None

    # What the scheduler decides.

    def share(self, source: int, target: int, end: int) -> None:
        """Lets an empty slot hold the first `end` tokens of another too."""
        self._backend.share(source, target, end)

    def clear(self, slot: int) -> None:
        """Forgets a slot; what is still to be saved of it is packed first."""
        if self._saver is not None:
            self._saver.flush(slot)
        self._backend.clear(slot)

    def pack(self, sequence: Sequence[Job], most_bytes: int) -> list[Piece]:
        """All that is computed, in blocks, so that the store may keep the same bytes."""
        facts = self._backend.facts
        if facts.cache_support is not CacheSupport.BLOCKS:
            return []
        if sequence.computed * facts.cell_bytes > most_bytes:
            return []
        saving = sequence.owner.saving
        pieces = []
        try:
            for start in range(0, sequence.computed, BLOCK_TOKENS):
                end = min(start + BLOCK_TOKENS, sequence.computed)
                state = self._backend.pack(sequence.slot, start, end)
                pieces.append(Piece(start, end, end, state, saved=False))
                if saving is not None and self._saver is not None:
                    self._saver.keep(saving, start, end, state)
        except StateError as error:
            _LOG.warning("a sequence could not be packed: %s", error)
            return []
        return pieces

    def join(self, sequence: Sequence[Job], piece: Piece, end: int) -> bool:
        """Restores tokens up to `end`. A state that is refused is withdrawn from the store."""
        began = self._clock.monotonic()
        try:
            self._backend.join(sequence.slot, piece.state, sequence.computed, end, piece.whole_end)
        except StateError as error:
            _LOG.warning("a saved state was refused: %s", error)
            self._observer.refused()
            self._withdraw(sequence.owner, piece)
            return False
        seconds = self._clock.monotonic() - began
        sequence.owner.restore_s += seconds
        self._observer.restored(seconds)
        return True

    def _withdraw(self, job: Job, piece: Piece) -> None:
        # Of a block that matched in part, the key is the store's; it stays, and the next one to meet it goes cold as well.
        if piece.saved and piece.end == piece.whole_end and job.chain and self._saver:
            self._saver.store.bad(job.chain.key(job.sequence.tokens, piece.end))

    # What jobs compute.

    def attach(self, store: BlockStore) -> None:
        """From now on blocks are saved into this store."""
        self._saver = Saver(self._backend, store, self._observer.packed, self._clock.monotonic)

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
        block."""
        sequence, saving = job.sequence, job.saving
        if self._saver is None or saving is None or sequence.slot < 0:
            return
        whole = sequence.computed >= sequence.prompt_length
        self._saver.offer(saving, sequence.slot, sequence.computed, reason if whole else None)
        if whole:
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
