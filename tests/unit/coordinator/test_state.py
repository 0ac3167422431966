"""Rules of sessions and models that single steps show best; test_state_machine.py has the rest."""

from __future__ import annotations

import pytest
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator.deployment import Deployment, Serving
from services.coordinator.effects import (
    CancelRequest,
    DrainEngine,
    Effects,
    Ending,
    UndrainEngine,
)
from services.coordinator.limits import Limits
from services.coordinator.models import ABANDONED_MODELS_MAX
from services.coordinator.state import CoordinatorState
from services.coordinator.waiting import Want
from services.runtime.errors import CaravanError
from tests.support.refusals import attempt

LOAD = engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_IDLE)


def join(
    state: CoordinatorState,
    engine_id: str = "engine",
    model: str = "demo",
    now: float = 0.0,
    life: str = "first",
    load: engine_pb.EngineLoad = LOAD,
) -> tuple[int, Effects]:
    """Registers an engine of 2 sequences at the wall time 100."""
    info = engine_pb.ModelInfo(name=model, max_sequences=2, context_tokens=512)
    return state.join_engine(
        engine_id, "127.0.0.1:1", info, load, now=now, wall=100.0, incarnation=f"{engine_id}-{life}"
    )


def route(state: CoordinatorState, request_id: str = "req-1", model: str = "demo") -> str:
    """Grants a lease; returns its id."""
    grant = state.route(Want(request_id, "gateway", model, f"lease-{request_id}", 0.0))
    assert grant is not None
    return grant.lease.lease_id


def reason(state: CoordinatorState, model: str = "demo") -> str:
    """The reason for which a route is refused."""
    with pytest.raises(CaravanError) as caught:
        route(state, "req-x", model)
    return caught.value.reason


def test_a_late_end_of_a_replaced_session_is_nothing() -> None:
    """The old stream of an engine that came back ends after the new one began: the new one and its leases stay."""
    state = CoordinatorState(Limits())
    state.join_gateway("gateway", 0.0)
    old, _ = join(state)
    route(state, "req-1")
    new, effects = join(state, life="second")
    assert [lease.request_id for lease in effects.swept] == ["req-1"]
    assert [(e.session, e.why) for e in effects.endings] == [(old, Ending.REPLACED)]
    route(state, "req-2")
    assert state.end_session(old, 0.0) == Effects()
    assert state.leases.on_engine("engine") == 1
    with pytest.raises(CaravanError, match="not known"):
        state.report_engine(old, None, LOAD, 0.0)
    state.report_engine(new, None, LOAD, 0.0)


def test_a_gateway_that_dies_cancels_at_each_engine() -> None:
    """Each swept request is cancelled on the session of the engine that ran it, if the gateway does not come back (I5, I6)."""
    state = CoordinatorState(Limits())
    gateway, _ = state.join_gateway("gateway", 0.0)
    sessions = [join(state, "a")[0], join(state, "b")[0]]
    route(state, "req-1")
    route(state, "req-2")
    effects = state.end_session(gateway, 0.0)
    assert (len(effects.swept), len(state.leases), effects.cancels) == (2, 0, ())
    for session in sessions:
        state.report_engine(session, None, LOAD, 7.5)
    state.expire(7.5)
    assert set(state.expire(8.0).cancels) == {
        CancelRequest(sessions[0], "req-1"),
        CancelRequest(sessions[1], "req-2"),
    }


def test_a_process_that_stood_still_judges_nobody() -> None:
    """After a pause of the coordinator itself, peers get an interval to be heard before silence counts."""
    state = CoordinatorState(Limits())
    session, _ = join(state, now=0.0)
    state.expire(0.5)
    assert state.expire(60.0) == Effects()
    state.report_engine(session, None, LOAD, 60.2)
    assert state.expire(60.5) == Effects()
    for tick in range(6):
        effects = state.expire(61.0 + tick / 2)
    assert [(e.session, e.why) for e in effects.endings] == [(session, Ending.SILENT)]


