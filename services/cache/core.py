"""The tables of the service, and the two things that every decision about a copy has in common: it comes, it goes."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.cache.effects import Change, Drop, Effects
from services.cache.index import Index
from services.cache.places import Place, PlaceTable
from services.cache.reservations import ReservationTable
from services.cache.rows import Copy, CopyState
from services.cache.sessions import Session, SessionTable
from services.cache.waiters import WaiterTable

SAVE_REASONS = 6
"""Numbers of SaveReason, the unspecified one included."""
DROP_KEYS_MAX = 4_096
"""Keys in one Drop."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of every table; times in seconds; the pressure thresholds are shares of a host's memory."""

    heartbeat_s: float = 1.0
    reservation_ttl_s: float = 60.0
    claim_ttl_s: float = 60.0
    sessions_max: int = 256
    rows_max: int = 2_000_000
    claims_per_session_max: int = 4_096
    waiters_max: int = 16_384
    keys_max: int = 65_536
    pressure_high: float = 0.85
    pressure_low: float = 0.75


@dataclass(slots=True)
class Counters:
    """What happened since the start (S2.42). `saves` is by the number of the reason."""

    acquires: int = 0
    blocks_wanted: int = 0
    blocks_found: int = 0
    partial_hits: int = 0
    saves: list[int] = field(default_factory=lambda: [0] * SAVE_REASONS)
    duplicates: int = 0
    refused: int = 0
    evictions: int = 0
    evicted_bytes: int = 0
    corrupt: int = 0
    adopted: int = 0


class Core:
    """All tables. `watched` tells whether anybody wants to hear of changes."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.index = Index()
        self.places = PlaceTable()
        self.sessions = SessionTable()
        self.reservations = ReservationTable()
        self.waiters = WaiterTable()
        self.counters = Counters()
        self.watched = False
        self.epoch = 0

    def appeared(self, copy: Copy, effects: Effects) -> None:
        """A copy is available from now on."""
        if self.watched:
            effects.changes.append(Change(copy, published=True))

    def remove(self, copy: Copy, effects: Effects) -> None:
        """A copy is gone. Those who watch have heard of one that was being dropped, and never of one being written."""
        if self.watched and copy.state is CopyState.AVAILABLE:
            effects.changes.append(Change(copy, published=False))
        self.index.remove(copy)

    def command_drops(
        self, place: Place, copies: list[Copy], effects: Effects, preferred: Session | None = None
    ) -> None:
        """Has a live session delete copies that are being dropped; with nobody there they wait until somebody is."""
        writer = place.writer(preferred)
        if writer is None:
            place.stranded.update(dict.fromkeys(copies))
            return
        writer.dropping.update(dict.fromkeys(copies))
        for at in range(0, len(copies), DROP_KEYS_MAX):
            keys = tuple(copy.row.key for copy in copies[at : at + DROP_KEYS_MAX])
            effects.drops.append(Drop(writer, place, keys))
