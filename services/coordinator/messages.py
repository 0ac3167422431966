"""What goes out over the contract of the coordinator, built from the values of the state."""

from __future__ import annotations

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.core.v1 import scheduling_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from google.protobuf import timestamp_pb2
from google.protobuf.duration_pb2 import Duration

from services.coordinator.effects import CancelRequest, DrainEngine, Grant, UndrainEngine
from services.coordinator.engines import EngineRecord
from services.coordinator.leases import Lease
from services.coordinator.models import ModelRecord
from services.coordinator.tasks import Priority
from services.coordinator.waiting import Want
from services.runtime.errors import CaravanError

_TOLD_PRIORITIES: dict[Priority, scheduling_pb2.Priority.ValueType] = {
    Priority.CRITICAL: scheduling_pb2.PRIORITY_CRITICAL,
    Priority.HIGH: scheduling_pb2.PRIORITY_HIGH,
    Priority.NORMAL: scheduling_pb2.PRIORITY_NORMAL,
    Priority.BACKGROUND: scheduling_pb2.PRIORITY_BACKGROUND,
}


def to_duration(seconds: float) -> Duration:
    """Seconds, not below zero, as a Duration of whole microseconds."""
    duration = Duration()
    duration.FromMicroseconds(max(0, round(seconds * 1e6)))
    return duration


def to_timestamp(wall: float) -> timestamp_pb2.Timestamp:
    """Seconds since the epoch as a Timestamp of whole microseconds."""
    timestamp = timestamp_pb2.Timestamp()
    timestamp.FromMicroseconds(round(wall * 1e6))
    return timestamp


def to_route(grant: Grant) -> pb.RouteResponse:
    """A grant as its gateway sees it."""
    lease = grant.lease
    told = pb.Lease(
        lease_id=lease.lease_id,
        engine_id=lease.engine_id,
        address=grant.address,
        incarnation=lease.incarnation,
    )
    return pb.RouteResponse(
        lease=told,
        queued=to_duration(lease.granted_at - lease.arrived_at),
        model=lease.model,
        idempotent=grant.idempotent,
        priority=_TOLD_PRIORITIES[lease.priority],
    )


def to_answer(request_id: str, answer: pb.RouteResponse | CaravanError) -> pb.RouteAnswer:
    """What became of a route that was asked for on a session, as its gateway sees it."""
    if isinstance(answer, CaravanError):
        return pb.RouteAnswer(request_id=request_id, refused=answer.to_status())
    return pb.RouteAnswer(request_id=request_id, granted=answer)


def to_command(command: CancelRequest | DrainEngine | UndrainEngine) -> pb.JoinEngineResponse:
    """A command as its engine sees it."""
    if isinstance(command, CancelRequest):
        return pb.JoinEngineResponse(cancel=pb.CancelCommand(request_id=command.request_id))
    if isinstance(command, DrainEngine):
        drain = pb.DrainCommand(grace=to_duration(command.grace_s), stop=command.stop)
        return pb.JoinEngineResponse(drain=drain)
    return pb.JoinEngineResponse(undrain=pb.UndrainCommand())


def to_running(
    lease: Lease, now: float, told: engine_pb.InflightRequest | None, *, is_cancelling: bool
) -> pb.InflightRequest:
    """A lease as the list of requests in flight shows it; `told` is what its engine last said of the request."""
    shown = pb.InflightRequest() if told is None else _to_progress(told)
    shown.MergeFrom(_to_leased(lease, now, is_cancelling=is_cancelling))
    return shown


def _to_progress(told: engine_pb.InflightRequest) -> pb.InflightRequest:
    return pb.InflightRequest(
        engine_phase=told.phase,
        prompt_tokens=told.prompt_tokens,
        completion_tokens=told.completion_tokens,
    )


def _to_leased(lease: Lease, now: float, *, is_cancelling: bool) -> pb.InflightRequest:
    return pb.InflightRequest(
        request_id=lease.request_id,
        model=lease.model,
        engine_id=lease.engine_id,
        gateway_id=lease.gateway_id,
        lease_id=lease.lease_id,
        age=to_duration(now - lease.arrived_at),
        phase=pb.INFLIGHT_PHASE_CANCELLING if is_cancelling else pb.INFLIGHT_PHASE_RUNNING,
        tenant=lease.tenant,
        priority=_TOLD_PRIORITIES[lease.priority],
        queued=to_duration(lease.granted_at - lease.arrived_at),
    )


def to_queued(want: Want, now: float) -> pb.InflightRequest:
    """A request that waits as the list of requests in flight shows it."""
    waited = to_duration(now - want.arrived_at)
    return pb.InflightRequest(
        request_id=want.request_id,
        model=want.model,
        gateway_id=want.gateway_id,
        age=waited,
        phase=pb.INFLIGHT_PHASE_QUEUED,
        tenant=want.tenant,
        priority=_TOLD_PRIORITIES[want.priority],
        queued=waited,
    )


def to_engine(engine: EngineRecord, now: float) -> pb.Engine:
    """An engine as the list of engines shows it."""
    return pb.Engine(
        engine_id=engine.engine_id,
        address=engine.address,
        model=engine.model,
        load=engine.load,
        leases=engine.held,
        report_age=to_duration(now - engine.reported_at),
        written_off=engine.written_off,
        incarnation=engine.incarnation,
        revision=engine.revision,
        drained=engine.is_drained,
        held_back=engine.is_held_back,
        suspect=engine.is_suspect,
    )


def to_model(model: ModelRecord) -> pb.Model:
    """A model as the list of models shows it."""
    return pb.Model(
        name=model.name,
        created=to_timestamp(model.created_at) if model.created_at else None,
        context_tokens=model.context_tokens,
        ready_engines=model.ready_engines,
        in_flight=model.queue.in_flight_count,
        capacity=model.limit,
        queued=model.queue.queued_count,
    )
