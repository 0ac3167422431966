"""The RAM tier: slabs of one engine, within a byte quota (S2.14, W45).

What goes first is chosen by cost (W32): a block's priority is the clock of the tier plus its uses times the tokens that its loss
would cost per byte, and the clock rises to the priority of each block that goes, so old fame fades (GreedyDual-Size-Frequency).
Only leaves go: a chain with a hole in front could not be reached; and nothing goes for a block whose parent is not here. Slabs
never change and are counted by reference, so one that is being read may go without harm; nothing is pinned.

Any thread; one lock, held for microseconds.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from services.engine.kv.store import SavedBlock

USES_MAX: Final = 64
"""Uses beyond this do not raise a priority: no block stays for ever."""
ATTENTION_TOKENS: Final = 8192
"""At this depth attention has doubled the cost of computing a token."""
OVERHEAD_BYTES: Final = 4096
"""What a block costs beside its state: tokens, keys, bookkeeping. Counted, so that the quota is honest for small states."""


def worth(uses: int, tokens: int, end: int, size: int) -> float:
    """Token-equivalents that dropping a block would cost, per MiB of its memory."""
    cost = tokens * (1 + end / ATTENTION_TOKENS)
    return min(uses, USES_MAX) * cost / (size / (1 << 20))


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two sequences share, by halving: comparing slices is a memory comparison."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(slots=True)
class RamEntry:
    """A block in RAM. `created` is in seconds since the Unix epoch; `bytes` is what it counts against the quota."""

    block: SavedBlock
    created: float
    bytes: int
    uses: int = 1
    rank: tuple[float, int] = (0.0, 0)
    """Its priority, and when it was ranked: of equals, the one that was used longer ago goes first."""


@dataclass(slots=True)
class RamChanges:
    """What changed since the last look."""

    added: list[RamEntry] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)


class RamTier:
    """Blocks by key. `on_change` is called, on any thread, after something was added or removed."""

    def __init__(self, quota_bytes: int, on_change: Callable[[], None] = lambda: None) -> None:
        self.quota_bytes = quota_bytes
        self.on_change = on_change
        self.bytes = 0
        """Bytes in use, never above the quota."""
        self.evictions = 0
        """Blocks that went for want of room."""
        self._lock = threading.Lock()
        self._entries: dict[bytes, RamEntry] = {}
        self._children: dict[bytes, dict[bytes, None]] = {}
        self._heap: list[tuple[tuple[float, int], bytes]] = []
        self._clock = 0.0
        self._ranked = 0
        self._changed: dict[bytes, None] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def entries(self) -> list[RamEntry]:
        """All blocks, oldest first."""
        with self._lock:
            return list(self._entries.values())

    def whole_lengths(self, most: int) -> set[int]:
        """Lengths, in tokens, of the states that cannot be cut: of the last `most` that came."""
        with self._lock:
            newest = list(itertools.islice(reversed(self._entries.values()), most))
        return {entry.block.end for entry in newest if entry.block.whole}

    # --- use -----------------------------------------------------------------------------------------------------

    def chain(self, keys: Sequence[bytes]) -> list[SavedBlock]:
        """The blocks of the longest prefix of `keys` that is here, each counted as used."""
        found = []
        with self._lock:
            for key in keys:
                entry = self._entries.get(key)
                if entry is None:
                    break
                self._use(key, entry)
                found.append(entry.block)
        return found

    def partial(self, parent: bytes, tail: Sequence[int]) -> tuple[SavedBlock, int] | None:
        """The block after `parent` that shares most first tokens with `tail`, and how many; None if none does."""
        tail = tuple(tail)
        best: tuple[int, bytes] | None = None
        with self._lock:
            for key in self._children.get(parent, ()):
                length = common_prefix(self._entries[key].block.tokens, tail)
                if length > 0 and (best is None or length > best[0]):
                    best = length, key
            if best is None:
                return None
            length, key = best
            entry = self._entries[key]
            self._use(key, entry)
            return entry.block, length

    def get(self, key: bytes) -> SavedBlock | None:
        """A block, not counted as used."""
        entry = self._entries.get(key)
        return None if entry is None else entry.block

    def _use(self, key: bytes, entry: RamEntry) -> None:
        entry.uses += 1
        self._rank(key, entry)

    def _rank(self, key: bytes, entry: RamEntry) -> None:
        block = entry.block
        value = worth(entry.uses, block.end - block.start, block.end, entry.bytes)
        self._ranked += 1
        entry.rank = self._clock + value, self._ranked
        if key not in self._children:
            self._push(key, entry)

    def _push(self, key: bytes, entry: RamEntry) -> None:
        heapq.heappush(self._heap, (entry.rank, key))
        if len(self._heap) > 64 + 4 * len(self._entries):
            # Each use left an outdated place behind.
            self._heap = [
                (entry.rank, key)
                for key, entry in self._entries.items()
                if key not in self._children
            ]
            heapq.heapify(self._heap)

    # --- change --------------------------------------------------------------------------------------------------

    def put(self, block: SavedBlock, created: float) -> bool:
        """Keeps a block, dropping what is worth less; False where it is here already or no room can be made."""
        size = len(block.state) + OVERHEAD_BYTES
        with self._lock:
            if block.key in self._entries or size > self.quota_bytes:
                return False
            # As a child it protects its parent from being dropped for its sake.
            self._children.setdefault(block.parent, {})[block.key] = None
            if not block.whole:  # All of these have one parent, and none is a part of another.
                self._drop_superseded(block)
            is_reachable = block.start == 0 or block.parent in self._entries
            fits = self.bytes + size <= self.quota_bytes or (is_reachable and self._make_room(size))
            if fits:
                self._insert(RamEntry(block, created, size))
            else:
                self._forget_child(block)
        self.on_change()
        return fits

    def drop(self, keys: Sequence[bytes]) -> None:
        """Lets go of blocks; those that are not here count as gone."""
        with self._lock:
            for key in keys:
                if key in self._entries:
                    self._remove(key)
        self.on_change()

    def _insert(self, entry: RamEntry) -> None:
        key = entry.block.key
        self._entries[key] = entry
        self.bytes += entry.bytes
        self._note(key)
        self._rank(key, entry)

    def _drop_superseded(self, block: SavedBlock) -> None:
        """A block in part whose tokens another one continues is of no more use."""
        for key in tuple(self._children[block.parent]):
            entry = self._entries.get(key)
            if (
                entry is not None
                and key not in self._children
                and entry.block.partial
                and len(entry.block.tokens) < len(block.tokens)
                and entry.block.tokens == block.tokens[: len(entry.block.tokens)]
            ):
                self._remove(key)

    def _make_room(self, size: int) -> bool:
        while self.bytes + size > self.quota_bytes:
            key = self._least()
            if key is None:
                return False
            self._clock = max(self._clock, self._entries[key].rank[0])
            self._remove(key)
            self.evictions += 1
        return True

    def _least(self) -> bytes | None:
        while self._heap:
            rank, key = heapq.heappop(self._heap)
            entry = self._entries.get(key)
            if entry is not None and entry.rank == rank and key not in self._children:
                return key
        return None

    def _remove(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self.bytes -= entry.bytes
        self._forget_child(entry.block)
        self._note(key)

    def _forget_child(self, block: SavedBlock) -> None:
        siblings = self._children[block.parent]
        del siblings[block.key]
        if not siblings:
            del self._children[block.parent]
            parent = self._entries.get(block.parent)
            if parent is not None:
                self._push(block.parent, parent)

    # --- telling -------------------------------------------------------------------------------------------------

    def watch(self) -> list[RamEntry]:
        """Begins to note changes for `changes`; returns what is here now."""
        with self._lock:
            self._changed = {}
            return list(self._entries.values())

    def unwatch(self) -> None:
        """Nobody listens: changes are not noted, and take no memory."""
        with self._lock:
            self._changed = None

    def changes(self) -> RamChanges:
        """What changed since `watch` or the last call; a block that came and went counts as removed."""
        told = RamChanges()
        with self._lock:
            for key in self._changed or ():
                entry = self._entries.get(key)
                if entry is None:
                    told.removed.append(key)
                else:
                    told.added.append(entry)
            if self._changed is not None:
                self._changed = {}
        return told

    def _note(self, key: bytes) -> None:
        if self._changed is not None:
            self._changed[key] = None

    def check_integrity(self) -> None:
        """Asserts that counts, children and heap agree with the entries, and the quota holds. O(n), for tests."""
        assert self.bytes == sum(entry.bytes for entry in self._entries.values())
        assert self.bytes <= self.quota_bytes
        children = [(p, k) for p, keys in self._children.items() for k in keys]
        assert {k for _, k in children} == self._entries.keys()
        assert all(self._entries[k].block.parent == p for p, k in children)
        leaves = self._entries.keys() - self._children.keys()
        ranked = {k for rank, k in self._heap if k in leaves and self._entries[k].rank == rank}
        assert ranked == leaves
