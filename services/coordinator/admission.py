"""Who gets a lease, who waits for one, and who is told why not (S4, W55, W60, W61).

Pure. Each model has a queue whose tasks in flight are the leases of the model; whatever frees a place starts those whose turn
it is in the same call, so nothing waits for a model beside an engine that could serve it.
"""

from __future__ import annotations

import dataclasses
import math

from services.coordinator import refusals
from services.coordinator.budgets import Budgets
from services.coordinator.deployment import Deployment
from services.coordinator.effects import NOTHING, Effects, Grant, Refusal
from services.coordinator.engines import EngineRecord, EngineRegistry
from services.coordinator.fallback import Placement
from services.coordinator.grants import Grants
from services.coordinator.leases import Ended, Lease
from services.coordinator.limits import Limits
from services.coordinator.models import ModelCatalogue, ModelRecord
from services.coordinator.returns import lives_to_return_to
from services.coordinator.waiting import Want
from services.runtime.errors import CaravanError


class Admission(Grants):
    """Decides on the requests that come, and on what becomes of those that are there."""

    def __init__(
        self,
        limits: Limits,
        engines: EngineRegistry,
        models: ModelCatalogue,
        budgets: Budgets,
        learning_until: float = -math.inf,
    ) -> None:
        """`learning_until`: see Placement."""
        super().__init__(limits, engines, models)
        self._placement = Placement(models, limits, budgets, self._of_tenant, learning_until)
        self._learning_until = learning_until

    # --- coming and going ----------------------------------------------------------------------------------------

    def route(self, want: Want) -> Grant | None:
        """Grants a lease; None where the request waits for one. O(log) of engines and requests.

        Raises CaravanError: DUPLICATE_REQUEST, MODEL_NOT_FOUND, NO_ENGINE, MODEL_LOADING, CAPACITY_EXHAUSTED, BUDGET_EXCEEDED.
        """
        self._check_new(want)
        return self._place(want, want.arrived_at)

    def _place(self, want: Want, now: float) -> Grant | None:
        first = self._models.find(want.model)
        if first is None and self._placement.may_expect(want):
            first = self._models.expect(want.model, want.arrived_at)
        if first is None:
            raise refusals.unknown_model(want.model)
        taker = self._placement.taker(want, first, now)
        if taker is None:
            raise self._placement.refusal(want, first, now)
        model = first
        if taker != first.name:
            model, want = self._named(taker), dataclasses.replace(want, model=taker)
        if model.can_grant(want.avoid):
            model.queue.begin(want.request_id, now, priority=want.priority, tenant=want.tenant)
            return self._grant(model, want, now)
        self._wait(model, want)
        return None

    def place_again(self, name: str, tenant: str | None, now: float) -> Effects:
        """Places those that wait for a model anew, of one tenant or all: its budget is spent. O(requests that wait).

        What runs already and waits to go on stays.
        """
        effects = NOTHING
        for want in self.waiting:
            if want.model == name and tenant in {None, want.tenant} and not want.resumed:
                self._leave_queue(want, now)
                try:
                    granted = self._place(want, now)
                except CaravanError as error:
                    effects += Effects(refusals=(Refusal(want.request_id, error),))
                else:
                    effects += Effects(grants=(granted,) if granted else ())
        return effects

    def _of_tenant(self, name: str, tenant: str) -> int:
        """Requests of a tenant that run on a model or wait for it. O(requests of the tenant)."""
        held = sum(lease.model == name for lease in self.leases.of_tenant(tenant))
        return held + sum(want.model == name for want in self.waiting.of_tenant(tenant))

    def _check_new(self, want: Want) -> None:
        request_id = want.request_id
        if self.leases.of_request(request_id) or self.waiting.of_request(request_id):
            raise CaravanError(
                "DUPLICATE_REQUEST",
                f"A request with the id '{request_id}' is in flight already.",
                request_id=request_id,
            )
        most = self._limits.known_max if want.resumed else self._limits.leases_max
        if len(self.leases) + len(self.waiting) >= most:
            raise refusals.table_full("requests in flight", most)

    def _wait(self, model: ModelRecord, want: Want) -> None:
        wait_s = self._placement.longest_wait(model, want)
        model.queue.enqueue(
            want.request_id,
            want.arrived_at,
            priority=want.priority,
            tenant=want.tenant,
            start_by=want.arrived_at + wait_s,
            in_turn=not want.had_its_turn,
        )
        if want.had_its_turn:
            model.ahead.add(want.request_id, want.avoid)
        self.waiting.add(dataclasses.replace(want, wait_s=wait_s))

    def release(
        self, lease_id: str, now: float, ended: Ended = Ended.UNTOLD, finish_key: bytes = b""
    ) -> Effects | None:
        """Ends a lease and starts who waited for its place; None where it was not held.

        An engine on which a request failed is a suspect until one finishes. `finish_key` names the KV state that is left.
        """
        lease = self.leases.release(lease_id)
        if lease is None:
            return None
        model, engine = self._model(lease), self._engine(lease)
        model.note_lease(now - lease.granted_at)
        model.queue.succeed(lease.request_id)
        if ended is not Ended.UNTOLD:
            engine.is_suspect = ended is Ended.BADLY
        if finish_key:
            model.choice.note_finish(lease.affinity, finish_key)
        self._settle([lease])
        return Effects(grants=self._start(model, now))

    def leave(self, want: Want, now: float) -> Effects:
        """The call that asked is over: it waits no more, and a grant that it did not take is given back (W61)."""
        waiting = self.waiting.of_request(want.request_id)
        if waiting is not None and waiting.lease_id == want.lease_id:
            self._leave_queue(waiting, now)
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

    def cancels_again(self, engine: EngineRecord) -> Effects:
        """The cancels of requests that an engine still holds: the first may have outrun its request."""
        return Effects(cancels=self._cancels(self.cancelling.items(engine.engine_id)))

    # --- what becomes of engines, gateways and time --------------------------------------------------------------

    def engine_changed(self, engine: EngineRecord, now: float) -> Effects:
        """An engine has joined, or its capacity or readiness may have changed."""
        model = self._named(engine.model.name)
        model.settle(engine, self.leases.on_engine(engine.engine_id))
        return Effects(grants=self._start(model, now))

    def engine_gone(self, engine: EngineRecord, now: float) -> Effects:
        """The session of an engine, which has left the registry, is over."""
        swept = self._swept(self.leases.sweep_engine(engine.engine_id))
        self._models.remove_engine(engine, now)
        return Effects(swept=swept)

    def gateway_gone(self, gateway_id: str, now: float) -> Effects:
        """The session of a gateway is over: its requests wait no more, and its leases end. Starts nobody: see `start`."""
        effects = self._refuse(
            self.waiting.of_gateway(gateway_id), refusals.unknown_session(gateway_id), now
        )
        swept = self._swept(self.leases.sweep_gateway(gateway_id))
        self._settle(swept)
        return effects + Effects(swept=swept)

    def expire(self, now: float) -> Effects:
        """Refuses who has waited long enough, writes off what was not ended in time, and starts who can start then."""
        refused: list[Refusal] = []
        written_off: list[Lease] = []
        learned = self._end_learning(now)
        for model in self._models:
            expired = model.queue.expire(now)
            for request_id in expired.not_started:
                want = self._stop_waiting(model, request_id)
                error = refusals.queue_timeout(model, now - want.arrived_at)
                refused.append(Refusal(request_id, error))
            written_off += (self._write_off(request_id) for request_id in expired.written_off)
            self._let_return(model, now)
            self._models.forget_passing(model)
        ended = Effects(refusals=tuple(refused), written_off=tuple(written_off))
        return learned + ended + self.start(now)

    def _let_return(self, model: ModelRecord, now: float) -> None:
        """Lets requests go back to engines that lost them, where there is no other. O(engines and requests that wait ahead)."""
        if not len(model.ahead):
            return
        ready = [engine for engine in model.engines.values() if engine.is_ready]
        for request_id in model.ahead.everybody():
            want = self.waiting.of_request(request_id)
            assert want is not None  # It waits for as long as it is in the line.
            lives = lives_to_return_to(want, ready, now, self._limits.return_s)
            if lives:
                self._avoid(model, want, want.avoid - lives)

    def _end_learning(self, now: float) -> Effects:
        """The engines that there are have joined: who waits for another is told that there is none."""
        if now < self._learning_until or self._learning_until == -math.inf:
            return NOTHING
        self._learning_until = -math.inf
        effects = NOTHING
        for want in self.waiting:
            model = self._named(want.model)
            if not want.resumed and not model.ready_engines:
                unknown = model.rules is None and not model.engines
                error = refusals.unknown_model(model.name) if unknown else refusals.refusal(model)
                effects += self._refuse([want], error, now)
        return effects

    def drain(self, now: float) -> Effects:
        """Refuses all who wait."""
        return self._refuse(self.waiting, refusals.draining(), now)

    # --- what an operator says -----------------------------------------------------------------------------------

    def set_rules(self, name: str, rules: Deployment | None, now: float, wall: float) -> Effects:
        """Gives a model rules, also before it has an engine: its requests wait or get NO_ENGINE instead of MODEL_NOT_FOUND.

        Without rules it goes back to the defaults, and is forgotten when it has no engines and nobody waits.
        """
        most = None if rules is None else rules.serving.max_queued
        max_queued = self._limits.queued_max if most is None else most
        model = self._models.set_rules(name, rules, max_queued, now=now, wall=wall)
        return NOTHING if model is None else Effects(grants=self._start(model, now))

    def keep_from(self, engine: EngineRecord) -> None:
        """Keeps those that wait from an engine that has just joined and cannot go on with their answers. O(requests that wait)."""
        model = self._named(engine.model.name)
        for want in self.waiting:
            others = want.revisions and engine.revision not in want.revisions
            if others and want.model == model.name:
                self._avoid(model, want, want.avoid | {engine.incarnation})

    def _avoid(self, model: ModelRecord, want: Want, avoid: frozenset[str]) -> None:
        model.ahead.change(want.request_id, avoid)
        self.waiting.replace(dataclasses.replace(want, avoid=avoid))

    def refuse_waiting(
        self, name: str, error: CaravanError, now: float, *, only_begun: bool = False
    ) -> Effects:
        """Refuses those that wait for a model, or those of them whose answer has begun. O(requests that wait)."""
        wants = [want for want in self.waiting if want.model == name]
        return self._refuse(
            [want for want in wants if want.has_begun or not only_begun], error, now
        )

    def throttle(self, model: ModelRecord, now: float, *, is_throttled: bool) -> Effects:
        """Halves the places of a model, or gives them back to those that wait."""
        model.throttle(is_throttled=is_throttled)
        return Effects(grants=self._start(model, now))

    def hold_back(self, engine: EngineRecord, held_back: bool, now: float) -> Effects:
        """Keeps an engine out of service, or puts it back: held back it gets no new leases and counts as not ready."""
        engine.is_held_back = held_back
        return self.engine_changed(engine, now)


def _cancelled() -> CaravanError:
    return CaravanError("CANCELLED", "The request was cancelled.")
