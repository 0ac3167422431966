"""The requests that hold a lease or wait for one, and the single steps by which they come and go; admission.py takes them.

Pure. Each step keeps the leases, the queue of the model, the sums of the engine and the indexes in agreement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from services.coordinator.effects import CancelRequest, Effects, Grant, Refusal
from services.coordinator.engines import EngineRecord, EngineRegistry
from services.coordinator.grouping import Groups
from services.coordinator.leases import Lease, LeaseTable
from services.coordinator.limits import Limits
from services.coordinator.models import ModelCatalogue, ModelRecord
from services.coordinator.tasks import InFlight
from services.coordinator.waiting import WaitingTable, Want
from services.runtime.errors import CaravanError

_SWEPT = "its engine or gateway is gone"
_ASKED = "asked for"


class Grants:
    """The tables, and what is done to them."""

    def __init__(self, limits: Limits, engines: EngineRegistry, models: ModelCatalogue) -> None:
        self.leases = LeaseTable()
        self.waiting = WaitingTable()
        self._limits = limits
        self._engines = engines
        self._models = models
        self._grants = 0
        # By engine: leases whose request was asked to end.
        self.cancelling: Groups[Lease] = Groups()

    def is_cancelling(self, lease: Lease) -> bool:
        """Whether the engine of the lease was asked to end its request."""
        return not isinstance(self._model(lease).queue.state(lease.request_id), InFlight)

    def start(self, now: float) -> Effects:
        """Starts who can start, of all models."""
        return Effects(grants=tuple(g for model in self._models for g in self._start(model, now)))

    def adopt(self, lease: Lease, engine: EngineRecord, now: float) -> bool:
        """Takes a lease that was granted before, by another coordinator or to another session; whether it could be taken.

        Not where the engine has begun another life, or the request waits or runs elsewhere; also beyond the engine's capacity,
        because it runs. One that is held by its gateway's former session goes over to this one.
        """
        if (engine.incarnation, engine.model.name) != (lease.incarnation, lease.model):
            return False
        held = self.leases.of_request(lease.request_id)
        if held is not None:
            if (held.lease_id, held.engine_id) != (lease.lease_id, lease.engine_id):
                return False
            self._hand_over(held, lease.gateway_id)
            return True
        known = len(self.leases) + len(self.waiting)
        if (
            self.waiting.of_request(lease.request_id) is not None
            or self.leases.find(lease.lease_id) is not None
            or known >= self._limits.known_max
        ):
            return False
        model = self._model(lease)
        model.queue.begin(lease.request_id, now, priority=lease.priority, tenant=lease.tenant)
        self.leases.grant(lease)
        model.settle(engine, engine.held + 1)
        if lease.asked_to_end:
            self._ask_to_end(lease, now)  # The engine is told with its next report.
        return True

    def _hand_over(self, lease: Lease, gateway_id: str) -> None:
        moved = self.leases.hand_over(lease.lease_id, gateway_id)
        if self.is_cancelling(lease):
            self.cancelling.add(lease.engine_id, lease.lease_id, moved)

    # --- steps ---------------------------------------------------------------------------------------------------

    def _start(self, model: ModelRecord, now: float) -> tuple[Grant, ...]:
        """Starts those that go ahead of all others and those whose turn it is, while there is room for them."""
        queue, started = model.queue, []
        while queue.room and len(model.ahead):
            key = model.ahead.first(model.choice.has_room_for)
            if key is None:
                break
            queue.start(key, now)
            started.append(self._grant(model, self._stop_waiting(model, key), now))
        if queue.in_turn_count:
            keys = queue.start_available(now)
            started += [self._grant(model, self._stop_waiting(model, key), now) for key in keys]
        return tuple(started)

    def _stop_waiting(self, model: ModelRecord, request_id: str) -> Want:
        model.ahead.discard(request_id)
        return self.waiting.remove(request_id)

    def _grant(self, model: ModelRecord, want: Want, now: float) -> Grant:
        # Those that `start_available` has just started are counted in flight already, this one included.
        engine = model.choice.choose(want, model.queue.in_flight_count / model.slots)
        lease = Lease(
            want.lease_id,
            want.request_id,
            want.model,
            engine.engine_id,
            want.gateway_id,
            granted_at=now,
            arrived_at=want.arrived_at,
            priority=want.priority,
            tenant=want.tenant,
            incarnation=engine.incarnation,
            affinity=want.affinity,
        )
        self.leases.grant(lease)
        self._grants += 1
        engine.last_grant = self._grants
        model.settle(engine, engine.held + 1)
        return Grant(lease, engine.address, model.rules is None or model.rules.idempotent)

    def _swept(self, leases: Iterable[Lease]) -> tuple[Lease, ...]:
        """The leases of a session that ended, with what is to be known of them if they come back."""
        swept: list[Lease] = []
        for lease in leases:
            ending = self.is_cancelling(lease)
            swept.append(dataclasses.replace(lease, asked_to_end=True) if ending else lease)
            self._model(lease).queue.fail(lease.request_id, _SWEPT)
            self.cancelling.discard(lease.engine_id, lease.lease_id)
        return tuple(swept)

    def _settle(self, leases: Iterable[Lease]) -> None:
        """Counts the places of leases that have ended on live engines as free."""
        for lease in leases:
            self.cancelling.discard(lease.engine_id, lease.lease_id)
            engine = self._engine(lease)
            self._model(lease).settle(engine, self.leases.on_engine(lease.engine_id))

    def _ask_to_end(self, lease: Lease, now: float) -> None:
        queue = self._model(lease).queue
        if isinstance(queue.state(lease.request_id), InFlight):
            queue.cancel(lease.request_id, _ASKED, now)
            self.cancelling.add(lease.engine_id, lease.lease_id, lease)

    def _write_off(self, request_id: str) -> Lease:
        lease = self.leases.of_request(request_id)
        assert lease is not None  # It was in flight until now.
        self.leases.release(lease.lease_id)
        engine = self._engine(lease)
        engine.written_off += 1
        engine.is_suspect = True
        self._settle([lease])
        return lease

    def _refuse(self, wants: Iterable[Want], error: CaravanError, now: float) -> Effects:
        refused = []
        for want in wants:
            self._leave_queue(want, now)
            refused.append(Refusal(want.request_id, error))
        return Effects(refusals=tuple(refused))

    def _leave_queue(self, want: Want, now: float) -> None:
        model = self._named(want.model)
        self._stop_waiting(model, want.request_id)
        model.queue.cancel(want.request_id, _ASKED, now)

    def _cancels(self, leases: Iterable[Lease]) -> tuple[CancelRequest, ...]:
        return tuple(
            CancelRequest(self._engine(lease).session, lease.request_id) for lease in leases
        )

    def _engine(self, lease: Lease) -> EngineRecord:
        engine = self._engines.find(lease.engine_id)
        assert engine is not None  # A lease never outlives the session of its engine.
        return engine

    def _model(self, lease: Lease) -> ModelRecord:
        return self._named(lease.model)

    def _named(self, name: str) -> ModelRecord:
        model = self._models.find(name)
        assert model is not None  # It is there while it has engines, leases or waiting requests.
        return model
