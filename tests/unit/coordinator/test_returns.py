"""When a request goes back to an engine that lost it."""

from __future__ import annotations

import pytest
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator.leases import Ended
from services.coordinator.limits import RETURN_S, Limits
from services.coordinator.state import CoordinatorState
from services.coordinator.waiting import Want

IDLE = engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_IDLE)


@pytest.fixture
def state() -> CoordinatorState:
    state = CoordinatorState(Limits())
    state.join_gateway("gateway", 0.0)
    return state


def join(state: CoordinatorState, name: str, sequences: int = 2) -> int:
    info = engine_pb.ModelInfo(name="demo", max_sequences=sequences)
    session, _ = state.join_engine(
        name, "127.0.0.1:1", info, IDLE, now=0.0, wall=0.0, incarnation=f"{name}-life"
    )
    return session


def lose(state: CoordinatorState, *engines: str, request_id: str = "lost") -> None:
    """A request that lost these engines at 0 s waits."""
    avoid = frozenset(f"{name}-life" for name in engines)
    want = Want(
        request_id, "gateway", "demo", f"l-{request_id}", 0.0, 30, avoid=avoid, resumed=True
    )
    assert state.route(want) is None


def granted(state: CoordinatorState, now: float) -> list[str]:
    """The engines to which requests go at a time."""
    grants = state.expire_waiting(now).grants
    state.check_integrity()
    return [grant.lease.engine_id for grant in grants]


def test_the_sole_engine_gets_it_back_when_it_was_heard_and_the_time_has_passed(
    state: CoordinatorState,
) -> None:
    """Neither before its time, nor before the engine has said a word."""
    session = join(state, "sole")
    lose(state, "sole")
    assert granted(state, RETURN_S) == []
    state.report_engine(session, None, IDLE, RETURN_S + 1)
    assert granted(state, RETURN_S + 1) == ["sole"]
    lose(state, "sole", request_id="next")
    state.report_engine(session, None, IDLE, 1.0)
    assert granted(state, RETURN_S - 0.1) == []
    assert granted(state, RETURN_S) == ["sole"]


def test_an_engine_that_joins_again_in_the_same_life_gets_it_back(state: CoordinatorState) -> None:
    """It was silent for so long that its session ended."""
    session = join(state, "sole")
    lose(state, "sole")
    state.end_session(session, 3.0)
    assert granted(state, RETURN_S) == []
    state.join_engine(
        "sole",
        "127.0.0.1:1",
        engine_pb.ModelInfo(name="demo", max_sequences=2),
        IDLE,
        now=8.0,
        wall=0.0,
        incarnation="sole-life",
    )
    assert granted(state, 8.0) == ["sole"]


def test_it_waits_for_an_engine_that_did_not_lose_it(state: CoordinatorState) -> None:
    """One that is ready and full serves it better than one that failed it."""
    lost, _ = join(state, "lost"), join(state, "full", sequences=1)
    state.hold_back(state.engines.find("lost"), True, 0.0)  # type: ignore[arg-type]  # noqa: FBT003
    grant = state.route(Want("other", "gateway", "demo", "l-other", 0.0))
    assert grant is not None
    state.hold_back(state.engines.find("lost"), False, 0.0)  # type: ignore[arg-type]  # noqa: FBT003
    lose(state, "lost")
    state.report_engine(lost, None, IDLE, 2 * RETURN_S)
    assert granted(state, 2 * RETURN_S) == []
    effects = state.release("l-other", 2 * RETURN_S)
    assert effects is not None
    assert [grant.lease.engine_id for grant in effects.grants] == ["full"]


def test_suspects_come_last(state: CoordinatorState) -> None:
    """Of two that lost it, it goes to the one on which something has ended well since."""
    sessions = [join(state, name) for name in ("a", "b")]
    grants = [state.route(Want(f"r-{n}", "gateway", "demo", f"l-{n}", 0.0)) for n in range(2)]
    badly = grants[0].lease.engine_id  # type: ignore[union-attr]
    lose(state, "a", "b")
    state.release("l-0", 0.5, Ended.BADLY)
    state.release("l-1", 0.5, Ended.WELL)
    for session in sessions:
        state.report_engine(session, None, IDLE, RETURN_S)
    assert granted(state, RETURN_S) == [{"a": "b", "b": "a"}[badly]]
