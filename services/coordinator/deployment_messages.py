"""Between the messages of DeploymentService and the values of deployment.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, TypeVar

from caravan.coordinator.v1 import deployment_pb2 as pb
from caravan.coordinator.v1 import deployment_service_pb2 as service_pb
from caravan.core.v1 import scheduling_pb2

from services.coordinator.checks import PRIORITIES
from services.coordinator.deployment import (
    ALL_REASONS,
    Budget,
    CapacityPolicy,
    Deployment,
    EngineOptions,
    Fallback,
    FallbackReason,
    OnExceeded,
    Runtime,
    Serving,
)
from services.coordinator.deployment_changes import Change, ChangeKind
from services.coordinator.deployment_rules import DEPLOYMENTS_MAX, Mistake
from services.coordinator.deployment_status import State
from services.coordinator.deployments import KeptDeployment
from services.coordinator.messages import to_duration, to_timestamp
from services.coordinator.remote import Remote
from services.coordinator.runtime_inference import infer_runtime
from services.coordinator.tasks import Priority

_Value = TypeVar("_Value")

_TOLD_RUNTIMES: Final[Mapping[Runtime, pb.Runtime.ValueType]] = {
    value: pb.Runtime.Value(f"RUNTIME_{value.name}") for value in Runtime
}
_TOLD_POLICIES: Final[Mapping[CapacityPolicy, pb.CapacityPolicy.ValueType]] = {
    value: pb.CapacityPolicy.Value(f"CAPACITY_POLICY_{value.name}") for value in CapacityPolicy
}
_TOLD_REASONS: Final[Mapping[FallbackReason, pb.FallbackReason.ValueType]] = {
    value: pb.FallbackReason.Value(f"FALLBACK_REASON_{value.name}") for value in FallbackReason
}
_TOLD_ON_EXCEEDED: Final[Mapping[OnExceeded, pb.OnExceeded.ValueType]] = {
    value: pb.OnExceeded.Value(f"ON_EXCEEDED_{value.name}") for value in OnExceeded
}
_TOLD_PRIORITIES: Final[Mapping[Priority, scheduling_pb2.Priority.ValueType]] = {
    value: scheduling_pb2.Priority.Value(f"PRIORITY_{value.name}") for value in Priority
}
_TOLD_STATES: Final[Mapping[State, pb.DeploymentState.ValueType]] = {
    State.PENDING: pb.DEPLOYMENT_STATE_PENDING,
    State.SERVING: pb.DEPLOYMENT_STATE_SERVING,
    State.DRAINING: pb.DEPLOYMENT_STATE_DRAINING,
    State.FAILED: pb.DEPLOYMENT_STATE_FAILED,
}
_TOLD_KINDS: Final[Mapping[ChangeKind, service_pb.ChangeKind.ValueType]] = {
    ChangeKind.ADDED: service_pb.CHANGE_KIND_ADDED,
    ChangeKind.CHANGED: service_pb.CHANGE_KIND_CHANGED,
    ChangeKind.UNCHANGED: service_pb.CHANGE_KIND_UNCHANGED,
    ChangeKind.REMOVED: service_pb.CHANGE_KIND_REMOVED,
}
_RUNTIMES: Final[Mapping[int, Runtime]] = {told: value for value, told in _TOLD_RUNTIMES.items()}
_REASONS: Final[Mapping[int, FallbackReason]] = {
    told: value for value, told in _TOLD_REASONS.items()
}
_POLICIES: Final[Mapping[int, CapacityPolicy]] = {
    pb.CAPACITY_POLICY_UNSPECIFIED: CapacityPolicy.QUEUE,
    **{told: value for value, told in _TOLD_POLICIES.items()},
}
_ON_EXCEEDED: Final[Mapping[int, OnExceeded]] = {
    pb.ON_EXCEEDED_UNSPECIFIED: OnExceeded.REJECT,
    **{told: value for value, told in _TOLD_ON_EXCEEDED.items()},
}


def from_messages(told: Iterable[pb.Deployment]) -> tuple[list[Deployment], list[Mistake]]:
    """The deployments of a request, defaults filled in, and what has no value. At most one more than may be is looked at."""
    mistakes: list[Mistake] = []
    found: list[Deployment] = []
    for index, message in enumerate(told):
        if index > DEPLOYMENTS_MAX:
            break
        found.append(_from_message(message, f"deployments[{index}]", mistakes))
    return found, mistakes


def _from_message(told: pb.Deployment, path: str, mistakes: list[Mistake]) -> Deployment:
    def known(values: Mapping[int, _Value], number: int, field: str, otherwise: _Value) -> _Value:
        if number not in values:
            mistakes.append(Mistake(f"{path}.{field}", f"{number} is not one of the known ones"))
        return values.get(number, otherwise)

    serving, budget = told.serving, told.budget
    inferred = infer_runtime(told.model)
    return Deployment(
        name=told.name,
        model=told.model,
        runtime=(known(_RUNTIMES, told.runtime, "runtime", inferred) if told.runtime else inferred),
        replicas=told.replicas if told.HasField("replicas") else 1,
        engine=EngineOptions(
            told.engine.context_tokens, told.engine.max_sequences, told.engine.threads
        ),
        serving=Serving(
            max_concurrent=serving.max_concurrent,
            max_queued=serving.max_queued if serving.HasField("max_queued") else None,
            max_wait_s=(
                serving.max_wait.ToMicroseconds() / 1e6 if serving.HasField("max_wait") else None
            ),
            on_capacity_exhausted=known(
                _POLICIES,
                serving.on_capacity_exhausted,
                "serving.on_capacity_exhausted",
                CapacityPolicy.QUEUE,
            ),
        ),
        priority=known(PRIORITIES, told.priority, "priority", Priority.NORMAL),
        fallback=tuple(
            _fallback(fallback, f"{path}.fallback[{place}]", mistakes)
            for place, fallback in enumerate(told.fallback)
        ),
        idempotent=told.idempotent if told.HasField("idempotent") else True,
        remote=Remote.of(told.remote) if told.HasField("remote") else None,
        budget=Budget(
            budget.usd_per_hour,
            budget.usd_per_day,
            budget.tenant_usd_per_hour,
            budget.tenant_usd_per_day,
            known(_ON_EXCEEDED, budget.on_exceeded, "budget.on_exceeded", OnExceeded.REJECT),
        ),
    )


def _fallback(told: pb.Fallback, path: str, mistakes: list[Mistake]) -> Fallback:
    reasons = set()
    for place, number in enumerate(told.reasons):
        reason = _REASONS.get(number)
        if reason is None:
            mistakes.append(
                Mistake(f"{path}.reasons[{place}]", f"{number} is not one of the known ones")
            )
        else:
            reasons.add(reason)
    return Fallback(told.deployment, frozenset(reasons) or ALL_REASONS)


def to_message(deployment: Deployment) -> pb.Deployment:
    """A deployment with every default said, but those of remote options, which are the engine's."""
    options, serving = deployment.engine, deployment.serving
    limits = pb.Serving(
        max_concurrent=serving.max_concurrent,
        max_queued=serving.max_queued,
        on_capacity_exhausted=_TOLD_POLICIES[serving.on_capacity_exhausted],
    )
    if serving.max_wait_s is not None:
        limits.max_wait.CopyFrom(to_duration(serving.max_wait_s))
    return pb.Deployment(
        name=deployment.name,
        model=deployment.model,
        runtime=_TOLD_RUNTIMES[deployment.runtime],
        replicas=deployment.replicas,
        engine=pb.EngineOptions(
            context_tokens=options.context_tokens,
            max_sequences=options.max_sequences,
            threads=options.threads,
        ),
        serving=limits,
        priority=_TOLD_PRIORITIES[deployment.priority],
        fallback=[
            pb.Fallback(
                deployment=fallback.deployment,
                reasons=sorted(_TOLD_REASONS[reason] for reason in fallback.reasons),
            )
            for fallback in deployment.fallback
        ],
        idempotent=deployment.idempotent,
        remote=None if deployment.remote is None else deployment.remote.to_message(),
        budget=to_budget(deployment.budget),
    )


