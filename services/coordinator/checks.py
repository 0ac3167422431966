"""What comes in over the contract of the coordinator, checked."""

from __future__ import annotations

from collections.abc import Sequence

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import deployment_pb2 as deployment_pb
from caravan.core.v1 import scheduling_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator.deployment import FallbackReason
from services.coordinator.leases import Ended, Lease
from services.coordinator.tasks import Priority
from services.coordinator.waiting import Want
from services.runtime.errors import CaravanError
from services.runtime.limit_counters import KEY_BYTES_MAX
from services.runtime.settings import peer_address

ID_BYTES_MAX = 128
TEXT_BYTES_MAX = 2_048
"""Longest free text that is kept of an engine (description, failure); longer ones are cut."""

AFFINITY_MAX = 64
"""Most hashes of a prompt, and most bytes of one."""
AVOID_MAX = 16
"""Most engines that a request avoids, and most deployments that have failed it."""
ROUTES_MAX = 1_024
"""Most routes in one message of a gateway: all are decided in one turn of the loop."""
TRACE_MAX = 8
"""Most entries of the trace context of a route."""
KEY_BYTES = 32
REPORTED_REQUESTS_MAX = 1_024
REPORTED_TENANTS_MAX = 1_024
REPORTED_LIMITS_MAX = 64
"""Most counters of limits in one report: two epochs of each limit."""
GRACE_S = 30.0
"""Time for a drained engine's requests to finish where it is not told."""
GRACE_MAX_S = 3_600.0

PRIORITIES: dict[int, Priority] = {
    scheduling_pb2.PRIORITY_UNSPECIFIED: Priority.NORMAL,
    scheduling_pb2.PRIORITY_CRITICAL: Priority.CRITICAL,
    scheduling_pb2.PRIORITY_HIGH: Priority.HIGH,
    scheduling_pb2.PRIORITY_NORMAL: Priority.NORMAL,
    scheduling_pb2.PRIORITY_BACKGROUND: Priority.BACKGROUND,
}

_REASONS: dict[int, FallbackReason] = {
    deployment_pb.FALLBACK_REASON_CAPACITY: FallbackReason.CAPACITY,
    deployment_pb.FALLBACK_REASON_UNAVAILABLE: FallbackReason.UNAVAILABLE,
    deployment_pb.FALLBACK_REASON_RATE_LIMITED: FallbackReason.RATE_LIMITED,
    deployment_pb.FALLBACK_REASON_CIRCUIT_OPEN: FallbackReason.CIRCUIT_OPEN,
    deployment_pb.FALLBACK_REASON_BUDGET: FallbackReason.BUDGET,
}
ENDED: dict[int, Ended] = {pb.OUTCOME_FINISHED: Ended.WELL, pb.OUTCOME_FAILED: Ended.BADLY}
"""What the outcome of a request says of its engine; others say nothing."""


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


def checked_key(param: str, value: bytes) -> bytes:
    """The key of a KV state, or none. Raises CaravanError: INVALID_VALUE."""
    if value and len(value) != KEY_BYTES:
        raise _invalid(param, f"'{param}' is not of {KEY_BYTES} bytes.")
    return value


def checked_want(
    request: pb.RouteRequest,
    gateway_id: str,
    *,
    lease_id: str,
    wait_s: float,
    priority: Priority,
    now: float,
) -> Want:
    """What a route of a gateway asks for; `wait_s` and `priority` are what it gets where it says nothing.

    Raises CaravanError: MISSING_FIELD, INVALID_VALUE.
    """
    if request.priority:
        if request.priority not in PRIORITIES:
            raise _invalid("priority", "'priority' is not one of the known ones.")
        priority = PRIORITIES[request.priority]
    if request.HasField("max_wait"):
        wait_s = request.max_wait.ToNanoseconds() / 1e9
    if wait_s < 0:
        raise _invalid("max_wait", "'max_wait' is negative.")
    if len(request.affinity) > AFFINITY_MAX or any(
        len(prefix) > AFFINITY_MAX for prefix in request.affinity
    ):
        raise _invalid(
            "affinity", f"'affinity' has more than {AFFINITY_MAX} hashes, or one has more bytes."
        )
    if len(request.trace) > TRACE_MAX:
        raise _invalid("trace", f"'trace' has more than {TRACE_MAX} entries.")
    return Want(
        checked_id("request_id", request.request_id),
        checked_id("gateway_id", gateway_id),
        checked_id("model", request.model),
        lease_id,
        now,
        wait_s=wait_s,
        priority=priority,
        tenant=checked_optional_id("tenant", request.tenant),
        affinity=tuple(request.affinity),
        session_id=checked_optional_id("session_id", request.session_id),
        avoid=_checked_avoid(request) if request.avoid_incarnations else frozenset(),
        resumed=request.resumed,
        may_fall_back=request.may_fall_back,
        failed=_checked_failed(request) if request.failed else {},
    )


def _checked_avoid(request: pb.RouteRequest) -> frozenset[str]:
    lives = request.avoid_incarnations
    if len(lives) > AVOID_MAX:
        raise _invalid("avoid_incarnations", f"'avoid_incarnations' has more than {AVOID_MAX}.")
    return frozenset(checked_id("avoid_incarnations", life) for life in lives)


