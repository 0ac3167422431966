"""What the state asks its edge to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from caravan.cache.v1 import cache_service_pb2 as pb

from services.cache.places import Place
from services.cache.rows import Copy
from services.cache.sessions import Session
from services.runtime.errors import CaravanError


class Ending(Enum):
    """Why the service ends a session of its own accord."""

    REPLACED = "replaced by a newer session of the same engine"
    SILENT = "silent for too long"
    DRAINING = "the cache service is shutting down"


class WaitOutcome(Enum):
    """How a wait ended; the numbers of the contract."""

    AVAILABLE = pb.WAIT_OUTCOME_AVAILABLE
    ABSENT = pb.WAIT_OUTCOME_ABSENT
    FAILED = pb.WAIT_OUTCOME_FAILED
    TIMED_OUT = pb.WAIT_OUTCOME_TIMED_OUT


class ReserveOutcome(Enum):
    """What became of a wish to save; the numbers of the contract."""

    GRANTED = pb.RESERVE_OUTCOME_GRANTED
    ALREADY_PRESENT = pb.RESERVE_OUTCOME_ALREADY_PRESENT
    CONFLICT = pb.RESERVE_OUTCOME_CONFLICT
    NO_ROOM = pb.RESERVE_OUTCOME_NO_ROOM


@dataclass(frozen=True, slots=True)
class Drop:
    """Tell an engine to delete the copies of some keys from a place."""

    session: Session
    place: Place
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Settle:
    """Ask an engine to look at the file of a lost writer."""

    session: Session
    place: Place
    key: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer the call that waits under an id: a waiter's, or a reservation's token."""

    call_id: str
    answer: WaitOutcome | ReserveOutcome | CaravanError


@dataclass(frozen=True, slots=True)
class Change:
    """Tell watchers that a copy came or went."""

    copy: Copy
    published: bool


@dataclass(frozen=True, slots=True)
class EndSession:
    """End the stream of a session; its engine may join again."""

    session: Session
    why: Ending


@dataclass(slots=True)
class Effects:
    """What to do, filled while a decision is made; within a list in the order of the decisions."""

    drops: list[Drop] = field(default_factory=list)
    settles: list[Settle] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    endings: list[EndSession] = field(default_factory=list)
