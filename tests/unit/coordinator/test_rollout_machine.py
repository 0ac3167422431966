"""Rollouts at random, with requests that lose their engines: an answer that has begun is never gone on with by another revision."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.coordinator.deployment import Deployment
from services.coordinator.effects import Effects, Grant
from services.coordinator.limits import Limits
from services.coordinator.state import CoordinatorState
from services.coordinator.waiting import Want
from services.runtime.errors import CaravanError
from tests.unit.coordinator.test_deployments import (
    FAILED,
    IDLE,
    LOADING,
    V1,
    V2,
    Phase,
    apply,
    join,
    report,
)

ENGINES = st.sampled_from(["a", "b", "c"])
DEPLOYMENTS = st.sampled_from([V1, V2, Deployment("demo", "/v3.gguf")])
PHASES = st.sampled_from([LOADING, IDLE, IDLE, FAILED])


@dataclass
class Answer:
    """A request whose client has been given something: the revision that began it, and the lives that it has lost."""

    revision: str
    lost: frozenset[str] = frozenset()


class Rollouts(RuleBasedStateMachine):
    """One deployment, three engines and requests, which ask for another engine whenever theirs is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.state = CoordinatorState(Limits(leases_per_engine_max=2))
        self.state.join_gateway("gateway", 0.0)
        self.answers: dict[str, Answer] = {}
        self.lives: dict[str, str] = {}
        self.count = 0
        apply(self.state, V1)

    @rule(engine_id=ENGINES, of=st.none() | DEPLOYMENTS, phase=PHASES)
    def joins(self, engine_id: str, of: Deployment | None, phase: Phase) -> None:
        """An engine is started for any revision, the current one or not, or by hand."""
        self.count += 1
        self.take(join(self.state, engine_id, of, phase, life=str(self.count))[1])

    @rule(engine_id=ENGINES, phase=PHASES)
    def reports(self, engine_id: str, phase: Phase) -> None:
        """It becomes ready, or fails."""
        engine = self.state.engines.find(engine_id)
        if engine is not None:
            self.take(report(self.state, engine.session, phase))

    @rule(engine_id=ENGINES)
    def ends(self, engine_id: str) -> None:
        """It dies, or has drained."""
        engine = self.state.engines.find(engine_id)
        if engine is not None:
            self.take(self.state.end_session(engine.session, 0.0))

    @rule(of=DEPLOYMENTS, replicas=st.integers(0, 2))
    def applies(self, of: Deployment, replicas: int) -> None:
        """Another revision, or another number of engines."""
        self.take(apply(self.state, Deployment("demo", of.model, replicas=replicas)))

    @rule()
    def asks(self) -> None:
        """A new request, which begins where it is sent."""
        self.count += 1
        self.route(f"req-{self.count}", None)

    def route(self, request_id: str, answer: Answer | None) -> None:
        want = Want(
            request_id,
            "gateway",
            "demo",
            f"lease-{self.count}-{request_id}",
            0.0,
            wait_s=10,
            avoid=frozenset() if answer is None else answer.lost,
            resumed=answer is not None,
            may_fall_back=answer is None,
        )
        try:
            grant = self.state.route(want)
        except CaravanError:
            self.answers.pop(request_id, None)
            return
        if grant is not None:
            self.granted(grant)

    def granted(self, grant: Grant) -> None:
        engine = self.state.engines.find(grant.lease.engine_id)
        assert engine is not None
        request_id = grant.lease.request_id
        answer = self.answers.setdefault(request_id, Answer(engine.revision))
        assert answer.revision in {engine.revision, ""}
        self.lives[request_id] = engine.incarnation

    def take(self, effects: Effects) -> None:
        for grant in effects.grants:
            self.granted(grant)
        for refusal in effects.refusals:
            self.answers.pop(refusal.request_id, None)
        for lease in effects.swept:
            answer = self.answers[lease.request_id]
            answer.lost |= {self.lives[lease.request_id]}
            self.route(lease.request_id, answer)

    @invariant()
    def holds(self) -> None:
        """No bound is passed, and ready engines are never all held back."""
        self.state.check_integrity()


TestRollouts = Rollouts.TestCase
TestRollouts.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
