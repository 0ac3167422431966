"""The series of the coordinator."""

from __future__ import annotations

import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from prometheus_client import CollectorRegistry

from services.coordinator.deployment import Deployment
from services.coordinator.deployment_status import State
from services.coordinator.limits import Limits
from services.coordinator.metrics import CoordinatorMetrics
from services.coordinator.state import CoordinatorState


def test_engines_are_counted_by_phase() -> None:
    """The gauge follows the state; a phase of a later version counts as unspecified, not as a new label."""
    registry, state = CollectorRegistry(), CoordinatorState(Limits())
    CoordinatorMetrics(registry, state)
    for number, phase in enumerate((2, 2, 6, 99)):
        load = engine_pb.EngineLoad()
        load.MergeFromString(bytes([0x08, phase]))
        model = engine_pb.ModelInfo(name="demo")
        state.join_engine(f"e{number}", "127.0.0.1:1", model, load, now=0, wall=0)
    values = {
        phase: registry.get_sample_value("caravan_engines", {"phase": phase})
        for phase in ("idle", "failed", "loading", "unspecified")
    }
    assert values == {"idle": 2, "failed": 1, "loading": 0, "unspecified": 1}


def test_deployments_are_counted_by_state() -> None:
    """Where they stand, each state shown from the start."""
    registry, state = CollectorRegistry(), CoordinatorState(Limits())
    CoordinatorMetrics(registry, state)

    def shown(stands: str) -> float | None:
        return registry.get_sample_value("caravan_deployments", {"state": stands})

    assert [shown(one.value) for one in State] == [0, 0, 0, 0]
    demo = Deployment("demo", "/m.gguf")
    state.deployments.apply([demo], remove_others=False, now=0, wall=0)
    assert (shown("pending"), shown("serving")) == (1, 0)


def test_labels_are_bounded() -> None:
    """An outcome that is not known counts as unspecified, and a result outside the error table is a defect."""
    registry, state = CollectorRegistry(), CoordinatorState(Limits())
    metrics = CoordinatorMetrics(registry, state)
    metrics.count_release(pb.OUTCOME_CANCELLED)
    metrics.count_release(77)
    for outcome in ("cancelled", "unspecified"):
        assert registry.get_sample_value("caravan_releases_total", {"outcome": outcome}) == 1
    with pytest.raises(AssertionError):
        metrics.count_refusal("req-1")
