"""Between the messages of the contract and the values of the state: checks what comes in, builds what goes out."""

from __future__ import annotations

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from google.protobuf import timestamp_pb2
from google.protobuf.duration_pb2 import Duration

from services.coordinator.engines import EngineRecord
from services.coordinator.leases import Lease
from services.coordinator.models import ModelRecord
from services.coordinator.state import Grant
from services.runtime.errors import CaravanError
from services.runtime.settings import peer_address

ID_BYTES_MAX = 128
TEXT_BYTES_MAX = 2_048
"""Longest free text that is kept of an engine (description, failure); longer ones are cut."""


def checked_id(param: str, value: str) -> str:
    """An id or name of 1 to 128 bytes. Raises CaravanError: MISSING_FIELD, INVALID_VALUE."""
    if not value:
        raise CaravanError("MISSING_FIELD", f"'{param}' is missing.", param=param)
    if len(value.encode()) > ID_BYTES_MAX:
        raise CaravanError(
            "INVALID_VALUE", f"'{param}' is longer than {ID_BYTES_MAX} bytes.", param=param
        )
    return value


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


def to_lease(grant: Grant) -> pb.Lease:
    """A grant as its gateway sees it."""
    lease = grant.lease
    return pb.Lease(lease_id=lease.lease_id, engine_id=lease.engine_id, address=grant.address)


def to_inflight(lease: Lease, now: float) -> pb.InflightRequest:
    """A lease as the list of requests in flight shows it."""
    return pb.InflightRequest(
        request_id=lease.request_id,
        model=lease.model,
        engine_id=lease.engine_id,
        gateway_id=lease.gateway_id,
        lease_id=lease.lease_id,
        age=to_duration(now - lease.granted_at),
    )


def to_engine(engine: EngineRecord, leases: int, now: float) -> pb.Engine:
    """An engine as the list of engines shows it."""
    return pb.Engine(
        engine_id=engine.engine_id,
        address=engine.address,
        model=engine.model,
        load=engine.load,
        leases=leases,
        report_age=to_duration(now - engine.reported_at),
    )


def to_model(model: ModelRecord) -> pb.Model:
    """A model as the list of models shows it."""
    return pb.Model(
        name=model.name,
        created=to_timestamp(model.created_at),
        context_tokens=model.context_tokens,
        ready_engines=model.ready_engines,
    )
