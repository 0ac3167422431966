"""Requests in flight as the REST API lists them."""

from __future__ import annotations

from caravan.coordinator.v1 import coordinator_service_pb2 as coordinator_pb
from caravan.core.v1 import scheduling_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.gateway.openai_inflight import listed


def test_a_request_that_generates() -> None:
    """What the coordinator knows and what the engine has told."""
    request = coordinator_pb.InflightRequest(
        request_id="req-1",
        model="demo",
        engine_id="engine-0",
        phase=coordinator_pb.INFLIGHT_PHASE_RUNNING,
        priority=scheduling_pb2.PRIORITY_HIGH,
        engine_phase=engine_pb.REQUEST_PHASE_GENERATING,
        prompt_tokens=17,
        completion_tokens=4,
    )
    request.age.FromMilliseconds(2500)
    assert listed(request) == {
        "id": "req-1",
        "object": "request",
        "model": "demo",
        "status": "running",
        "priority": "high",
        "engine_id": "engine-0",
        "phase": "generating",
        "prompt_tokens": 17,
        "completion_tokens": 4,
        "age_s": 2.5,
        "queued_s": 0.0,
    }


def test_what_nobody_has_told_is_null() -> None:
    """A request whose engine has not reported yet has no phase and no prompt."""
    shown = listed(coordinator_pb.InflightRequest(request_id="req-1"))
    unknown = ("status", "engine_id", "phase", "prompt_tokens")
    assert [shown[name] for name in unknown] == [None] * 4
    assert shown["completion_tokens"] == 0
