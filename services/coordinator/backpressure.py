"""Admission of tasks at a boundary: a bounded queue in a fair order in front of a bounded number in flight (S4).

Pure: times are arguments, in monotonic seconds. An operation that is refused raises a BackpressureError and changes nothing.

    (new) -> queued, in_flight
    queued -> in_flight, cancelled
    in_flight -> succeeded, failed, cancelling (or cancelled, where the budget is 0)
    cancelling -> succeeded, failed, cancelled
    failed, cancelled -> queued
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

from services.coordinator.deadlines import Deadlines
from services.coordinator.fair_queue import FairQueue
from services.coordinator.tasks import (
    FINISHED,
    RUNNING,
    AttemptsExhaustedError,
    Boundary,
    Cancelled,
    Cancelling,
    DuplicateTaskError,
    Failed,
    InFlight,
    InvalidTransitionError,
    Mode,
    Priority,
    Queued,
    QueueSaturatedError,
    Succeeded,
    TaskState,
    UnknownTaskError,
)

NOT_STARTED = "not started in time"
WRITTEN_OFF = "did not stop in time"


@dataclass(slots=True)
class _Task:
    state: TaskState
    priority: Priority
    tenant: str
    attempts: int = 1
    in_turn: bool = True


@dataclass(frozen=True, slots=True)
class Expired:
    """What `expire` ended: tasks that were not started in time, and tasks that did not stop in time."""

    not_started: tuple[str, ...]
    written_off: tuple[str, ...]


class Backpressure:
    """The tasks of one boundary, by key. Operations are O(log tasks) amortized."""

    def __init__(self, boundary: Boundary, weights: Mapping[str, float] | None = None) -> None:
        """`weights` are the shares of tenants, above 0; a tenant without one has 1."""
        self._boundary = boundary
        self._tasks: dict[str, _Task] = {}
        self._queues = {priority: FairQueue(weights or {}) for priority in Priority}
        self._start_by = Deadlines()
        self._stop_by = Deadlines()
        self._finished: OrderedDict[str, None] = OrderedDict()
        self._next_seq = 0
        self._queued = 0
        self._in_turn = 0
        self._in_flight = 0

    # --- what is asked of it -------------------------------------------------------------------------------------

    @property
    def boundary(self) -> Boundary:
        """The limits in force."""
        return self._boundary

    @property
    def queued_count(self) -> int:
        """Tasks that wait."""
        return self._queued

    @property
    def in_turn_count(self) -> int:
        """Tasks that wait for their turn; the others wait to be named."""
        return self._in_turn

    @property
    def is_full(self) -> bool:
        """Whether no more tasks may wait for their turn."""
        return self._in_turn >= self._boundary.max_queued

    @property
    def in_flight_count(self) -> int:
        """Tasks that run, those included that were asked to stop. Above the limit only after `resize` and `begin`."""
        return self._in_flight

    @property
    def room(self) -> int:
        """Tasks that could start now."""
        return max(0, self._boundary.max_in_flight - self._in_flight)

    def state(self, key: str) -> TaskState | None:
        """The state of a task; None where it is not known."""
        task = self._tasks.get(key)
        return None if task is None else task.state

    def tasks(self) -> dict[str, TaskState]:
        """All tasks that are known."""
        return {key: task.state for key, task in self._tasks.items()}

    def signature(self) -> str:
        """The whole state as text, for fixtures and for looking at: the same state gives the same text (S4.11)."""
        limits = self._boundary
        head = (
            f"mode={limits.mode.value}|f={self._in_flight}/{limits.max_in_flight}"
            f"|q={self._queued}/{limits.max_queued}|c={limits.cancellation_budget_s * 1000:.0f}|next={self._next_seq}"
        )
        tasks = sorted(self._tasks.items(), key=lambda item: item[1].state.seq)
        return f"{head}|{','.join(_describe(key, task) for key, task in tasks)}"

    # --- what changes it -----------------------------------------------------------------------------------------

    def resize(self, max_in_flight: int, max_queued: int | None = None) -> None:
        """Changes how many may run, and wait if given. What is beyond a smaller limit stays. Raises ValueError below 0."""
        queued = self._boundary.max_queued if max_queued is None else max_queued
        if (max_in_flight, queued) != (self._boundary.max_in_flight, self._boundary.max_queued):
            self._boundary = dataclasses.replace(
                self._boundary, max_in_flight=max_in_flight, max_queued=queued
            )

    def enqueue(
        self,
        key: str,
        now: float,
        *,
        priority: Priority = Priority.NORMAL,
        tenant: str = "",
        start_by: float = math.inf,
        in_turn: bool = True,
    ) -> None:
        """Adds a task, which `expire` cancels if it has not started by then. One out of turn waits until `start` names it.

        Raises DuplicateTaskError, and QueueSaturatedError where `max_queued` wait or where, push-only, it could not start; out of
        turn neither counts.
        """
        if key in self._tasks:
            raise DuplicateTaskError(key)
        if in_turn:
            self._check_saturation(key)
        task = _Task(Queued(self._take_seq()), priority, tenant, in_turn=in_turn)
        self._tasks[key] = task
        self._wait(key, task, now, start_by)

    def begin(
        self, key: str, now: float, *, priority: Priority = Priority.NORMAL, tenant: str = ""
    ) -> None:
        """Adds a task that runs already, within the limit or not. Raises DuplicateTaskError."""
        if key in self._tasks:
            raise DuplicateTaskError(key)
        self._tasks[key] = _Task(InFlight(self._take_seq(), now), priority, tenant)
        self._in_flight += 1

    def start(self, key: str, now: float) -> None:
        """Starts one waiting task, whoever's turn it is.

        Raises UnknownTaskError, and InvalidTransitionError where it does not wait or nothing more may run.
        """
        task = self._find(key)
        if not isinstance(task.state, Queued) or not self.room:
            raise InvalidTransitionError(key, task.state.label, "start")
        self._leave_queue(key, task)
        self._run(task, now)

    def start_available(self, now: float) -> list[str]:
        """Starts what may run now; returns the keys in the order of starting. Nothing where work is pulled.

        What is past its time but not expired yet is started too: call `expire` before.
        """
        if self._boundary.mode is Mode.PULL_ONLY:
            return []
        return self._start(self.room, now)

    def pull(self, most: int, now: float) -> list[str]:
        """Starts up to `most` tasks for somebody who asks for work, within the limit; returns their keys in order."""
        return self._start(min(most, self.room), now)

    def succeed(self, key: str) -> None:
        """A running task has ended well. Raises UnknownTaskError, InvalidTransitionError."""
        task = self._running(key, "succeed")
        self._finish(key, task, Succeeded(task.state.seq))

    def fail(self, key: str, reason: str) -> None:
        """A running task has ended badly. Raises UnknownTaskError, InvalidTransitionError."""
        task = self._running(key, "fail")
        self._finish(key, task, Failed(task.state.seq, reason))

    def cancel(self, key: str, reason: str, now: float) -> TaskState:
        """Ends a waiting task, or asks a running one to stop; returns its state now.

        Raises UnknownTaskError, and InvalidTransitionError where it has ended or was asked already.
        """
        task = self._find(key)
        state = task.state
        if isinstance(state, Queued):
            self._leave_queue(key, task)
        elif not isinstance(state, InFlight):
            raise InvalidTransitionError(key, state.label, "cancel")
        elif self._boundary.cancellation_budget_s > 0:
            until = now + self._boundary.cancellation_budget_s
            task.state = Cancelling(state.seq, reason, until)
            self._stop_by.add(key, until)
            return task.state
        self._finish(key, task, Cancelled(state.seq, reason))
        return task.state

    def stop(self, key: str) -> None:
        """A task that was asked to stop has. Raises UnknownTaskError, InvalidTransitionError."""
        task = self._find(key)
        state = task.state
        if not isinstance(state, Cancelling):
            raise InvalidTransitionError(key, state.label, "stop")
        self._finish(key, task, Cancelled(state.seq, state.reason))

    def retry(self, key: str, now: float, start_by: float = math.inf) -> None:
        """Queues a failed or cancelled task again, behind those that wait.

        Raises UnknownTaskError, InvalidTransitionError, AttemptsExhaustedError, QueueSaturatedError.
        """
        task = self._find(key)
        if not isinstance(task.state, Failed | Cancelled):
            raise InvalidTransitionError(key, task.state.label, "retry")
        if task.attempts >= self._boundary.max_attempts:
            raise AttemptsExhaustedError(key, self._boundary.max_attempts)
        if task.in_turn:
            self._check_saturation(key)
        del self._finished[key]
        task.state = Queued(self._take_seq())
        task.attempts += 1
        self._wait(key, task, now, start_by)

    def forget(self, key: str) -> None:
        """Forgets a task that has ended; its key may come again. Raises UnknownTaskError, InvalidTransitionError."""
        task = self._find(key)
        if not isinstance(task.state, FINISHED):
            raise InvalidTransitionError(key, task.state.label, "be forgotten")
        del self._finished[key], self._tasks[key]

    def expire(self, now: float) -> Expired:
        """Cancels what has waited past its time, and writes off what was asked to stop and has not within its budget."""
        not_started = tuple(self._start_by.due(now))
        for key in not_started:
            task = self._tasks[key]
            self._leave_queue(key, task)
            self._finish(key, task, Cancelled(task.state.seq, NOT_STARTED))
        written_off = tuple(self._stop_by.due(now))
        for key in written_off:
            task = self._tasks[key]
            self._finish(key, task, Cancelled(task.state.seq, WRITTEN_OFF))
        return Expired(not_started, written_off)

    # --- how -----------------------------------------------------------------------------------------------------

    def _check_saturation(self, key: str) -> None:
        push_only = self._boundary.mode is Mode.PUSH_ONLY
        limit = self.room if push_only else self._boundary.max_queued
        if self._in_turn >= limit:
            raise QueueSaturatedError(key, limit)

    def _take_seq(self) -> int:
        self._next_seq += 1
        return self._next_seq - 1

    def _find(self, key: str) -> _Task:
        task = self._tasks.get(key)
        if task is None:
            raise UnknownTaskError(key)
        return task

    def _running(self, key: str, action: str) -> _Task:
        task = self._find(key)
        if not isinstance(task.state, RUNNING):
            raise InvalidTransitionError(key, task.state.label, action)
        return task

    def _wait(self, key: str, task: _Task, now: float, start_by: float) -> None:
        if task.in_turn:
            self._queues[task.priority].add(key, task.tenant, now)
            self._in_turn += 1
        self._queued += 1
        if start_by < math.inf:
            self._start_by.add(key, start_by)

    def _leave_queue(self, key: str, task: _Task) -> None:
        if task.in_turn:
            self._queues[task.priority].discard(key)
            self._in_turn -= 1
        self._start_by.discard(key)
        self._queued -= 1

    def _run(self, task: _Task, now: float) -> None:
        self._in_flight += 1
        task.state = InFlight(task.state.seq, now)

    def _start(self, most: int, now: float) -> list[str]:
        started: list[str] = []
        while self._in_turn and len(started) < most:
            key = min(
                (queue.oldest_since() + priority * self._boundary.aging_s, priority, queue)
                for priority, queue in self._queues.items()
                if queue
            )[2].pop()
            self._start_by.discard(key)
            self._queued -= 1
            self._in_turn -= 1
            self._run(self._tasks[key], now)
            started.append(key)
        return started

    def _finish(self, key: str, task: _Task, state: Succeeded | Failed | Cancelled) -> None:
        if isinstance(task.state, RUNNING):
            self._in_flight -= 1
            self._stop_by.discard(key)
        task.state = state
        self._finished[key] = None
        if len(self._finished) > self._boundary.max_finished:
            oldest, _ = self._finished.popitem(last=False)
            del self._tasks[oldest]

    def check_integrity(self) -> None:
        """Asserts that every count and index says what a recount of the tasks says. O(n), for tests (S4.12)."""
        states = [task.state for task in self._tasks.values()]
        waiting = sum(isinstance(state, Queued) for state in states)
        assert self._queued == waiting
        assert self._in_turn == sum(len(queue) for queue in self._queues.values())
        assert self._in_turn == sum(
            task.in_turn for task in self._tasks.values() if isinstance(task.state, Queued)
        )
        assert self._in_flight == sum(isinstance(state, RUNNING) for state in states)
        assert len(self._finished) == sum(isinstance(state, FINISHED) for state in states)
        assert len(self._finished) <= self._boundary.max_finished
        assert len(self._stop_by) == sum(isinstance(state, Cancelling) for state in states)
        assert len(self._start_by) <= self._queued
        seqs = {state.seq for state in states}
        assert len(seqs) == len(states)
        assert all(seq < self._next_seq for seq in seqs)


def _describe(key: str, task: _Task) -> str:
    parts = [key, task.state.label, str(task.state.seq), task.priority.name.lower(), task.tenant]
    if isinstance(task.state, Cancelling | Failed | Cancelled):
        parts.append(task.state.reason)
    return ":".join(quote(part, safe="") for part in parts)