def test_a_command_that_the_stream_has_lost_is_said_again() -> None:
    """To the same life of the engine, with what is left of the grace; what was said last counts."""
    state = CoordinatorState(Limits())
    state.join_gateway("gateway", 0.0)
    session, _ = join(state)
    state.drain_engine("engine", 10.0, stop=True, now=0.0)
    state.end_session(session, 1.0)
    session, effects = join(state, now=4.0)
    assert effects.drains == (DrainEngine(session, 6.0, stop=True),)
    assert reason(state) == "NO_ENGINE"
    state.undrain_engine("engine", 5.0)
    state.end_session(session, 6.0)
    draining = engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_DRAINING)
    session, effects = join(state, now=7.0, load=draining)
    assert effects.undrains == (UndrainEngine(session),)
    state.end_session(session, 8.0)
    session, effects = join(state, now=9.0)
    assert (effects.undrains, effects.drains) == ((), ())
    # Another life of the process was told nothing.
    state.drain_engine("engine", 10.0, stop=False, now=10.0)
    state.end_session(session, 11.0)
    assert join(state, now=12.0, life="second")[1].drains == ()


def test_an_abandoned_model_is_remembered_for_a_while() -> None:
    """Without engines a model answers NO_ENGINE (503) for the time of memory, then MODEL_NOT_FOUND (404)."""
    state = CoordinatorState(Limits(model_memory_s=10))
    state.join_gateway("gateway", 0.0)
    session, _ = join(state)
    state.end_session(session, 5.0)
    state.models.expire(14.9)
    assert reason(state) == "NO_ENGINE"
    (model,) = state.models
    assert (model.created_at, model.context_tokens, model.ready_engines) == (100.0, 512, 0)
    state.models.expire(15.0)
    assert reason(state) == "MODEL_NOT_FOUND"


def test_a_model_for_which_requests_wait_is_not_forgotten() -> None:
    """They may still be served by an engine that comes back; when their time is over they are told that none did."""
    state = CoordinatorState(Limits(model_memory_s=10, queue_s=60))
    state.join_gateway("gateway", 0.0)
    session, _ = join(state)
    route(state, "req-1")
    route(state, "req-2")
    assert state.route(Want("req-3", "gateway", "demo", "lease-3", 0.0, wait_s=60)) is None
    state.end_session(session, 5.0)
    state.models.expire(59.0)
    assert state.models.find("demo") is not None
    effects = state.expire_waiting(60.0)
    assert [(r.request_id, r.error.reason) for r in effects.refusals] == [("req-3", "NO_ENGINE")]
    state.models.expire(60.0)
    assert state.models.find("demo") is None


def test_a_draining_engine_does_not_hide_the_room_of_another() -> None:
    """Its leases do not count against the room of engines that are ready."""
    state = CoordinatorState(Limits())
    state.join_gateway("gateway", 0.0)
    session, _ = join(state, "a")
    route(state, "req-1")
    route(state, "req-2")
    draining = engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_DRAINING)
    state.report_engine(session, None, draining, 0.0)
    join(state, "b")
    for number in (3, 4):
        assert route(state, f"req-{number}")
    state.release("lease-req-1", 0.0)
    assert reason(state) == "CAPACITY_EXHAUSTED"
    state.check_integrity()


def test_a_model_that_comes_back_is_not_forgotten() -> None:
    """An engine that returns in time keeps its model, and the model its time of creation."""
    state = CoordinatorState(Limits(model_memory_s=10))
    session, _ = join(state)
    state.end_session(session, 0.0)
    join(state, now=9.0)
    state.models.expire(100.0)
    assert [model.name for model in state.models] == ["demo"]


def test_abandoned_models_are_bounded() -> None:
    """An engine that restarts under ever new names cannot grow the table (I4); the oldest are forgotten first."""
    state = CoordinatorState(Limits())
    for number in range(ABANDONED_MODELS_MAX + 10):
        session, _ = join(state, model=f"model-{number}")
        state.end_session(session, float(number))
    assert len(state.models) == ABANDONED_MODELS_MAX
    assert state.models.find("model-9") is None
    assert state.models.find("model-10") is not None


