"""What applying deployments changes, and what engines have to be started anew for. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Final

from services.coordinator.deployment import Budget, Deployment, EngineOptions, Serving
from services.coordinator.remote import Remote, changed_fields

_REVISION_DIGITS: Final = 16


class ChangeKind(Enum):
    """What happens to a deployment."""

    ADDED = "added"
    CHANGED = "changed"
    UNCHANGED = "unchanged"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to one deployment; `fields` are paths such as `serving.max_queued`, where it is changed."""

    name: str
    kind: ChangeKind
    fields: tuple[str, ...] = ()
    restarts_engines: bool = False


def revision(deployment: Deployment) -> str:
    """16 hexadecimal digits over all that an engine is started with, so not over what is only the coordinator's to keep to."""
    options = deployment.engine
    what = [
        deployment.model,
        deployment.runtime.value,
        options.context_tokens,
        options.max_sequences,
        options.threads,
    ]
    if deployment.remote is not None:
        what.append(deployment.remote.to_json())
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:_REVISION_DIGITS]


def diff(
    current: Mapping[str, Deployment], wanted: Iterable[Deployment], *, remove_others: bool
) -> tuple[Change, ...]:
    """The changes, by name, that make `current` what is wanted; others stay, or go with `remove_others`."""
    changes = {deployment.name: _change(current, deployment) for deployment in wanted}
    if remove_others:
        for name in current.keys() - changes.keys():
            changes[name] = Change(name, ChangeKind.REMOVED)
    return tuple(changes[name] for name in sorted(changes))


def _change(current: Mapping[str, Deployment], wanted: Deployment) -> Change:
    before = current.get(wanted.name)
    if before is None:
        return Change(wanted.name, ChangeKind.ADDED)
    changed = tuple(_changed_fields(before, wanted))
    if not changed:
        return Change(wanted.name, ChangeKind.UNCHANGED)
    anew = revision(before) != revision(wanted)
    return Change(wanted.name, ChangeKind.CHANGED, changed, anew)


def _changed_fields(before: object, after: object, prefix: str = "") -> Iterable[str]:
    # The fields of a dataclass have no common type; both sides are of the same class.
    for field in fields(after):  # type: ignore[arg-type]
        old, new = getattr(before, field.name), getattr(after, field.name)
        if isinstance(new, EngineOptions | Serving | Budget):
            yield from _changed_fields(old, new, f"{field.name}.")
        elif isinstance(old, Remote) and isinstance(new, Remote):
            yield from (f"{field.name}.{path}" for path in changed_fields(old, new))
        elif old != new:
            yield prefix + field.name.removesuffix("_s")
