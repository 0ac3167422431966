"""Leases that outlive a session: of an earlier coordinator, of a gateway that joins again, of an engine that does (I6). Pure.

A lease ends with the session of its engine or gateway. Where only the session ended, and not the process, the request goes on;
so the lease may come back for a while: a gateway that joins tells which ones it holds, and an engine that joins in the same
life (incarnation) gets those that are known of it. A request whose gateway does not come back is cancelled at its engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from services.coordinator.admission import Admission
from services.coordinator.effects import CancelRequest, Effects
from services.coordinator.engines import EngineRecord, EngineRegistry
from services.coordinator.grouping import Groups
from services.coordinator.leases import Lease
from services.coordinator.limits import Limits


class LeasesAside:
    """Leases that are not held, by id, each kept for `keep_s` seconds; beyond `most` of them the oldest make room."""

    def __init__(self, keep_s: float, most: int) -> None:
        self._keep_s = keep_s
        self._most = most
        self._leases: dict[str, tuple[Lease, float]] = {}
        self._engines: Groups[Lease] = Groups()

    def __len__(self) -> int:
        return len(self._leases)

    def add(self, lease: Lease, now: float) -> list[Lease]:
        """Puts a lease aside; one of the same id goes. Returns those that had to make room."""
        self.pop(lease.lease_id)
        self._leases[lease.lease_id] = lease, now + self._keep_s
        self._engines.add(lease.engine_id, lease.lease_id, lease)
        return [self._pop_oldest()] if len(self._leases) > self._most else []

    def pop(self, lease_id: str) -> Lease | None:
        """Takes a lease away; None where it is not there."""
        lease, _ = self._leases.pop(lease_id, (None, 0.0))
        if lease is not None:
            self._engines.discard(lease.engine_id, lease_id)
        return lease

    def of_engine(self, engine_id: str) -> tuple[Lease, ...]:
        """The leases on an engine, oldest first."""
        return self._engines.items(engine_id)

    def of_gateway(self, gateway_id: str) -> list[Lease]:
        """The leases of a gateway. O(n)."""
        return [lease for lease, _ in self._leases.values() if lease.gateway_id == gateway_id]

    def of_request(self, request_id: str) -> Lease | None:
        """The lease of a request. O(n)."""
        leases = (lease for lease, _ in self._leases.values())
        return next((lease for lease in leases if lease.request_id == request_id), None)

    def replace(self, lease: Lease) -> None:
        """Takes another form of a lease that is there, on the same engine."""
        _, until = self._leases[lease.lease_id]
        self._leases[lease.lease_id] = lease, until
        self._engines.add(lease.engine_id, lease.lease_id, lease)

    def due(self, now: float) -> list[Lease]:
        """Takes away the leases whose time is over."""
        gone: list[Lease] = []
        # All are kept for the same time, so the oldest is due first.
        while self._leases and next(iter(self._leases.values()))[1] <= now:
            gone.append(self._pop_oldest())
        return gone

    def _pop_oldest(self) -> Lease:
        lease, _ = self._leases.pop(next(iter(self._leases)))
        self._engines.discard(lease.engine_id, lease.lease_id)
        return lease


class Relearning:
    """What becomes of leases whose sessions ended."""

    def __init__(self, limits: Limits, engines: EngineRegistry, admission: Admission) -> None:
        self._limits = limits
        self._engines = engines
        self._admission = admission
        # Released a short while ago, with when they are forgotten: a gateway's join may have been on its way with them.
        self._released: dict[str, float] = {}
        # Claimed by a gateway, on an engine that has not joined yet.
        self.claimed = LeasesAside(limits.rejoin_s, limits.leases_max)
        # Of a gateway that may come back, on an engine that may still run the request.
        self.orphaned = LeasesAside(limits.rejoin_s, limits.leases_max)

    def claim(self, held: Iterable[Lease], now: float) -> Effects:
        """A gateway has joined that holds these: takes those whose engine lives, keeps aside those whose engine is not there."""
        adopted: list[Lease] = []
        for told in held:
            if told.lease_id in self._released:
                continue
            orphan = self.orphaned.pop(told.lease_id)
            asked_to_end = orphan is not None and orphan.asked_to_end
            lease = dataclasses.replace(told, asked_to_end=asked_to_end)
            engine = self._engines.find(lease.engine_id)
            if engine is None:
                self.claimed.add(lease, now)
            elif self._admission.adopt(lease, engine, now):
                adopted.append(lease)
        return Effects(adopted=tuple(adopted))

    def engine_joined(self, engine: EngineRecord, now: float) -> Effects:
        """Takes the leases that are claimed on an engine; those of a former life of it are dropped."""
        adopted: list[Lease] = []
        for lease in self.claimed.of_engine(engine.engine_id):
            self.claimed.pop(lease.lease_id)
            if self._admission.adopt(lease, engine, now):
                adopted.append(lease)
        return Effects(adopted=tuple(adopted))

    def engine_gone(self, swept: Iterable[Lease], now: float) -> None:
        """The session of the leases' engine ended: they are its own again if it joins again in this life."""
        for lease in swept:
            self.claimed.add(lease, now)

    def gateway_gone(self, gateway_id: str, swept: Iterable[Lease], now: float) -> Effects:
        """The session of a gateway ended: what it claimed is dropped, what it held may be claimed by its next session."""
        for lease in self.claimed.of_gateway(gateway_id):
            self.claimed.pop(lease.lease_id)
        early = [gone for lease in swept for gone in self.orphaned.add(lease, now)]
        return Effects(cancels=tuple(self._cancels(early)))

    def cancel(self, request_id: str) -> bool:
        """Has a claimed request ended as soon as its engine is there; whether there is such a request. O(n)."""
        lease = self.claimed.of_request(request_id)
        if lease is not None:
            self.claimed.replace(dataclasses.replace(lease, asked_to_end=True))
        return lease is not None

    def release(self, lease_id: str, now: float) -> bool:
        """A gateway ends a lease; whether it was put aside. It can be claimed no more."""
        self._released.pop(lease_id, None)
        self._released[lease_id] = now + self._limits.rejoin_s
        if len(self._released) > self._limits.leases_max:
            del self._released[next(iter(self._released))]
        aside = (self.claimed.pop(lease_id), self.orphaned.pop(lease_id))
        return aside != (None, None)

    def expire(self, now: float) -> Effects:
        """Drops claims whose engine did not come, and cancels the requests of gateways that did not come back (I5)."""
        self.claimed.due(now)
        while self._released and next(iter(self._released.values())) <= now:
            del self._released[next(iter(self._released))]
        return Effects(cancels=tuple(self._cancels(self.orphaned.due(now))))

    def _cancels(self, leases: Iterable[Lease]) -> Iterable[CancelRequest]:
        for lease in leases:
            engine = self._engines.find(lease.engine_id)
            again = self._admission.leases.of_request(lease.request_id)
            # The same id may run there again by now, for another gateway.
            runs_again = again is not None and again.engine_id == lease.engine_id
            if engine is not None and engine.incarnation == lease.incarnation and not runs_again:
                yield CancelRequest(engine.session, lease.request_id)
