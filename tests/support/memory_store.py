"""A store for tests of what is saved: it keeps everything and finds nothing."""

from __future__ import annotations

from services.engine.kv.store import FoundBlock, SavedBlock, SaveReason
from tests.support.kv import NAMESPACE


class MemoryStore:
    """Keeps what is saved, in order."""

    namespace = NAMESPACE

    def __init__(self) -> None:
        self.blocks: list[SavedBlock] = []

    async def find(self, *_args: object, **_options: object) -> list[FoundBlock]:
        """Nothing: this store is only written."""
        return []

    def save(self, block: SavedBlock) -> bool:
        """Keeps it."""
        self.blocks.append(block)
        return True

    def holds(self, key: bytes) -> bool:
        """Whether it was saved."""
        return any(block.key == key for block in self.blocks)

    def bad(self, key: bytes) -> None:
        """Forgets it."""
        self.blocks = [block for block in self.blocks if block.key != key]

    @property
    def places(self) -> list[tuple[int, int, SaveReason, bool]]:
        """What the blocks are."""
        return [(b.start, b.end, b.reason, b.partial) for b in self.blocks]
