"""Between the messages of the contract and the values of the state: checks what comes in, builds what goes out."""

from __future__ import annotations

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.core.v1 import scheduling_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from google.protobuf import timestamp_pb2
from google.protobuf.duration_pb2 import Duration

from services.coordinator.effects import Grant
from services.coordinator.engines import EngineRecord
from services.coordinator.leases import Lease
from services.coordinator.models import ModelRecord
from services.coordinator.tasks import Priority
from services.coordinator.waiting import Want
from services.runtime.errors import CaravanError
from services.runtime.settings import peer_address

ID_BYTES_MAX = 128
TEXT_BYTES_MAX = 2_048
"""Longest free text that is kept of an engine (description, failure); longer ones are cut."""

AFFINITY_MAX = 64
"""Most hashes of a prompt, and most bytes of one."""

_PRIORITIES: dict[int, Priority] = {
    scheduling_pb2.PRIORITY_UNSPECIFIED: Priority.NORMAL,
    scheduling_pb2.PRIORITY_CRITICAL: Priority.CRITICAL,
    scheduling_pb2.PRIORITY_HIGH: Priority.HIGH,
    scheduling_pb2.PRIORITY_NORMAL: Priority.NORMAL,
    scheduling_pb2.PRIORITY_BACKGROUND: Priority.BACKGROUND,
}
_TOLD_PRIORITIES: dict[Priority, scheduling_pb2.Priority.ValueType] = {
    Priority.CRITICAL: scheduling_pb2.PRIORITY_CRITICAL,
    Priority.HIGH: scheduling_pb2.PRIORITY_HIGH,
    Priority.NORMAL: scheduling_pb2.PRIORITY_NORMAL,
    Priority.BACKGROUND: scheduling_pb2.PRIORITY_BACKGROUND,
}


def checked_id(param: str, value: str) -> str:
    """An id or name of 1 to 128 bytes. Raises CaravanError: MISSING_FIELD, INVALID_VALUE."""
    if not value:
        raise CaravanError("MISSING_FIELD", f"'{param}' is missing.", param=param)
    if len(value.encode()) > ID_BYTES_MAX:
        raise CaravanError(
            "INVALID_VALUE", f"'{param}' is longer than {ID_BYTES_MAX} bytes.", param=param
        )
    return value


def checked_optional_id(param: str, value: str) -> str:
    """An id or name of at most 128 bytes, or none. Raises CaravanError: INVALID_VALUE."""
    return checked_id(param, value) if value else ""


def checked_want(request: pb.RouteRequest, *, lease_id: str, queue_s: float, now: float) -> Want:
    """What a route asks for; `queue_s` is the time to wait where it says nothing.

    Raises CaravanError: MISSING_FIELD, INVALID_VALUE.
    """
    priority = _PRIORITIES.get(request.priority)
    if priority is None:
        raise _invalid("priority", "'priority' is not one of the known ones.")
    wait_s = request.max_wait.ToNanoseconds() / 1e9 if request.HasField("max_wait") else queue_s
    if wait_s < 0:
        raise _invalid("max_wait", "'max_wait' is negative.")
    if len(request.affinity) > AFFINITY_MAX or any(
        len(prefix) > AFFINITY_MAX for prefix in request.affinity
    ):
        raise _invalid(
            "affinity", f"'affinity' has more than {AFFINITY_MAX} hashes, or one has more bytes."
        )
    return Want(
        checked_id("request_id", request.request_id),
        checked_id("gateway_id", request.gateway_id),
        checked_id("model", request.model),
        lease_id,
        now,
        wait_s=wait_s,
        priority=priority,
        tenant=checked_optional_id("tenant", request.tenant),
        affinity=tuple(request.affinity),
        session_id=checked_optional_id("session_id", request.session_id),
    )


def _invalid(param: str, message: str) -> CaravanError:
    return CaravanError("INVALID_VALUE", message, param=param)


def checked_registration(request: pb.JoinEngineRequest) -> pb.EngineRegistration:
    """The registration in the first message of an engine. Raises CaravanError: MISSING_FIELD, INVALID_VALUE."""
    if request.WhichOneof("message") != "register":
        raise CaravanError(
            "MISSING_FIELD", "The first message must be 'register'.", param="register"
        )
    registration = request.register
    checked_id("register.engine_id", registration.engine_id)
    checked_id("register.address", registration.address)
    checked_id("register.model.name", registration.model.name)
    try:
        peer_address(registration.address)
    except ValueError as error:
        raise CaravanError(
            "INVALID_VALUE", f"'register.address' is {error}.", param="register.address"
        ) from error
    _bound_model(registration.model)
    _bound_load(registration.load)
    return registration


def checked_report(request: pb.JoinEngineRequest) -> pb.EngineReport:
    """The report in a later message of an engine. Raises CaravanError: MISSING_FIELD, INVALID_VALUE."""
    kind = request.WhichOneof("message")
    if kind == "register":
        raise CaravanError(
            "INVALID_VALUE", "An engine registers once, in its first message.", param="register"
        )
    if kind is None:
        raise CaravanError("MISSING_FIELD", "'report' is missing.", param="report")
    report = request.report
    if report.HasField("model"):
        checked_id("report.model.name", report.model.name)
        _bound_model(report.model)
    _bound_load(report.load)
    return report


def _bound_model(model: engine_pb.ModelInfo) -> None:
    model.description = _cut(model.description)


def _bound_load(load: engine_pb.EngineLoad) -> None:
    load.failure = _cut(load.failure)
    # NaN compares false with everything, so it becomes 0 too.
    load.load_progress = min(load.load_progress, 1.0) if load.load_progress > 0 else 0.0


def _cut(text: str) -> str:
    encoded = text.encode()
    if len(encoded) <= TEXT_BYTES_MAX:
        return text
    return encoded[:TEXT_BYTES_MAX].decode(errors="ignore")


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
    told = pb.Lease(lease_id=lease.lease_id, engine_id=lease.engine_id, address=grant.address)
    return pb.RouteResponse(lease=told, queued=to_duration(lease.granted_at - lease.arrived_at))


def to_running(lease: Lease, now: float, *, is_cancelling: bool) -> pb.InflightRequest:
    """A lease as the list of requests in flight shows it."""
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
    )


def to_model(model: ModelRecord) -> pb.Model:
    """A model as the list of models shows it."""
    return pb.Model(
        name=model.name,
        created=to_timestamp(model.created_at),
        context_tokens=model.context_tokens,
        ready_engines=model.ready_engines,
        in_flight=model.queue.in_flight_count,
        capacity=model.slots,
        queued=model.queue.queued_count,
    )
