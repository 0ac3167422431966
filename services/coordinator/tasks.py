"""What the backpressure core speaks of: boundaries, the states of a task, and the errors (S4.1, S4.4, S4.5). Pure values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import TypeAlias


class Mode(Enum):
    """Who starts work at a boundary."""

    PUSH_PULL = "push_pull"
    """What can start is started, the rest waits."""
    PUSH_ONLY = "push_only"
    """What cannot start now is refused."""
    PULL_ONLY = "pull_only"
    """Work waits until it is pulled."""


class Priority(IntEnum):
    """The smaller goes first."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    BACKGROUND = 3


@dataclass(frozen=True, slots=True)
class Boundary:
    """The limits of one runtime.

    `max_in_flight` may be 0, which starts nothing; a task whose end was asked for has `cancellation_budget_s` to stop. A task of
    a lower priority goes before one of the next higher that came `aging_s` later, so nothing starves. `max_finished` tasks that
    have ended are remembered, and a task is tried at most `max_attempts` times.
    """

    mode: Mode = Mode.PUSH_PULL
    max_in_flight: int = 32
    max_queued: int = 256
    cancellation_budget_s: float = 10.0
    aging_s: float = 10.0
    max_finished: int = 1024
    max_attempts: int = 3

    def __post_init__(self) -> None:
        limits = (self.max_in_flight, self.max_queued, self.cancellation_budget_s, self.aging_s)
        if min(*limits, self.max_finished) < 0 or self.max_attempts < 1:
            raise ValueError(f"not a boundary: {self}")


@dataclass(frozen=True, slots=True)
class Queued:
    """Waits to start."""

    seq: int
    label = "queued"


@dataclass(frozen=True, slots=True)
class InFlight:
    """Runs since `started_at`, in monotonic seconds."""

    seq: int
    started_at: float
    label = "in_flight"


@dataclass(frozen=True, slots=True)
class Cancelling:
    """Was asked to stop and still runs; at `until`, in monotonic seconds, it is written off."""

    seq: int
    reason: str
    until: float
    label = "cancelling"


@dataclass(frozen=True, slots=True)
class Succeeded:
    """Ended well. Final."""

    seq: int
    label = "succeeded"


@dataclass(frozen=True, slots=True)
class Failed:
    """Ended badly; may be tried again."""

    seq: int
    reason: str
    label = "failed"


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Was cancelled; may be tried again."""

    seq: int
    reason: str
    label = "cancelled"


TaskState: TypeAlias = Queued | InFlight | Cancelling | Succeeded | Failed | Cancelled
FINISHED = (Succeeded, Failed, Cancelled)
"""States of a task that has ended."""
RUNNING = (InFlight, Cancelling)
"""States of a task that counts as in flight."""


class BackpressureError(Exception):
    """An operation was refused, and changed nothing."""


class DuplicateTaskError(BackpressureError):
    """The key is known already, in whatever state."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the task '{key}' is known already")
        self.key = key


class QueueSaturatedError(BackpressureError):
    """Nothing more may wait."""

    def __init__(self, key: str, max_queued: int) -> None:
        super().__init__(f"the task '{key}' does not fit: {max_queued} wait already")
        self.key, self.max_queued = key, max_queued


class UnknownTaskError(BackpressureError):
    """The key is not known: never seen, or forgotten."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the task '{key}' is not known")
        self.key = key


class InvalidTransitionError(BackpressureError):
    """The task is in a state that does not allow the action."""

    def __init__(self, key: str, state: str, action: str) -> None:
        super().__init__(f"the task '{key}' is {state}: it cannot {action}")
        self.key, self.state, self.action = key, state, action


class AttemptsExhaustedError(BackpressureError):
    """The task was tried as often as it may be."""

    def __init__(self, key: str, max_attempts: int) -> None:
        super().__init__(f"the task '{key}' was tried {max_attempts} times")
        self.key, self.max_attempts = key, max_attempts
