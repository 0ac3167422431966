"""The backpressure core against a naive one of lists: no heaps, no counters, everything counted again each time."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.coordinator.backpressure import Backpressure
from services.coordinator.tasks import BackpressureError, Boundary, Mode, Priority

KEYS = st.sampled_from([f"t{i}" for i in range(10)])
WEIGHTS = {"big": 3.0, "half": 0.5}
MODES = st.sampled_from([Mode.PUSH_PULL, Mode.PUSH_PULL, Mode.PUSH_ONLY, Mode.PULL_ONLY])


@dataclass
class Task:
    """A task that has not been forgotten."""

    key: str
    seq: int
    priority: Priority
    tenant: str
    label: str = "queued"
    since: float = 0.0
    start_by: float = 0.0
    until: float = 0.0
    attempts: int = 1
    in_turn: bool = True


@dataclass
class Shares:
    """Who is next among the tenants of one priority, by the book: nobody is forgotten while anybody waits."""

    virtual: float = 0.0
    turns: int = 0
    tags: dict[str, tuple[float, int]] = field(default_factory=dict)

    def arrive(self, tenant: str, waiting: list[Task]) -> None:
        if not waiting:
            self.virtual, self.tags = 0.0, {}
        if tenant not in [t.tenant for t in waiting]:
            tag = max(self.tags.get(tenant, (0.0, 0))[0], self.virtual)
            self.tags[tenant] = (tag, self.turns)
            self.turns += 1

    def choose(self, waiting: list[Task]) -> Task:
        active = {t.tenant for t in waiting}
        tenant = min(active, key=lambda t: self.tags[t])
        tag, _ = self.tags[tenant]
        weight = sum(WEIGHTS.get(t, 1.0) for t in active)
        self.virtual = max(self.virtual + 1 / weight, tag)
        self.tags[tenant] = (tag + 1 / WEIGHTS.get(tenant, 1.0), self.turns)
        self.turns += 1
        return min((t for t in waiting if t.tenant == tenant), key=lambda t: t.seq)


class BackpressureMachine(RuleBasedStateMachine):
    """Does the same to both."""

    @initialize(mode=MODES, most=st.integers(0, 3), queue=st.integers(0, 6), keep=st.integers(0, 3))
    def start(self, mode: Mode, most: int, queue: int, keep: int) -> None:
        self.boundary = Boundary(mode, most, queue, 2.0, aging_s=3.0, max_finished=keep)
        self.core = Backpressure(self.boundary, WEIGHTS)
        self.most, self.queue = most, queue
        self.now = 0.0
        self.seq = 0
        self.tasks: list[Task] = []
        self.ended: list[Task] = []
        self.shares = {priority: Shares() for priority in Priority}

    def of(self, *labels: str) -> list[Task]:
        return [t for t in self.tasks if t.label in labels]

    def in_turn(self) -> list[Task]:
        return [t for t in self.of("queued") if t.in_turn]

    def find(self, key: str) -> Task | None:
        return next((t for t in self.tasks if t.key == key), None)

    def end(self, task: Task, label: str) -> None:
        task.label = label
        self.ended.append(task)
        while len(self.ended) > self.boundary.max_finished:
            self.tasks.remove(self.ended.pop(0))

    def room(self) -> int:
        return max(0, self.most - len(self.of("in_flight", "cancelling")))

    def saturated(self) -> bool:
        push_only = self.boundary.mode is Mode.PUSH_ONLY
        return len(self.in_turn()) >= (self.room() if push_only else self.queue)

    def wait(self, task: Task) -> None:
        task.label, task.seq, task.since = "queued", self.seq, self.now
        self.seq += 1
        if task.in_turn:
            same = [t for t in self.in_turn() if t.priority == task.priority and t is not task]
            self.shares[task.priority].arrive(task.tenant, same)

    def refused(self, action: str, *arguments: object, **options: object) -> str | None:
        """Does it to the core; the name of the error, if any."""
        before = self.core.signature()
        try:
            getattr(self.core, action)(*arguments, **options)
        except BackpressureError as error:
            assert self.core.signature() == before
            return type(error).__name__
        return None

    @rule(
        key=KEYS,
        priority=st.sampled_from(Priority),
        tenant=st.sampled_from(["big", "half", "one", "two"]),
        within=st.integers(1, 8),
        in_turn=st.sampled_from([True, True, False]),
    )
    def enqueue(
        self, key: str, priority: Priority, tenant: str, within: int, in_turn: bool
    ) -> None:
        expected = "QueueSaturatedError" if in_turn and self.saturated() else None
        if self.find(key) is not None:
            expected = "DuplicateTaskError"
        options = {"priority": priority, "tenant": tenant, "start_by": self.now + within}
        options["in_turn"] = in_turn
        assert self.refused("enqueue", key, self.now, **options) == expected
        if expected is None:
            task = Task(key, 0, priority, tenant, start_by=self.now + within, label="new")
            task.in_turn = in_turn
            self.tasks.append(task)
            self.wait(task)

    @rule(key=KEYS, priority=st.sampled_from(Priority))
    def begin(self, key: str, priority: Priority) -> None:
        """Runs from the start, whatever the limit."""
        expected = None if self.find(key) is None else "DuplicateTaskError"
        options = {"priority": priority, "tenant": "one"}
        assert self.refused("begin", key, self.now, **options) == expected
        if expected is None:
            self.tasks.append(Task(key, self.seq, priority, "one", "in_flight"))
            self.seq += 1

    @rule(key=KEYS)
    def start_by_name(self, key: str) -> None:
        """Out of turn or not, within the limit."""
        task = self.find(key)
        allowed = task is not None and task.label == "queued" and self.room() > 0
        expected = None if allowed else "InvalidTransitionError"
        assert self.refused("start", key, self.now) == (expected if task else "UnknownTaskError")
        if task is not None and allowed:
            task.label = "in_flight"

    def next_to_start(self) -> Task:
        oldest = {
            p: min(t.since for t in self.in_turn() if t.priority == p)
            for p in Priority
            if any(t.priority == p for t in self.in_turn())
        }
        chosen = min(oldest, key=lambda p: (oldest[p] + p * self.boundary.aging_s, p))
        waiting = [t for t in self.in_turn() if t.priority == chosen]
        return self.shares[chosen].choose(waiting)

    def expect_started(self, most: int) -> list[str]:
        started = []
        for _ in range(min(most, self.room(), len(self.in_turn()))):
            task = self.next_to_start()
            task.label = "in_flight"
            started.append(task.key)
        return started

    @rule()
    def start_available(self) -> None:
        pulled = self.boundary.mode is Mode.PULL_ONLY
        expected = [] if pulled else self.expect_started(99)
        assert self.core.start_available(self.now) == expected

    @rule(most=st.integers(0, 3))
    def pull(self, most: int) -> None:
        expected = self.expect_started(most)
        assert self.core.pull(most, self.now) == expected

    @rule(key=KEYS, action=st.sampled_from(["succeed", "fail", "stop"]))
    def end_some(self, key: str, action: str) -> None:
        task = self.find(key)
        allowed = ("cancelling",) if action == "stop" else ("in_flight", "cancelling")
        expected = None if task and task.label in allowed else "InvalidTransitionError"
        arguments = (key, "why") if action == "fail" else (key,)
        assert self.refused(action, *arguments) == (expected if task else "UnknownTaskError")
        if task is not None and expected is None:
            self.end(task, {"succeed": "succeeded", "fail": "failed", "stop": "cancelled"}[action])

    @rule(key=KEYS)
    def cancel(self, key: str) -> None:
        task = self.find(key)
        allowed = task is not None and task.label in {"queued", "in_flight"}
        expected = None if allowed else "InvalidTransitionError"
        assert self.refused("cancel", key, "why", self.now) == (
            expected if task else "UnknownTaskError"
        )
        if task is not None and task.label == "queued":
            self.end(task, "cancelled")
        elif task is not None and task.label == "in_flight":
            task.label, task.until = "cancelling", self.now + 2.0

    @rule(key=KEYS)
    def retry(self, key: str) -> None:
        task = self.find(key)
        expected: str | None = "UnknownTaskError"
        if task is not None:
            expected = "QueueSaturatedError" if task.in_turn and self.saturated() else None
            if task.attempts == self.boundary.max_attempts:
                expected = "AttemptsExhaustedError"
            if task.label not in {"failed", "cancelled"}:
                expected = "InvalidTransitionError"
        assert self.refused("retry", key, self.now, self.now + 5.0) == expected
        if task is not None and expected is None:
            self.ended.remove(task)
            task.attempts += 1
            task.start_by = self.now + 5.0
            self.wait(task)

    @rule(key=KEYS)
    def forget(self, key: str) -> None:
        task = self.find(key)
        expected = None if task in self.ended else "InvalidTransitionError"
        assert self.refused("forget", key) == (expected if task else "UnknownTaskError")
        if task is not None and expected is None:
            self.ended.remove(task)
            self.tasks.remove(task)

    @rule(most=st.integers(0, 4), queue=st.integers(0, 6) | st.none())
    def resize(self, most: int, queue: int | None) -> None:
        """What runs or waits beyond a smaller limit stays."""
        self.core.resize(most, queue)
        self.most = most
        self.queue = self.queue if queue is None else queue

    @rule(seconds=st.sampled_from([0.5, 1.0, 4.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        late = sorted(
            (t for t in self.of("queued") if t.start_by <= self.now),
            key=lambda t: (t.start_by, t.seq),
        )
        stuck = sorted(
            (t for t in self.of("cancelling") if t.until <= self.now), key=lambda t: t.until
        )
        expired = self.core.expire(self.now)
        assert list(expired.not_started) == [t.key for t in late]
        assert sorted(expired.written_off) == sorted(t.key for t in stuck)
        by_key = {t.key: t for t in stuck}
        for task in (*late, *(by_key[key] for key in expired.written_off)):
            self.end(task, "cancelled")

    @invariant()
    def both_are_equal(self) -> None:
        if not hasattr(self, "core"):
            return
        self.core.check_integrity()
        states = {key: (state.label, state.seq) for key, state in self.core.tasks().items()}
        assert states == {t.key: (t.label, t.seq) for t in self.tasks}
        assert self.core.queued_count == len(self.of("queued"))
        assert self.core.in_turn_count == len(self.in_turn())
        assert self.core.is_full == (len(self.in_turn()) >= self.queue)
        assert self.core.in_flight_count == len(self.of("in_flight", "cancelling"))


TestBackpressureMachine = BackpressureMachine.TestCase
TestBackpressureMachine.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
