"""The coordinator's decisions: sessions of engines and gateways, and what becomes of requests when they come and go.

Pure: the time (monotonic seconds), the wall time and ids are arguments, and what has to be done outside comes back as
`Effects`. A session is a number that is never used twice, so the late end of a replaced stream cannot end its successor.
Whatever ends a session - its stream, silence, a successor - sweeps what belongs to it (I6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator import refusals
from services.coordinator.admission import Admission
from services.coordinator.backpressure import Backpressure
from services.coordinator.budgets import Budgets
from services.coordinator.costs import Costs
from services.coordinator.deployment import Deployment
from services.coordinator.deployments import Deployments
from services.coordinator.drain_orders import DrainOrders
from services.coordinator.effects import (
    NOTHING,
    DrainEngine,
    Effects,
    Ending,
    EndSession,
    Grant,
    UndrainEngine,
)
from services.coordinator.engines import EngineRecord, EngineRegistry
from services.coordinator.gateways import GatewayRegistry
from services.coordinator.integrity import check_admission
from services.coordinator.leases import Ended, Lease
from services.coordinator.limits import SILENT_INTERVALS_MAX, Limits
from services.coordinator.models import ModelCatalogue
from services.coordinator.rate_limits import RateLimits
from services.coordinator.relearning import Relearning
from services.coordinator.routing import LeastLoaded, Policy
from services.coordinator.spend_ledger import SpendLedger
from services.coordinator.tasks import Priority
from services.coordinator.waiting import Want
from services.runtime.errors import CaravanError


class CoordinatorState:
    """Everything that the coordinator knows."""

    def __init__(
        self,
        limits: Limits,
        new_policy: Callable[[], Policy] = LeastLoaded,
        learning_until: float = -math.inf,
        ledger: SpendLedger | None = None,
    ) -> None:
        """Until `learning_until`, in monotonic seconds, requests of models without engines wait for these to join.

        `ledger` is what was spent before; None: nothing.
        """
        self.limits = limits
        self.engines = EngineRegistry(limits.leases_per_engine_max)
        self.gateways = GatewayRegistry()
        self.models = ModelCatalogue(
            limits.model_memory_s,
            lambda: Backpressure(limits.boundary(), limits.tenant_weights),
            new_policy,
        )
        ledger = SpendLedger() if ledger is None else ledger
        budgets = Budgets(ledger)
        self._admission = Admission(limits, self.engines, self.models, budgets, learning_until)
        self.costs = Costs(ledger, budgets, self.models, self._admission)
        self.deployments = Deployments(self._admission, self.engines, self._retire)
        self._relearning = Relearning(limits, self.engines, self._admission)
        self.rates = RateLimits(limits, learning_until)
        self.leases = self._admission.leases
        self.waiting = self._admission.waiting
        self.draining = False
        self._drain_orders = DrainOrders()
        self._sessions = 0
        self._expired_at: float | None = None

    # --- engines -------------------------------------------------------------------------------------------------

    def join_engine(
        self,
        engine_id: str,
        address: str,
        model: engine_pb.ModelInfo,
        load: engine_pb.EngineLoad,
        *,
        now: float,
        wall: float,
        incarnation: str = "",
        revision: str = "",
    ) -> tuple[int, Effects]:
        """Registers an engine; returns its session. Its session before, if any, ends; the same life of it stays drained.

        Raises CaravanError: DRAINING, or CAPACITY_EXHAUSTED where `engines_max` have joined.
        """
        self._refuse_while_draining()
        before = self.engines.find(engine_id)
        if before is None and len(self.engines) >= self.limits.engines_max:
            raise refusals.table_full("engines", self.limits.engines_max)
        effects = NOTHING
        if before is not None:
            effects = self._end_engine(before.session, now)
            effects += Effects(endings=(EndSession(before.session, engine_id, Ending.REPLACED),))
        session = self._next_session()
        record = self.engines.add(
            engine_id,
            session,
            address,
            model,
            load,
            incarnation=incarnation,
            revision=revision,
            now=now,
        )
        if before is not None and before.incarnation == incarnation:
            record.is_drained = before.is_drained
        effects += self._drain_orders.repeat(record, now)
        self.rates.joined(record)
        self.models.add_engine(record, wall)
        effects += self._relearning.engine_joined(record, now)
        # First who must not go there and whether it is held back, then whether it gets what waits.
        self._admission.keep_from(record)
        effects += self.deployments.engine_changed(record, now)
        effects += self._admission.engine_changed(record, now)
        # The session before may have served another model, whose rules let others run now.
        return session, effects + (NOTHING if before is None else self._admission.start(now))

    def report_engine(
        self,
        session: int,
        model: engine_pb.ModelInfo | None,
        load: engine_pb.EngineLoad,
        now: float,
        requests: Sequence[engine_pb.InflightRequest] = (),
        *,
        spend: Sequence[pb.SpendCounter] = (),
        limits: Sequence[pb.LimitCounter] = (),
    ) -> Effects:
        """Takes a report; asks again to end what was cancelled and is still leased, and starts who can run now.

        Raises CaravanError: SESSION_UNKNOWN; INVALID_VALUE where the name of the model changed.
        """
        record = self.engines.of_session(session)
        if record is None:
            raise refusals.unknown_session(f"engine session {session}")
        if model is not None and model.name != record.model.name:
            raise CaravanError(
                "INVALID_VALUE",
                f"The model's name changed from '{record.model.name}' to '{model.name}' within a session.",
                param="report.model.name",
            )
        self.engines.report(record, model, load, requests, now)
        # First what it has cost: who waits may not start where the budget is spent.
        effects = self.costs.report(record, spend, now)
        effects += self.rates.report(record, limits, now)
        effects += self._admission.cancels_again(record)
        effects += self.deployments.engine_changed(record, now)
        return effects + self._admission.engine_changed(record, now)

    def drain_engine(self, engine_id: str, grace_s: float, stop: bool, now: float) -> Effects:
        """Takes an engine out of service; what still runs on it after `grace_s` seconds moves, and then it may have to `stop`.

        Raises CaravanError: ENGINE_NOT_FOUND.
        """
        record = self._engine(engine_id)
        self._drain_orders.drained(record, now + grace_s, stop)
        effects = self._drain(record, grace_s, stop, now)
        return effects + self.deployments.engine_changed(record, now)

    def undrain_engine(self, engine_id: str, now: float) -> Effects:
        """Puts an engine back into service. Raises CaravanError: ENGINE_NOT_FOUND."""
        record = self._engine(engine_id)
        self._drain_orders.undrained(record)
        record.is_drained = False
        changed = self.deployments.engine_changed(record, now)
        changed += self._admission.engine_changed(record, now)
        return changed + Effects(undrains=(UndrainEngine(record.session),))

    def _retire(self, engine: EngineRecord, now: float) -> Effects:
        """An engine that its deployment needs no more ends when what runs on it has ended."""
        return self._drain(engine, self.limits.rollout_grace_s, stop=True, now=now)

    def _drain(self, engine: EngineRecord, grace_s: float, stop: bool, now: float) -> Effects:
        engine.is_drained = True
        changed = self._admission.engine_changed(engine, now)
        return changed + Effects(drains=(DrainEngine(engine.session, grace_s, stop),))

    def hold_back(self, engine: EngineRecord, held_back: bool, now: float) -> Effects:
        """See Admission."""
        return self._admission.hold_back(engine, held_back, now)

    def _engine(self, engine_id: str) -> EngineRecord:
        record = self.engines.find(engine_id)
        if record is None:
            raise refusals.unknown_engine(engine_id)
        return record

    def _end_engine(self, session: int, now: float) -> Effects:
        record = self.engines.remove(session)
        if record is None:
            return NOTHING
        self.rates.left(record, now)
        effects = self._admission.engine_gone(record, now)
        self._relearning.engine_gone(effects.swept, now)
        return effects + self.deployments.engine_gone(record, now)

    # --- gateways ------------------------------------------------------------------------------------------------

    def join_gateway(
        self, gateway_id: str, now: float, held: Sequence[Lease] = ()
    ) -> tuple[int, Effects]:
        """Registers a gateway; returns its session. Its session before, if any, ends. `held` are leases that it has.

        Raises CaravanError: DRAINING, or CAPACITY_EXHAUSTED where `gateways_max` have joined.
        """
        self._refuse_while_draining()
        before = self.gateways.find(gateway_id)
        if before is None and len(self.gateways) >= self.limits.gateways_max:
            raise refusals.table_full("gateways", self.limits.gateways_max)
        effects = NOTHING
        if before is not None:
            effects = self._end_gateway(before.session, now) + self._admission.start(now)
            effects += Effects(endings=(EndSession(before.session, gateway_id, Ending.REPLACED),))
        session = self._next_session()
        self.gateways.add(gateway_id, session, now)
        return session, effects + self._relearning.claim(held, now)

    def hear_gateway(self, session: int, now: float) -> None:
        """Takes a heartbeat. Raises CaravanError: SESSION_UNKNOWN."""
        record = self.gateways.of_session(session)
        if record is None:
            raise refusals.unknown_session(f"gateway session {session}")
        record.heard_at = now

    def _end_gateway(self, session: int, now: float) -> Effects:
        record = self.gateways.remove(session)
        if record is None:
            return NOTHING
        effects = self._admission.gateway_gone(record.gateway_id, now)
        return effects + self._relearning.gateway_gone(record.gateway_id, effects.swept, now)

    # --- sessions ------------------------------------------------------------------------------------------------

    def end_session(self, session: int, now: float) -> Effects:
        """The stream of a session ended: sweeps what belongs to it. Nothing where the session is over already."""
        effects = self._end_engine(session, now) + self._end_gateway(session, now)
        return effects + self._admission.start(now)

    def expire(self, now: float) -> Effects:
        """Ends the sessions of silent peers, refuses who has waited too long, and forgets old models.

        To be called at least once per interval.

        Where the last call is longer ago than an interval, it was this process that stood still: what its peers said
        meanwhile still waits in the sockets, so nobody is judged until the next call.
        """
        last, self._expired_at = self._expired_at, now
        effects = NOTHING
        if last is None or now - last <= self.limits.interval_s:
            effects = self._end_silent(now - SILENT_INTERVALS_MAX * self.limits.interval_s, now)
            self.models.expire(now)
            effects += self._relearning.expire(now)
            effects += self.costs.expire(now)
            self.rates.expire(now)
        return effects + self._admission.expire(now)

    def _end_silent(self, then: float, now: float) -> Effects:
        effects = NOTHING
        for engine in self.engines.silent_since(then):
            effects += self._end_engine(engine.session, now)
            effects += _ending(engine.session, engine.engine_id, Ending.SILENT)
        for gateway in self.gateways.silent_since(then):
            effects += self._end_gateway(gateway.session, now)
            effects += _ending(gateway.session, gateway.gateway_id, Ending.SILENT)
        return effects

    def expire_waiting(self, now: float) -> Effects:
        """Refuses who has waited too long, and writes off what was not ended in time; to be called when either is due."""
        return self._admission.expire(now)

    def drain(self, now: float) -> Effects:
        """Takes no new work, refuses who waits, and ends all sessions. Running requests go on: nothing is cancelled (S0.7)."""
        self.draining = True
        effects = self._admission.drain(now)
        for engine in self.engines:
            self._end_engine(engine.session, now)
            effects += _ending(engine.session, engine.engine_id, Ending.DRAINING)
        for gateway in self.gateways:
            self._end_gateway(gateway.session, now)
            effects += _ending(gateway.session, gateway.gateway_id, Ending.DRAINING)
        return effects

    # --- requests ------------------------------------------------------------------------------------------------

    def route(self, want: Want) -> Grant | None:
        """Grants a lease; None where the request waits for one, which comes as an effect later.

        Raises CaravanError: DRAINING, SESSION_UNKNOWN, DUPLICATE_REQUEST, MODEL_NOT_FOUND, NO_ENGINE, MODEL_LOADING,
        CAPACITY_EXHAUSTED.
        """
        self._refuse_while_draining()
        if self.gateways.find(want.gateway_id) is None:
            raise refusals.unknown_session(want.gateway_id)
        return self._admission.route(self.deployments.admit(want))

    def set_rules(self, name: str, rules: Deployment | None, now: float, wall: float) -> Effects:
        """See Admission."""
        return self._admission.set_rules(name, rules, now, wall)

    def default_wait_s(self, model: str) -> float:
        """How long a request of a model waits that does not say, in seconds."""
        rules = self._rules(model)
        most = None if rules is None else rules.serving.max_wait_s
        return self.limits.queue_s if most is None else most

    def default_priority(self, model: str) -> Priority:
        """The priority of a request of a model that does not say."""
        rules = self._rules(model)
        return Priority.NORMAL if rules is None else rules.priority

    def _rules(self, model: str) -> Deployment | None:
        record = self.models.find(model)
        return None if record is None else record.rules

    def release(
        self, lease_id: str, now: float, ended: Ended = Ended.UNTOLD, finish_key: bytes = b""
    ) -> Effects | None:
        """Ends a lease; None where it was not held. See Admission. O(log) of engines and requests."""
        effects = self._admission.release(lease_id, now, ended, finish_key)
        was_aside = self._relearning.release(lease_id, now)
        return NOTHING if effects is None and was_aside else effects

    def leave(self, want: Want, now: float) -> Effects:
        """The call that asked is over without an answer: the request leaves the queue, or its lease is given back."""
        return self._admission.leave(want, now)

    def cancel(self, request_id: str, now: float) -> Effects:
        """Ends a request: it waits no more, or its engine is told. Raises CaravanError: REQUEST_NOT_FOUND."""
        is_known = self.leases.of_request(request_id) or self.waiting.of_request(request_id)
        if not is_known and self._relearning.cancel(request_id):
            return NOTHING
        return self._admission.cancel(request_id, now)

    def cancel_tenant(self, tenant: str, now: float) -> tuple[int, Effects]:
        """Ends all requests of a tenant; returns how many there were."""
        return self._admission.cancel_tenant(tenant, now)

    def is_cancelling(self, lease: Lease) -> bool:
        """Whether the engine of the lease was asked to end its request."""
        return self._admission.is_cancelling(lease)

    def _next_session(self) -> int:
        self._sessions += 1
        return self._sessions

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise refusals.draining()

    def check_integrity(self) -> None:
        """Asserts that every request belongs to live sessions and every bound holds (I4, I6). O(n), for tests."""
        check_admission(self._admission, self.models)
        self.deployments.check_integrity()
        self.rates.check_integrity()
        for lease in self.leases:
            assert self.engines.find(lease.engine_id) is not None, lease
            assert self.gateways.find(lease.gateway_id) is not None, lease
            assert self.models.find(lease.model) is not None, lease
        for want in self.waiting:
            assert self.gateways.find(want.gateway_id) is not None, want
            assert self.leases.of_request(want.request_id) is None, want
        assert len(self.leases) + len(self.waiting) <= self.limits.known_max
        assert len(self._relearning.claimed) <= self.limits.leases_max
        assert len(self._relearning.orphaned) <= self.limits.leases_max
        assert len(self.engines) <= self.limits.engines_max
        assert len(self.gateways) <= self.limits.gateways_max


def _ending(session: int, peer_id: str, why: Ending) -> Effects:
    return Effects(endings=(EndSession(session, peer_id, why),))
