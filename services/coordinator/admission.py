"""Who gets a lease, who waits for one, and who is told why not (S4, W55, W60, W61).

Pure. Each model has a queue whose tasks in flight are the leases of the model; whatever frees a place starts those whose turn
it is in the same call, so while anything waits for a model, its engines are full.
"""

from __future__ import annotations

from collections.abc import Iterable

from services.coordinator import refusals
from services.coordinator.effects import NOTHING, CancelRequest, Effects, Grant, Refusal
from services.coordinator.engines import EngineRecord, EngineRegistry
from services.coordinator.grouping import Groups
from services.coordinator.leases import Lease, LeaseTable
from services.coordinator.limits import Limits
from services.coordinator.models import ModelCatalogue, ModelRecord
from services.coordinator.tasks import InFlight, QueueSaturatedError
from services.coordinator.waiting import WaitingTable, Want
from services.runtime.errors import CaravanError

_SWEPT = "its engine or gateway is gone"
_ASKED = "asked for"


class Admission:
    """The requests that hold a lease or wait for one."""

    def __init__(self, limits: Limits, engines: EngineRegistry, models: ModelCatalogue) -> None:
        self.leases = LeaseTable()
        self.waiting = WaitingTable()
        self._limits = limits
        self._engines = engines
        self._models = models
        self._grants = 0
        # Leases on each engine whose request was asked to end.
        self._cancelling: Groups[Lease] = Groups()

    # --- coming and going ----------------------------------------------------------------------------------------

    def route(self, want: Want) -> Grant | None:
        """Grants a lease; None where the request waits for one. O(log) of engines and requests.

        Raises CaravanError: DUPLICATE_REQUEST, MODEL_NOT_FOUND, NO_ENGINE, MODEL_LOADING, CAPACITY_EXHAUSTED.
        """
        request_id, now = want.request_id, want.arrived_at
        if self.leases.of_request(request_id) or self.waiting.of_request(request_id):
            raise CaravanError(
                "DUPLICATE_REQUEST",
                f"A request with the id '{request_id}' is in flight already.",
                request_id=request_id,
            )
        model = self._models.find(want.model)
        if model is None:
            raise refusals.unknown_model(want.model)
        if len(self.leases) + len(self.waiting) >= self._limits.leases_max:
            raise refusals.table_full("requests in flight", self._limits.leases_max)
        wait_s = min(want.wait_s, self._limits.queue_s)
        if not model.ready_engines or (not model.queue.room and wait_s <= 0):
            raise refusals.refusal(model)
        try:
            model.queue.enqueue(
                request_id,
                now,
                priority=want.priority,
                tenant=want.tenant,
                start_by=now + wait_s,
            )
        except QueueSaturatedError:
            raise refusals.refusal(model) from None
        self.waiting.add(want)
        grants = self._start(model, now)
        return grants[0] if grants else None

    def release(self, lease_id: str, now: float) -> Effects | None:
        """Ends a lease and starts who waited for its place; None where it was not held."""
        lease = self.leases.release(lease_id)
        if lease is None:
            return None
        model = self._model(lease)
        model.note_lease(now - lease.granted_at)
        model.queue.succeed(lease.request_id)
        self._settle([lease])
        return Effects(grants=self._start(model, now))

    def leave(self, want: Want, now: float) -> Effects:
        """The call that asked is over: it waits no more, and a grant that it did not take is given back (W61)."""
        if self.waiting.of_request(want.request_id) is want:
            self._leave_queue(want, now)
            return NOTHING
        return self.release(want.lease_id, now) or NOTHING

    def cancel(self, request_id: str, now: float) -> Effects:
        """Ends a request: it waits no more, or its engine is told. Raises CaravanError: REQUEST_NOT_FOUND."""
        want = self.waiting.of_request(request_id)
        if want is not None:
            return self._refuse([want], _cancelled(), now)
        lease = self.leases.of_request(request_id)
        if lease is None:
            raise refusals.unknown_request(request_id)
        self._ask_to_end(lease, now)
        return Effects(cancels=self._cancels([lease]))

    def cancel_tenant(self, tenant: str, now: float) -> tuple[int, Effects]:
        """Ends all requests of a tenant; returns how many there were."""
        wants, leases = self.waiting.of_tenant(tenant), self.leases.of_tenant(tenant)
        for lease in leases:
            self._ask_to_end(lease, now)
        effects = self._refuse(wants, _cancelled(), now) + Effects(cancels=self._cancels(leases))
        return len(wants) + len(leases), effects

    def is_cancelling(self, lease: Lease) -> bool:
        """Whether the engine of the lease was asked to end its request."""
        return not isinstance(self._model(lease).queue.state(lease.request_id), InFlight)

    def cancels_again(self, engine: EngineRecord) -> Effects:
        """The cancels of requests that an engine still holds: the first may have outrun its request."""
        return Effects(cancels=self._cancels(self._cancelling.items(engine.engine_id)))

    # --- what becomes of engines, gateways and time --------------------------------------------------------------

    def engine_changed(self, engine: EngineRecord, now: float) -> Effects:
        """An engine has joined, or its capacity or readiness may have changed."""
        model = self._models.find(engine.model.name)
        assert model is not None  # It is there while it has engines.
        model.settle(engine, self.leases.on_engine(engine.engine_id))
        return Effects(grants=self._start(model, now))

    def engine_gone(self, engine: EngineRecord, now: float) -> Effects:
        """The session of an engine, which has left the registry, is over."""
        swept = self.leases.sweep_engine(engine.engine_id)
        for lease in swept:
            self._model(lease).queue.fail(lease.request_id, _SWEPT)
            self._cancelling.discard(lease.engine_id, lease.lease_id)
        self._models.remove_engine(engine, now)
        return Effects(swept=swept)

    def gateway_gone(self, gateway_id: str, now: float) -> Effects:
        """The session of a gateway is over: its requests wait no more, and its leases end. Starts nobody: see `start`."""
        effects = self._refuse(
            self.waiting.of_gateway(gateway_id), refusals.unknown_session(gateway_id), now
        )
        swept = self.leases.sweep_gateway(gateway_id)
        for lease in swept:
            self._model(lease).queue.fail(lease.request_id, _SWEPT)
        self._settle(swept)
        return effects + Effects(cancels=self._cancels(swept), swept=swept)

    def start(self, now: float) -> Effects:
        """Starts who can start, of all models."""
        return Effects(grants=tuple(g for model in self._models for g in self._start(model, now)))

    def expire(self, now: float) -> Effects:
        """Refuses who has waited long enough, writes off what was not ended in time, and starts who can start then."""
        refused: list[Refusal] = []
        written_off: list[Lease] = []
        for model in self._models:
            expired = model.queue.expire(now)
            for request_id in expired.not_started:
                want = self.waiting.remove(request_id)
                error = refusals.queue_timeout(model, now - want.arrived_at)
                refused.append(Refusal(request_id, error))
            written_off += (self._write_off(request_id) for request_id in expired.written_off)
        ended = Effects(refusals=tuple(refused), written_off=tuple(written_off))
        return ended + self.start(now)

    def drain(self, now: float) -> Effects:
        """Refuses all who wait."""
        return self._refuse(self.waiting, refusals.draining(), now)

    # --- how -----------------------------------------------------------------------------------------------------

    def _start(self, model: ModelRecord, now: float) -> tuple[Grant, ...]:
        if not model.queue.queued_count:
            return ()
        return tuple(self._grant(model, key, now) for key in model.queue.start_available(now))

    def _grant(self, model: ModelRecord, request_id: str, now: float) -> Grant:
        want = self.waiting.remove(request_id)
        # Those that `start_available` has just started are counted in flight already, this one included.
        engine = model.policy.choose(want, model.queue.in_flight_count / model.slots)
        lease = Lease(
            want.lease_id,
            request_id,
            want.model,
            engine.engine_id,
            want.gateway_id,
            granted_at=now,
            arrived_at=want.arrived_at,
            priority=want.priority,
            tenant=want.tenant,
        )
        self.leases.grant(lease)
        self._grants += 1
        engine.last_grant = self._grants
        model.settle(engine, engine.held + 1)
        return Grant(lease, engine.address)

    def _settle(self, leases: Iterable[Lease]) -> None:
        """Counts the places of leases that have ended on live engines as free."""
        for lease in leases:
            self._cancelling.discard(lease.engine_id, lease.lease_id)
            engine = self._engine(lease)
            self._model(lease).settle(engine, self.leases.on_engine(lease.engine_id))

    def _ask_to_end(self, lease: Lease, now: float) -> None:
        queue = self._model(lease).queue
        if isinstance(queue.state(lease.request_id), InFlight):
            queue.cancel(lease.request_id, _ASKED, now)
            self._cancelling.add(lease.engine_id, lease.lease_id, lease)

    def _write_off(self, request_id: str) -> Lease:
        lease = self.leases.of_request(request_id)
        assert lease is not None  # It was in flight until now.
        self.leases.release(lease.lease_id)
        self._engine(lease).written_off += 1
        self._settle([lease])
        return lease

    def _refuse(self, wants: Iterable[Want], error: CaravanError, now: float) -> Effects:
        refused = []
        for want in wants:
            self._leave_queue(want, now)
            refused.append(Refusal(want.request_id, error))
        return Effects(refusals=tuple(refused))

    def _leave_queue(self, want: Want, now: float) -> None:
        self.waiting.remove(want.request_id)
        model = self._models.find(want.model)
        assert model is not None  # A model is not forgotten while requests wait for it.
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
        model = self._models.find(lease.model)
        assert model is not None  # It is there while it has engines, and a lease's engine is live.
        return model

    def check_integrity(self) -> None:
        """Asserts that queues, leases, waiting requests and sums agree, and that nobody waits beside room. O(n), for tests."""
        self.leases.check_integrity()
        self.waiting.check_integrity()
        for model in self._models:
            model.queue.check_integrity()
            assert model.queue.in_flight_count == self.leases.of_model(model.name)
            assert model.queue.boundary.max_in_flight == model.slots
            ready = [engine for engine in model.engines.values() if engine.is_ready]
            assert model.ready_engines == len(ready)
            free = sum(max(0, engine.capacity - engine.held) for engine in ready)
            assert model.queue.room == free, (model.queue.room, free)
            assert free == 0 or model.queue.queued_count == 0, model.name
            for engine in model.engines.values():
                assert engine.held == self.leases.on_engine(engine.engine_id)
        assert len(self.waiting) == sum(model.queue.queued_count for model in self._models)
        for engine_id in self._cancelling.counts():
            for lease in self._cancelling.items(engine_id):
                assert self.leases.find(lease.lease_id) is lease
                assert lease.engine_id == engine_id


def _cancelled() -> CaravanError:
    return CaravanError("CANCELLED", "The request was cancelled.")
