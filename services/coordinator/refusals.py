"""What a client is told where no engine can take its request. Pure."""

from __future__ import annotations

from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator.budgets import Spent
from services.coordinator.deployment import FallbackReason
from services.coordinator.models import ModelRecord
from services.runtime.errors import CaravanError

LOADING_RETRY_S = 1.0
NO_ENGINE_RETRY_S = 1.0
DRAINING_RETRY_S = 1.0
CAPACITY_RETRY_MIN_S = 1.0
"""Also told while no lease of the model has ended yet, when nothing is known of their duration."""
CAPACITY_RETRY_MAX_S = 30.0
BUDGET_RETRY_MIN_S = 1.0

_STARTING = frozenset({engine_pb.ENGINE_PHASE_UNSPECIFIED, engine_pb.ENGINE_PHASE_LOADING})


def refusal(model: ModelRecord) -> CaravanError:
    """Why no engine of the model can take a request now: the reason that is closest to being served comes first."""
    if model.ready_engines:
        queue = model.queue
        return CaravanError(
            "CAPACITY_EXHAUSTED",
            f"All {model.limit} sequences of the model '{model.name}' are in use, and {queue.queued_count} requests wait. "
            "Try again later.",
            retry_after_s=capacity_retry_s(model.lease_mean_s, model.limit, queue.queued_count),
            model=model.name,
            active=str(queue.in_flight_count),
            capacity=str(model.limit),
            queued=str(queue.queued_count),
            max_queued=str(queue.boundary.max_queued),
        )
    phases = {engine.load.phase for engine in model.engines.values()}
    if phases & _STARTING:
        return CaravanError(
            "MODEL_LOADING",
            f"The model '{model.name}' is being loaded ({_progress(model):.0%}).",
            retry_after_s=LOADING_RETRY_S,
            model=model.name,
        )
    return CaravanError(
        "NO_ENGINE", _why_none(model), retry_after_s=NO_ENGINE_RETRY_S, model=model.name
    )


def capacity_retry_s(lease_mean_s: float | None, capacity: int, queued: int) -> float:
    """Seconds until it is likely to be the turn of one more: `capacity` leases of that mean duration end one by one."""
    if lease_mean_s is None or capacity == 0:
        return CAPACITY_RETRY_MIN_S
    expected_s = lease_mean_s * (queued + 1) / capacity
    return min(max(expected_s, CAPACITY_RETRY_MIN_S), CAPACITY_RETRY_MAX_S)


def queue_timeout(model: ModelRecord, waited_s: float) -> CaravanError:
    """The request has waited as long as it may: for a sequence, or for an engine at all."""
    if not model.ready_engines:
        return refusal(model)
    queued = model.queue.queued_count
    return CaravanError(
        "QUEUE_TIMEOUT",
        f"No sequence of the model '{model.name}' became free for the request within {waited_s:.1f} s.",
        retry_after_s=capacity_retry_s(model.lease_mean_s, model.limit, queued),
        model=model.name,
        queued=str(queued),
        waited_s=f"{waited_s:.1f}",
    )


def failed(model: ModelRecord, reason: FallbackReason) -> CaravanError:
    """The model has refused the request by itself, and no fallback takes it."""
    is_busy = reason in {FallbackReason.CAPACITY, FallbackReason.RATE_LIMITED}
    return CaravanError(
        "CAPACITY_EXHAUSTED" if is_busy else "NO_ENGINE",
        f"The model '{model.name}' has refused the request ({reason.value}), and none of its fallbacks takes it.",
        retry_after_s=CAPACITY_RETRY_MIN_S if is_busy else NO_ENGINE_RETRY_S,
        model=model.name,
    )


def budget_spent(model: ModelRecord, spent: Spent) -> CaravanError:
    """The deployment, or the tenant's part of it, has cost what it may; what exactly is not for callers to know."""
    whose = "budget" if spent.tenant is None else f"part of tenant '{spent.tenant}' of the budget"
    retry_after_s = max(BUDGET_RETRY_MIN_S, spent.retry_after_s())
    return CaravanError(
        "BUDGET_EXCEEDED",
        f"The {whose} of '{model.name}' is spent ({spent.limit}). Enough of it is free again in {retry_after_s:.0f} s.",
        retry_after_s=retry_after_s,
        model=model.name,
        budget=spent.limit,
    )


def unknown_engine(engine_id: str) -> CaravanError:
    """No such engine has joined."""
    return CaravanError(
        "ENGINE_NOT_FOUND",
        f"No engine with the id '{engine_id}' has joined.",
        engine_id=engine_id,
    )


def table_full(what: str, limit: int) -> CaravanError:
    """A table of the coordinator is full."""
    return CaravanError(
        "CAPACITY_EXHAUSTED",
        f"There are {limit} {what}, and no more are taken.",
        retry_after_s=CAPACITY_RETRY_MIN_S,
        active=str(limit),
        capacity=str(limit),
    )


def unknown_session(session_id: str) -> CaravanError:
    """The peer has no session, or not any more."""
    return CaravanError(
        "SESSION_UNKNOWN",
        f"The session '{session_id}' is not known: join again.",
        session_id=session_id,
    )


def unknown_request(request_id: str) -> CaravanError:
    """The request neither waits nor runs."""
    return CaravanError(
        "REQUEST_NOT_FOUND",
        f"No request with the id '{request_id}' is in flight.",
        request_id=request_id,
    )


def unknown_model(name: str) -> CaravanError:
    """No engine has registered the model lately."""
    return CaravanError(
        "MODEL_NOT_FOUND", f"The model '{name}' does not exist.", param="model", model=name
    )


def replaced(name: str) -> CaravanError:
    """The model that began the answer serves the name no more."""
    return CaravanError(
        "ENGINE_LOST",
        f"The engine that served the request is gone, and '{name}' is served by another model now.",
    )


def draining() -> CaravanError:
    """The coordinator is shutting down."""
    return CaravanError(
        "DRAINING", "The coordinator is shutting down.", retry_after_s=DRAINING_RETRY_S
    )


def _progress(model: ModelRecord) -> float:
    return max(
        engine.load.load_progress
        for engine in model.engines.values()
        if engine.load.phase in _STARTING
    )


def _why_none(model: ModelRecord) -> str:
    failures = [
        engine.load.failure or "the engine does not say why"
        for engine in model.engines.values()
        if engine.load.phase == engine_pb.ENGINE_PHASE_FAILED
    ]
    if failures:
        return f"The model '{model.name}' could not be loaded: {failures[0]}"
    if model.engines:
        return f"Every engine of the model '{model.name}' is drained or shutting down."
    return f"No engine of the model '{model.name}' is running at present."
