"""The state against a naive model of it: lists, recounts, no indexes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from caravan.engine.v1 import engine_service_pb2 as engine_pb
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.coordinator.effects import CancelRequest, Effects, Ending
from services.coordinator.engines import READY_PHASES
from services.coordinator.limits import Limits
from services.coordinator.state import CoordinatorState
from services.coordinator.waiting import Want
from services.runtime.clock import CountingIds, ManualClock
from tests.support.refusals import attempt

LIMITS = Limits(
    engines_max=3,
    gateways_max=2,
    leases_max=9,
    leases_per_engine_max=3,
    queued_max=3,
    queue_s=4.0,
    cancel_budget_s=2.0,
)
MODELS = st.sampled_from(["demo", "other"])
ENGINES = st.sampled_from([f"engine-{i}" for i in range(4)])
GATEWAYS = st.sampled_from([f"gateway-{i}" for i in range(3)])
REQUESTS = st.sampled_from([f"req-{i}" for i in range(8)])
PHASES = st.sampled_from(
    [engine_pb.ENGINE_PHASE_IDLE] * 3 + [p for p in engine_pb.EnginePhase.values() if p > 0]
)


Phase: TypeAlias = engine_pb.EnginePhase.ValueType


@dataclass
class Peer:
    """An engine (with a model) or a gateway (without)."""

    peer_id: str
    session: int
    heard_at: float
    model: str = ""
    capacity: int = 0
    phase: int = 0


@dataclass
class Held:
    """A lease, or a request that waits for one and has no engine."""

    lease_id: str
    request_id: str
    engine_id: str
    gateway_id: str
    model: str
    start_by: float = 0.0
    stop_by: float = math.inf


class StateMachine(RuleBasedStateMachine):
    """Does the same to both; after each step all counts are equal to a recount."""

    @initialize()
    def start(self) -> None:
        self.clock, self.ids = ManualClock(), CountingIds()
        self.state = CoordinatorState(LIMITS)
        self.engines: list[Peer] = []
        self.gateways: list[Peer] = []
        self.held: list[Held] = []
        self.waiting: list[Held] = []
        self.granted: list[str] = []
        self.sessions: list[int] = []
        self.known_models: set[str] = set()
        # Most runs of rules would otherwise end before anything is granted.
        self.join_gateway(gateway_id="gateway-0")
        self.join_engine(
            engine_id="engine-0", model="demo", capacity=3, phase=engine_pb.ENGINE_PHASE_IDLE
        )

    def sweep(self, peer: Peer, effects: Effects) -> None:
        """Removes a peer and its leases from the model; the effects must say the same."""
        is_engine = peer in self.engines
        (self.engines if is_engine else self.gateways).remove(peer)
        gone = [h for h in self.held if peer.peer_id in (h.engine_id, h.gateway_id)]
        self.held = [h for h in self.held if h not in gone]
        assert {lease.lease_id for lease in effects.swept} >= {h.lease_id for h in gone}
        cancels = {c.request_id: c.session for c in effects.cancels}
        for lease in gone:
            engine = next((e for e in self.engines if e.peer_id == lease.engine_id), None)
            if engine is not None:
                assert cancels[lease.request_id] == engine.session
        left = [w for w in self.waiting if w.gateway_id == peer.peer_id]
        self.waiting = [w for w in self.waiting if w not in left]
        assert {r.request_id for r in effects.refusals} >= {w.request_id for w in left}

    def take_grants(self, effects: Effects) -> None:
        """Who waited gets what became free, in the order of arrival, on an engine with the least load."""
        for grant in effects.grants:
            lease = grant.lease
            first = next(w for w in self.waiting if w.model == lease.model)
            assert (first.lease_id, first.request_id) == (lease.lease_id, lease.request_id)
            self.waiting.remove(first)
            self.take_grant(first, lease.engine_id)

    def take_grant(self, request: Held, engine_id: str) -> None:
        engine = next(e for e in self.engines if e.peer_id == engine_id)
        assert engine.model == request.model
        assert self.load(engine) == min(self.load(e) for e in self.routable(request.model))
        request.engine_id = engine_id
        self.granted.append(request.lease_id)
        self.held.append(request)

    @rule(engine_id=ENGINES, model=MODELS, capacity=st.integers(0, 4), phase=PHASES)
    def join_engine(self, engine_id: str, model: str, capacity: int, phase: Phase) -> None:
        before = next((e for e in self.engines if e.peer_id == engine_id), None)
        full = before is None and len(self.engines) == LIMITS.engines_max
        joined, reason = attempt(
            lambda: self.state.join_engine(
                engine_id,
                "127.0.0.1:7010",
                engine_pb.ModelInfo(name=model, max_sequences=capacity),
                engine_pb.EngineLoad(phase=phase),
                now=self.clock.monotonic(),
                wall=self.clock.wall(),
            )
        )
        assert reason == ("CAPACITY_EXHAUSTED" if full else None)
        if joined is not None:
            self.note_replaced(before, joined[1])
            self.sessions.append(joined[0])
            self.known_models.add(model)
            peer = Peer(engine_id, joined[0], self.clock.now, model, min(capacity, 3), phase)
            self.engines.append(peer)
            self.take_grants(joined[1])

    @rule(gateway_id=GATEWAYS)
    def join_gateway(self, gateway_id: str) -> None:
        before = next((g for g in self.gateways if g.peer_id == gateway_id), None)
        full = before is None and len(self.gateways) == LIMITS.gateways_max
        joined, reason = attempt(
            lambda: self.state.join_gateway(gateway_id, self.clock.monotonic())
        )
        assert reason == ("CAPACITY_EXHAUSTED" if full else None)
        if joined is not None:
            self.note_replaced(before, joined[1])
            self.sessions.append(joined[0])
            self.gateways.append(Peer(gateway_id, joined[0], self.clock.now))
            self.take_grants(joined[1])

    def note_replaced(self, before: Peer | None, effects: Effects) -> None:
        if before is None:
            assert effects == Effects(grants=effects.grants)
            return
        assert [(e.session, e.why) for e in effects.endings] == [(before.session, Ending.REPLACED)]
        self.sweep(before, effects)

    @rule(data=st.data())
    def end_some_session(self, data: st.DataObject) -> None:
        """Any session that ever was: the late end of an old one must change nothing."""
        if not self.sessions:
            return
        session = data.draw(st.sampled_from(self.sessions))
        effects = self.state.end_session(session, self.clock.monotonic())
        assert effects.endings == ()
        for peer in [p for p in (*self.engines, *self.gateways) if p.session == session]:
            self.sweep(peer, effects)
        self.take_grants(effects)

    @rule(data=st.data(), phase=PHASES)
    def speak(self, data: st.DataObject, phase: Phase) -> None:
        """A report or a heartbeat in the name of any session that ever was."""
        if not self.sessions:
            return
        session, now = data.draw(st.sampled_from(self.sessions)), self.clock.monotonic()
        load = engine_pb.EngineLoad(phase=phase)
        effects, reason = attempt(lambda: self.state.report_engine(session, None, load, now))
        reasons = (reason, attempt(lambda: self.state.hear_gateway(session, now))[1])
        for peers, reason in zip((self.engines, self.gateways), reasons, strict=True):
            peer = next((p for p in peers if p.session == session), None)
            assert reason == (None if peer is not None else "SESSION_UNKNOWN")
            if peer is not None:
                peer.heard_at, peer.phase = now, phase
        if effects is not None:
            self.take_grants(effects)

    @rule(
        request_id=REQUESTS, gateway_id=GATEWAYS, model=MODELS, wait_s=st.sampled_from([0, 1, 3, 9])
    )
    def route(self, request_id: str, gateway_id: str, model: str, wait_s: float) -> None:
        wait_s = min(wait_s, LIMITS.queue_s)
        expected = self.refusal(request_id, gateway_id, model, wait_s)
        lease_id, now = self.ids("lease"), self.clock.monotonic()
        want = Want(request_id, gateway_id, model, lease_id, now, wait_s)
        grant, reason = attempt(lambda: self.state.route(want))
        assert reason == expected
        request = Held(lease_id, request_id, "", gateway_id, model, now + wait_s)
        if grant is not None:
            self.take_grant(request, grant.lease.engine_id)
        elif reason is None:
            assert not self.routable(model)
            self.waiting.append(request)

    def count(self, engine: Peer) -> int:
        return sum(h.engine_id == engine.peer_id for h in self.held)

    def load(self, engine: Peer) -> float:
        return self.count(engine) / engine.capacity

    def routable(self, model: str) -> list[Peer]:
        return [
            e
            for e in self.engines
            if e.model == model and e.phase in READY_PHASES and self.count(e) < e.capacity
        ]

    def refusal(self, request_id: str, gateway_id: str, model: str, wait_s: float) -> str | None:
        """The reason for which a route must be refused: the first that holds."""
        phases = [e.phase for e in self.engines if e.model == model]
        full = len(self.held) + len(self.waiting) >= LIMITS.leases_max
        queued = sum(w.model == model for w in self.waiting)
        may_wait = wait_s > 0 and queued < LIMITS.queued_max
        ready = any(p in READY_PHASES for p in phases)
        reasons = {
            "SESSION_UNKNOWN": gateway_id not in [g.peer_id for g in self.gateways],
            "DUPLICATE_REQUEST": request_id in [h.request_id for h in self.held + self.waiting],
            "MODEL_NOT_FOUND": model not in self.known_models,
            "CAPACITY_EXHAUSTED": full or (ready and not may_wait and not self.routable(model)),
            "MODEL_LOADING": not ready and engine_pb.ENGINE_PHASE_LOADING in phases,
            "NO_ENGINE": not ready,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Any lease that was ever granted, or never."""
        lease_id = data.draw(st.sampled_from(["lease-0", *self.granted]))
        held = [h for h in self.held if h.lease_id == lease_id]
        effects = self.state.release(lease_id, self.clock.monotonic())
        assert (effects is not None) == bool(held)
        self.held = [h for h in self.held if h not in held]
        if effects is not None:
            self.take_grants(effects)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """The call of a request that waits ends."""
        if not self.waiting:
            return
        request = data.draw(st.sampled_from(self.waiting))
        want = self.state.waiting.of_request(request.request_id)
        assert want is not None
        assert self.state.leave(want, self.clock.monotonic()) == Effects()
        self.waiting.remove(request)

    @rule(request_id=REQUESTS)
    def cancel(self, request_id: str) -> None:
        held = next((h for h in self.held if h.request_id == request_id), None)
        waiting = next((w for w in self.waiting if w.request_id == request_id), None)
        effects, reason = attempt(lambda: self.state.cancel(request_id, self.clock.monotonic()))
        assert reason == (None if held or waiting else "REQUEST_NOT_FOUND")
        if waiting is not None:
            assert effects is not None
            assert [r.error.reason for r in effects.refusals] == ["CANCELLED"]
            self.waiting.remove(waiting)
        if held is not None:
            held.stop_by = min(held.stop_by, self.clock.now + LIMITS.cancel_budget_s)
            session = next(e.session for e in self.engines if e.peer_id == held.engine_id)
            assert effects == Effects(cancels=(CancelRequest(session, request_id),))

    @rule(halves=st.integers(1, 7))
    def pass_time(self, halves: int) -> None:
        """Half an interval at a time, as the sweeper does."""
        for _ in range(halves):
            self.clock.advance(LIMITS.interval_s / 2)
            effects = self.state.expire(self.clock.monotonic())
            peers = (*self.engines, *self.gateways)
            silent = [p for p in peers if self.clock.now - p.heard_at >= 3 * LIMITS.interval_s]
            assert {(e.session, e.why) for e in effects.endings} == {
                (p.session, Ending.SILENT) for p in silent
            }
            for peer in silent:
                self.sweep(peer, effects)
            self.expire_requests(effects)
            self.take_grants(effects)

    def expire_requests(self, effects: Effects) -> None:
        late = [w for w in self.waiting if w.start_by <= self.clock.now]
        told = {r.request_id: r.error.reason for r in effects.refusals}
        for request in late:
            assert told[request.request_id] in {"QUEUE_TIMEOUT", "NO_ENGINE", "MODEL_LOADING"}
        self.waiting = [w for w in self.waiting if w not in late]
        stuck = [h for h in self.held if h.stop_by <= self.clock.now]
        assert {lease.lease_id for lease in effects.written_off} == {h.lease_id for h in stuck}
        self.held = [h for h in self.held if h not in stuck]

    @invariant()
    def counts_are_a_recount(self) -> None:
        if not hasattr(self, "state"):
            return
        self.state.check_integrity()
        leases = self.state.leases
        assert [lease.lease_id for lease in leases] == [h.lease_id for h in self.held]
        assert len(leases) == len(self.held)
        assert [w.lease_id for w in self.state.waiting] == [w.lease_id for w in self.waiting]
        for engine in self.engines:
            assert leases.on_engine(engine.peer_id) == self.count(engine)
        for gateway in self.gateways:
            assert leases.of_gateway(gateway.peer_id) == sum(
                h.gateway_id == gateway.peer_id for h in self.held
            )
        for model in ("demo", "other"):
            assert leases.of_model(model) == sum(h.model == model for h in self.held)
        assert {e.engine_id for e in self.state.engines} == {e.peer_id for e in self.engines}
        assert {g.gateway_id for g in self.state.gateways} == {g.peer_id for g in self.gateways}


TestStateMachine = StateMachine.TestCase
TestStateMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
