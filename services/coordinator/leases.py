"""The lease table: which request runs on which engine for which gateway and tenant (S0, W57).

Pure. Every count is the length of an index that changes together with the table, so counts cannot drift from it and cost
O(1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from services.coordinator.grouping import Groups
from services.coordinator.tasks import Priority


class Ended(Enum):
    """What the end of a request says of its engine."""

    WELL = "well"
    BADLY = "badly"
    UNTOLD = "untold"


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of one gateway to run one request on one engine, whose life is `incarnation`. Times are in monotonic seconds.

    `affinity` are the hashes of its prompt, as in `Want`. One that is put aside was `asked_to_end` where somebody cancelled it.
    """

    lease_id: str
    request_id: str
    model: str
    engine_id: str
    gateway_id: str
    granted_at: float
    arrived_at: float = 0.0
    priority: Priority = Priority.NORMAL
    tenant: str = ""
    incarnation: str = ""
    affinity: tuple[bytes, ...] = ()
    asked_to_end: bool = False


class LeaseTable:
    """All leases that are held. The caller has checked its limits before it grants."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        self._requests: dict[str, Lease] = {}
        self._engines: Groups[Lease] = Groups()
        self._gateways: Groups[Lease] = Groups()
        self._models: Groups[Lease] = Groups()
        self._tenants: Groups[Lease] = Groups()

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        """Oldest first: a dict keeps the order of insertion."""
        return iter(tuple(self._leases.values()))

    def find(self, lease_id: str) -> Lease | None:
        """The lease, or None where it is not held."""
        return self._leases.get(lease_id)

    def of_request(self, request_id: str) -> Lease | None:
        """The lease of a request, or None where it has none."""
        return self._requests.get(request_id)

    def grant(self, lease: Lease) -> None:
        """Adds a lease. Raises ValueError where its id or its request id is held already."""
        if lease.request_id in self._requests or lease.lease_id in self._leases:
            raise ValueError(f"held already: {lease}")
        self._leases[lease.lease_id] = lease
        self._requests[lease.request_id] = lease
        for groups, name in self._memberships(lease):
            groups.add(name, lease.lease_id, lease)

    def release(self, lease_id: str) -> Lease | None:
        """Removes a lease and returns it; None where it is not held (released, swept, or never granted)."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return None
        del self._requests[lease.request_id]
        for groups, name in self._memberships(lease):
            groups.discard(name, lease_id)
        return lease

    def hand_over(self, lease_id: str, gateway_id: str) -> Lease:
        """Gives a lease, which must be held, to another gateway; returns it as it is then."""
        lease = self._leases[lease_id]
        moved = dataclasses.replace(lease, gateway_id=gateway_id)
        self._leases[lease_id] = self._requests[lease.request_id] = moved
        self._gateways.discard(lease.gateway_id, lease_id)
        for groups, name in self._memberships(moved):
            groups.add(name, lease_id, moved)
        return moved

    def _memberships(self, lease: Lease) -> Iterable[tuple[Groups[Lease], str]]:
        return (
            (self._engines, lease.engine_id),
            (self._gateways, lease.gateway_id),
            (self._models, lease.model),
            (self._tenants, lease.tenant),
        )

    def sweep_engine(self, engine_id: str) -> tuple[Lease, ...]:
        """Removes all leases on an engine and returns them, oldest first."""
        return self._sweep(self._engines.items(engine_id))

    def sweep_gateway(self, gateway_id: str) -> tuple[Lease, ...]:
        """Removes all leases of a gateway and returns them, oldest first."""
        return self._sweep(self._gateways.items(gateway_id))

    def _sweep(self, leases: Iterable[Lease]) -> tuple[Lease, ...]:
        return tuple(lease for lease in leases if self.release(lease.lease_id) is not None)

    def of_tenant(self, tenant: str) -> tuple[Lease, ...]:
        """The leases of a tenant, oldest first."""
        return self._tenants.items(tenant)

    def on_engine(self, engine_id: str) -> int:
        """Leases held on an engine, in O(1)."""
        return self._engines.count(engine_id)

    def of_gateway(self, gateway_id: str) -> int:
        """Leases held by a gateway, in O(1)."""
        return self._gateways.count(gateway_id)

    def of_model(self, model: str) -> int:
        """Leases held on a model, in O(1)."""
        return self._models.count(model)

    def count_tenant(self, tenant: str) -> int:
        """Leases held for a tenant, in O(1)."""
        return self._tenants.count(tenant)

    def check_integrity(self) -> None:
        """Asserts that every index says what a recount of the table says. O(n), for tests."""
        recounts: tuple[dict[str, int], ...] = ({}, {}, {}, {})
        for lease in self._leases.values():
            for recount, (_, name) in zip(recounts, self._memberships(lease), strict=True):
                recount[name] = recount.get(name, 0) + 1
        kept = tuple(
            groups.counts()
            for groups in (self._engines, self._gateways, self._models, self._tenants)
        )
        assert kept == recounts, (kept, recounts)
        assert {lease.request_id: lease for lease in self._leases.values()} == self._requests
