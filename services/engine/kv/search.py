"""One search for the longest restorable prefix of a prompt: what is wanted, what is found so far, what comes next. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from caravan.cache.v1 import cache_service_pb2 as pb

from services.engine.kv.keys import BLOCK_TOKENS, Namespace, encode_tokens
from services.engine.kv.kvc import BlockMeta, Expected, Flaw, KvcError
from services.engine.kv.ram import common_prefix
from services.engine.kv.restore import Wanted
from services.engine.kv.store import Asked, FoundBlock, SavedBlock, Source

PART_TOKENS_LEAST: Final = 32
"""Fewer tokens of a block are not worth its loading, unless they are the end of the prompt: most prompts begin alike."""
_SOURCES = {pb.TIER_RAM_FILE: Source.RAM_FILE, pb.TIER_DISK: Source.DISK}


@dataclass(slots=True)
class Search:
    """A prompt on its way to its blocks.

    `files` is the namespace that stands in the files, which tenants share: their salts are in the keys.
    """

    asked: Asked
    files: Namespace
    found: list[FoundBlock] = field(default_factory=list)
    waited: bool = False
    """Whether a save in flight was waited for."""
    _full: int = 0
    _partial_key: bytes = b""

    @property
    def prompt(self) -> Sequence[int]:
        """Its tokens."""
        return self.asked.prompt

    @property
    def keys(self) -> Sequence[bytes]:
        """The keys of its full blocks."""
        return self.asked.keys

    @property
    def salted(self) -> Namespace:
        """The namespace of its tenant."""
        return self.asked.namespace

    @property
    def parent_key(self) -> bytes:
        """The key of the state that it continues, if it names one."""
        return self.asked.parent_key

    @property
    def depth(self) -> int:
        """Full blocks that are resident or found."""
        return self.asked.blocks_held + self._full

    @property
    def chain_complete(self) -> bool:
        """Whether every full block of the prompt is there."""
        return self.depth >= len(self.keys)

    @property
    def tail(self) -> Sequence[int]:
        """The tokens after the last full block of the prompt."""
        return self.prompt[len(self.keys) * BLOCK_TOKENS :]

    @property
    def next_tokens(self) -> Sequence[int]:
        """The tokens after what is found, of one block at most."""
        start = self.depth * BLOCK_TOKENS
        return self.prompt[start : start + BLOCK_TOKENS]

    @property
    def has_partial(self) -> bool:
        """Whether a block was found that begins like the tail."""
        return bool(self._partial_key)

    @property
    def complete(self) -> bool:
        """Whether nothing more can be found, or a block in part has been found."""
        return self.has_partial or (self.chain_complete and not self.tail)

    @property
    def awaits_parent(self) -> bool:
        """Whether the state that the prompt continues is named and not among what is found."""
        return bool(self.parent_key) and (
            self.parent_key != self._partial_key and self.parent_key not in self.keys[: self.depth]
        )

    def parent(self) -> bytes:
        """Key of what comes before the next block."""
        return self.keys[self.depth - 1] if self.depth else self.salted.root_key()

    def missing(self) -> Sequence[bytes]:
        """Keys of the full blocks that are not found yet."""
        return self.keys[self.depth :]

    # --- found in RAM --------------------------------------------------------------------------------------------

    def add_ram(self, blocks: Sequence[SavedBlock]) -> None:
        """The next full blocks, from RAM."""
        for block in blocks:
            self._add_full(block, Source.RAM)

    def add_ram_partial(self, block: SavedBlock, length: int) -> None:
        """The block after the chain, of which `length` tokens match."""
        self._add_partial(block, length, Source.RAM)

    # --- found by the cache service ------------------------------------------------------------------------------

    def wanted(self, response: pb.AcquireResponse) -> list[Wanted]:
        """What to load of what the service found, in order: full blocks, and one in part where it follows the whole chain."""
        wanted: list[Wanted] = []
        parent = self.parent()
        for index, copy in enumerate(response.blocks, self.depth):
            if index >= len(self.keys):
                return wanted  # More than was asked for.
            start = index * BLOCK_TOKENS
            tokens = encode_tokens(self.prompt[start : start + BLOCK_TOKENS])
            expected = Expected(self.keys[index], parent, self.files, start, tokens)
            wanted.append(wanted_of(expected, copy))
            parent = expected.key
        if self.depth + len(wanted) == len(self.keys):
            wanted += self._wanted_part(response, len(self.keys), parent)
        return wanted

    def wanted_part(self, response: pb.AcquireResponse) -> list[Wanted]:
        """What to load in part after what is found, as the service answered for the keys up to there."""
        if response.partial_tokens < PART_TOKENS_LEAST:
            return []
        return self._wanted_part(response, self.depth, self.parent())

    def _wanted_part(self, response: pb.AcquireResponse, index: int, parent: bytes) -> list[Wanted]:
        if not response.HasField("partial"):
            return []
        expected = Expected(
            response.partial.block.key, parent, self.files, index * BLOCK_TOKENS, None
        )
        return [wanted_of(expected, response.partial)]

    def add_loaded(self, block: SavedBlock, source: Source) -> None:
        """The next full block, loaded and checked."""
        self._add_full(block, source)

    def add_loaded_part(self, block: SavedBlock, source: Source) -> None:
        """The block after what is found, loaded and checked. Raises KvcError where none of its tokens is the prompt's."""
        length = common_prefix(block.tokens, tuple(self.next_tokens))
        if length == 0:
            raise KvcError(Flaw.TOKENS_MISMATCH)
        self._add_partial(block, length, source)

    def check_key(self, meta: BlockMeta, tokens: Sequence[int]) -> None:
        """Computes the key of a block that is used in part from all tokens that it stands for. Raises KvcError."""
        hasher = self.salted.hasher()
        hasher.feed(self.prompt[: meta.start])
        hasher.feed(tokens)
        if hasher.key() != meta.key:
            raise KvcError(Flaw.KEY_MISMATCH)

    def _add_full(self, block: SavedBlock, source: Source) -> None:
        self.found.append(
            FoundBlock(block.key, block.start, block.end, block.end, block.state, source)
        )
        self._full += 1

    def _add_partial(self, block: SavedBlock, length: int, source: Source) -> None:
        start, end = block.start, block.end
        self.found.append(FoundBlock(block.key, start, start + length, end, block.state, source))
        self._partial_key = block.key


def wanted_of(expected: Expected, copy: pb.Copy) -> Wanted:
    """What to load of a copy that the service named."""
    if copy.WhichOneof("place") == "root_id":
        source = _SOURCES.get(copy.tier, Source.DISK)
        return Wanted(expected, source, copy.root_id, "")
    return Wanted(expected, Source.REMOTE, "", copy.address)
