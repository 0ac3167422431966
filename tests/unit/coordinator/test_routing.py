"""Which engine is chosen, and what is said where none can be."""

from __future__ import annotations

from collections import Counter

import pytest
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.limits import Limits
from services.coordinator.refusals import capacity_retry_s
from services.coordinator.state import CoordinatorState
from services.coordinator.waiting import Want
from services.runtime.errors import CaravanError

IDLE = engine_pb.ENGINE_PHASE_IDLE


class World:
    """A state with one gateway, engines as told, and a count of requests."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.state = CoordinatorState(limits or Limits())
        self.state.join_gateway("gateway", 0.0)
        self.requests = 0

    def engine(
        self,
        engine_id: str,
        capacity: int = 4,
        phase: engine_pb.EnginePhase.ValueType = IDLE,
        progress: float = 0.0,
        failure: str = "",
    ) -> int:
        """Adds an engine; returns its session."""
        model = engine_pb.ModelInfo(name="demo", max_sequences=capacity)
        load = engine_pb.EngineLoad(phase=phase, load_progress=progress, failure=failure)
        session, _ = self.state.join_engine(
            engine_id, "127.0.0.1:1", model, load, now=0.0, wall=0.0
        )
        return session

    def route(self, now: float = 0.0) -> str:
        """Grants a lease for a new request; returns the engine. The lease is `lease-N` for the Nth request."""
        self.requests += 1
        number = self.requests
        grant = self.state.route(Want(f"req-{number}", "gateway", "demo", f"lease-{number}", now))
        assert grant is not None
        return grant.lease.engine_id

    def refusal(self) -> CaravanError:
        """The error of a route that must be refused."""
        with pytest.raises(CaravanError) as caught:
            self.route()
        return caught.value


def test_ties_are_broken_fairly() -> None:
    """Requests that come one after the other, each ended before the next, go to all engines in turn (W5)."""
    world = World()
    for number in range(3):
        world.engine(f"engine-{number}")
    chosen = Counter[str]()
    for number in range(1, 31):
        chosen[world.route()] += 1
        world.state.release(f"lease-{number}", 0.0)
    assert set(chosen.values()) == {10}


def test_load_is_relative_to_capacity() -> None:
    """An engine with three times the sequences gets three times the requests."""
    world = World()
    world.engine("small", capacity=4)
    world.engine("large", capacity=12)
    assert Counter(world.route() for _ in range(8)) == {"small": 2, "large": 6}


def test_a_burst_between_two_reports_spreads() -> None:
    """The coordinator's own count decides: a stale report of an idle engine does not attract a burst."""
    world = World()
    sessions = [world.engine("a"), world.engine("b")]
    for _ in range(4):
        world.route()
        for session in sessions:
            load = engine_pb.EngineLoad(phase=IDLE, active_sequences=0)
            world.state.report_engine(session, None, load, 0.0)
    leases = world.state.leases
    assert (leases.on_engine("a"), leases.on_engine("b")) == (2, 2)


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(engine_pb.EnginePhase.values())), max_size=5
    )
)
def test_no_engine_is_ever_given_more_than_it_holds(
    engines: list[tuple[int, engine_pb.EnginePhase.ValueType]],
) -> None:
    """Exactly the sum of the ready capacities is granted, whatever else is there, and then refused."""
    world = World(Limits(leases_per_engine_max=4))
    ready = {"IDLE", "PREFILLING", "GENERATING"}
    room = 0
    for number, (capacity, phase) in enumerate(engines):
        world.engine(f"engine-{number}", capacity, phase)
        name = engine_pb.EnginePhase.Name(phase).removeprefix("ENGINE_PHASE_")
        room += min(capacity, 4) if name in ready else 0
    for _ in range(room):
        world.route()
    expected = {"CAPACITY_EXHAUSTED", "MODEL_LOADING", "NO_ENGINE", "MODEL_NOT_FOUND"}
    assert world.refusal().reason in expected
    world.state.check_integrity()
    for engine in world.state.engines:
        assert world.state.leases.on_engine(engine.engine_id) <= engine.capacity


def test_the_refusal_closest_to_being_served_wins() -> None:
    """A full engine beside a loading one: come back for a sequence. A loading one beside a failed one: loading."""
    world = World()
    world.engine("failed", phase=engine_pb.ENGINE_PHASE_FAILED, failure="no such file")
    failed = world.refusal()
    assert failed.reason == "NO_ENGINE"
    assert "no such file" in failed.message
    world.engine("loading", phase=engine_pb.ENGINE_PHASE_LOADING, progress=0.4)
    loading = world.refusal()
    assert loading.reason == "MODEL_LOADING"
    assert "40%" in loading.message
    world.engine("full", capacity=1)
    assert world.route() == "full"
    full = world.refusal()
    assert full.metadata == {
        "model": "demo",
        "active": "1",
        "capacity": "1",
        "queued": "0",
        "max_queued": "256",
    }


def test_the_retry_time_follows_the_duration_of_leases() -> None:
    """With leases of 40 s on 4 sequences one is free every 10 s; bounds hold; without knowledge it is the minimum."""
    world = World()
    world.engine("engine", capacity=4)
    for _ in range(4):
        world.route(now=0.0)
    assert world.refusal().retry_after_s == 1.0
    for number in range(1, 5):
        world.state.release(f"lease-{number}", now=40.0)
    world.requests = 10
    for _ in range(4):
        world.route(now=40.0)
    assert world.refusal().retry_after_s == pytest.approx(10.0)
    assert capacity_retry_s(10_000.0, 1, 0) == 30.0
    assert capacity_retry_s(0.001, 64, 0) == 1.0
    assert capacity_retry_s(5.0, 0, 0) == 1.0
    assert capacity_retry_s(8.0, 4, 3) == 8.0
