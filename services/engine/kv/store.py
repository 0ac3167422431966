"""What the decode side needs of the KV cache: find blocks for a prompt, keep new ones. tiered_store.py implements it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Protocol

from services.engine.kv.keys import BLOCK_TOKENS, Namespace


class SaveReason(IntEnum):
    """Why a block was saved; numbers as in the contract and in the files (S2.9)."""

    UNSPECIFIED = 0
    COLD = 1
    CONTINUED = 2
    EVICT = 3
    SHUTDOWN = 4
    FINISH = 5


class Source(Enum):
    """Where a block was found."""

    RAM = "ram"
    RAM_FILE = "ram_file"
    DISK = "disk"
    REMOTE = "remote"


@dataclass(frozen=True, slots=True)
class SavedBlock:
    """A block to keep: the KV state of the tokens [start, end) of a sequence.

    `key` is the key of tokens [0, end), `parent` that of [0, start). `partial` says that the block may be used in part
    (an answer's tail, or the block in which a prompt or an earlier answer ended). `state` is never changed afterwards.

    A `whole` state is one that cannot be cut: it starts at 0, its parent is the empty prefix, and `tokens` are only the last of
    its tokens, at most as many as a block has. The key stands for all of them.
    """

    key: bytes
    parent: bytes
    start: int
    end: int
    tokens: tuple[int, ...]
    partial: bool
    reason: SaveReason
    state: memoryview
    whole: bool = False


@dataclass(frozen=True, slots=True)
class FoundBlock:
    """A block that can be restored.

    Tokens [start, end) may be used; `state` restores [start, whole_end), of which a partial match uses the front only.
    `key` is the block's own, that of tokens [0, whole_end).
    """

    key: bytes
    start: int
    end: int
    whole_end: int
    state: memoryview
    source: Source


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt whose state is looked for.

    `keys` are block_keys(namespace, prompt), `namespace` that of its tenant; `held` counts the leading tokens that the cells
    hold. `parent_key`, which may be empty, names state that the prompt continues.
    """

    prompt: Sequence[int]
    keys: Sequence[bytes]
    held: int
    namespace: Namespace
    parent_key: bytes

    @property
    def blocks_held(self) -> int:
        """Full blocks that the cells hold."""
        return self.held // BLOCK_TOKENS


class BlockStore(Protocol):
    """Finds and keeps blocks. An optimisation: whatever fails costs time, never a request (I7)."""

    namespace: Namespace
    """The namespace of the model, without a tenant's salt."""

    async def find(
        self,
        prompt: Sequence[int],
        keys: Sequence[bytes],
        held: int,
        *,
        namespace: Namespace,
        parent_key: bytes = b"",
    ) -> list[FoundBlock]:
        """The chain of blocks of `prompt` behind the `held` tokens, checked and in memory; [] means cold. Of states that cannot be
        cut it is the longest, if it is longer than `held`. On the event loop.

        `keys` are block_keys(namespace, prompt); `held` counts the leading tokens that are in the cells. With `parent_key`, a
        save of it that is in flight is waited for, 500 ms at most (S2.31). The blocks may cover the whole prompt. Never raises
        except CancelledError; its time is bounded.
        """
        ...

    def save(self, block: SavedBlock) -> bool:
        """Keeps a block. Any thread, never blocks. False where it was dropped because a queue was full; it is counted."""
        ...

    def holds(self, key: bytes) -> bool:
        """Whether packing the block again would be wasted: it is in RAM, published, or being saved. Any thread, cheap."""
        ...

    def bad(self, key: bytes) -> None:
        """llama.cpp refused this state: withdraw the block everywhere. Any thread."""
        ...