def test_the_context_of_a_model_is_the_least_of_its_engines() -> None:
    """A request that fits the model fits every engine; an engine that does not know yet does not count."""
    state = CoordinatorState(Limits())
    join(state, "a")
    for engine_id, tokens in (("b", 256), ("c", 0)):
        info = engine_pb.ModelInfo(name="demo", context_tokens=tokens)
        state.join_engine(engine_id, "127.0.0.1:1", info, LOAD, now=0.0, wall=0.0)
    (model,) = state.models
    assert (model.context_tokens, model.ready_engines) == (256, 3)


def test_a_cancel_is_repeated_until_the_lease_ends() -> None:
    """A cancel may reach the engine before its request: each report is answered by it while the lease is held (I5)."""
    state = CoordinatorState(Limits())
    state.join_gateway("gateway", 0.0)
    session, _ = join(state)
    lease_id = route(state)
    assert state.report_engine(session, None, LOAD, 0.0) == Effects()
    state.cancel("req-1", 0.0)
    again = state.report_engine(session, None, LOAD, 0.0)
    assert again.cancels == (CancelRequest(session, "req-1"),)
    state.release(lease_id, 0.0)
    assert state.report_engine(session, None, LOAD, 0.0) == Effects()


def test_draining_ends_sessions_without_cancels() -> None:
    """What runs goes on; what comes is refused with DRAINING and a retry time."""
    state = CoordinatorState(Limits())
    gateway, _ = state.join_gateway("gateway", 0.0)
    engine, _ = join(state)
    route(state)
    effects = state.drain(0.0)
    assert effects.cancels == ()
    assert {(e.session, e.why) for e in effects.endings} == {
        (gateway, Ending.DRAINING),
        (engine, Ending.DRAINING),
    }
    assert len(state.leases) == 0
    assert reason(state) == "DRAINING"
    with pytest.raises(CaravanError, match="shutting down"):
        state.join_gateway("gateway", 0.0)
    with pytest.raises(CaravanError, match="shutting down"):
        join(state)


def test_a_coordinator_that_starts_lets_requests_wait_for_engines_to_join() -> None:
    """For as long as an engine may take to join again; then those who wait for what does not exist are told so."""
    state = CoordinatorState(Limits(queue_s=60), learning_until=8.0)
    state.join_gateway("gateway", 0.0)
    for request_id, model in (("early", "demo"), ("wrong", "typo"), ("ruled", "ruled")):
        want = Want(request_id, "gateway", model, f"lease-{request_id}", 1.0, wait_s=60)
        assert state.route(want) is None
    assert reason(state, "nobody") == "MODEL_NOT_FOUND"  # It does not wait.
    state.set_rules("ruled", Deployment("ruled", "m"), 1.0, 1.0)
    _, effects = join(state, now=2.0)
    assert [grant.lease.request_id for grant in effects.grants] == ["early"]
    assert state.expire_waiting(7.9) == Effects()
    effects = state.expire_waiting(8.0)
    assert {(r.request_id, r.error.reason) for r in effects.refusals} == {
        ("wrong", "MODEL_NOT_FOUND"),
        ("ruled", "NO_ENGINE"),
    }
    assert {model.name for model in state.models} == {"demo", "ruled"}
    late = Want("late", "gateway", "typo", "lease-late", 8.0, wait_s=60)
    with pytest.raises(CaravanError) as caught:
        state.route(late)
    assert caught.value.reason == "MODEL_NOT_FOUND"
    state.check_integrity()


