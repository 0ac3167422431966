"""Hands blocks of computed state to the store, a few between steps, so that nobody who decodes waits for long.

A sequence is watched from its first token on: what it computed before is of use to others only, and its client waits for
that token. Blocks go in the order of the chain, the oldest sequence first. A block that the store holds is not packed again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Final

from services.engine.backend import Backend, StateError
from services.engine.key_chain import KeyChain
from services.engine.kv.keys import BLOCK_TOKENS
from services.engine.kv.store import BlockStore, SavedBlock, SaveReason

_LOG = logging.getLogger(__name__)
BLOCKS_AT_AN_END: Final = 16
"""Most blocks packed at once because their cells are needed; what is left then is not saved."""


class Saving:
    """What is saved of one sequence. `ready` tokens of it may be packed from `slot`; `last` is set at its end.

    `reused` tokens were not computed: where they end inside a block, an earlier answer or prompt ended there.
    """

    __slots__ = (
        "chain",
        "last",
        "next_start",
        "prompt_length",
        "queued",
        "ready",
        "reused",
        "slot",
        "tokens",
    )

    def __init__(self, chain: KeyChain, tokens: list[int], prompt_length: int) -> None:
        self.chain = chain
        self.tokens = tokens
        self.prompt_length = prompt_length
        self.reused = 0
        self.slot = -1
        self.ready = 0
        self.next_start = 0
        self.last: SaveReason | None = None
        self.queued = False

    @property
    def pending(self) -> bool:
        """Whether there is a whole block, or at the end the rest of one."""
        left = self.ready - self.next_start
        return left >= BLOCK_TOKENS or (left > 0 and self.last is not None)

    @property
    def next_end(self) -> int:
        """Where the next block ends."""
        return min(self.next_start + BLOCK_TOKENS, self.ready)

    def block(self, start: int, end: int, reason: SaveReason, state: memoryview) -> SavedBlock:
        """The block of tokens [start, end)."""
        whole = end - start == BLOCK_TOKENS
        # With its tokens told, a block takes the place of the tail that an earlier turn left of it.
        holds_an_end = any(start < at < end for at in (self.reused, self.prompt_length))
        return SavedBlock(
            key=self.chain.key(self.tokens, end),
            parent=self.chain.key(self.tokens, start),
            start=start,
            end=end,
            tokens=tuple(self.tokens[start:end]),
            partial=not whole or holds_an_end,
            reason=reason,
            state=state,
        )

    def reason(self, start: int, end: int) -> SaveReason:
        """Why the block [start, end) is saved when nothing forces it."""
        if end - start < BLOCK_TOKENS:
            return self.last or SaveReason.FINISH
        return SaveReason.COLD if end <= self.prompt_length else SaveReason.CONTINUED


class Saver:
    """Lives on the decode thread. `packed` is told the seconds that each packing took, and why it was done."""

    def __init__(
        self,
        backend: Backend,
        store: BlockStore,
        packed: Callable[[float, SaveReason], None],
        monotonic: Callable[[], float],
    ) -> None:
        self.store = store
        self._backend = backend
        self._packed = packed
        self._monotonic = monotonic
        self._queue: deque[Saving] = deque()

    @property
    def pending(self) -> bool:
        """Whether blocks wait to be packed."""
        return bool(self._queue)

    def offer(self, saving: Saving, slot: int, ready: int, last: SaveReason | None = None) -> None:
        """From now on the first `ready` tokens may be packed from `slot`; `last` says why these are all there will be."""
        saving.slot, saving.ready, saving.last = slot, ready, last
        if saving.pending and not saving.queued:
            saving.queued = True
            self._queue.append(saving)

    def work(self, blocks: int) -> None:
        """Packs at most `blocks` blocks."""
        while blocks > 0 and self._queue:
            saving = self._queue[0]
            blocks -= self._save_next(saving)
            if not saving.pending:
                self._queue.popleft()
                saving.queued = False

    def flush(self, slot: int) -> None:
        """The slot is about to be emptied: packs what is left of it, up to a limit."""
        blocks = BLOCKS_AT_AN_END
        for saving in self.forget(slot):
            while blocks > 0 and saving.pending:
                blocks -= self._save_next(saving)

    def forget(self, slot: int) -> list[Saving]:
        """Saves nothing more from a slot; returns what was waiting."""
        dropped = [saving for saving in self._queue if saving.slot == slot]
        for saving in dropped:
            self._queue.remove(saving)
            saving.queued = False
        return dropped

    def keep(self, saving: Saving, start: int, end: int, state: memoryview) -> None:
        """Saves a block that was packed to make room, if nobody has it yet."""
        if start == saving.next_start and end - start == BLOCK_TOKENS:
            saving.next_start = end
            if not self.store.holds(saving.chain.key(saving.tokens, end)):
                self.store.save(saving.block(start, end, SaveReason.EVICT, state))

    def _save_next(self, saving: Saving) -> int:
        """Saves the next block; returns the blocks that had to be packed for it: 1 or 0."""
        start, end = saving.next_start, saving.next_end
        saving.next_start = end
        if self.store.holds(saving.chain.key(saving.tokens, end)):
            return 0
        began = self._monotonic()
        try:
            state = self._backend.pack(saving.slot, start, end)
        except StateError as error:
            _LOG.warning("a block could not be packed: %s", error)
            return 1
        reason = saving.reason(start, end)
        self._packed(self._monotonic() - began, reason)
        self.store.save(saving.block(start, end, reason, state))
        return 1
