"""A naive model of the coordinator's requests: lists and recounts, no indexes, no queues."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from services.coordinator.deployment import CapacityPolicy, Deployment, FallbackReason
from services.coordinator.engines import READY_PHASES
from services.coordinator.limits import Limits


@dataclass
class Peer:
    """An engine (with a model) or a gateway (without)."""

    peer_id: str
    session: int
    heard_at: float
    model: str = ""
    capacity: int = 0
    phase: int = 0
    life: str = ""
    drained: bool = False
    held_back: bool = False
    suspect: bool = False

    @property
    def ready(self) -> bool:
        """Whether it takes requests, if it has room."""
        return self.phase in READY_PHASES and not self.drained and not self.held_back


@dataclass
class Held:
    """A lease, or a request that waits for one and has no engine; `until` is when it is forgotten, once it is put aside."""

    lease_id: str
    request_id: str
    engine_id: str
    gateway_id: str
    model: str
    life: str = ""
    start_by: float = 0.0
    stop_by: float = math.inf
    until: float = 0.0
    arrived_at: float = 0.0
    avoid: frozenset[str] = frozenset()
    resumed: bool = False
    asked_to_end: bool = False

    @property
    def is_ahead(self) -> bool:
        """Whether it goes before all others."""
        return self.resumed or bool(self.avoid)


@dataclass
class Asked:
    """A route, before it is known what becomes of it."""

    model: str
    wait_s: float
    avoid: frozenset[str] = frozenset()
    resumed: bool = False
    may_fall_back: bool = False
    failed: dict[str, FallbackReason] = field(default_factory=dict)


class Model:
    """Who is there, who holds what, who waits."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.engines: list[Peer] = []
        self.gateways: list[Peer] = []
        self.held: list[Held] = []
        self.waiting: list[Held] = []
        self.claimed: list[Held] = []
        self.orphaned: list[Held] = []
        self.released: list[tuple[str, float]] = []
        self.rules: dict[str, Deployment] = {}
        self.known: set[str] = set()
        self.orders: dict[str, float | None] = {}
        """For each life to which a drain or undrain was said, until when the last of them drains; None: it undid that."""
        self.removed: set[str] = set()

    # --- counting ------------------------------------------------------------------------------------------------

    def engine(self, engine_id: str) -> Peer | None:
        """The engine, if it has joined."""
        return next((e for e in self.engines if e.peer_id == engine_id), None)

    def count(self, engine: Peer) -> int:
        """Leases on an engine."""
        return sum(h.engine_id == engine.peer_id for h in self.held)

    def load(self, engine: Peer) -> float:
        """Share of an engine that is in use."""
        return self.count(engine) / engine.capacity

    def routable(self, model: str, avoid: frozenset[str] = frozenset()) -> list[Peer]:
        """Engines on which a request of the model can be granted now."""
        rules = self.rules.get(model)
        most = rules.serving.max_concurrent if rules else 0
        if most and sum(h.model == model for h in self.held) >= most:
            return []
        return [
            e
            for e in self.engines
            if e.model == model and e.ready and self.count(e) < e.capacity and e.life not in avoid
        ]

    def best(self, model: str, avoid: frozenset[str]) -> list[Peer]:
        """Engines of which any may be chosen: no suspects beside others, the least loaded."""
        routable = self.routable(model, avoid)
        routable = [e for e in routable if not e.suspect] or routable
        return [e for e in routable if self.load(e) == min(map(self.load, routable))]

    def next_waiting(self, model: str) -> Held | None:
        """Who is to be granted next of those that wait."""
        waiting = [w for w in self.waiting if w.model == model]
        ahead = [w for w in waiting if w.is_ahead and self.routable(model, w.avoid)]
        return next(iter([*ahead, *(w for w in waiting if not w.is_ahead)]), None)

    def let_return(self, now: float) -> None:
        """Who has waited for long, avoiding all engines that are ready, may go to those that have spoken since."""
        for request in self.waiting:
            ready = [e for e in self.engines if e.model == request.model and e.ready]
            waited = now - request.arrived_at >= self.limits.return_s
            if waited and request.is_ahead and {e.life for e in ready} <= request.avoid:
                heard = {e.life for e in ready if e.heard_at > request.arrived_at}
                # One that goes ahead stays there.
                request.resumed, request.avoid = True, request.avoid - heard

    # --- what a route gets ---------------------------------------------------------------------------------------

    def wait_s(self, model: str, asked: Asked) -> float:
        """How long it may wait."""
        rules = self.rules.get(model)
        most = rules.serving.max_wait_s if rules else None
        return min(asked.wait_s, self.limits.queue_s if most is None else most)

    def verdict(self, model: str, asked: Asked) -> tuple[str, FallbackReason]:
        """grant, wait, wait_or_move or refuse; and why no grant."""
        rules, may_wait = self.rules.get(model), self.wait_s(model, asked) > 0
        policy = rules.serving.on_capacity_exhausted if rules else CapacityPolicy.QUEUE
        if model in asked.failed:
            return "refuse", asked.failed[model]
        if not any(e.ready for e in self.engines if e.model == model):
            waits = asked.resumed and may_wait
            return ("wait_or_move" if waits else "refuse"), FallbackReason.UNAVAILABLE
        if self.routable(model, asked.avoid):
            return "grant", FallbackReason.CAPACITY
        most = rules.serving.max_queued if rules else None
        most = self.limits.queued_max if most is None else most
        queued = sum(w.model == model and not w.is_ahead for w in self.waiting)
        had_its_turn = asked.resumed or bool(asked.avoid)
        if not had_its_turn and (policy is CapacityPolicy.REJECT or queued >= most):
            may_wait = False
        how = "wait_or_move" if policy is CapacityPolicy.FALLBACK else "wait"
        return (how if may_wait else "refuse"), FallbackReason.CAPACITY

    def taker(self, asked: Asked) -> str | None:
        """The model that grants or queues the request."""
        tried: set[str] = set()

        def follow(model: str, *, at_once: bool) -> str | None:
            tried.add(model)
            verdict, reason = self.verdict(model, asked)
            stays = verdict in {"wait", "wait_or_move"} and not at_once
            if verdict == "grant" or (verdict == "wait" and stays):
                return model
            rules = self.rules.get(model)
            looks_on = asked.may_fall_back and rules is not None and verdict != "wait"
            for fallback in rules.fallback if rules is not None and looks_on else ():
                name = fallback.deployment
                if reason in fallback.reasons and name in self.known and name not in tried:
                    # Whoever could wait is only moved to where it runs at once.
                    found = follow(name, at_once=at_once or verdict == "wait_or_move")
                    if found:
                        return found
            return model if stays else None

        return follow(asked.model, at_once=False)

    def refusal(self, request_id: str, gateway_id: str, asked: Asked) -> str | None:
        """The reason for which a route must be refused: the first that holds."""
        known = len(self.held) + len(self.waiting)
        most = self.limits.leases_max * (2 if asked.resumed else 1)
        verdict, why = self.verdict(asked.model, asked)
        phases = [e.phase for e in self.engines if e.model == asked.model]
        failed = asked.failed.get(asked.model)
        is_busy = why in {FallbackReason.CAPACITY, FallbackReason.RATE_LIMITED}
        reasons = {
            "SESSION_UNKNOWN": gateway_id not in [g.peer_id for g in self.gateways],
            "DUPLICATE_REQUEST": request_id in [h.request_id for h in self.held + self.waiting],
            "CAPACITY_EXHAUSTED": known >= most,
            "MODEL_NOT_FOUND": asked.model not in self.known
            and not (asked.resumed and asked.wait_s > 0),
        }
        for reason, holds in reasons.items():
            if holds:
                return reason
        if self.taker(asked) is not None:
            return None
        assert verdict == "refuse"
        if is_busy:
            return "CAPACITY_EXHAUSTED"
        return "MODEL_LOADING" if failed is None and {0, 1} & set(phases) else "NO_ENGINE"

    # --- leases that come back -----------------------------------------------------------------------------------

    def put_aside(self, aside: list[Held], leases: list[Held], now: float) -> list[Held]:
        """Keeps leases whose session ended; returns those that are too many."""
        for lease in leases:
            lease.until = now + self.limits.rejoin_s
            lease.asked_to_end |= lease.stop_by < math.inf
            lease.stop_by = math.inf
            aside[:] = [h for h in aside if h.lease_id != lease.lease_id]
            aside.append(lease)
        gone = aside[: -self.limits.leases_max] if len(aside) > self.limits.leases_max else []
        aside[:] = aside[len(gone) :]
        return gone

    def note_released(self, lease_id: str, now: float) -> None:
        """The lease can be claimed no more for a while."""
        others = [r for r in self.released if r[0] != lease_id]
        self.released = [*others, (lease_id, now + self.limits.rejoin_s)][-self.limits.leases_max :]

    def cancels(self, orphans: list[Held]) -> set[tuple[int, str]]:
        """Session and request of orphans that must be cancelled."""
        running = {(h.request_id, h.engine_id) for h in self.held}
        return {
            (e.session, o.request_id)
            for o in orphans
            for e in self.engines
            if (e.peer_id, e.life) == (o.engine_id, o.life)
            and (o.request_id, o.engine_id) not in running
        }

    def adopt(self, lease: Held, now: float) -> bool:
        """Takes a lease of before, if it may be taken."""
        engine = self.engine(lease.engine_id)
        if engine is None or (engine.life, engine.model) != (lease.life, lease.model):
            return False
        for held in self.held:
            if held.request_id == lease.request_id or held.lease_id == lease.lease_id:
                same = (held.request_id, held.lease_id, held.engine_id)
                if same != (lease.request_id, lease.lease_id, lease.engine_id):
                    return False
                held.gateway_id = lease.gateway_id
                return True
        known = len(self.held) + len(self.waiting)
        waits = lease.request_id in [w.request_id for w in self.waiting]
        if waits or known >= 2 * self.limits.leases_max:
            return False
        if lease.asked_to_end:
            lease.stop_by = now + self.limits.cancel_budget_s
        self.held.append(lease)
        return True

    def forget(self, model: str) -> None:
        """A removed model goes with its last engine, or its last request that waits."""
        there = [e for e in self.engines if e.model == model]
        if model in self.removed and not there and model not in [w.model for w in self.waiting]:
            self.removed.discard(model)
            self.known.discard(model)
