"""What the state asks its edge to do. Pure values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from services.coordinator.deployment import OnExceeded
from services.coordinator.leases import Lease
from services.runtime.errors import CaravanError


class Ending(Enum):
    """Why the coordinator ends a session of its own accord."""

    REPLACED = "replaced by a newer session of the same id"
    SILENT = "silent for too long"
    DRAINING = "the coordinator is shutting down"


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease, the address (host:port) of its engine, and whether its request may be sent to a second one (`idempotent`)."""

    lease: Lease
    address: str
    idempotent: bool = True


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
class DrainEngine:
    """Tell the engine of `session` to take no more requests, to end those left after `grace_s` seconds, and then perhaps itself."""

    session: int
    grace_s: float
    stop: bool


@dataclass(frozen=True, slots=True)
class UndrainEngine:
    """Tell the engine of `session` to take requests again."""

    session: int


@dataclass(frozen=True, slots=True)
class TellLimits:
    """Tell the engine of `session` what others have used of limits that it shares: as it is when it is sent."""

    session: int


EngineCommand: TypeAlias = CancelRequest | DrainEngine | UndrainEngine | TellLimits
"""What is sent to an engine."""


@dataclass(frozen=True, slots=True)
class EndSession:
    """End the stream of `session`; its peer may join again."""

    session: int
    peer_id: str
    why: Ending


@dataclass(frozen=True, slots=True)
class BudgetCrossing:
    """The budget of a deployment is spent, or not any more; of one tenant where that is given. `limit` is its field."""

    deployment: str
    tenant: str | None
    limit: str
    policy: OnExceeded
    is_over: bool


@dataclass(frozen=True, slots=True)
class Effects:
    """What to do, commands before endings.

    `adopted` are the leases of an earlier coordinator or session that were taken, `swept` are the leases that ended with their engine or gateway, `written_off` those whose engine did not end the request
    in time after it was asked to. `grants` and `refusals` answer requests that waited.
    """

    cancels: tuple[CancelRequest, ...] = ()
    endings: tuple[EndSession, ...] = ()
    swept: tuple[Lease, ...] = ()
    written_off: tuple[Lease, ...] = ()
    grants: tuple[Grant, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    drains: tuple[DrainEngine, ...] = ()
    undrains: tuple[UndrainEngine, ...] = ()
    adopted: tuple[Lease, ...] = ()
    crossings: tuple[BudgetCrossing, ...] = ()
    tellings: tuple[TellLimits, ...] = ()

    @property
    def commands(self) -> tuple[EngineCommand, ...]:
        """All that is to be sent to engines."""
        return self.cancels + self.drains + self.undrains + self.tellings

    def __add__(self, other: Effects) -> Effects:
        return Effects(
            self.cancels + other.cancels,
            self.endings + other.endings,
            self.swept + other.swept,
            self.written_off + other.written_off,
            self.grants + other.grants,
            self.refusals + other.refusals,
            self.drains + other.drains,
            self.undrains + other.undrains,
            self.adopted + other.adopted,
            self.crossings + other.crossings,
            self.tellings + other.tellings,
        )


NOTHING = Effects()
