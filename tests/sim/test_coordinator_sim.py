"""Gateways, engines, delays and crashes around the pure state of the coordinator, in virtual time, from a seed.

After each step every lease belongs to live sessions and every bound holds (I4, I6). When the faults end, nothing is left:
no lease, no running request, and the whole capacity can be leased again. A failure prints its seed and the command that
replays it (I8).
"""

from __future__ import annotations

import heapq
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator.effects import Effects, Grant
from services.coordinator.limits import Limits
from services.coordinator.state import CoordinatorState
from services.coordinator.waiting import Want
from services.runtime.clock import CountingIds
from tests.support.refusals import attempt

SCHEDULES = 1000
SEED_VARIABLE = "CARAVAN_SIM_SEED"
LIMITS = Limits(
    interval_s=1.0,
    engines_max=3,
    gateways_max=2,
    leases_max=14,
    leases_per_engine_max=4,
    queued_max=3,
    queue_s=4.0,
    cancel_budget_s=2.5,
)
FAULTS_END_S = 15.0
SETTLED_S = 32.0
CAPACITY = 3
MODELS = ("demo", "other")


@dataclass
class Stream:
    """A session's stream. `session` is None until the coordinator has taken the join, `open` falls once."""

    coordinator: int
    session: int | None = None
    open: bool = True


@dataclass
class Engine:
    """An engine process; `life` counts its starts."""

    engine_id: str
    model: str
    life: int = 0
    hung: bool = False
    stream: Stream | None = None
    running: dict[str, int] = field(default_factory=dict)  # request id -> number of the call


@dataclass
class Gateway:
    """A gateway process, with the requests that it has not seen end."""

    name: str
    life: int = 0
    stream: Stream | None = None
    waiting: set[str] = field(default_factory=set)

    @property
    def gateway_id(self) -> str:
        return f"{self.name}-{self.life}"


