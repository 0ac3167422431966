"""What the state asks its edge to do. Pure values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from services.coordinator.leases import Lease


class Ending(Enum):
    """Why the coordinator ends a session of its own accord."""

    REPLACED = "replaced by a newer session of the same id"
    SILENT = "silent for too long"
    DRAINING = "the coordinator is shutting down"


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
    """What to do, cancels before endings. `swept` are the leases that ended with their engine or gateway."""

    cancels: tuple[CancelRequest, ...] = ()
    endings: tuple[EndSession, ...] = ()
    swept: tuple[Lease, ...] = ()

    def __add__(self, other: Effects) -> Effects:
        return Effects(
            self.cancels + other.cancels, self.endings + other.endings, self.swept + other.swept
        )


NOTHING = Effects()
