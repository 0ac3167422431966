"""Engines, gateways and the pure state of the coordinator in virtual time: sessions and requests, with messages that are late."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator.effects import Effects, Grant
from services.coordinator.leases import Ended, Lease
from services.coordinator.limits import Limits
from services.coordinator.state import CoordinatorState
from services.coordinator.waiting import Want
from services.runtime.clock import CountingIds
from tests.support.refusals import attempt

LIMITS = Limits(
    interval_s=1.0,
    engines_max=3,
    gateways_max=2,
    leases_max=14,
    leases_per_engine_max=4,
    queued_max=3,
    queue_s=4.0,
    cancel_budget_s=2.5,
    return_s=1.5,
)
FAULTS_END_S = 15.0
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

    @property
    def incarnation(self) -> str:
        return f"{self.engine_id}-{self.life}"


@dataclass
class Gateway:
    """A gateway process, with the requests that it has not seen end, and the leases of those that run."""

    name: str
    life: int = 0
    joins: int = 0
    stream: Stream | None = None
    waiting: set[str] = field(default_factory=set)
    held: dict[str, Lease] = field(default_factory=dict)

    @property
    def gateway_id(self) -> str:
        return f"{self.name}-{self.life}-{self.joins}"


class World:
    """One schedule of messages; who adds faults calls `join`, `sweep` and `request` once."""

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
        self.adopted = self.resumed = 0

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

    # --- sessions ------------------------------------------------------------------------------------------------

    def join(self, peer: Engine | Gateway) -> None:
        """The peer opens a stream; the coordinator takes its first message some time later."""
        stream = peer.stream = Stream(self.coordinator)
        held: list[Lease] = []
        if isinstance(peer, Gateway):
            peer.joins += 1
            held = [replace(lease, gateway_id=peer.gateway_id) for lease in peer.held.values()]
        self.soon(lambda: self.take_join(peer, stream, held))

    def take_join(self, peer: Engine | Gateway, stream: Stream, held: list[Lease]) -> None:
        if not stream.open or stream.coordinator != self.coordinator:
            return self.break_stream(peer, stream)
        joined, reason = attempt(lambda: self.joined(peer, held))
        if joined is None:
            assert reason == "CAPACITY_EXHAUSTED"
            return self.break_stream(peer, stream)
        stream.session = joined[0]
        self.streams[joined[0]] = stream, peer
        self.perform(joined[1])
        self.after(1.0, lambda: self.speak(peer, stream))
        return None

    def joined(self, peer: Engine | Gateway, held: list[Lease]) -> tuple[int, Effects]:
        if isinstance(peer, Gateway):
            return self.state.join_gateway(peer.gateway_id, self.now, held)
        model = engine_pb.ModelInfo(name=peer.model, max_sequences=CAPACITY)
        return self.state.join_engine(
            peer.engine_id,
            "h:1",
            model,
            self.load(),
            now=self.now,
            wall=self.now,
            incarnation=peer.incarnation,
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
        self.adopted += len(effects.adopted)
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
            gateway, life, want = self.waiting.pop(grant.lease.request_id)
            has_waited = self.now - want.arrived_at >= LIMITS.return_s
            assert has_waited or grant.lease.incarnation not in want.avoid
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
            self.ask(gateway, request_id, model)
            if self.random.random() < 0.3:
                self.after(self.random.uniform(0, 2), lambda: self.cancel(request_id))
        self.after(self.random.expovariate(2.0), self.request)

    def ask(self, gateway: Gateway, request_id: str, model: str, lost: Lease | None = None) -> None:
        """Sends a route; one that has lost an engine must not come to it again, or not soon."""
        life, session, coordinator = gateway.life, gateway.gateway_id, self.coordinator
        want = Want(
            request_id,
            session,
            model,
            self.ids("lease"),
            0.0,
            self.random.choice((0, 0.5, 2, 9)),
            avoid=frozenset() if lost is None else frozenset({lost.incarnation}),
            resumed=lost is not None,
            may_fall_back=self.random.random() < 0.5,
        )
        self.soon(lambda: self.take_route(gateway, life, want, coordinator))

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

    def take_route(self, gateway: Gateway, life: int, sent: Want, coordinator: int) -> None:
        grant: Grant | None = None
        reason: str | None = "the coordinator is gone"
        want = replace(sent, arrived_at=self.now)
        if coordinator == self.coordinator:
            grant, reason = attempt(lambda: self.state.route(want))
        if grant is not None:
            assert grant.lease.incarnation not in want.avoid
            self.begin(gateway, life, grant)
        elif reason is not None:
            self.soon(lambda: self.finish(gateway, life, want.request_id))
        else:
            self.waiting[want.request_id] = gateway, life, want
            if self.random.random() < 0.2:
                self.after(self.random.uniform(0, 3), lambda: self.hang_up(want))

    def begin(self, gateway: Gateway, life: int, grant: Grant) -> None:
        """A grant is on its way."""
        self.soon(lambda: self.generate(gateway, life, grant.lease))

    def hang_up(self, want: Want) -> None:
        """The client of a request leaves; the coordinator learns of it while the request waits."""
        gateway, life, waiting = self.waiting.get(want.request_id, (None, 0, None))
        if gateway is not None and waiting is want:
            del self.waiting[want.request_id]
            self.perform(self.state.leave(want, self.now))
            self.finish(gateway, life, want.request_id)

    def generate(self, gateway: Gateway, life: int, lease: Lease) -> None:
        if gateway.life != life:
            return
        engine = next(e for e in self.engines if e.engine_id == lease.engine_id)
        call, request_id = next(self.calls), lease.request_id
        gateway.held[lease.lease_id] = lease

        def start() -> None:
            if engine.incarnation == lease.incarnation and gateway.life == life:
                engine.running[request_id] = call
            self.after(self.random.uniform(0, 3), end)

        def end() -> None:
            # The call ends here whatever ended it: done, cancelled, engine dead, gateway dead.
            was_lost = engine.incarnation != lease.incarnation
            if engine.running.get(request_id) == call:
                del engine.running[request_id]
            if gateway.life != life:
                return
            del gateway.held[lease.lease_id]
            self.soon(lambda: self.leave(gateway, life, lease, was_lost=was_lost))

        self.soon(start)

    def leave(self, gateway: Gateway, life: int, lease: Lease, *, was_lost: bool) -> None:
        """The lease is released; a request that lost its engine goes on elsewhere."""
        self.take_release(lease)
        if gateway.life != life:
            return
        if was_lost and self.faulty and lease.request_id in gateway.waiting:
            self.resumed += 1
            self.ask(gateway, lease.request_id, lease.model, lost=lease)
        else:
            self.finish(gateway, life, lease.request_id)

    def take_release(self, lease: Lease) -> None:
        ended = self.random.choice(list(Ended))
        self.perform(self.state.release(lease.lease_id, self.now, ended) or Effects())
