"""Deployments in the state of the coordinator: what becomes of their engines and requests, in single steps and at random."""

from __future__ import annotations

from contextlib import suppress
from typing import TypeAlias

import pytest
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from hypothesis import given, settings
from hypothesis import strategies as st

from services.coordinator.deployment import Deployment, Fallback
from services.coordinator.deployment_changes import revision
from services.coordinator.deployment_status import State
from services.coordinator.effects import DrainEngine, Effects
from services.coordinator.limits import Limits
from services.coordinator.lineage import LIVES_MAX, Lineage
from services.coordinator.state import CoordinatorState
from services.coordinator.waiting import Want
from services.runtime.errors import CaravanError

V1 = Deployment("demo", "/v1.gguf")
V2 = Deployment("demo", "/v2.gguf")
IDLE, LOADING = engine_pb.ENGINE_PHASE_IDLE, engine_pb.ENGINE_PHASE_LOADING
FAILED, DRAINING = engine_pb.ENGINE_PHASE_FAILED, engine_pb.ENGINE_PHASE_DRAINING
Phase: TypeAlias = engine_pb.EnginePhase.ValueType


@pytest.fixture
def state() -> CoordinatorState:
    """With one gateway."""
    state = CoordinatorState(Limits(rollout_grace_s=60))
    state.join_gateway("gateway", 0.0)
    return state


def apply(state: CoordinatorState, *wanted: Deployment, others: bool = False) -> Effects:
    """Applies deployments that have no mistakes."""
    assert state.deployments.check(wanted, remove_others=others)[1] == []
    return state.deployments.apply(wanted, remove_others=others, now=0.0, wall=100.0)


def join(
    state: CoordinatorState,
    engine_id: str,
    of: Deployment | None,
    phase: Phase = IDLE,
    life: str = "life",
) -> tuple[int, Effects]:
    """An engine of 2 sequences joins for a deployment; None: by hand."""
    info = engine_pb.ModelInfo(name="demo", max_sequences=2, context_tokens=512)
    return state.join_engine(
        engine_id,
        "127.0.0.1:1",
        info,
        engine_pb.EngineLoad(phase=phase, failure="bad tensor" if phase == FAILED else ""),
        now=0.0,
        wall=100.0,
        incarnation=f"{engine_id}-{life}",
        revision="" if of is None else revision(of),
    )


def report(state: CoordinatorState, session: int, phase: Phase) -> Effects:
    """An engine reports a phase."""
    return state.report_engine(session, None, engine_pb.EngineLoad(phase=phase), 0.0)


def route(state: CoordinatorState, request_id: str) -> str | None:
    """The engine that a request gets; None where it waits."""
    want = Want(request_id, "gateway", "demo", f"lease-{request_id}", 0.0, wait_s=10)
    grant = state.route(want)
    return None if grant is None else grant.lease.engine_id


def stands(state: CoordinatorState) -> State:
    """Where the only deployment stands."""
    (kept,) = state.deployments
    return kept.status.state


def test_a_hot_swap(state: CoordinatorState) -> None:
    """Old ones serve until the new one is ready; then all requests go there, and the old one is told to end when it may."""
    apply(state, V1)
    old, _ = join(state, "old", V1)
    assert route(state, "a") == "old"
    apply(state, V2)
    new, effects = join(state, "new", V2, LOADING)
    assert (effects.drains, route(state, "b")) == ((), "old")
    assert route(state, "c") is None
    effects = report(state, new, IDLE)
    assert effects.drains == (DrainEngine(old, 60, stop=True),)
    assert [grant.lease.engine_id for grant in effects.grants] == ["new"]
    assert state.release("lease-a", 0.0) is not None
    assert route(state, "d") == "new"
    assert report(state, old, DRAINING).drains == ()
    (kept,) = state.deployments
    assert (kept.status.state, kept.status.ready, kept.status.former) == (State.SERVING, 1, 1)
    state.end_session(old, 0.0)
    assert kept.status.former == 0
    state.check_integrity()


