"""When requests of a deployment shift from engines of a former revision to those of the current one. Pure.

Former engines serve until as many of the current revision are ready as there are to be; then all requests go to those at once, and
the former end when what runs on them has ended. A revision that cannot be loaded so never takes over.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Standing(Enum):
    """What an engine says of itself, whether or not it is held back."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Member:
    """An engine that has joined under the name of a deployment.

    An empty `revision` is that of an engine which was started by hand: it always serves. `told` is whether it was told to drain and
    to stop by an earlier decision.
    """

    session: int
    revision: str
    standing: Standing
    told: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows: sessions of engines that get no new requests, and of those to be told to drain and to stop.

    `shifted` is whether the current revision has taken over, to be handed in again next time.
    """

    held_back: frozenset[int]
    drained: tuple[int, ...]
    shifted: bool


def decide(revision: str, replicas: int, members: Iterable[Member], *, shifted: bool) -> Decision:
    """What to do with the engines of a deployment whose current revision this is; `shifted` is that of the last decision on it."""
    members = tuple(members)
    current = [member for member in members if member.revision == revision]
    former = [member for member in members if member.revision not in {revision, ""}]
    by_hand = [member for member in members if not member.revision]
    # Where none is to be started, those that were started by hand are the ones to wait for.
    successors = current if replicas else current + by_hand
    ready = sum(_serves(member) for member in successors)
    former_ready = any(_serves(member) for member in former)
    if ready and (shifted or ready >= max(1, replicas) or not former_ready):
        held_back = frozenset(member.session for member in former)
        drained = tuple(member.session for member in former if not member.told)
        return Decision(held_back, drained, shifted=True)
    waits = current if former_ready else ()
    failed = (m for m in former if m.standing is Standing.FAILED and not m.told)
    return Decision(
        frozenset(member.session for member in waits),
        tuple(member.session for member in failed),
        shifted,
    )


def decide_removed(members: Iterable[Member]) -> Decision:
    """What to do with the engines of a deployment that was removed: all of them end."""
    members = tuple(members)
    return Decision(
        frozenset(member.session for member in members),
        tuple(member.session for member in members if not member.told),
        shifted=False,
    )


def _serves(member: Member) -> bool:
    return member.standing is Standing.READY and not member.told
