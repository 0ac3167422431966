"""What the state asks its edge to do. Pure values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from services.coordinator.leases import Lease
from services.runtime.errors import CaravanError


class Ending(Enum):
    """Why the coordinator ends a session of its own accord."""

    REPLACED = "replaced by a newer session of the same id"
    SILENT = "silent for too long"
    DRAINING = "the coordinator is shutting down"


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease and the address (host:port) of its engine."""

    lease: Lease
    address: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that waited, and why it gets no lease."""

    request_id: str
    error: CaravanError


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """Tell the engine of `session` to end a request."""

    session: int
    request_id: str


@dataclass(frozen=True, slots=True)
class EndSession:
    """End the stream of `session`; its peer may join again."""

    session: int
    peer_id: str
    why: Ending


@dataclass(frozen=True, slots=True)
class Effects:
    """What to do, cancels before endings.

    `swept` are the leases that ended with their engine or gateway, `written_off` those whose engine did not end the request
    in time after it was asked to. `grants` and `refusals` answer requests that waited.
    """

    cancels: tuple[CancelRequest, ...] = ()
    endings: tuple[EndSession, ...] = ()
    swept: tuple[Lease, ...] = ()
    written_off: tuple[Lease, ...] = ()
    grants: tuple[Grant, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    def __add__(self, other: Effects) -> Effects:
        return Effects(
            self.cancels + other.cancels,
            self.endings + other.endings,
            self.swept + other.swept,
            self.written_off + other.written_off,
            self.grants + other.grants,
            self.refusals + other.refusals,
        )


NOTHING = Effects()
