"""What is wrong with a set of deployments: all of it, each with where it is (S1.19). Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from services.coordinator.deployment import (
    CapacityPolicy,
    Deployment,
    FallbackReason,
    Runtime,
)
from services.coordinator.remote_rules import of_provider
from services.coordinator.runtime_inference import SCRIPTED

DEPLOYMENTS_MAX: Final = 256
REPLICAS_MAX: Final = 64
FALLBACKS_MAX: Final = 8
CONTEXT_TOKENS_MAX: Final = 1 << 24
SEQUENCES_MAX: Final = 255
"""llama.cpp holds 256, and an engine keeps one for itself."""
THREADS_MAX: Final = 512
CONCURRENT_MAX: Final = 1_000_000
QUEUED_MAX: Final = 100_000
WAIT_S_MAX: Final = 3_600.0

_NAME: Final = re.compile(r"[A-Za-z0-9._/:-]{1,128}", re.ASCII)
_TEXT_BYTES_MAX: Final = 4_096


@dataclass(frozen=True, slots=True)
class Mistake:
    """What is wrong, and where: a path such as `deployments[1].fallback[0].deployment`."""

    field: str
    message: str


def find_mistakes(
    deployments: Sequence[Deployment], others: Mapping[str, Deployment]
) -> list[Mistake]:
    """Every mistake of `deployments`, which replace or join `others`, those that are kept already, by name."""
    found = list(_of_the_set(deployments, others))
    for index, deployment in enumerate(deployments):
        path = f"deployments[{index}]"
        found += (
            Mistake(f"{path}.{field}", message)
            for part in (_of_name_and_model, _of_engines, _of_serving, of_provider)
            for field, message in part(deployment)
        )
    found += _of_fallbacks(deployments, others)
    return found


def _of_the_set(
    deployments: Sequence[Deployment], others: Mapping[str, Deployment]
) -> Iterator[Mistake]:
    names = [deployment.name for deployment in deployments]
    total = len(set(others) | set(names))
    if total > DEPLOYMENTS_MAX:
        yield Mistake("deployments", f"{total} would be kept, and at most {DEPLOYMENTS_MAX} may be")
    for index, name in enumerate(names):
        if name and name in names[:index]:
            yield Mistake(f"deployments[{index}].name", f"'{name}' is given twice")


def _of_name_and_model(deployment: Deployment) -> Iterator[tuple[str, str]]:
    name, model = deployment.name, deployment.model
    if not name:
        yield "name", "is missing"
    elif not _NAME.fullmatch(name):
        yield "name", f"'{name[:64]}' is not 1 to 128 letters, digits, '.', '_', '-', '/' or ':'"
    if not model.strip():
        yield "model", "is missing"
    elif len(model.encode()) > _TEXT_BYTES_MAX or not model.isprintable():
        yield "model", f"is longer than {_TEXT_BYTES_MAX} bytes or has characters of no path"
    elif (deployment.runtime is Runtime.SCRIPTED) != model.startswith(SCRIPTED):
        yield "runtime", f"'{deployment.runtime.value}' does not run '{model[:64]}'"


def _of_engines(deployment: Deployment) -> Iterator[tuple[str, str]]:
    options = deployment.engine
    yield from _above("replicas", deployment.replicas, REPLICAS_MAX)
    yield from _above("engine.context_tokens", options.context_tokens, CONTEXT_TOKENS_MAX)
    yield from _above("engine.max_sequences", options.max_sequences, SEQUENCES_MAX)
    yield from _above("engine.threads", options.threads, THREADS_MAX)
    if options.threads and deployment.runtime is Runtime.SCRIPTED:
        yield "engine.threads", "a scripted engine has none"


def _of_serving(deployment: Deployment) -> Iterator[tuple[str, str]]:
    serving, policy = deployment.serving, deployment.serving.on_capacity_exhausted
    queued, wait_s = serving.max_queued, serving.max_wait_s
    yield from _above("serving.max_concurrent", serving.max_concurrent, CONCURRENT_MAX)
    yield from _above("serving.max_queued", queued or 0, QUEUED_MAX)
    if wait_s is not None and not 0 <= wait_s <= WAIT_S_MAX:
        yield "serving.max_wait", f"{wait_s:g} s is not within 0 to {WAIT_S_MAX:g} s"
    if policy is CapacityPolicy.REJECT:
        for field, value in (("max_queued", queued), ("max_wait", wait_s)):
            if value:
                yield f"serving.{field}", "contradicts on_capacity_exhausted = reject: nobody waits"
    elif policy is CapacityPolicy.QUEUE:
        for field, value in (("max_queued", queued), ("max_wait", wait_s)):
            if value == 0:
                yield (
                    f"serving.{field}",
                    "0 contradicts on_capacity_exhausted = queue: nobody could wait",
                )
    elif not any(FallbackReason.CAPACITY in other.reasons for other in deployment.fallback):
        yield (
            "serving.on_capacity_exhausted",
            "fallback needs a fallback that is for the reason capacity",
        )


def _above(field: str, value: int, most: int) -> Iterator[tuple[str, str]]:
    if not 0 <= value <= most:
        yield field, f"{value} is not within 0 to {most}"


def _of_fallbacks(
    deployments: Sequence[Deployment], others: Mapping[str, Deployment]
) -> Iterator[Mistake]:
    known = {**others, **{deployment.name: deployment for deployment in deployments}}
    told: set[frozenset[str]] = set()
    for index, deployment in enumerate(deployments):
        path = f"deployments[{index}].fallback"
        if len(deployment.fallback) > FALLBACKS_MAX:
            yield Mistake(
                path, f"{len(deployment.fallback)} are listed, and at most {FALLBACKS_MAX} may be"
            )
            continue
        targets: list[str] = []
        for place, fallback in enumerate(deployment.fallback):
            target = fallback.deployment
            message = _wrong_target(deployment, target, targets, known)
            if message is None:
                cycle = _cycle(deployment.name, target, known)
                if cycle and frozenset(cycle) not in told:
                    told.add(frozenset(cycle))
                    message = f"closes a cycle: {' -> '.join(cycle)}"
            if message is not None:
                yield Mistake(f"{path}[{place}].deployment", message)
            targets.append(target)


def _wrong_target(
    deployment: Deployment, target: str, before: list[str], known: Mapping[str, Deployment]
) -> str | None:
    if not target:
        return "is missing"
    if target == deployment.name:
        return "is the deployment itself"
    if target not in known:
        return f"'{target[:64]}' is not a deployment"
    return f"'{target}' is listed twice" if target in before else None


def _cycle(name: str, target: str, known: Mapping[str, Deployment]) -> list[str]:
    """The way from `name` over its fallback `target` back to itself; empty where there is none."""
    came_from: dict[str, str] = {target: name}
    row = [target]
    for here in row:
        for fallback in known[here].fallback:
            there = fallback.deployment
            if there == name:
                way = [name]
                while here != name:
                    way.append(here)
                    here = came_from[here]  # noqa: PLW2901 - the loop is left here
                return [name, *reversed(way)]
            if there in known and there not in came_from:
                came_from[there] = here
                row.append(there)
    return []