def test_a_broken_model_takes_nothing_over(state: CoordinatorState) -> None:
    """The new revision fails to load: the deployment says so, and what served serves."""
    apply(state, V1)
    join(state, "old", V1)
    apply(state, V2)
    join(state, "new", V2, FAILED)
    (kept,) = state.deployments
    assert stands(state) is State.FAILED
    assert kept.status.note.startswith("no engine can serve the model: bad tensor; the former")
    assert route(state, "a") == "old"
    effects = apply(state, V1)
    assert [drain.session for drain in effects.drains] == [state.engines.find("new").session]  # type: ignore[union-attr]
    assert stands(state) is State.SERVING


def test_rules_change_without_new_engines(state: CoordinatorState) -> None:
    """Another number of replicas drains nobody."""
    apply(state, V1)
    join(state, "old", V1)
    assert apply(state, Deployment("demo", "/v1.gguf", replicas=3)) == Effects()
    (kept,) = state.deployments
    assert kept.status.note == "1 of 3 engines ready"
    assert route(state, "a") == "old"


def test_a_removal_drains(state: CoordinatorState) -> None:
    """Who waits or comes is told that there is no such model; what runs goes on; then it is gone."""
    apply(state, V1)
    session, _ = join(state, "old", V1)
    assert [route(state, request) for request in "abc"] == ["old", "old", None]
    effects = state.deployments.remove("demo", 0.0)
    assert effects.drains == (DrainEngine(session, 60, stop=True),)
    assert [refusal.error.reason for refusal in effects.refusals] == ["MODEL_NOT_FOUND"]
    assert (effects.cancels, effects.swept) == ((), ())
    with pytest.raises(CaravanError, match="does not exist"):
        route(state, "d")
    (kept,) = state.deployments
    assert (kept.status.state, kept.status.note) == (
        State.DRAINING,
        "removed; 1 engine still to end",
    )
    state.check_integrity()
    state.end_session(session, 0.0)
    assert (len(state.deployments), state.models.find("demo")) == (0, None)


def test_what_was_removed_can_come_back(state: CoordinatorState) -> None:
    """Applied again while its engine ends, it waits for a new one, and is as new."""
    apply(state, V1)
    session, _ = join(state, "old", V1)
    state.deployments.remove("demo", 0.0)
    apply(state, V1)
    report(state, session, DRAINING)
    with pytest.raises(CaravanError, match="shutting down"):
        route(state, "a")
    join(state, "next", V1)
    assert route(state, "b") == "next"


def test_a_deployment_without_an_engine_is_known(state: CoordinatorState) -> None:
    """503, not 404, from the moment it is applied."""
    apply(state, V1)
    with pytest.raises(CaravanError) as caught:
        route(state, "a")
    assert caught.value.reason == "NO_ENGINE"


def test_an_engine_by_hand_serves_a_deployment_that_comes_later(state: CoordinatorState) -> None:
    """It has no revision, and needs none."""
    session, _ = join(state, "hand", None)
    apply(state, Deployment("demo", "/v1.gguf", replicas=0))
    (kept,) = state.deployments
    assert (kept.status.state, kept.status.ready) == (State.SERVING, 1)
    assert route(state, "a") == "hand"
    state.end_session(session, 0.0)
    assert kept.status.state is State.PENDING


def test_a_command_to_drain_counts(state: CoordinatorState) -> None:
    """An engine that a person drains is none that the deployment has ready; put back it is one again."""
    apply(state, V1)
    join(state, "old", V1)
    state.drain_engine("old", 5, stop=False, now=0.0)
    assert stands(state) is State.PENDING
    state.undrain_engine("old", 0.0)
    assert stands(state) is State.SERVING


def resume(
    state: CoordinatorState, request_id: str, lost: str, *, begun: bool = True
) -> str | None:
    """The engine that goes on with a request which the engine `lost` has left; None where it waits."""
    want = Want(
        request_id,
        "gateway",
        "demo",
        f"lease-{request_id}",
        0.0,
        wait_s=10,
        avoid=frozenset({f"{lost}-life"}),
        resumed=True,
        may_fall_back=not begun,
    )
    grant = state.route(want)
    return None if grant is None else grant.lease.engine_id


