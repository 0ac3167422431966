"""Choosing copies to drop and having them dropped.

A dropped copy is EVICTING from the choice on: nobody finds it any more, but its bytes count until an engine confirms that
they are free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heapreplace

from services.cache.core import Core
from services.cache.effects import Change, Effects
from services.cache.eviction import worth_now
from services.cache.places import Place
from services.cache.pressure import INTERVAL_S, TIERS, bytes_to_free
from services.cache.rows import Copy, CopyState
from services.cache.sessions import Session

VICTIMS_MAX = 4_096
"""Copies that one decision drops at most, so that no call holds the loop for long."""


class Dropping:
    """All ways in which copies are dropped."""

    def __init__(self, core: Core) -> None:
        self._core = core

    # --- for want of room ----------------------------------------------------------------------------------------

    def make_room(self, place: Place, effects: Effects, preferred: Session | None) -> bool:
        """Drops what is needed so that all that wait for room in a place will fit; False, and nothing, if it cannot be."""
        needed = place.ledger.shortage
        if needed <= 0:
            return True
        if needed > place.ledger.droppable_max or place.writer() is None:
            return False
        victims, freed = self._pick(place, needed)
        if freed < needed:
            for copy in reversed(victims):
                self._core.index.undo_eviction(copy)
            return False
        self._commit(place, victims, effects, preferred)
        return True

    def shrink(self, place: Place, effects: Effects) -> None:
        """Drops down to the quota, as far as possible, where more was found than it allows."""
        needed = place.ledger.held - place.ledger.evicting - place.ledger.quota
        while needed > 0 and place.writer() is not None:
            victims, freed = self._pick(place, needed)
            self._commit(place, victims, effects, None)
            needed -= freed
            if not victims:
                return

    def drop_one(self, place: Place, effects: Effects) -> None:
        """Drops the copy least worth keeping, if any may go, to make room for a row."""
        if place.writer() is not None:
            self._commit(place, self._pick(place, 1)[0], effects, None)

    # --- on demand -----------------------------------------------------------------------------------------------

    def evict(
        self, places: Iterable[Place], wanted: int, effects: Effects, victims_max: int = VICTIMS_MAX
    ) -> tuple[int, int]:
        """Drops the copies least worth keeping of all the places, until `wanted` bytes are on their way or no more may go.

        Returns how many copies and bytes. One call drops at most `victims_max`; call again for more.
        """
        # The next copy of each place, least worth first. The number keeps places themselves from being compared.
        offers = [
            (worth_now(copy), number, place)
            for number, place in enumerate(places)
            if place.writer() is not None and (copy := place.order.first()) is not None
        ]
        heapify(offers)
        chosen: dict[Place, list[Copy]] = {}
        copies = freed = 0
        while offers and freed < wanted and copies < victims_max:
            _, number, place = offers[0]
            copy = place.order.take()
            assert copy is not None
            self._core.index.start_eviction(copy)
            place.order.dropped(copy)
            chosen.setdefault(place, []).append(copy)
            copies, freed = copies + 1, freed + copy.size
            following = place.order.first()
            if following is None:
                heappop(offers)
            else:
                heapreplace(offers, (worth_now(following), number, place))
        for place, victims in chosen.items():
            self._tell(place, victims, effects, None)
        return copies, freed

    def evict_keys(
        self, places: Iterable[Place], keys: Sequence[bytes], effects: Effects
    ) -> tuple[int, int]:
        """Drops the copies of these keys, whatever their worth; pinned ones, and those in front of others, stay."""
        live = {place for place in places if place.writer() is not None}
        # A chain in any order: last blocks first, so that those in front may follow.
        rows = [row for row in map(self._core.index.rows.get, dict.fromkeys(keys)) if row]
        rows.sort(key=lambda row: -row.end)
        copies = [copy for row in rows for copy in row.copies if copy.place in live]
        return self.drop_all(copies, effects)

    def drop_all(self, copies: Iterable[Copy], effects: Effects) -> tuple[int, int]:
        """Drops those of the copies that may go; returns how many copies and bytes."""
        chosen: dict[Place, list[Copy]] = {}
        for copy in copies:
            if copy.may_go and copy.place.writer() is not None:
                self._core.index.start_eviction(copy)
                chosen.setdefault(copy.place, []).append(copy)
        for place, victims in chosen.items():
            self._tell(place, victims, effects, None)
        gone = [copy for victims in chosen.values() for copy in victims]
        return len(gone), sum(copy.size for copy in gone)

    def relieve(
        self, session: Session, used: int, total: int, now: float, effects: Effects
    ) -> None:
        """An engine tells of its host's memory: drops from what it holds there if it is short (S2.43)."""
        limits = self._core.limits
        wanted = bytes_to_free(used, total, limits.pressure_high, limits.pressure_low)
        if not wanted or (session.pressed_at is not None and now - session.pressed_at < INTERVAL_S):
            return
        session.pressed_at = now
        places = [place for place in session.own if place.tier in TIERS]
        self.evict(places, wanted - sum(place.ledger.evicting for place in places), effects)

    # --- what engines tell ---------------------------------------------------------------------------------------

    def confirm(
        self, session: Session, place: Place, keys: Iterable[bytes], effects: Effects
    ) -> None:
        """An engine did what it was told: the bytes are free. What it was not told is not believed."""
        for key in keys:
            copy = self._core.index.find(key, place)
            if copy is not None and copy in session.dropping:
                del session.dropping[copy]
                self._core.remove(copy, effects)

    def withdraw(
        self, place: Place, keys: Iterable[bytes], effects: Effects, *, corrupt: bool
    ) -> None:
        """Copies turned out to be gone or bad: they are forgotten, so that they can be saved again (W30)."""
        for key in keys:
            copy = self._core.index.find(key, place)
            if copy is not None and copy.state is CopyState.AVAILABLE:
                self._core.remove(copy, effects)
                self._core.counters.corrupt += corrupt

    # --- how -----------------------------------------------------------------------------------------------------

    def _pick(self, place: Place, needed: int) -> tuple[list[Copy], int]:
        """Starts to drop copies until `needed` bytes are found or no more may go; a parent may follow its last child."""
        victims: list[Copy] = []
        freed = 0
        while freed < needed and len(victims) < VICTIMS_MAX:
            copy = place.order.take()
            if copy is None:
                break
            self._core.index.start_eviction(copy)
            victims.append(copy)
            freed += copy.size
        return victims, freed

    def _commit(
        self, place: Place, victims: list[Copy], effects: Effects, preferred: Session | None
    ) -> None:
        for copy in victims:
            place.order.dropped(copy)
        self._tell(place, victims, effects, preferred)

    def _tell(
        self, place: Place, victims: list[Copy], effects: Effects, preferred: Session | None
    ) -> None:
        counters = self._core.counters
        counters.evictions += len(victims)
        counters.evicted_bytes += sum(copy.size for copy in victims)
        if self._core.watched:
            effects.changes.extend(Change(copy, published=False) for copy in victims)
        self._core.command_drops(place, victims, effects, preferred)
