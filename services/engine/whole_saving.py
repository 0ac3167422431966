"""Hands states that cannot be cut to the store: each whole, at the moment when a sequence holds exactly its tokens.

Such a state cannot be rolled back, so what a later prompt may go on from is chosen beforehand: the last block boundary of the
prompt, from which prompts go on that end otherwise; all of it but its last token, for the same prompt and for its next turn;
the end of the answer; and the boundary up to which it begins like an earlier prompt, because a third may begin so too. Four
states of a request at most, since each is as large as all that it stands for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Generic

from services.engine.backend import Backend, StateError
from services.engine.key_chain import KeyChain
from services.engine.kv.keys import BLOCK_TOKENS
from services.engine.kv.known import KnownKeys
from services.engine.kv.store import BlockStore, SavedBlock, SaveReason
from services.engine.sequence import Owner, Sequence

_LOG = logging.getLogger(__name__)
SEEN_MAX: Final = 8192
"""Block boundaries of earlier prompts that are remembered: two million tokens."""


class WholeSaver(Generic[Owner]):
    """Lives on the decode thread. `packed` is told the seconds that each packing took, and why it was done."""

    def __init__(
        self,
        backend: Backend,
        store: BlockStore,
        packed: Callable[[float, SaveReason], None],
        monotonic: Callable[[], float],
    ) -> None:
        self._backend = backend
        self._store = store
        self._packed = packed
        self._monotonic = monotonic
        self._seen = KnownKeys(SEEN_MAX)

    def prefilled(self, sequence: Sequence[Owner], chain: KeyChain) -> None:
        """Between two batches of its prompt: saves the state if it is one to keep."""
        end, last = sequence.computed, sequence.prompt_length - 1
        boundary = last - last % BLOCK_TOKENS
        if end in {last, boundary} or self._branches_at(sequence, chain, end):
            self._save(sequence, chain, SaveReason.COLD)
        if end == sequence.prompt_length:
            for at in range(BLOCK_TOKENS, boundary + 1, BLOCK_TOKENS):
                self._seen.add(chain.key(sequence.tokens, at))

    def _branches_at(self, sequence: Sequence[Owner], chain: KeyChain, end: int) -> bool:
        """Whether an earlier prompt began like this one as far as here, and none a block further."""
        tokens, following = sequence.tokens, end + BLOCK_TOKENS
        return (
            end % BLOCK_TOKENS == 0
            and following < sequence.prompt_length
            and chain.key(tokens, end) in self._seen
            and chain.key(tokens, following) not in self._seen
        )

    def finished(self, sequence: Sequence[Owner], chain: KeyChain, reason: SaveReason) -> bool:
        """It ends here: saves what it holds. Whether the store has it."""
        return self._save(sequence, chain, reason)

    def _save(self, sequence: Sequence[Owner], chain: KeyChain, reason: SaveReason) -> bool:
        end = sequence.computed
        key = chain.key(sequence.tokens, end)
        if self._store.holds(key):
            return True
        began = self._monotonic()
        try:
            state = self._backend.pack(sequence.slot, 0, end)
        except StateError as error:
            _LOG.warning("a state could not be packed: %s", error)
            return False
        self._packed(self._monotonic() - began, reason)
        tokens = tuple(sequence.tokens[max(0, end - BLOCK_TOKENS) : end])
        return self._store.save(
            SavedBlock(
                key=key,
                parent=chain.namespace.root_key(),
                start=0,
                end=end,
                tokens=tokens,
                partial=False,
                reason=reason,
                state=state,
                whole=True,
            )
        )
