"""All rows and copies, and what is counted with them: bytes, children, pins.

Pure. Every change of a copy's state goes through here, so that no count can drift from what it counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from services.cache.places import Place
from services.cache.rows import NOT_QUEUED, Copy, CopyState, Facts, Row
from services.cache.siblings import SiblingIndex


class Index:
    """Rows by key. `siblings` are those that may be used in part."""

    def __init__(self) -> None:
        self.rows: dict[bytes, Row] = {}
        self.siblings = SiblingIndex()

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, key: bytes, place: Place) -> Copy | None:
        """The copy of a block in a place, whatever its state; None if there is none."""
        row = self.rows.get(key)
        if row is not None:
            for copy in row.copies:
                if copy.place is place:
                    return copy
        return None

    def chain(self, keys: Iterable[bytes]) -> Iterator[Row]:
        """The rows of keys that follow each other, up to the first that is not known.

        Asking the table for each key would cost a cache miss each, which with a million rows is most of a lookup. So a row
        remembers one that follows it, the last that was asked for; most have only one.
        """
        find = self.rows.get
        before: Row | None = None
        row: Row | None = None
        for key in keys:
            if row is None or row.key != key:
                row = find(key)
                if row is None:
                    return
                if before is not None and row.parent == before.key:
                    before.follower = row
            yield row
            before, row = row, row.follower

    def add(
        self, facts: Facts, place: Place, state: CopyState, *, seen: int, size: int, now: float
    ) -> Copy:
        """Adds a copy that is not there, AVAILABLE or WRITING, of `size` bytes."""
        row = self.rows.get(facts.key)
        if row is None:
            parent = self.rows.get(facts.parent)
            row = Row(facts, facts.parent if parent is None else parent.key)
            self.rows[row.key] = row
            if parent is not None and parent.follower is None:
                parent.follower = row
            if row.tokens:
                self.siblings.add(row)
        elif facts.tokens:
            self._learn_tokens(row, facts.tokens)
        copy = Copy(row, place, size, state, seen=seen, now=now)
        row.copies = (*row.copies, copy)
        place.copies[copy] = None
        place.ledger.held += size
        copy.children = place.orphans.pop(row.key, 0)
        self._count_child(copy, 1)
        if state is CopyState.AVAILABLE:
            place.order.begin(copy, facts.hits, now)
        return copy

    def publish(self, copy: Copy, facts: Facts, *, seen: int, now: float) -> None:
        """A copy that was being written is available, with the size that it has now."""
        assert copy.state is CopyState.WRITING
        row = copy.row
        row.wire = facts.wire
        if facts.tokens:
            self._learn_tokens(row, facts.tokens)
        self.resize(copy, facts.size)
        copy.state = CopyState.AVAILABLE
        copy.seen = seen
        copy.place.order.begin(copy, facts.hits, now)

    def resize(self, copy: Copy, size: int) -> None:
        """The bytes of a copy that is being written turn out different."""
        copy.place.ledger.held += size - copy.size
        copy.size = size

    def start_eviction(self, copy: Copy) -> None:
        """A copy that may go is being dropped; its bytes count until it is removed."""
        assert copy.may_go
        copy.state = CopyState.EVICTING
        copy.place.ledger.evicting += copy.size
        self._count_child(copy, -1)

    def undo_eviction(self, copy: Copy) -> None:
        """It stays after all."""
        assert copy.state is CopyState.EVICTING
        copy.state = CopyState.AVAILABLE
        copy.place.ledger.evicting -= copy.size
        self._count_child(copy, 1)
        copy.place.order.offer(copy)

    def remove(self, copy: Copy) -> None:
        """A copy is not there any more; its row goes with its last copy. Claims on it become meaningless."""
        place, row, state = copy.place, copy.row, copy.state
        if state is CopyState.EVICTING:
            place.ledger.evicting -= copy.size
        else:
            self._count_child(copy, -1)
        if copy.claims:
            place.ledger.pinned -= copy.size
        copy.state = CopyState.GONE
        place.ledger.held -= copy.size
        del place.copies[copy]
        if copy.queued != NOT_QUEUED:
            place.order.shrink(len(place.copies))
        if copy.children:
            place.orphans[row.key] = copy.children
        if (
            state is not CopyState.WRITING
        ):  # A placeholder says nothing of a file that may lie there since before.
            place.note_gone(row.key)
        row.copies = tuple(other for other in row.copies if other is not copy)
        if not row.copies:
            self._forget(row)

    def _forget(self, row: Row) -> None:
        del self.rows[row.key]
        if row.tokens:
            self.siblings.remove(row)
        parent = self.rows.get(row.parent)
        if parent is not None and parent.follower is row:
            parent.follower = None

    def pin(self, copies: Iterable[Copy]) -> None:
        """One more claim on each."""
        for copy in copies:
            if not copy.claims:
                copy.place.ledger.pinned += copy.size
            copy.claims += 1

    def unpin(self, copies: Iterable[Copy]) -> list[Copy]:
        """One claim less on each; returns those that should go now that nobody uses them."""
        superseded = []
        gone = CopyState.GONE
        for copy in copies:
            copy.claims -= 1
            if copy.claims or copy.state is gone:
                continue
            copy.place.ledger.pinned -= copy.size
            if copy.children:
                continue  # Most of a chain: it may not go anyway, and a call for each would be most of the time.
            copy.place.order.offer(copy)
            if copy.superseded and copy.may_go:
                superseded.append(copy)
        return superseded

    def superseded_by(self, copy: Copy) -> Iterator[Copy]:
        """Copies in the same place that are not needed once this one is available: the shorter of two siblings."""
        row = copy.row
        for shorter in self.siblings.prefixes(row):
            for other in shorter.copies:
                if other.place is copy.place and other.state is CopyState.AVAILABLE:
                    yield other
        for longer in self.siblings.extensions(row):
            for other in longer.copies:
                if other.place is copy.place and other.state is CopyState.AVAILABLE:
                    yield copy
                    return

    def _learn_tokens(self, row: Row, tokens: bytes) -> None:
        if not row.tokens:
            row.tokens = tokens
            self.siblings.add(row)

    def _count_child(self, copy: Copy, change: int) -> None:
        place, parent_key = copy.place, copy.row.parent
        parent = self.find(parent_key, place)
        if parent is not None:
            parent.children += change
            if not parent.children:
                place.order.offer(parent)
            return
        children = place.orphans.get(parent_key, 0) + change
        if children:
            place.orphans[parent_key] = children
        else:
            del place.orphans[parent_key]
