"""Where a deployment stands, and what to tell people of it (S1.24, W10). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from services.coordinator.rollout import Member, Standing


class State(Enum):
    """Where a deployment stands."""

    PENDING = "pending"
    SERVING = "serving"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Status:
    """`ready` are engines of the current revision that are ready, `former` those of earlier ones; `note` is for people."""

    state: State = State.PENDING
    ready: int = 0
    former: int = 0
    note: str = ""


def describe(
    revision: str, replicas: int, members: Sequence[Member], failures: Sequence[str]
) -> Status:
    """Where a deployment with these engines stands; `failures` are those of the engines of its revision."""
    current = [member for member in members if member.revision in {revision, ""}]
    former = [member for member in members if member.revision not in {revision, ""}]
    ready = sum(member.standing is Standing.READY for member in current)
    former_ready = any(member.standing is Standing.READY for member in former)
    hopeful = any(member.standing is Standing.LOADING for member in current)
    why = f": {failures[0]}" if failures else ""
    if failures and not ready and not hopeful:
        note = f"no engine can serve the model{why}"
        if former_ready:
            note += "; the former revision serves"
        return Status(State.FAILED, 0, len(former), note)
    note = ""
    if ready < max(1, replicas):
        note = f"{ready} of {max(1, replicas)} engines ready{why}"
        if former_ready:
            note += "; the former revision serves until then"
    state = State.SERVING if ready or former_ready else State.PENDING
    return Status(state, ready, len(former), note)


def describe_removed(members: Sequence[Member]) -> Status:
    """Where a deployment that was removed stands."""
    engines = "1 engine" if len(members) == 1 else f"{len(members)} engines"
    return Status(State.DRAINING, 0, len(members), f"removed; {engines} still to end")