def test_a_loading_engine_does_not_hide_those_that_have_not_joined_yet() -> None:
    """It was started again, and joins before one that is ready: requests wait; in the end they are told that it loads."""
    state = CoordinatorState(Limits(queue_s=60), learning_until=8.0)
    state.join_gateway("gateway", 0.0)
    loading = engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_LOADING)
    for number, model in enumerate(("demo", "other")):
        info = engine_pb.ModelInfo(name=model, max_sequences=2)
        engine_id = f"again-{number}"
        state.join_engine(
            engine_id, "127.0.0.1:2", info, loading, now=0.5, wall=100.0, incarnation=engine_id
        )
        want = Want(f"for-{model}", "gateway", model, f"lease-{model}", 1.0, wait_s=60)
        assert state.route(want) is None
    _, effects = join(state, now=2.0)
    assert [grant.lease.request_id for grant in effects.grants] == ["for-demo"]
    told = [(r.request_id, r.error.reason) for r in state.expire_waiting(8.0).refusals]
    assert told == [("for-other", "MODEL_LOADING")]
    state.check_integrity()


def test_who_knows_its_deployments_refuses_other_names_at_once() -> None:
    """A typing error in the first seconds is answered as one, and a deployment whose engines are on their way is waited for."""
    state = CoordinatorState(Limits(queue_s=60), learning_until=8.0)
    state.join_gateway("gateway", 0.0)
    state.set_rules("demo", Deployment("demo", "m"), 0.0, 0.0)
    with pytest.raises(CaravanError) as caught:
        state.route(Want("wrong", "gateway", "typo", "lease-wrong", 1.0, wait_s=60))
    assert caught.value.reason == "MODEL_NOT_FOUND"
    assert state.route(Want("early", "gateway", "demo", "lease-early", 1.0, wait_s=60)) is None
    state.check_integrity()


def test_a_starting_coordinator_queues_no_more_than_its_bound() -> None:
    """Names that nobody serves cannot fill it (I4), and leave nothing behind."""
    state = CoordinatorState(Limits(queued_max=2, leases_max=5), learning_until=8.0)
    state.join_gateway("gateway", 0.0)
    reasons = []
    for number in range(8):
        want = Want(f"r{number}", "gateway", f"m{number % 2}", f"l{number}", 0.0, wait_s=9)
        reasons.append(attempt(lambda w=want: state.route(w))[1])  # type: ignore[misc]
    assert reasons == [None] * 4 + ["NO_ENGINE"] * 4
    state.expire_waiting(8.0)
    assert (len(state.waiting), len(state.models)) == (0, 0)


def test_a_request_that_runs_again_is_not_cancelled_for_its_former_gateway() -> None:
    """Its client came back through another gateway, under the same id, on the same engine."""
    state = CoordinatorState(Limits())
    doomed, _ = state.join_gateway("doomed", 0.0)
    session, _ = join(state)
    state.route(Want("req-1", "doomed", "demo", "lease-1", 0.0))
    state.route(Want("req-2", "doomed", "demo", "lease-2", 0.0))
    state.end_session(doomed, 0.0)
    gateway, _ = state.join_gateway("gateway", 0.0)
    route(state, "req-1")
    state.report_engine(session, None, LOAD, 8.0)
    state.hear_gateway(gateway, 8.0)
    assert state.expire(8.0).cancels == (CancelRequest(session, "req-2"),)


def test_an_engine_that_changes_its_model_makes_way_under_the_limit_of_the_former() -> None:
    """What it ran counted against `max_concurrent`; another engine of the model has room for who waits."""
    state = CoordinatorState(Limits())
    state.join_gateway("gateway", 0.0)
    state.set_rules("demo", Deployment("demo", "m", serving=Serving(max_concurrent=1)), 0.0, 0.0)
    join(state, "a")
    route(state, "req-1")
    join(state, "b")
    assert state.route(Want("req-2", "gateway", "demo", "lease-2", 0.0, wait_s=9)) is None
    _, effects = join(state, "a", model="other")
    assert [(g.lease.request_id, g.lease.engine_id) for g in effects.grants] == [("req-2", "b")]
    state.check_integrity()
