"""What is known of a block (a row) and of each place that holds it (a copy).

Pure. A million rows stay in memory, so both are slotted, and what no decision needs (start, reason, time) is kept only as
the bytes that Acquire sends: `Row.wire`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from caravan.cache.v1 import cache_service_pb2 as pb

if TYPE_CHECKING:
    from services.cache.places import Place

KEY_BYTES: Final = 32
NOT_QUEUED: Final = -1.0


class Tier(IntEnum):
    """Where a place is; the numbers of the contract. Lower is faster."""

    RAM = pb.TIER_RAM
    RAM_FILE = pb.TIER_RAM_FILE
    DISK = pb.TIER_DISK


class CopyState(IntEnum):
    """Where a copy stands; the numbers of the contract, and GONE for one that somebody still refers to."""

    GONE = pb.COPY_STATE_UNSPECIFIED
    AVAILABLE = pb.COPY_STATE_AVAILABLE
    WRITING = pb.COPY_STATE_WRITING
    EVICTING = pb.COPY_STATE_EVICTING


@dataclass(frozen=True, slots=True)
class Facts:
    """What an engine tells of a block.

    `end` is the position after its last token, `size` the bytes of the copy, `reason` the number of why it was saved, `hits`
    its uses before this service started, `tokens` its tokens as big-endian u32 where it may be used in part (their order is
    then that of the bytes), and `wire` the block as Acquire sends it: a serialized Copy without its place.
    """

    key: bytes
    parent: bytes
    end: int
    size: int
    reason: int
    hits: int
    tokens: bytes
    wire: bytes


class Row:
    """A block. It lives as long as it has copies. `uses` are those since the service started.

    `follower` is one of the rows whose parent this is, of those that are known, or None: see Index.chain.
    """

    __slots__ = ("copies", "end", "follower", "key", "parent", "tokens", "uses", "wire")

    def __init__(self, facts: Facts, parent: bytes) -> None:
        self.key = facts.key
        self.parent = parent
        self.end = facts.end
        self.tokens = facts.tokens
        self.wire = facts.wire
        self.uses = 0
        self.follower: Row | None = None
        self.copies: tuple[Copy, ...] = ()


class Copy:
    """A block in a place.

    `claims` pin it; `children` are copies in the same place whose parent is this block; `frequency` and `priority` are the
    score (see eviction.py), `queued` the priority under which it stands in the order of eviction; `seen` is the epoch in
    which it was last known to be there; `superseded` marks one that goes once nobody uses it.
    """

    __slots__ = (
        "children",
        "claims",
        "frequency",
        "last_used",
        "place",
        "priority",
        "queued",
        "row",
        "seen",
        "size",
        "state",
        "superseded",
    )

    def __init__(
        self, row: Row, place: Place, size: int, state: CopyState, *, seen: int, now: float
    ) -> None:
        self.row = row
        self.place = place
        self.size = size
        self.state = state
        self.claims = 0
        self.children = 0
        self.frequency = 0.0
        self.priority = 0.0
        self.queued = NOT_QUEUED
        self.last_used = now
        self.seen = seen
        self.superseded = False

    def __lt__(self, other: Copy) -> bool:
        """The order of the heap in eviction.py."""
        return self.queued < other.queued

    @property
    def may_go(self) -> bool:
        """Whether it may be dropped: nobody reads, writes or drops it, and nothing behind it needs it."""
        return self.state is CopyState.AVAILABLE and not self.claims and not self.children