def _checked_failed(request: pb.RouteRequest) -> dict[str, FallbackReason]:
    if len(request.failed) > AVOID_MAX:
        raise _invalid("failed", f"'failed' has more than {AVOID_MAX}.")
    failed: dict[str, FallbackReason] = {}
    for told in request.failed:
        if told.reason not in _REASONS:
            raise _invalid("failed.reason", "'failed.reason' is not one of the known ones.")
        failed[checked_id("failed.name", told.name)] = _REASONS[told.reason]
    return failed


def checked_held(told: pb.HeldLease, gateway_id: str, now: float) -> Lease:
    """A lease that a gateway holds already. Raises CaravanError: MISSING_FIELD, INVALID_VALUE."""
    age_s = told.age.ToNanoseconds() / 1e9
    if age_s < 0:
        raise _invalid("held.age", "'held.age' is negative.")
    if told.priority not in PRIORITIES:
        raise _invalid("held.priority", "'held.priority' is not one of the known ones.")
    return Lease(
        checked_id("held.lease_id", told.lease_id),
        checked_id("held.request_id", told.request_id),
        checked_id("held.model", told.model),
        checked_id("held.engine_id", told.engine_id),
        gateway_id,
        granted_at=now - age_s,
        arrived_at=now - age_s,
        priority=PRIORITIES[told.priority],
        tenant=checked_optional_id("held.tenant", told.tenant),
        incarnation=checked_id("held.incarnation", told.incarnation),
    )


def check_join(first: pb.JoinGatewayRequest) -> None:
    """Checks that the first message of a gateway only joins. Raises CaravanError: INVALID_VALUE."""
    for param in ("routes", "releases"):
        if getattr(first, param):
            raise _invalid(param, f"'{param}' does not belong into the first message.")


def check_later(message: pb.JoinGatewayRequest) -> None:
    """Checks a message of a gateway after its first. Raises CaravanError: INVALID_VALUE."""
    if message.held:
        raise _invalid("held", "'held' belongs into the first message.")
    if len(message.routes) > ROUTES_MAX:
        raise _invalid("routes", f"'routes' has more than {ROUTES_MAX} entries.")


def checked_grace(request: pb.DrainEngineRequest) -> float:
    """The time of a drain in seconds, 0 to 3600. Raises CaravanError: INVALID_VALUE."""
    grace_s = request.grace.ToNanoseconds() / 1e9 if request.HasField("grace") else GRACE_S
    if not 0 <= grace_s <= GRACE_MAX_S:
        raise _invalid("grace", f"'grace' is not within 0 and {GRACE_MAX_S:g} s.")
    return grace_s


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
    checked_id("register.incarnation", registration.incarnation)
    checked_optional_id("register.revision", registration.revision)
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
    if len(report.requests) > REPORTED_REQUESTS_MAX:
        raise _invalid("report.requests", f"More than {REPORTED_REQUESTS_MAX} requests are told.")
    if len(report.spend) > REPORTED_TENANTS_MAX:
        raise _invalid("report.spend", f"More than {REPORTED_TENANTS_MAX} tenants are told.")
    _check_limits(report.limits)
    for counter in report.spend:
        checked_optional_id("report.spend.tenant", counter.tenant)
    _bound_load(report.load)
    return report


def _check_limits(counters: Sequence[pb.LimitCounter]) -> None:
    if len(counters) > REPORTED_LIMITS_MAX:
        raise _invalid("report.limits", f"More than {REPORTED_LIMITS_MAX} counters are told.")
    for counter in counters:
        checked_limit_key("report.limits.key", counter.key)


def checked_limit_key(param: str, value: str) -> str:
    """The name of a limit, 1 to 256 bytes. Raises CaravanError: MISSING_FIELD, INVALID_VALUE."""
    if not value:
        raise CaravanError("MISSING_FIELD", f"'{param}' is missing.", param=param)
    if len(value.encode()) > KEY_BYTES_MAX:
        raise _invalid(param, f"'{param}' is longer than {KEY_BYTES_MAX} bytes.")
    return value


def checked_throttled(request: pb.SettleLimitRequest) -> float | None:
    """The time that a provider has named, in seconds; None where it has not throttled. Raises CaravanError: INVALID_VALUE."""
    if not request.HasField("throttled"):
        return None
    throttled_s = request.throttled.ToNanoseconds() / 1e9
    if throttled_s < 0:
        raise _invalid("throttled", "'throttled' is negative.")
    return throttled_s


def _bound_model(model: engine_pb.ModelInfo) -> None:
    model.description = _cut(model.description)
    model.provider = _cut(model.provider)


def _bound_load(load: engine_pb.EngineLoad) -> None:
    load.failure = _cut(load.failure)
    # NaN compares false with everything, so it becomes 0 too.
    load.load_progress = min(load.load_progress, 1.0) if load.load_progress > 0 else 0.0


def _cut(text: str) -> str:
    encoded = text.encode()
    if len(encoded) <= TEXT_BYTES_MAX:
        return text
    return encoded[:TEXT_BYTES_MAX].decode(errors="ignore")