def to_budget(budget: Budget) -> pb.Budget | None:
    """A budget; None for one without any limit."""
    if budget == Budget():
        return None
    return pb.Budget(
        usd_per_hour=budget.usd_per_hour,
        usd_per_day=budget.usd_per_day,
        tenant_usd_per_hour=budget.tenant_usd_per_hour,
        tenant_usd_per_day=budget.tenant_usd_per_day,
        on_exceeded=_TOLD_ON_EXCEEDED[budget.on_exceeded],
    )


def to_record(kept: KeptDeployment) -> pb.DeploymentRecord:
    """A deployment and where it stands."""
    status = kept.status
    return pb.DeploymentRecord(
        deployment=to_message(kept.deployment),
        revision=kept.revision,
        state=_TOLD_STATES[status.state],
        ready_engines=status.ready,
        former_engines=status.former,
        created=to_timestamp(kept.created_at),
        note=status.note,
    )


def to_mistake(mistake: Mistake) -> service_pb.DeploymentMistake:
    """A mistake as the answer tells it."""
    return service_pb.DeploymentMistake(field=mistake.field, message=mistake.message)


def to_change(change: Change) -> service_pb.DeploymentChange:
    """A change as the answer tells it."""
    return service_pb.DeploymentChange(
        name=change.name,
        kind=_TOLD_KINDS[change.kind],
        fields=change.fields,
        restarts_engines=change.restarts_engines,
    )
