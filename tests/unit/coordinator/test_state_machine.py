"""The state against a naive model of it: lists, recounts, no indexes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from caravan.engine.v1 import engine_service_pb2 as engine_pb
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.coordinator.effects import CancelRequest, Effects, Ending
from services.coordinator.engines import READY_PHASES
from services.coordinator.state import CoordinatorState, Limits
from services.runtime.clock import CountingIds, ManualClock
from tests.support.refusals import attempt

LIMITS = Limits(engines_max=3, gateways_max=2, leases_max=6, leases_per_engine_max=3)
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
    """A lease."""

    lease_id: str
    request_id: str
    engine_id: str
    gateway_id: str
    model: str


class StateMachine(RuleBasedStateMachine):
    """Does the same to both; after each step all counts are equal to a recount."""

    @initialize()
    def start(self) -> None:
        self.clock, self.ids = ManualClock(), CountingIds()
        self.state = CoordinatorState(LIMITS)
        self.engines: list[Peer] = []
        self.gateways: list[Peer] = []
        self.held: list[Held] = []
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

    def note_replaced(self, before: Peer | None, effects: Effects) -> None:
        if before is None:
            assert effects == Effects()
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

    @rule(data=st.data(), phase=PHASES)
    def speak(self, data: st.DataObject, phase: Phase) -> None:
        """A report or a heartbeat in the name of any session that ever was."""
        if not self.sessions:
            return
        session, now = data.draw(st.sampled_from(self.sessions)), self.clock.monotonic()
        load = engine_pb.EngineLoad(phase=phase)
        reasons = (
            attempt(lambda: self.state.report_engine(session, None, load, now))[1],
            attempt(lambda: self.state.hear_gateway(session, now))[1],
        )
        for peers, reason in zip((self.engines, self.gateways), reasons, strict=True):
            peer = next((p for p in peers if p.session == session), None)
            assert reason == (None if peer is not None else "SESSION_UNKNOWN")
            if peer is not None:
                peer.heard_at, peer.phase = now, phase

    @rule(request_id=REQUESTS, gateway_id=GATEWAYS, model=MODELS)
    def route(self, request_id: str, gateway_id: str, model: str) -> None:
        expected = self.refusal(request_id, gateway_id, model)
        lease_id, now = self.ids("lease"), self.clock.monotonic()
        grant, reason = attempt(
            lambda: self.state.route(request_id, gateway_id, model, lease_id=lease_id, now=now)
        )
        assert reason == expected
        if grant is not None:
            engine = next(e for e in self.engines if e.peer_id == grant.lease.engine_id)
            assert engine.model == model
            assert self.load(engine) == min(self.load(e) for e in self.routable(model))
            self.granted.append(lease_id)
            self.held.append(Held(lease_id, request_id, engine.peer_id, gateway_id, model))

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

    def refusal(self, request_id: str, gateway_id: str, model: str) -> str | None:
        """The reason for which a route must be refused: the first that holds."""
        phases = [e.phase for e in self.engines if e.model == model]
        full = len(self.held) >= LIMITS.leases_max
        reasons = {
            "SESSION_UNKNOWN": gateway_id not in [g.peer_id for g in self.gateways],
            "DUPLICATE_REQUEST": request_id in [h.request_id for h in self.held],
            "MODEL_NOT_FOUND": model not in self.known_models,
            "CAPACITY_EXHAUSTED": full
            or (any(p in READY_PHASES for p in phases) and not self.routable(model)),
            "MODEL_LOADING": not self.routable(model) and engine_pb.ENGINE_PHASE_LOADING in phases,
            "NO_ENGINE": not self.routable(model),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Any lease that was ever granted, or never."""
        lease_id = data.draw(st.sampled_from(["lease-0", *self.granted]))
        held = [h for h in self.held if h.lease_id == lease_id]
        assert self.state.release(lease_id, self.clock.monotonic()) == bool(held)
        self.held = [h for h in self.held if h not in held]

    @rule(request_id=REQUESTS)
    def cancel(self, request_id: str) -> None:
        held = next((h for h in self.held if h.request_id == request_id), None)
        effects, reason = attempt(lambda: self.state.cancel(request_id))
        assert reason == (None if held is not None else "REQUEST_NOT_FOUND")
        if held is not None:
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

    @invariant()
    def counts_are_a_recount(self) -> None:
        if not hasattr(self, "state"):
            return
        self.state.check_integrity()
        leases = self.state.leases
        assert [lease.lease_id for lease in leases] == [h.lease_id for h in self.held]
        assert len(leases) == len(self.held)
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
