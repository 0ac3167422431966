"""The leases whose requests run, as a coordinator that has started anew must learn them. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.gateway.routes import Lease, Wanted


@dataclass(frozen=True, slots=True)
class _Held:
    lease: Lease
    wanted: Wanted
    asked_at: float


class HeldLeases:
    """At most as many as there are requests. Times are in monotonic seconds."""

    def __init__(self) -> None:
        self._leases: dict[str, _Held] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def add(self, lease: Lease, wanted: Wanted, asked_at: float) -> None:
        """The lease was granted; `asked_at` is when the request asked for it."""
        self._leases[lease.lease_id] = _Held(lease, wanted, asked_at)

    def discard(self, lease: Lease) -> None:
        """The request of the lease runs no more."""
        self._leases.pop(lease.lease_id, None)

    def messages(self, now: float) -> list[pb.HeldLease]:
        """All of them, oldest first."""
        return [_message(held, now) for held in self._leases.values()]


def _message(held: _Held, now: float) -> pb.HeldLease:
    message = pb.HeldLease(
        lease_id=held.lease.lease_id,
        request_id=held.wanted.request_id,
        model=held.lease.model,
        engine_id=held.lease.engine_id,
        incarnation=held.lease.incarnation,
        priority=held.lease.priority,
    )
    message.age.FromNanoseconds(round((now - held.asked_at) * 1e9))
    return message
