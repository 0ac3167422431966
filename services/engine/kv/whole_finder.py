"""Finds the longest state of a prompt among those that cannot be cut: each is asked for by the exact length that it has.

No chain leads to such a state. Asked are the lengths at which states are saved (see whole_saving.py): all of the prompt but its
last token, block boundaries from the longest down, what RAM got lately, and what the request itself names as its parent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from caravan.cache.v1 import cache_service_pb2 as pb

from services.engine.kv.blocking import RunBlocking
from services.engine.kv.keys import BLOCK_TOKENS, encode_tokens, prefix_keys
from services.engine.kv.kvc import Expected, Flaw, KvcError
from services.engine.kv.ledger import Ledger
from services.engine.kv.restore import Failure
from services.engine.kv.rows import block_of
from services.engine.kv.search import wanted_of
from services.engine.kv.state_finder import FindingParts
from services.engine.kv.store import Asked, FoundBlock, SavedBlock, Source

RAM_LENGTHS_MAX: Final = 128
"""States in RAM whose lengths are tried."""
BOUNDARIES_MAX: Final = 10
"""Block boundaries that the cache service is asked for: the last 2,560 tokens of a prompt, some milliseconds."""


class WholeFinder:
    """See StateFinder. `checkers` computes keys, apart from disks that may hang."""

    def __init__(self, parts: FindingParts, checkers: RunBlocking) -> None:
        self._parts = parts
        self._checkers = checkers

    async def find(self, asked: Asked, found: list[FoundBlock]) -> None:
        """Puts the longest state into `found`. Raises CacheDown; one that was found until then counts."""
        seen = self._parts.ram.whole_lengths(RAM_LENGTHS_MAX)
        keys = await self._checkers(lambda: candidate_keys(asked, seen))
        best = await self._best_in_ram(asked, keys)
        if best is not None:
            found.append(FoundBlock(best.key, 0, best.end, best.end, best.state, Source.RAM))
        if self._parts.ledger is not None:
            least = best.end if best is not None else asked.held
            continues = best is not None and best.key == asked.parent_key
            longer = await self._ask(asked, keys, least, self._parts.ledger, knows_parent=continues)
            if longer is not None:
                found[:] = [longer]

    async def _best_in_ram(self, asked: Asked, keys: Mapping[int, bytes]) -> SavedBlock | None:
        ram = self._parts.ram
        states = (
            state for length in sorted(keys, reverse=True) for state in ram.chain([keys[length]])
        )
        best = next(states, None)
        least = best.end if best is not None else asked.held
        for parent in ram.chain([asked.parent_key]):
            if least < parent.end and await self._begins(asked, parent.end, parent.key):
                best = parent
        return best

    async def _ask(
        self,
        asked: Asked,
        keys: Mapping[int, bytes],
        least: int,
        ledger: Ledger,
        *,
        knows_parent: bool,
    ) -> FoundBlock | None:
        """A state of more than `least` tokens, from a root or from another engine."""
        most = len(asked.prompt) - 1
        if least >= most:
            return None
        found, _ = await self._probe(asked, keys[most], least, ledger)
        if found is not None or knows_parent:
            return found
        if asked.parent_key:
            found = await self._parent(asked, least, ledger)
        until = self._parts.clock.monotonic() + self._parts.wait_seconds
        for length in boundaries(asked, least)[:BOUNDARIES_MAX]:
            if found is not None or self._parts.clock.monotonic() > until:
                break
            found, _ = await self._probe(asked, keys[length], least, ledger)
        return found

    async def _parent(self, asked: Asked, least: int, ledger: Ledger) -> FoundBlock | None:
        """The state that the prompt names; waits for its save if that is in flight (S2.31, W38)."""
        found, is_pending = await self._probe(asked, asked.parent_key, least, ledger)
        if not is_pending:
            return found
        self._parts.stats.waits += 1
        outcome = await ledger.wait(asked.parent_key, self._parts.wait_seconds)
        if outcome == pb.WAIT_OUTCOME_AVAILABLE:
            found, _ = await self._probe(asked, asked.parent_key, least, ledger)
        return found

    async def _probe(
        self, asked: Asked, key: bytes, least: int, ledger: Ledger
    ) -> tuple[FoundBlock | None, bool]:
        """The state of a key, if it is one of this prompt and of more than `least` tokens; and whether it is being saved."""
        parts = self._parts
        response = await ledger.acquire(asked.namespace.root_key(), [key], 0, ())
        try:
            if not response.blocks:
                parts.known.discard([key])
                return None, response.pending_key == key
            copy = response.blocks[0]
            if copy.WhichOneof("place") == "root_id":
                parts.known.add(key)
            end = copy.block.end
            if end <= least or key in parts.withdrawals.refused:
                return None, False
            if not await self._begins(asked, end, key):
                return None, False
            wanted = wanted_of(self._expected(asked, key, end), copy)
            restored = await parts.restorer.load([wanted])
        finally:
            if response.claim_id:
                ledger.release_soon(response.claim_id)
        failure = restored.failure
        if failure is None and restored.blocks:
            block = restored.blocks[0]
            if block.meta.end == end:
                parts.ram.put(block_of(block.meta, block.state), block.meta.created)
                return FoundBlock(key, 0, end, end, block.state, wanted.source), False
            failure = Failure(wanted, KvcError(Flaw.TOKENS_MISMATCH))
        if failure is not None:
            parts.withdrawals.failed(failure)
        return None, False

    async def _begins(self, asked: Asked, length: int, key: bytes) -> bool:
        """Whether the key is that of the first `length` tokens of the prompt, which is longer than they are (I2)."""
        if not 0 < length < len(asked.prompt):
            return False
        return key in await self._checkers(
            lambda: prefix_keys(asked.namespace, asked.prompt, [length])
        )

    def _expected(self, asked: Asked, key: bytes, end: int) -> Expected:
        tokens = encode_tokens(asked.prompt[max(0, end - BLOCK_TOKENS) : end])
        root = asked.namespace.root_key()
        return Expected(key, root, self._parts.namespace, 0, tokens, whole=True)


def boundaries(asked: Asked, least: int) -> list[int]:
    """Block boundaries beyond `least` tokens that a prompt may go on from, longest first; its last token is computed."""
    last = (len(asked.prompt) - 1) // BLOCK_TOKENS
    return [block * BLOCK_TOKENS for block in range(last, least // BLOCK_TOKENS, -1)]


def candidate_keys(asked: Asked, seen: set[int]) -> dict[int, bytes]:
    """Lengths at which there may be a state of the prompt, longer than what the cells hold, with their keys; `seen` are
    lengths of other states. Hashes the prompt once."""
    most = len(asked.prompt) - 1
    keys = {
        length: asked.keys[length // BLOCK_TOKENS - 1] for length in boundaries(asked, asked.held)
    }
    other = sorted(
        {length for length in {most, *seen} if asked.held < length <= most} - keys.keys()
    )
    keys.update(zip(other, prefix_keys(asked.namespace, asked.prompt, other), strict=True))
    return keys
