"""The state against a naive model of it: lists, recounts, no indexes (tests/support/coordinator_model.py)."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from services.coordinator.deployment import (
    CapacityPolicy,
    Deployment,
    Fallback,
    FallbackReason,
    Serving,
)
from services.coordinator.effects import CancelRequest, Effects
from services.coordinator.leases import Ended
from services.coordinator.waiting import Want
from tests.support.coordinator_machine import (
    GATEWAYS,
    LIMITS,
    MODELS,
    SessionsMachine,
)
from tests.support.coordinator_model import Asked, Held
from tests.support.refusals import attempt

LIVES = st.sampled_from(["engine-0-a", "engine-0-a", "engine-0-b", "engine-1-a", "engine-2-a"])
REQUESTS = st.sampled_from([f"req-{i}" for i in range(8)])
REASONS = st.sampled_from(list(FallbackReason))
FALLBACKS = st.lists(
    st.builds(Fallback, MODELS, st.frozensets(REASONS, min_size=1)), max_size=2
).map(tuple)
SERVING = st.builds(
    Serving,
    max_concurrent=st.integers(0, 3),
    max_queued=st.sampled_from([None, 0, 1, 4]),
    max_wait_s=st.sampled_from([None, 0, 2, 9]),
    on_capacity_exhausted=st.sampled_from(CapacityPolicy),
)


class StateMachine(SessionsMachine):
    """Does the same to both; after each step all counts are equal to a recount."""

    @initialize()
    def start(self) -> None:
        """Most runs would otherwise end before a request falls back."""
        self.begin()
        moving = Serving(on_capacity_exhausted=CapacityPolicy.FALLBACK)
        self.set_rules("demo", moving, (Fallback("other"),), idempotent=True, remove=False)

    # --- requests ------------------------------------------------------------------------------------------------

    @rule(
        request_id=REQUESTS,
        gateway_id=GATEWAYS,
        model=MODELS,
        wait_s=st.sampled_from([0, 1, 3, 9, 9]),
        avoid=st.sampled_from([frozenset[str]()] * 3) | st.frozensets(LIVES, max_size=2),
        resumed=st.booleans(),
        may_fall_back=st.booleans(),
        failed=st.sampled_from([{}] * 4 + [{"demo": reason} for reason in FallbackReason]),
    )
    def route(
        self,
        request_id: str,
        gateway_id: str,
        model: str,
        wait_s: float,
        avoid: frozenset[str],
        resumed: bool,
        may_fall_back: bool,
        failed: dict[str, FallbackReason],
    ) -> None:
        asked = Asked(model, wait_s, avoid, resumed, may_fall_back, failed)
        expected, taker = self.model.refusal(request_id, gateway_id, asked), self.model.taker(asked)
        lease_id, now = self.ids("lease"), self.clock.monotonic()
        want = Want(
            request_id,
            gateway_id,
            model,
            lease_id,
            now,
            wait_s,
            avoid=avoid,
            resumed=resumed,
            may_fall_back=may_fall_back,
            failed=failed,
        )
        grant, reason = attempt(lambda: self.state.route(want))
        assert reason == expected
        if self.state.models.find(model) is not None and model not in self.model.known:
            self.model.known.add(model)
            self.model.removed.add(model)
        if reason is not None:
            return
        assert taker is not None
        start_by = now + self.model.wait_s(taker, asked)
        request = Held(lease_id, request_id, "", gateway_id, taker, avoid=avoid, resumed=resumed)
        request.arrived_at = now
        if grant is not None:
            assert grant.lease.model == taker
            assert grant.idempotent == getattr(self.model.rules.get(taker), "idempotent", True)
            self.take_grant(request, grant.lease.engine_id)
        else:
            assert not self.model.routable(taker, avoid)
            request.start_by = start_by
            self.model.waiting.append(request)

    @rule(
        count=st.integers(1, 5),
        model=MODELS,
        avoid=st.sampled_from([frozenset[str]()] * 2) | st.frozensets(LIVES, max_size=2),
        may_fall_back=st.booleans(),
    )
    def crowd(self, count: int, model: str, avoid: frozenset[str], may_fall_back: bool) -> None:
        """Several requests at once, so that engines fill and queues grow."""
        gateways = [g.peer_id for g in self.model.gateways]
        busy = [h.request_id for h in (*self.model.held, *self.model.waiting)]
        for number in [n for n in range(12) if f"req-{n}" not in busy][:count]:
            if gateways:
                gateway_id = gateways[number % len(gateways)]
                resumed = bool(avoid) and number % 2 == 0
                self.route(f"req-{number}", gateway_id, model, 9, avoid, resumed, may_fall_back, {})

    @rule(model=MODELS, halves=st.integers(1, 7))
    def lose_all(self, model: str, halves: int) -> None:
        """A request has lost all engines that there are, and time passes."""
        lives = frozenset(e.life for e in self.model.engines if e.model == model)
        gateways = [g.peer_id for g in self.model.gateways]
        busy = [h.request_id for h in (*self.model.held, *self.model.waiting)]
        if gateways and "req-0" not in busy:
            self.route("req-0", gateways[0], model, 9, lives, True, False, {})  # noqa: FBT003
            self.pass_time(halves, heard=True)

    @rule(
        name=MODELS,
        serving=SERVING,
        fallback=FALLBACKS,
        idempotent=st.booleans(),
        remove=st.sampled_from([False, False, True]),
    )
    def set_rules(
        self,
        name: str,
        serving: Serving,
        fallback: tuple[Fallback, ...],
        idempotent: bool,
        remove: bool,
    ) -> None:
        rules = Deployment(name, "m", serving=serving, fallback=fallback, idempotent=idempotent)
        now = self.clock.monotonic()
        effects = self.state.set_rules(name, None if remove else rules, now, 0.0)
        if not remove:
            self.model.rules[name] = rules
            self.model.known.add(name)
            self.model.removed.discard(name)
        elif self.model.rules.pop(name, None) is not None:
            self.model.removed.add(name)
            self.model.forget(name)
        self.take_grants(effects)

    @rule(data=st.data(), ended=st.sampled_from(Ended))
    def release(self, data: st.DataObject, ended: Ended) -> None:
        """Any lease that was ever granted, or never."""
        lease_id = data.draw(st.sampled_from(["lease-0", *(h.lease_id for h in self.history)]))
        held = [h for h in self.model.held if h.lease_id == lease_id]
        model = self.model
        aside = [a for a in (*model.claimed, *model.orphaned) if a.lease_id == lease_id]
        effects = self.state.release(lease_id, self.clock.monotonic(), ended)
        assert (effects is not None) == bool(held or aside)
        model.held = [h for h in model.held if h not in held]
        model.claimed = [c for c in model.claimed if c.lease_id != lease_id]
        model.orphaned = [o for o in model.orphaned if o.lease_id != lease_id]
        model.note_released(lease_id, self.clock.now)
        for lease in held:
            engine = self.model.engine(lease.engine_id)
            if engine is not None and ended is not Ended.UNTOLD:
                engine.suspect = ended is Ended.BADLY
        if effects is not None:
            self.take_grants(effects)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """The call of a request that waits ends."""
        if not self.model.waiting:
            return
        request = data.draw(st.sampled_from(self.model.waiting))
        want = self.state.waiting.of_request(request.request_id)
        assert want is not None
        assert self.state.leave(want, self.clock.monotonic()) == Effects()
        self.model.waiting.remove(request)

    @rule(request_id=REQUESTS)
    def cancel(self, request_id: str) -> None:
        held = next((h for h in self.model.held if h.request_id == request_id), None)
        waiting = next((w for w in self.model.waiting if w.request_id == request_id), None)
        claimed = next((c for c in self.model.claimed if c.request_id == request_id), None)
        effects, reason = attempt(lambda: self.state.cancel(request_id, self.clock.monotonic()))
        assert reason == (None if held or waiting or claimed else "REQUEST_NOT_FOUND")
        if claimed is not None and not held and not waiting:
            claimed.asked_to_end = True
            return
        if waiting is not None:
            assert effects is not None
            assert [r.error.reason for r in effects.refusals] == ["CANCELLED"]
            self.model.waiting.remove(waiting)
        if held is not None:
            held.stop_by = min(held.stop_by, self.clock.now + LIMITS.cancel_budget_s)
            engine = self.model.engine(held.engine_id)
            assert engine is not None
            assert effects == Effects(cancels=(CancelRequest(engine.session, request_id),))

    @invariant()
    def counts_are_a_recount(self) -> None:
        if not hasattr(self, "state"):
            return
        self.state.check_integrity()
        leases, model = self.state.leases, self.model
        assert [(lease.lease_id, lease.gateway_id) for lease in leases] == [
            (h.lease_id, h.gateway_id) for h in model.held
        ]
        assert [w.lease_id for w in self.state.waiting] == [w.lease_id for w in model.waiting]
        for engine in model.engines:
            assert leases.on_engine(engine.peer_id) == model.count(engine)
        assert {e.engine_id for e in self.state.engines} == {e.peer_id for e in model.engines}
        assert {g.gateway_id for g in self.state.gateways} == {g.peer_id for g in model.gateways}
        assert {m.name for m in self.state.models} == model.known


TestStateMachine = StateMachine.TestCase
TestStateMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
