"""The state machine of sessions and time, against a naive model; tests/unit/coordinator/test_state_machine.py adds requests."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TypeAlias

from caravan.engine.v1 import engine_service_pb2 as engine_pb
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from services.coordinator.effects import (
    DrainEngine,
    Effects,
    Ending,
    UndrainEngine,
)
from services.coordinator.leases import Lease
from services.coordinator.limits import Limits
from services.coordinator.state import CoordinatorState
from services.runtime.clock import CountingIds, ManualClock
from tests.support.coordinator_model import Held, Model, Peer
from tests.support.refusals import attempt

LIMITS = Limits(
    engines_max=3,
    gateways_max=2,
    leases_max=9,
    leases_per_engine_max=3,
    queued_max=3,
    queue_s=4.0,
    cancel_budget_s=2.0,
    return_s=1.0,
)
NAMES = ("demo", "other", "third")
MODELS = st.sampled_from(["demo"] * 4 + ["other", "third"])
ENGINES = st.sampled_from([f"engine-{i}" for i in range(4)])
GATEWAYS = st.sampled_from(["gateway-0"] * 3 + ["gateway-1", "gateway-2"])
PHASES = st.sampled_from(
    [engine_pb.ENGINE_PHASE_IDLE] * 9 + [p for p in engine_pb.EnginePhase.values() if p > 0]
)
Phase: TypeAlias = engine_pb.EnginePhase.ValueType


class SessionsMachine(RuleBasedStateMachine):
    """Does the same to the state and to the model: engines, gateways, time."""

    def begin(self) -> None:
        """To be called first: two gateways, and engines of two models."""
        self.clock, self.ids = ManualClock(), CountingIds()
        self.state, self.model = CoordinatorState(LIMITS), Model(LIMITS)
        self.history: list[Held] = []
        self.sessions: list[int] = []
        # Most runs of rules would otherwise end before anything is granted.
        for number in range(2):
            self.join_gateway(gateway_id=f"gateway-{number}", picks=[])
            self.join_engine(f"engine-{number}", NAMES[number], 2, engine_pb.ENGINE_PHASE_IDLE, "a")

    # --- what effects do to the model ----------------------------------------------------------------------------

    def sweep(self, peer: Peer, effects: Effects) -> None:
        """Removes a peer and its leases from the model; the effects must say the same."""
        model, is_engine = self.model, peer in self.model.engines
        (model.engines if is_engine else model.gateways).remove(peer)
        gone = [h for h in model.held if peer.peer_id in (h.engine_id, h.gateway_id)]
        model.held = [h for h in model.held if h not in gone]
        assert {lease.lease_id for lease in effects.swept} >= {h.lease_id for h in gone}
        if is_engine:
            model.put_aside(model.claimed, gone, self.clock.now)
            model.forget(peer.model)
            return
        model.claimed = [c for c in model.claimed if c.gateway_id != peer.peer_id]
        early = model.put_aside(model.orphaned, gone, self.clock.now)
        assert {(c.session, c.request_id) for c in effects.cancels} >= model.cancels(early)
        left = [w for w in model.waiting if w.gateway_id == peer.peer_id]
        model.waiting = [w for w in model.waiting if w not in left]
        assert {r.request_id for r in effects.refusals} >= {w.request_id for w in left}

    def take_grants(self, effects: Effects) -> None:
        """Who waited gets what became free: who lost an engine first, the others in the order of arrival."""
        for grant in effects.grants:
            lease = grant.lease
            first = self.model.next_waiting(lease.model)
            assert first is not None
            assert (first.lease_id, first.request_id) == (lease.lease_id, lease.request_id)
            self.model.waiting.remove(first)
            self.take_grant(first, lease.engine_id)

    def take_grant(self, request: Held, engine_id: str) -> None:
        engine = self.model.engine(engine_id)
        assert engine in self.model.best(request.model, request.avoid)
        assert engine is not None
        request.engine_id, request.life = engine_id, engine.life
        self.history.append(copy.copy(request))
        self.model.held.append(request)

    def adopt(self, leases: list[Held], effects: Effects) -> None:
        taken = [lease.lease_id for lease in leases if self.model.adopt(lease, self.clock.now)]
        assert [lease.lease_id for lease in effects.adopted] == taken

    # --- engines and gateways ------------------------------------------------------------------------------------

    @rule(
        engine_id=ENGINES,
        model=MODELS,
        capacity=st.integers(0, 4),
        phase=PHASES,
        life=st.sampled_from("aab"),
    )
    def join_engine(
        self, engine_id: str, model: str, capacity: int, phase: Phase, life: str
    ) -> None:
        before, life = self.model.engine(engine_id), f"{engine_id}-{life}"
        full = before is None and len(self.model.engines) == LIMITS.engines_max
        joined, reason = attempt(
            lambda: self.state.join_engine(
                engine_id,
                "127.0.0.1:7010",
                engine_pb.ModelInfo(name=model, max_sequences=capacity),
                engine_pb.EngineLoad(phase=phase),
                now=self.clock.monotonic(),
                wall=self.clock.wall(),
                incarnation=life,
            )
        )
        assert reason == ("CAPACITY_EXHAUSTED" if full else None)
        if joined is None:
            return
        self.check_told_again(life, joined[0], phase, joined[1])
        self.note_replaced(before, joined[1])
        self.sessions.append(joined[0])
        self.model.known.add(model)
        self.model.removed.discard(model)
        peer = Peer(engine_id, joined[0], self.clock.now, model, min(capacity, 3), phase, life)
        peer.drained = self.model.orders.get(life) is not None
        self.model.engines.append(peer)
        mine = [c for c in self.model.claimed if c.engine_id == engine_id]
        self.model.claimed = [c for c in self.model.claimed if c not in mine]
        self.adopt(mine, joined[1])
        self.take_grants(joined[1])

    @rule(gateway_id=GATEWAYS, picks=st.lists(st.integers(0, 6), max_size=4))
    def join_gateway(self, gateway_id: str, picks: list[int]) -> None:
        """With some of all leases that ever were, by whomever they were held."""
        before = next((g for g in self.model.gateways if g.peer_id == gateway_id), None)
        full = before is None and len(self.model.gateways) == LIMITS.gateways_max
        held = [copy.copy(self.history[-1 - p]) for p in picks if p < len(self.history)]
        for lease in held:
            lease.gateway_id = gateway_id
        leases = [
            Lease(
                h.lease_id, h.request_id, h.model, h.engine_id, gateway_id, 0.0, incarnation=h.life
            )
            for h in held
        ]
        joined, reason = attempt(
            lambda: self.state.join_gateway(gateway_id, self.clock.monotonic(), leases)
        )
        assert reason == ("CAPACITY_EXHAUSTED" if full else None)
        if joined is None:
            return
        self.note_replaced(before, joined[1])
        self.sessions.append(joined[0])
        self.take_grants(joined[1])
        self.model.gateways.append(Peer(gateway_id, joined[0], self.clock.now))
        released = [lease_id for lease_id, _ in self.model.released]
        held = [h for h in held if h.lease_id not in released]
        for lease in held:
            orphan = next((o for o in self.model.orphaned if o.lease_id == lease.lease_id), None)
            lease.asked_to_end = orphan is not None and orphan.asked_to_end
            self.model.orphaned = [o for o in self.model.orphaned if o is not orphan]
        claims = [h for h in held if self.model.engine(h.engine_id) is None]
        self.model.put_aside(self.model.claimed, claims, self.clock.now)
        self.adopt([h for h in held if h not in claims], joined[1])

    def check_told_again(self, life: str, session: int, phase: Phase, effects: Effects) -> None:
        """Whoever joins is told what was last said to this life of it, if that makes a difference."""
        until = self.model.orders.get(life)
        drains: tuple[DrainEngine, ...] = ()
        undrains: tuple[UndrainEngine, ...] = ()
        if until is not None:
            grace_s = max(0.0, until - self.clock.now)
            drains = (DrainEngine(session, grace_s, stop=False),)
        elif life in self.model.orders and phase == engine_pb.ENGINE_PHASE_DRAINING:
            undrains = (UndrainEngine(session),)
        assert (effects.drains, effects.undrains) == (drains, undrains)

    def note_replaced(self, before: Peer | None, effects: Effects) -> None:
        if before is None:
            told = replace(effects, grants=(), adopted=(), drains=(), undrains=())
            assert told == Effects()
            return
        assert [(e.session, e.why) for e in effects.endings] == [(before.session, Ending.REPLACED)]
        self.sweep(before, effects)

    @rule(data=st.data())
    def end_some_session(self, data: st.DataObject) -> None:
        """Any session that ever was: the late end of an old one must change nothing."""
        session = data.draw(st.sampled_from(self.sessions))
        effects = self.state.end_session(session, self.clock.monotonic())
        assert effects.endings == ()
        for peer in [p for p in self.peers() if p.session == session]:
            self.sweep(peer, effects)
        self.take_grants(effects)

    @rule(data=st.data(), phase=PHASES)
    def speak(self, data: st.DataObject, phase: Phase) -> None:
        """A report or a heartbeat in the name of any session that ever was."""
        session, now = data.draw(st.sampled_from(self.sessions)), self.clock.monotonic()
        load = engine_pb.EngineLoad(phase=phase)
        effects, reason = attempt(lambda: self.state.report_engine(session, None, load, now))
        reasons = (reason, attempt(lambda: self.state.hear_gateway(session, now))[1])
        kinds = (self.model.engines, self.model.gateways)
        for peers, reason in zip(kinds, reasons, strict=True):
            peer = next((p for p in peers if p.session == session), None)
            assert reason == (None if peer is not None else "SESSION_UNKNOWN")
            if peer is not None:
                peer.heard_at, peer.phase = now, phase
        if effects is not None:
            self.take_grants(effects)

    @rule(engine_id=ENGINES, how=st.sampled_from(["drain", "undrain", "hold", "let go"]))
    def take_out_of_service(self, engine_id: str, how: str) -> None:
        peer, now = self.model.engine(engine_id), self.clock.monotonic()
        record = self.state.engines.find(engine_id)
        if how == "drain":
            effects, reason = attempt(
                lambda: self.state.drain_engine(engine_id, 5.0, stop=False, now=now)
            )
        elif how == "undrain":
            effects, reason = attempt(lambda: self.state.undrain_engine(engine_id, now))
        else:
            if record is None:
                return
            effects, reason = self.state.hold_back(record, how == "hold", now), None
        assert reason == (None if peer is not None else "ENGINE_NOT_FOUND")
        if peer is None or effects is None:
            return
        if how in {"drain", "undrain"}:
            peer.drained = how == "drain"
            self.model.orders[peer.life] = now + 5.0 if peer.drained else None
        else:
            peer.held_back = how == "hold"
        assert effects.drains == ((DrainEngine(peer.session, 5.0, False),) * (how == "drain"))  # noqa: FBT003
        assert effects.undrains == ((UndrainEngine(peer.session),) * (how == "undrain"))
        self.take_grants(effects)

    # --- time ----------------------------------------------------------------------------------------------------

    @rule(halves=st.integers(1, 7), heard=st.sampled_from([True, True, True, False]))
    def pass_time(self, halves: int, heard: bool) -> None:
        """Half an interval at a time, as the sweeper does, with or without a word of anybody."""
        for _ in range(halves * (3 if heard else 1)):
            self.clock.advance(LIMITS.interval_s / 2)
            for peer in self.peers() if heard else ():
                peer.heard_at = self.clock.now
                self.hear(peer)
            self.expire()

    def hear(self, peer: Peer) -> None:
        if peer in self.model.gateways:
            self.state.hear_gateway(peer.session, self.clock.now)
            return
        load = engine_pb.EngineLoad()
        load.MergeFromString(bytes([0x08, peer.phase]))
        assert not self.state.report_engine(peer.session, None, load, self.clock.now).grants

    def expire(self) -> None:
        effects = self.state.expire(self.clock.monotonic())
        silent = [p for p in self.peers() if self.clock.now - p.heard_at >= 3 * LIMITS.interval_s]
        assert {(e.session, e.why) for e in effects.endings} == {
            (p.session, Ending.SILENT) for p in silent
        }
        for peer in silent:
            self.sweep(peer, effects)
        model = self.model
        late = [o for o in model.orphaned if o.until <= self.clock.now]
        model.orphaned = [o for o in model.orphaned if o not in late]
        model.claimed = [c for c in model.claimed if c.until > self.clock.now]
        model.released = [r for r in model.released if r[1] > self.clock.now]
        assert {(c.session, c.request_id) for c in effects.cancels} >= model.cancels(late)
        self.expire_requests(effects)
        model.let_return(self.clock.now)
        for name in NAMES:
            model.forget(name)
        self.take_grants(effects)
        for name in NAMES:
            first = model.next_waiting(name)
            assert first is None or not model.routable(name, first.avoid)

    def expire_requests(self, effects: Effects) -> None:
        model = self.model
        late = [w for w in model.waiting if w.start_by <= self.clock.now]
        told = {r.request_id: r.error.reason for r in effects.refusals}
        for request in late:
            assert told[request.request_id] in {"QUEUE_TIMEOUT", "NO_ENGINE", "MODEL_LOADING"}
        model.waiting = [w for w in model.waiting if w not in late]
        stuck = [h for h in model.held if h.stop_by <= self.clock.now]
        assert {lease.lease_id for lease in effects.written_off} == {h.lease_id for h in stuck}
        model.held = [h for h in model.held if h not in stuck]
        for engine in model.engines:
            engine.suspect |= engine.peer_id in [h.engine_id for h in stuck]

    def peers(self) -> list[Peer]:
        return [*self.model.engines, *self.model.gateways]
