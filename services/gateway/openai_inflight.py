"""The requests that wait or run, as the REST API lists them. Pure."""

from __future__ import annotations

from typing import Any, Final

from caravan.coordinator.v1 import coordinator_service_pb2 as coordinator_pb
from caravan.core.v1 import scheduling_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb

_STATUS: Final = {
    coordinator_pb.INFLIGHT_PHASE_QUEUED: "queued",
    coordinator_pb.INFLIGHT_PHASE_RUNNING: "running",
    coordinator_pb.INFLIGHT_PHASE_CANCELLING: "cancelling",
}
_PHASES: Final = {
    engine_pb.REQUEST_PHASE_QUEUED: "queued",
    engine_pb.REQUEST_PHASE_PREFILLING: "prefilling",
    engine_pb.REQUEST_PHASE_GENERATING: "generating",
}


def listed(request: coordinator_pb.InflightRequest) -> dict[str, Any]:
    """One request. A status, priority or phase of a newer service is null; so is a phase that no engine has told yet."""
    return {
        "id": request.request_id,
        "object": "request",
        "model": request.model,
        "status": _STATUS.get(request.phase),
        "priority": _priority(request.priority),
        "engine_id": request.engine_id or None,
        "phase": _PHASES.get(request.engine_phase),
        "prompt_tokens": request.prompt_tokens or None,
        "completion_tokens": request.completion_tokens,
        "age_s": request.age.ToMilliseconds() / 1000,
        "queued_s": request.queued.ToMilliseconds() / 1000,
    }


def _priority(value: scheduling_pb2.Priority.ValueType) -> str | None:
    if value not in scheduling_pb2.Priority.values():
        return None
    return scheduling_pb2.Priority.Name(value).removeprefix("PRIORITY_").lower()
