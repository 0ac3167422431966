"""The places that hold copies: roots (folders that engines of one host share) and the RAM of each engine.

Pure. A root outlives the sessions that reach it: its rows stay known, unreachable, until somebody declares it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from caravan.cache.v1 import cache_service_pb2 as pb

from services.cache.eviction import EvictionOrder
from services.cache.quota import Ledger
from services.cache.rows import Copy, Tier

if TYPE_CHECKING:
    from services.cache.reservations import Reservation
    from services.cache.sessions import Session

_OWN_RAM_RANK: Final = 4
_REMOTE_RANK: Final = 10
_GONE_KEYS_MAX: Final = 100_000
"""Keys that are remembered as removed while a root is listed; beyond, a stale row may enter, and is withdrawn when used."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How a session gets at the copies of a place: lower ranks are preferred; `wire` is the place as Acquire sends it."""

    rank: int
    wire: bytes


def root_reach(tier: Tier, root_id: str) -> Reach:
    """A root that the session has itself: preferred, RAM_FILE before DISK."""
    wire = pb.Copy(tier=tier.value, root_id=root_id).SerializeToString()
    return Reach(int(tier), wire)


def address_reach(tier: Tier, address: str, *, own: bool = False) -> Reach:
    """A fetch from an engine. Its own RAM is offered to an engine only where none of its roots has the block."""
    wire = pb.Copy(tier=tier.value, address=address).SerializeToString()
    return Reach(_OWN_RAM_RANK if own else _REMOTE_RANK + tier, wire)


class Place:
    """A root, or the RAM of one engine. Exactly one of `root_id` and `engine_id` is not empty.

    `readers` are the live sessions that reach it, with whether they can write; `remote` is how others do. `orphans` counts
    copies by the key of a parent that is not here. While `scans` sessions list its contents, `gone` names what was removed
    meanwhile. `stranded` copies are to be dropped, and `unsettled` saves to be looked at, when somebody is there to ask.
    """

    __slots__ = (
        "copies",
        "engine_id",
        "gone",
        "inventoried",
        "ledger",
        "order",
        "orphans",
        "quotas",
        "readers",
        "remote",
        "root_id",
        "scans",
        "stranded",
        "tier",
        "unsettled",
        "waiting",
    )

    def __init__(self, tier: Tier, quota: int, *, root_id: str = "", engine_id: str = "") -> None:
        self.tier = tier
        self.root_id = root_id
        self.engine_id = engine_id
        self.ledger = Ledger(quota)
        self.order = EvictionOrder()
        self.copies: dict[Copy, None] = {}
        self.orphans: dict[bytes, int] = {}
        self.readers: dict[Session, bool] = {}
        self.quotas: dict[Session, int] = {}
        self.remote: Reach | None = None
        self.inventoried = not root_id
        self.scans = 0
        self.gone: dict[bytes, None] = {}
        self.stranded: dict[Copy, None] = {}
        self.waiting: dict[Reservation, None] = {}
        self.unsettled: dict[Reservation, None] = {}

    def enter(self, session: Session, quota: int, *, writable: bool) -> None:
        """A session reaches the place from now on; the smallest quota that any declares is in force."""
        self.readers[session] = writable
        self.quotas[session] = quota
        self._renew()

    def leave(self, session: Session) -> None:
        """A session does not reach it any more; with the last one the quota stays as it is."""
        del self.readers[session]
        del self.quotas[session]
        self._renew()

    def _renew(self) -> None:
        if self.quotas:
            self.ledger.quota = min(self.quotas.values())
        first = next(iter(self.readers), None)
        self.remote = None if first is None else address_reach(self.tier, first.address)

    def note_gone(self, key: bytes) -> None:
        """A file is not there any more: a listing of the root that began before must not bring its row back."""
        if self.scans and len(self.gone) < _GONE_KEYS_MAX:
            self.gone[key] = None

    def writer(self, preferred: Session | None = None) -> Session | None:
        """A live session that can write here, the preferred one if it can; None if there is none."""
        if preferred is not None and self.readers.get(preferred):
            return preferred
        return next((session for session, writable in self.readers.items() if writable), None)


class PlaceTable:
    """All places. Roots by id; the RAM of engines by engine id."""

    def __init__(self) -> None:
        self._roots: dict[str, Place] = {}
        self._rams: dict[str, Place] = {}

    def __iter__(self) -> Iterator[Place]:
        """Roots, then RAM. Copies first, so that the metrics thread may iterate too."""
        return iter((*self._roots.values(), *self._rams.values()))

    def root(self, root_id: str) -> Place | None:
        """The root, or None where it is not known."""
        return self._roots.get(root_id)

    def open_root(self, root_id: str, tier: Tier, quota: int) -> Place:
        """The root; a new one if it is not known."""
        place = self._roots.get(root_id)
        if place is None:
            place = self._roots[root_id] = Place(tier, quota, root_id=root_id)
        return place

    def open_ram(self, engine_id: str, quota: int) -> Place:
        """The RAM of an engine that just joined: empty. Its place before was forgotten with its session."""
        assert engine_id not in self._rams
        place = self._rams[engine_id] = Place(Tier.RAM, quota, engine_id=engine_id)
        return place

    def forget_if_empty(self, place: Place) -> None:
        """Forgets a place that holds nothing and that nobody reaches."""
        if not place.readers and not place.copies:
            places, name = (
                (self._roots, place.root_id) if place.root_id else (self._rams, place.engine_id)
            )
            places.pop(name, None)
            place.order.clear()  # What it skips refers to the place: nothing would be freed without a cycle collection.