class Simulation:
    """One schedule."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order, self.calls, self.ids = itertools.count(), itertools.count(), CountingIds()
        self.coordinator = 0
        self.state = CoordinatorState(LIMITS)
        self.engines = [Engine(f"engine-{i}", MODELS[i // 2]) for i in range(3)]
        self.gateways = [Gateway("gateway-0"), Gateway("gateway-1")]
        self.peers: list[Engine | Gateway] = [*self.engines, *self.gateways]
        self.streams: dict[int, tuple[Stream, Engine | Gateway]] = {}
        self.ended: dict[str, int] = {}
        self.waiting: dict[str, tuple[Gateway, int, Want]] = {}

    # --- time ----------------------------------------------------------------------------------------------------

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Schedules an action."""
        heapq.heappush(self.events, (self.now + delay_s, next(self.order), action))

    def soon(self, action: Callable[[], None]) -> None:
        """Schedules the arrival of a message: mostly fast, sometimes very late."""
        slow = self.random.random() < 0.05
        self.after(self.random.uniform(0.5, 4.0) if slow else self.random.uniform(0, 0.05), action)

    @property
    def faulty(self) -> bool:
        return self.now < FAULTS_END_S

    def run(self) -> None:
        """Runs to the end and checks that nothing is left."""
        for peer in self.peers:
            self.join(peer)
        self.after(0.5, self.sweep)
        self.after(0.0, self.fault)
        self.after(0.1, self.request)
        while self.events and self.events[0][0] < SETTLED_S:
            self.now, _, action = heapq.heappop(self.events)
            action()
            self.state.check_integrity()
            for engine in self.state.engines:
                assert self.state.leases.on_engine(engine.engine_id) <= engine.capacity
        assert len(self.state.leases) == 0, list(self.state.leases)
        assert len(self.state.waiting) == len(self.waiting) == 0, list(self.waiting)
        assert not any(engine.running for engine in self.engines)
        assert not any(gateway.waiting for gateway in self.gateways)
        assert all(count == 1 for count in self.ended.values())
        self.lease_everything()

    def lease_everything(self) -> None:
        """All engines are back, and each of their sequences can be leased."""
        gateway = self.gateways[0].gateway_id
        for model, engines in ((MODELS[0], 2), (MODELS[1], 1)):
            for _ in range(engines * CAPACITY):
                ids = self.ids("final"), self.ids("lease")
                assert self.state.route(Want(ids[0], gateway, model, ids[1], self.now))

    # --- sessions ------------------------------------------------------------------------------------------------

    def join(self, peer: Engine | Gateway) -> None:
        """The peer opens a stream; the coordinator takes its first message some time later."""
        stream = peer.stream = Stream(self.coordinator)
        self.soon(lambda: self.take_join(peer, stream))

    def take_join(self, peer: Engine | Gateway, stream: Stream) -> None:
        if not stream.open or stream.coordinator != self.coordinator:
            return self.break_stream(peer, stream)
        joined, reason = attempt(lambda: self.joined(peer))
        if joined is None:
            assert reason == "CAPACITY_EXHAUSTED"
            return self.break_stream(peer, stream)
        stream.session = joined[0]
        self.streams[joined[0]] = stream, peer
        self.perform(joined[1])
        self.after(1.0, lambda: self.speak(peer, stream))
        return None

    def joined(self, peer: Engine | Gateway) -> tuple[int, Effects]:
        if isinstance(peer, Gateway):
            return self.state.join_gateway(peer.gateway_id, self.now)
        model = engine_pb.ModelInfo(name=peer.model, max_sequences=CAPACITY)
        return self.state.join_engine(
            peer.engine_id, "h:1", model, self.load(), now=self.now, wall=self.now
        )

    def load(self) -> engine_pb.EngineLoad:
        return engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_IDLE)

    def speak(self, peer: Engine | Gateway, stream: Stream) -> None:
        """A report or heartbeat each second while the stream lives and the process does not hang."""
        if not stream.open:
            return
        if not (isinstance(peer, Engine) and peer.hung):
            self.soon(lambda: self.take_word(peer, stream))
        self.after(1.0, lambda: self.speak(peer, stream))

    def take_word(self, peer: Engine | Gateway, stream: Stream) -> None:
        if not stream.open or stream.coordinator != self.coordinator:
            return
        session = stream.session
        assert session is not None
        if isinstance(peer, Engine):
            effects, reason = attempt(
                lambda: self.state.report_engine(session, None, self.load(), self.now)
            )
            self.perform(effects or Effects())
        else:
            _, reason = attempt(lambda: self.state.hear_gateway(session, self.now))
        if reason is not None:
            assert reason == "SESSION_UNKNOWN"
            self.break_stream(peer, stream)

    def break_stream(self, peer: Engine | Gateway, stream: Stream) -> None:
        """The peer sees its stream end now, joins again after a while; the coordinator sees the end later."""
        if stream.open:
            stream.open = False
            self.soon(lambda: self.take_end(stream))
            if peer.stream is stream:
                life = peer.life
                self.soon(lambda: self.join(peer) if peer.life == life else None)

    def take_end(self, stream: Stream) -> None:
        if stream.session is not None and stream.coordinator == self.coordinator:
            self.perform(self.state.end_session(stream.session, self.now))

    def perform(self, effects: Effects) -> None:
        for cancel in effects.cancels:
            stream, engine = self.streams[cancel.session]
            assert isinstance(engine, Engine)
            request_id, life = cancel.request_id, engine.life
            if stream.open:
                self.soon(lambda e=engine, r=request_id, n=life: self.take_cancel(e, r, n))  # type: ignore[misc]
        for ending in effects.endings:
            stream, peer = self.streams[ending.session]
            self.soon(lambda p=peer, s=stream: self.break_stream(p, s))  # type: ignore[misc]
        for grant in effects.grants:
            gateway, life, _ = self.waiting.pop(grant.lease.request_id)
            self.begin(gateway, life, grant)
        for refusal in effects.refusals:
            gateway, life, want = self.waiting.pop(refusal.request_id)
            self.soon(lambda g=gateway, n=life, w=want: self.finish(g, n, w.request_id))  # type: ignore[misc]

    def take_cancel(self, engine: Engine, request_id: str, life: int) -> None:
        if engine.life == life:
            engine.running.pop(request_id, None)

    def sweep(self) -> None:
        self.perform(self.state.expire(self.now))
        self.after(0.5, self.sweep)

    # --- requests ------------------------------------------------------------------------------------------------

    def request(self) -> None:
        """A client comes to a gateway; ids repeat at times, as clients may choose them."""
        if not self.faulty:
            return
        gateway, model = self.random.choice(self.gateways), self.random.choice(MODELS)
        request_id = self.ids("req") if self.random.random() < 0.9 else "req-again"
        if request_id not in gateway.waiting and request_id != "req-again":
            self.ended[request_id] = 0
        if request_id not in gateway.waiting:
            gateway.waiting.add(request_id)
            life = gateway.life
            self.soon(lambda: self.take_route(gateway, life, request_id, model, self.coordinator))
            if self.random.random() < 0.3:
                self.after(self.random.uniform(0, 2), lambda: self.cancel(request_id))
        self.after(self.random.expovariate(2.0), self.request)

    def cancel(self, request_id: str) -> None:
        """Somebody asks the coordinator to end a request, early enough at times to outrun it."""
        effects, reason = attempt(lambda: self.state.cancel(request_id, self.now))
        assert reason in {None, "REQUEST_NOT_FOUND"}
        self.perform(effects or Effects())

    def finish(self, gateway: Gateway, life: int, request_id: str) -> None:
        """The client of a request sees its end."""
        if gateway.life == life:
            gateway.waiting.discard(request_id)
            if request_id in self.ended:
                self.ended[request_id] += 1

    def take_route(
        self, gateway: Gateway, life: int, request_id: str, model: str, coordinator: int
    ) -> None:
        grant: Grant | None = None
        reason: str | None = "the coordinator is gone"
        if coordinator == self.coordinator:
            wait_s = self.random.choice((0, 0.5, 2, 9))
            ids = f"{gateway.name}-{life}", self.ids("lease")
            want = Want(request_id, ids[0], model, ids[1], self.now, wait_s)
            grant, reason = attempt(lambda: self.state.route(want))
        if grant is not None:
            self.begin(gateway, life, grant)
        elif reason is not None:
            self.soon(lambda: self.finish(gateway, life, request_id))
        else:
            self.waiting[request_id] = gateway, life, want
            if self.random.random() < 0.2:
                self.after(self.random.uniform(0, 3), lambda: self.hang_up(want))

    def begin(self, gateway: Gateway, life: int, grant: Grant) -> None:
        """A grant is on its way."""
        coordinator = self.coordinator
        self.soon(lambda: self.generate(gateway, life, grant, coordinator))

    def hang_up(self, want: Want) -> None:
        """The client of a request leaves; the coordinator learns of it while the request waits."""
        gateway, life, waiting = self.waiting.get(want.request_id, (None, 0, None))
        if gateway is not None and waiting is want:
            del self.waiting[want.request_id]
            self.perform(self.state.leave(want, self.now))
            self.finish(gateway, life, want.request_id)

    def generate(self, gateway: Gateway, life: int, grant: Grant, coordinator: int) -> None:
        if gateway.life != life:
            return
        engine = next(e for e in self.engines if e.engine_id == grant.lease.engine_id)
        call, engine_life = next(self.calls), engine.life
        request_id = grant.lease.request_id

        def start() -> None:
            if engine.life == engine_life and gateway.life == life:
                engine.running[request_id] = call
            self.after(self.random.uniform(0, 3), end)

        def end() -> None:
            # The call ends here whatever ended it: done, cancelled, engine dead, gateway dead.
            if engine.running.get(request_id) == call:
                del engine.running[request_id]
            if gateway.life == life:
                self.finish(gateway, life, request_id)
                self.soon(lambda: self.take_release(grant, coordinator))

        self.soon(start)

    def take_release(self, grant: Grant, coordinator: int) -> None:
        if coordinator == self.coordinator or self.random.random() < 0.5:
            self.perform(self.state.release(grant.lease.lease_id, self.now) or Effects())

    # --- faults --------------------------------------------------------------------------------------------------

    def fault(self) -> None:
        """One of: a process dies and comes back, a stream breaks, an engine hangs, the coordinator restarts."""
        for engine in self.engines:
            engine.hung = False
        if not self.faulty:
            return
        kind = self.random.choices(
            ("engine", "gateway", "stream", "hang", "coordinator"), (4, 4, 6, 3, 1)
        )[0]
        engine, gateway = self.random.choice(self.engines), self.random.choice(self.gateways)
        peer: Engine | Gateway = engine if kind == "engine" else gateway
        if kind == "stream":
            peer = self.random.choice((engine, gateway))
        if kind == "hang":
            engine.hung = True
        elif kind == "coordinator":
            self.restart_coordinator()
        else:
            if kind != "stream":
                self.restart(peer)
            if peer.stream is not None:
                self.break_stream(peer, peer.stream)
        self.after(self.random.expovariate(0.5), self.fault)

    def restart(self, peer: Engine | Gateway) -> None:
        peer.life += 1
        if isinstance(peer, Engine):
            peer.running.clear()
        else:
            for request_id in peer.waiting:
                if request_id in self.ended:
                    self.ended[request_id] += 1  # Its clients see their connections break.
            peer.waiting.clear()
        if peer.stream is not None and not peer.stream.open:
            self.soon(lambda: self.join(peer))

    def restart_coordinator(self) -> None:
        self.coordinator += 1
        self.state = CoordinatorState(LIMITS)
        self.streams.clear()
        for gateway, life, want in self.waiting.values():
            self.soon(lambda g=gateway, n=life, w=want: self.finish(g, n, w.request_id))  # type: ignore[misc]
        self.waiting.clear()
        for peer in self.peers:
            if peer.stream is not None:
                self.break_stream(peer, peer.stream)


def run(seed: int) -> None:
    """Runs one schedule; a failure tells how to replay it."""
    try:
        Simulation(seed).run()
    except Exception as error:
        command = f"{SEED_VARIABLE}={seed} python -m pytest tests/sim/test_coordinator_sim.py"
        raise AssertionError(f"seed {seed} fails; replay: {command}") from error


@pytest.mark.timeout(180)
def test_nothing_outlives_its_session_in_any_schedule() -> None:
    """I4 and I6 hold after each step of a thousand seeded schedules, or of the one seed that is asked for."""
    asked = os.environ.get(SEED_VARIABLE)
    for seed in [int(asked)] if asked else range(SCHEDULES):
        run(seed)


def test_a_seed_replays_its_schedule() -> None:
    """Two runs of one seed are equal step by step (I8)."""

    def history(seed: int) -> list[str]:
        simulation = Simulation(seed)
        simulation.run()
        return [f"{simulation.now:.9f}", *map(str, simulation.state.leases), *simulation.ended]

    assert history(7) == history(7)
    assert history(7) != history(8)