def test_an_answer_stays_with_its_model(state: CoordinatorState) -> None:
    """Tokens of one revision are never continued by another, whether it serves, is held back, joins or takes over later."""
    apply(state, V1)
    old, _ = join(state, "old", V1)
    other, _ = join(state, "other", V1)
    apply(state, V2)
    new, _ = join(state, "new", V2, LOADING)
    state.end_session(old, 0.0)
    assert resume(state, "a", "old") == "other"
    state.end_session(other, 0.0)
    assert resume(state, "b", "other") is None
    join(state, "newer", V2, LOADING)
    effects = report(state, new, IDLE)
    assert [(r.request_id, r.error.reason) for r in effects.refusals] == [("b", "ENGINE_LOST")]
    assert effects.grants == ()
    with pytest.raises(CaravanError) as caught:
        resume(state, "c", "other")
    assert caught.value.reason == "ENGINE_LOST"
    assert resume(state, "d", "other", begun=False) == "new"
    state.end_session(new, 0.0)
    assert resume(state, "e", "new") is None
    join(state, "next", V2)
    assert state.leases.of_request("e") is not None
    state.check_integrity()


def test_an_answer_does_not_go_to_another_former_revision(state: CoordinatorState) -> None:
    """Two former revisions serve while a third is being loaded: what one began the other does not go on with."""
    apply(state, V1)
    join(state, "old", V1)
    apply(state, V2)
    session, _ = join(state, "new", V2, LOADING)
    apply(state, Deployment("demo", "/v3.gguf"))
    report(state, session, IDLE)
    assert resume(state, "a", "old", begun=False) == "new"
    assert resume(state, "b", "old") is None
    join(state, "older", V1)
    assert state.leases.of_request("b").engine_id == "older"  # type: ignore[union-attr]


def test_lives_are_remembered_in_bounds() -> None:
    """The one seen first is forgotten; engines that do not name their life are not remembered."""
    lineage = Lineage()
    lineage.note("", "x")
    for number in range(LIVES_MAX + 1):
        lineage.note(f"life-{number}", "r")
    assert lineage.of(["", "life-0"]) == frozenset()
    assert lineage.of(["life-1", f"life-{LIVES_MAX}", "unknown"]) == {"r"}


def test_dependents(state: CoordinatorState) -> None:
    """Who falls back to a deployment is known."""
    apply(state, V1, Deployment("big", "/b.gguf", fallback=(Fallback("demo"),)))
    assert state.deployments.dependents("demo") == ["big"]
    assert state.deployments.dependents("big") == []


revisions = st.sampled_from([V1, V2, None])
phases = st.sampled_from([LOADING, IDLE, IDLE, FAILED, DRAINING])
engine_ids = st.sampled_from(["a", "b", "c"])
steps = st.one_of(
    st.tuples(st.just("join"), engine_ids, revisions, phases),
    st.tuples(st.just("report"), engine_ids, phases),
    st.tuples(st.just("end"), engine_ids),
    st.tuples(st.just("apply"), revisions.filter(bool), st.integers(0, 2)),
    st.tuples(st.just("remove")),
    st.tuples(st.just("route")),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=25))
def test_whatever_happens_somebody_serves(row: list[tuple[object, ...]]) -> None:
    """After each step: every bound holds, and no deployment has ready engines of which none may serve."""
    state = CoordinatorState(Limits())
    state.join_gateway("gateway", 0.0)
    for number, (what, *rest) in enumerate(row):
        match what, rest:
            case "join", [str(engine_id), of, phase]:
                join(state, engine_id, of, phase)  # type: ignore[arg-type]
            case "report", [str(engine_id), phase]:
                if (engine := state.engines.find(engine_id)) is not None:
                    report(state, engine.session, phase)  # type: ignore[arg-type]
            case "end", [str(engine_id)]:
                if (engine := state.engines.find(engine_id)) is not None:
                    state.end_session(engine.session, 0.0)
            case "apply", [Deployment() as of, int(replicas)]:
                apply(state, Deployment("demo", of.model, replicas=replicas))
            case "remove", []:
                if "demo" in state.deployments.current():
                    state.deployments.remove("demo", 0.0)
            case _:
                with suppress(CaravanError):
                    route(state, f"req-{number}")
        state.check_integrity()
