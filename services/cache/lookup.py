"""Finding blocks: the longest chain that an engine can reach, the best partly matching block after it, and waiting for one.

`Lookup.acquire` is the hot path: 128 keys for a prompt of 32k tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Final

from services.cache.claims import Claim
from services.cache.core import Core
from services.cache.dropping import Dropping
from services.cache.effects import Effects, WaitOutcome
from services.cache.eviction import touch
from services.cache.places import Place, Reach
from services.cache.rows import KEY_BYTES, Copy, CopyState, Row
from services.cache.sessions import Session
from services.cache.waiters import Waiter
from services.runtime.errors import CaravanError

RETRY_S: Final = 0.1
_KEY: Final = struct.Struct(f"{KEY_BYTES}s")


@dataclass(frozen=True, slots=True)
class Partial:
    """A block whose first `matched` tokens are the prompt's."""

    copy: Copy
    reach: Reach
    matched: int


@dataclass(frozen=True, slots=True)
class Found:
    """A chain: its blocks and how to get at each, in order. `pending` is the key after it that is being saved, or empty.

    `parts_follow`: it ends before the last key that was asked for, at blocks that may be used in part.
    """

    claim_id: str
    copies: list[Copy]
    reaches: list[Reach]
    partial: Partial | None
    pending: bytes
    parts_follow: bool = False


class Lookup:
    """All that reads the index on behalf of engines."""

    def __init__(self, core: Core, dropping: Dropping) -> None:
        self._core = core
        self._dropping = dropping

    def acquire(
        self,
        session: Session,
        keys: bytes,
        skip: int,
        root_key: bytes,
        tail: bytes,
        *,
        claim_id: str,
        now: float,
    ) -> Found:
        """Pins the longest chain from block `skip` on, under `claim_id` if there is any. O(keys).

        `keys` is 32 bytes each, joined; `tail` is big-endian u32. Raises CaravanError: CAPACITY_EXHAUSTED.
        """
        core = self._core
        if len(session.claims) >= core.limits.claims_per_session_max:
            raise _full("claims", core.limits.claims_per_session_max)
        copies, reaches, missing = self._chain(session, keys, skip)
        partial = None
        pending = b""
        parts_follow = False
        if missing:
            end = KEY_BYTES * (skip + len(copies))
            last = keys[end - KEY_BYTES : end] if end else root_key
            parts_follow = core.index.siblings.has(last)
            row = core.index.rows.get(missing)
            if row is not None and any(c.state is CopyState.WRITING for c in row.copies):
                pending = missing
        else:
            partial = self._partial(session, keys[-KEY_BYTES:] if keys else root_key, tail)
        counters = core.counters
        counters.acquires += 1
        counters.blocks_wanted += max(0, len(keys) // KEY_BYTES - skip)
        counters.blocks_found += len(copies)
        pinned = copies
        if partial is not None:
            counters.partial_hits += 1
            pinned = [*copies, partial.copy]
        if not pinned:
            return Found("", copies, reaches, None, pending, parts_follow)
        core.index.pin(pinned)
        touch(pinned, now)
        session.claims.add(claim_id, Claim(tuple(pinned), now))
        return Found(claim_id, copies, reaches, partial, pending, parts_follow)

    def release(self, session: Session, claim_id: str, effects: Effects) -> bool:
        """Gives a claim back; whether it was held."""
        claim = session.claims.remove(claim_id)
        if claim is None:
            return False
        self._unpin(claim, effects)
        return True

    def expire(self, now: float, effects: Effects) -> None:
        """Gives claims back whose answer must have been lost on its way."""
        then = now - self._core.limits.claim_ttl_s
        for session in self._core.sessions:
            for claim in session.claims.remove_until(then):
                self._unpin(claim, effects)

    def wait(self, session: Session, key: bytes, waiter_id: str) -> WaitOutcome | None:
        """Answers a wish to wait; None: the answer follows under the waiter's id. Raises CaravanError: CAPACITY_EXHAUSTED."""
        core = self._core
        row = core.index.rows.get(key)
        if row is None:
            return WaitOutcome.ABSENT
        if self._best(session, row) is not None:
            return WaitOutcome.AVAILABLE
        if not any(copy.state is CopyState.WRITING for copy in row.copies):
            return WaitOutcome.ABSENT
        if len(core.waiters) >= core.limits.waiters_max:
            raise _full("waiting calls", core.limits.waiters_max)
        core.waiters.add(Waiter(waiter_id, session.session_id, key))
        return None

    def _chain(
        self, session: Session, keys: bytes, skip: int
    ) -> tuple[list[Copy], list[Reach], bytes]:
        """The chain, and the first key that is missing (empty if none is)."""
        own = session.own.get
        available = CopyState.AVAILABLE
        copies: list[Copy] = []
        reaches: list[Reach] = []
        place: Place | None = None
        reach: Reach | None = None
        for row in self._core.index.chain(_split(keys, skip)):
            # As `_best`, written out: this is most of the time of a call.
            best: Reach | None = None
            for copy in row.copies:
                if copy.state is available:
                    if (
                        copy.place is not place
                    ):  # Rarely: the blocks of a chain mostly lie together.
                        place = copy.place
                        reach = own(place) or place.remote
                    if reach is not None and (best is None or reach.rank < best.rank):
                        best, best_copy = reach, copy
            if best is None:
                break
            copies.append(best_copy)
            reaches.append(best)
        at = KEY_BYTES * (skip + len(copies))
        return copies, reaches, keys[at : at + KEY_BYTES]

    def _best(self, session: Session, row: Row) -> tuple[Copy, Reach] | None:
        """The copy of a block that a session gets at best."""
        best: tuple[Copy, Reach] | None = None
        for copy in row.copies:
            if copy.state is CopyState.AVAILABLE:
                reach = session.reach(copy.place)
                if reach is not None and (best is None or reach.rank < best[1].rank):
                    best = copy, reach
        return best

    def _partial(self, session: Session, parent: bytes, tail: bytes) -> Partial | None:
        found = self._core.index.siblings.best(
            parent, tail, lambda row: self._best(session, row) is not None
        )
        if found is None:
            return None
        row, matched = found
        best = self._best(session, row)
        assert best is not None
        return Partial(best[0], best[1], matched)

    def _unpin(self, claim: Claim, effects: Effects) -> None:
        self._dropping.drop_all(self._core.index.unpin(claim.copies), effects)


def _split(keys: bytes, skip: int) -> Iterator[bytes]:
    """The keys from block `skip` on."""
    return chain.from_iterable(_KEY.iter_unpack(memoryview(keys)[KEY_BYTES * skip :]))


def _full(what: str, limit: int) -> CaravanError:
    return CaravanError(
        "CAPACITY_EXHAUSTED",
        f"There are {limit} {what}, and no more are taken.",
        retry_after_s=RETRY_S,
        active=str(limit),
        capacity=str(limit),
    )
