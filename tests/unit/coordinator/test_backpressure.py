"""The transition table of the backpressure core, its modes, budgets and texts."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import pytest

from services.coordinator.backpressure import NOT_STARTED, WRITTEN_OFF, Backpressure
from services.coordinator.tasks import (
    AttemptsExhaustedError,
    BackpressureError,
    Boundary,
    Cancelled,
    Cancelling,
    DuplicateTaskError,
    InFlight,
    InvalidTransitionError,
    Mode,
    Priority,
    Queued,
    QueueSaturatedError,
    UnknownTaskError,
)

BOUNDARY = Boundary(max_in_flight=2, max_queued=2, cancellation_budget_s=5.0)

Step: TypeAlias = tuple[str, tuple[object, ...]]
_ENQUEUE: Step = ("enqueue", ("t", 0.0))
_START: Step = ("start_available", (1.0,))
_CANCEL: Step = ("cancel", ("t", "why", 2.0))
# How the task `t` gets into each state.
PATHS: dict[str, list[Step]] = {
    "queued": [_ENQUEUE],
    "in_flight": [_ENQUEUE, _START],
    "cancelling": [_ENQUEUE, _START, _CANCEL],
    "succeeded": [_ENQUEUE, _START, ("succeed", ("t",))],
    "failed": [_ENQUEUE, _START, ("fail", ("t", "why"))],
    "cancelled": [_ENQUEUE, _CANCEL],
}
ACTIONS: dict[str, Step] = {
    "start": _START,
    "succeed": ("succeed", ("t",)),
    "fail": ("fail", ("t", "why")),
    "cancel": ("cancel", ("t", "why", 3.0)),
    "stop": ("stop", ("t",)),
    "retry": ("retry", ("t", 3.0)),
}
# S4.13 and the cancelling state: what each action makes of each state; what is missing is an InvalidTransition.
TABLE = {
    ("queued", "start"): "in_flight",
    ("queued", "cancel"): "cancelled",
    ("in_flight", "succeed"): "succeeded",
    ("in_flight", "fail"): "failed",
    ("in_flight", "cancel"): "cancelling",
    ("cancelling", "succeed"): "succeeded",
    ("cancelling", "fail"): "failed",
    ("cancelling", "stop"): "cancelled",
    ("failed", "retry"): "queued",
    ("cancelled", "retry"): "queued",
}


def walk(core: Backpressure, *steps: Step) -> None:
    """Does the steps."""
    for method, arguments in steps:
        getattr(core, method)(*arguments)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("state", PATHS)
def test_the_transition_table(state: str, action: str) -> None:
    """Each action in each state does what the table says, or is refused with both named and changes nothing."""
    core = Backpressure(BOUNDARY)
    walk(core, *PATHS[state])
    before, expected = core.signature(), TABLE.get((state, action))
    if expected is None and action != "start":
        with pytest.raises(InvalidTransitionError) as caught:
            walk(core, ACTIONS[action])
        assert (caught.value.state, caught.value.action) == (state, action)
        assert core.signature() == before
    else:
        walk(core, ACTIONS[action])
        now = core.state("t")
        assert now is not None
        assert now.label == (expected or state)
    core.check_integrity()


@pytest.mark.parametrize("action", [a for a in ACTIONS if a != "start"])
def test_unknown_tasks(action: str) -> None:
    """What was never seen, or was forgotten, is unknown."""
    core = Backpressure(BOUNDARY)
    with pytest.raises(UnknownTaskError):
        walk(core, ACTIONS[action])
    walk(core, *PATHS["succeeded"])
    core.forget("t")
    assert core.state("t") is None
    with pytest.raises(UnknownTaskError):
        core.forget("t")


def test_a_known_key_is_a_duplicate_before_the_queue_is_full() -> None:
    """In any state, the final ones included; then saturation. Neither changes anything (S4.6)."""
    core = Backpressure(BOUNDARY)
    walk(core, *PATHS["succeeded"])
    core.enqueue("a", 0.0)
    core.enqueue("b", 0.0)
    before = core.signature()
    for key, error in (("t", DuplicateTaskError), ("a", DuplicateTaskError)):
        with pytest.raises(error):
            core.enqueue(key, 0.0)
    with pytest.raises(QueueSaturatedError) as caught:
        core.enqueue("c", 0.0)
    assert caught.value.max_queued == 2
    assert core.signature() == before


def test_a_retry_goes_to_the_tail_within_the_bounds() -> None:
    """It gets a new number, counts as queued, and is refused where the queue is full or it was tried often enough."""
    core = Backpressure(dataclasses.replace(BOUNDARY, max_in_flight=1, max_attempts=2))
    walk(core, *PATHS["failed"])
    core.enqueue("a", 2.0)
    core.enqueue("b", 2.0)
    with pytest.raises(QueueSaturatedError):
        core.retry("t", 3.0)
    core.start_available(3.0)
    core.retry("t", 4.0)
    core.succeed("a")
    assert core.start_available(5.0) == ["b"]
    core.succeed("b")
    assert core.start_available(6.0) == ["t"]
    core.fail("t", "again")
    with pytest.raises(AttemptsExhaustedError):
        core.retry("t", 7.0)


def test_push_only_refuses_what_cannot_start_now() -> None:
    """Two may run: two are taken, whether started already or not, and no third."""
    core = Backpressure(dataclasses.replace(BOUNDARY, mode=Mode.PUSH_ONLY, max_queued=0))
    core.enqueue("a", 0.0)
    assert core.start_available(0.0) == ["a"]
    core.enqueue("b", 0.0)
    with pytest.raises(QueueSaturatedError):
        core.enqueue("c", 0.0)
    core.check_integrity()


def test_pull_only_starts_when_asked() -> None:
    """Nothing starts by itself; who asks gets what there is, within the limit."""
    core = Backpressure(dataclasses.replace(BOUNDARY, mode=Mode.PULL_ONLY))
    core.enqueue("a", 0.0)
    core.enqueue("b", 0.0)
    assert core.start_available(0.0) == []
    assert core.pull(1, 1.0) == ["a"]
    core.enqueue("c", 0.0)
    assert core.pull(5, 1.0) == ["b"]
    assert core.state("b") == InFlight(1, 1.0)


def test_the_limit_follows_resize() -> None:
    """A smaller limit stops nobody; a larger one starts those who wait at the next call."""
    core = Backpressure(BOUNDARY)
    for key in "ab":
        core.enqueue(key, 0.0)
    core.start_available(0.0)
    core.enqueue("c", 0.0)
    core.resize(0)
    assert (core.in_flight_count, core.room) == (2, 0)
    core.succeed("a")
    assert core.start_available(1.0) == []
    core.resize(3)
    assert core.start_available(1.0) == ["c"]
    with pytest.raises(ValueError, match="not a boundary"):
        core.resize(-1)


def test_cancelling_has_a_budget() -> None:
    """A task that does not stop holds its place until the budget is over, and is written off then, not before (W60)."""
    core = Backpressure(dataclasses.replace(BOUNDARY, max_in_flight=1))
    core.enqueue("t", 0.0)
    core.enqueue("next", 0.0)
    core.start_available(0.0)
    assert core.cancel("t", "client", 10.0) == Cancelling(0, "client", 15.0)
    assert core.start_available(10.0) == []
    assert core.expire(14.9).written_off == ()
    assert core.expire(15.0).written_off == ("t",)
    assert core.state("t") == Cancelled(0, WRITTEN_OFF)
    assert core.start_available(15.0) == ["next"]


def test_no_budget_is_no_cancelling() -> None:
    """With a budget of 0 a running task is cancelled at once."""
    core = Backpressure(dataclasses.replace(BOUNDARY, cancellation_budget_s=0))
    walk(core, *PATHS["in_flight"])
    assert core.cancel("t", "why", 2.0) == Cancelled(0, "why")
    assert core.in_flight_count == 0


def test_what_does_not_start_in_time_expires() -> None:
    """By its own time, whatever its place in the queue; what has started does not expire."""
    core = Backpressure(dataclasses.replace(BOUNDARY, max_in_flight=1, max_queued=9))
    core.enqueue("running", 0.0, start_by=1.0)
    core.start_available(0.0)
    for key, start_by in (("late", 9.0), ("never", 99.0), ("soon", 3.0)):
        core.enqueue(key, 0.0, start_by=start_by)
    assert core.expire(2.9).not_started == ()
    assert core.expire(50.0).not_started == ("soon", "late")
    assert core.state("soon") == Cancelled(3, NOT_STARTED)
    assert (core.queued_count, core.in_flight_count) == (1, 1)


def test_finished_tasks_are_forgotten_oldest_first() -> None:
    """The memory of finished tasks is bounded (W60); with none at all a key is free again at once."""
    core = Backpressure(dataclasses.replace(BOUNDARY, max_finished=2))
    for key in "abc":
        core.enqueue(key, 0.0)
        core.start_available(0.0)
        core.succeed(key)
    assert list(core.tasks()) == ["b", "c"]
    none = Backpressure(dataclasses.replace(BOUNDARY, max_finished=0))
    walk(none, *PATHS["succeeded"])
    walk(none, *PATHS["succeeded"])
    assert none.tasks() == {}


def test_the_signature_is_stable_and_escaped() -> None:
    """A fixture: the same history gives the same text, and no key can forge it (S4.11)."""
    core = Backpressure(BOUNDARY)
    core.enqueue("plain", 0.0)
    core.enqueue("a|b,c:d ü", 0.0, priority=Priority.HIGH, tenant="x:y")
    core.start_available(0.0)
    core.fail("plain", "no, really")
    core.enqueue("last", 1.0)
    assert core.signature() == (
        "mode=push_pull|f=1/2|q=1/2|c=5000|next=3|plain:failed:0:normal::no%2C%20really,"
        "a%7Cb%2Cc%3Ad%20%C3%BC:in_flight:1:high:x%3Ay,last:queued:2:normal:"
    )
    assert core.state("last") == Queued(2)


@pytest.mark.parametrize(
    "wrong", [{"max_in_flight": -1}, {"max_queued": -1}, {"aging_s": -0.1}, {"max_attempts": 0}]
)
def test_boundaries_are_checked(wrong: dict[str, int]) -> None:
    """A limit below zero is no boundary."""
    with pytest.raises(ValueError, match="not a boundary"):
        dataclasses.replace(BOUNDARY, **wrong)  # type: ignore[arg-type]


def test_errors_are_of_one_kind() -> None:
    """Callers can catch them together."""
    kinds = (DuplicateTaskError, QueueSaturatedError, UnknownTaskError, InvalidTransitionError)
    assert all(issubclass(kind, BackpressureError) for kind in (*kinds, AttemptsExhaustedError))
