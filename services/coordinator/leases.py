"""The lease table: which request runs on which engine for which gateway (S0, W57).

Pure. Every count is the length of an index that changes together with the table, so counts cannot drift from it and cost
O(1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of one gateway to run one request on one engine. `granted_at` is in monotonic seconds."""

    lease_id: str
    request_id: str
    model: str
    engine_id: str
    gateway_id: str
    granted_at: float


class _Index:
    """Leases grouped by one of their fields; a group without leases takes no memory."""

    def __init__(self) -> None:
        self._groups: dict[str, dict[str, Lease]] = {}

    def add(self, key: str, lease: Lease) -> None:
        self._groups.setdefault(key, {})[lease.lease_id] = lease

    def discard(self, key: str, lease: Lease) -> None:
        group = self._groups[key]
        del group[lease.lease_id]
        if not group:
            del self._groups[key]

    def count(self, key: str) -> int:
        group = self._groups.get(key)
        return 0 if group is None else len(group)

    def leases(self, key: str) -> tuple[Lease, ...]:
        return tuple(self._groups.get(key, {}).values())

    def counts(self) -> dict[str, int]:
        return {key: len(group) for key, group in self._groups.items()}


class LeaseTable:
    """All leases that are held. The caller has checked its limits before it grants."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        self._requests: dict[str, Lease] = {}
        self._engines = _Index()
        self._gateways = _Index()
        self._models = _Index()

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        """Oldest first: a dict keeps the order of insertion."""
        return iter(tuple(self._leases.values()))

    def of_request(self, request_id: str) -> Lease | None:
        """The lease of a request, or None where it is not in flight."""
        return self._requests.get(request_id)

    def grant(self, lease: Lease) -> None:
        """Adds a lease. Raises ValueError where its id or its request id is held already."""
        if lease.request_id in self._requests or lease.lease_id in self._leases:
            raise ValueError(f"held already: {lease}")
        self._leases[lease.lease_id] = lease
        self._requests[lease.request_id] = lease
        self._engines.add(lease.engine_id, lease)
        self._gateways.add(lease.gateway_id, lease)
        self._models.add(lease.model, lease)

    def release(self, lease_id: str) -> Lease | None:
        """Removes a lease and returns it; None where it is not held (released, swept, or never granted)."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return None
        del self._requests[lease.request_id]
        self._engines.discard(lease.engine_id, lease)
        self._gateways.discard(lease.gateway_id, lease)
        self._models.discard(lease.model, lease)
        return lease

    def sweep_engine(self, engine_id: str) -> tuple[Lease, ...]:
        """Removes all leases on an engine and returns them, oldest first."""
        return self._sweep(self._engines.leases(engine_id))

    def sweep_gateway(self, gateway_id: str) -> tuple[Lease, ...]:
        """Removes all leases of a gateway and returns them, oldest first."""
        return self._sweep(self._gateways.leases(gateway_id))

    def _sweep(self, leases: Iterable[Lease]) -> tuple[Lease, ...]:
        return tuple(lease for lease in leases if self.release(lease.lease_id) is not None)

    def on_engine(self, engine_id: str) -> int:
        """Leases held on an engine, in O(1)."""
        return self._engines.count(engine_id)

    def of_gateway(self, gateway_id: str) -> int:
        """Leases held by a gateway, in O(1)."""
        return self._gateways.count(gateway_id)

    def of_model(self, model: str) -> int:
        """Leases held on a model, in O(1)."""
        return self._models.count(model)

    def check_integrity(self) -> None:
        """Asserts that every index says what a recount of the table says. O(n), for tests."""
        recounts: tuple[dict[str, int], ...] = ({}, {}, {})
        for lease in self._leases.values():
            for recount, key in zip(
                recounts, (lease.engine_id, lease.gateway_id, lease.model), strict=True
            ):
                recount[key] = recount.get(key, 0) + 1
        kept = (self._engines.counts(), self._gateways.counts(), self._models.counts())
        assert kept == recounts, (kept, recounts)
        assert {lease.request_id: lease for lease in self._leases.values()} == self._requests
