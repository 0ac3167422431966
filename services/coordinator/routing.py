"""Which engine gets a request, and what a client is told where none can take it. Pure."""

from __future__ import annotations

from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator.engines import EngineRecord
from services.coordinator.leases import LeaseTable
from services.coordinator.models import ModelRecord
from services.runtime.errors import CaravanError

LOADING_RETRY_S = 1.0
NO_ENGINE_RETRY_S = 1.0
CAPACITY_RETRY_MIN_S = 1.0
"""Also told while no lease of the model has ended yet, when nothing is known of their duration."""
CAPACITY_RETRY_MAX_S = 30.0

_STARTING = frozenset({engine_pb.ENGINE_PHASE_UNSPECIFIED, engine_pb.ENGINE_PHASE_LOADING})


def choose(model: ModelRecord, leases: LeaseTable) -> EngineRecord:
    """The least loaded ready engine with room (S1.11, S1.12); among equals the one whose last grant is the oldest (W5).

    The load is what the coordinator has granted, not what engines report: reports are a second old, and a burst within that
    second would all go to one engine. Raises CaravanError: CAPACITY_EXHAUSTED, MODEL_LOADING or NO_ENGINE.
    """
    best: EngineRecord | None = None
    best_key = (0.0, 0)
    for engine in model.engines.values():
        held = leases.on_engine(engine.engine_id)
        if not engine.is_ready or held >= engine.capacity:
            continue
        key = (held / engine.capacity, engine.last_grant)
        if best is None or key < best_key:
            best, best_key = engine, key
    if best is None:
        raise refusal(model, leases)
    return best


def refusal(model: ModelRecord, leases: LeaseTable) -> CaravanError:
    """Why no engine of the model can take a request now: the reason that is closest to being served comes first."""
    ready = [engine for engine in model.engines.values() if engine.is_ready]
    if ready:
        active = sum(leases.on_engine(engine.engine_id) for engine in ready)
        capacity = sum(engine.capacity for engine in ready)
        return CaravanError(
            "CAPACITY_EXHAUSTED",
            f"All {capacity} sequences of the model '{model.name}' are in use. Try again later.",
            retry_after_s=capacity_retry_s(model.lease_mean_s, capacity),
            model=model.name,
            active=str(active),
            capacity=str(capacity),
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


def capacity_retry_s(lease_mean_s: float | None, capacity: int) -> float:
    """Seconds until some sequence is likely to be free: `capacity` leases of that mean duration end one by one."""
    if lease_mean_s is None or capacity == 0:
        return CAPACITY_RETRY_MIN_S
    return min(max(lease_mean_s / capacity, CAPACITY_RETRY_MIN_S), CAPACITY_RETRY_MAX_S)


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
        return f"Every engine of the model '{model.name}' is shutting down."
    return f"No engine of the model '{model.name}' is running at present."
