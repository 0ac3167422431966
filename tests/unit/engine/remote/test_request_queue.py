"""Who goes first, that nobody starves, and that nobody leaves unseen."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

import pytest
from caravan.core.v1 import scheduling_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.engine.remote.request_queue import AGING_S, LOWEST_RANK, RequestQueue
from services.runtime.errors import CaravanError

CRITICAL = scheduling_pb2.PRIORITY_CRITICAL
HIGH = scheduling_pb2.PRIORITY_HIGH
NORMAL = scheduling_pb2.PRIORITY_NORMAL
BACKGROUND = scheduling_pb2.PRIORITY_BACKGROUND
UNSET = scheduling_pb2.PRIORITY_UNSPECIFIED
ORDER = (CRITICAL, HIGH, NORMAL, BACKGROUND)


def queue_of(capacity: int = 1000) -> RequestQueue[str]:
    return RequestQueue(capacity, "chat")


def drain(queue: RequestQueue[str], now: float) -> str:
    popped = iter(lambda: queue.pop(now), None)
    return " ".join(item for item in popped if item is not None)


def test_priorities_go_first_and_classes_in_order_of_arrival() -> None:
    """S3.3; a priority that is not set is the normal one."""
    queue = queue_of()
    for priority, name in zip((BACKGROUND, UNSET, HIGH, CRITICAL, NORMAL), "bnhcm", strict=True):
        queue.push(f"{name}1", priority, 0.0)
        queue.push(f"{name}2", priority, 0.0)
    assert drain(queue, 0.0) == "c1 c2 h1 h2 n1 n2 m1 m2 b1 b2"


def test_ten_seconds_are_worth_one_step() -> None:
    """A request that came ten seconds before one of the next class is its equal, and was there first."""
    queue = queue_of()
    queue.push("normal", NORMAL, 0.0)
    queue.push("background", BACKGROUND, 0.0)
    queue.push("high 9.9", HIGH, 9.9)
    queue.push("high 10", HIGH, 10.0)
    queue.push("critical 29.9", CRITICAL, 29.9)
    queue.push("critical 30", CRITICAL, 30.0)
    assert drain(queue, 30.0) == "high 9.9 normal high 10 critical 29.9 background critical 30"


def test_who_comes_back_has_its_old_place() -> None:
    """Between two attempts a request does not wait here; what came meanwhile is behind it all the same."""
    queue = queue_of()
    for name in ("first", "second", "third"):
        queue.push(name, NORMAL, float(len(queue)))
    assert queue.pop(5.0) == "first"
    queue.push("fourth", NORMAL, 6.0)
    queue.push("first", NORMAL, 0.0)
    assert drain(queue, 7.0) == "first second third fourth"


def test_a_full_queue_refuses_and_keeps_what_it_has() -> None:
    """With a retry time; leaving makes room."""
    queue = queue_of(2)
    queue.push("a", NORMAL, 0.0)
    queue.push("b", NORMAL, 0.0)
    with pytest.raises(CaravanError) as caught:
        queue.push("c", CRITICAL, 0.0)
    assert caught.value.reason == "CAPACITY_EXHAUSTED"
    assert caught.value.retry_after_s is not None
    assert caught.value.metadata == {"model": "chat", "queued": "2", "max_queued": "2"}
    assert queue.remove("a")
    queue.push("c", CRITICAL, 0.0)
    assert drain(queue, 0.0) == "c b"
    with pytest.raises(CaravanError):
        queue_of(0).push("a", NORMAL, 0.0)


def test_an_item_waits_once() -> None:
    """Pushed twice it is a defect of the caller."""
    queue = queue_of()
    queue.push("a", NORMAL, 0.0)
    with pytest.raises(ValueError, match="waits already"):
        queue.push("a", NORMAL, 0.0)
    assert len(queue) == 1


def test_what_has_expired_is_told_and_never_served() -> None:
    """Also when only `pop` has met it, and counted until it is fetched."""
    queue = queue_of()
    queue.push("late", CRITICAL, 0.0, deadline=5.0)
    queue.push("later", CRITICAL, 0.0, deadline=4.0)
    queue.push("gone", CRITICAL, 0.0, deadline=3.0)
    queue.push("ever", BACKGROUND, 0.0)
    assert queue.pop(5.0) == "ever"
    assert queue.pop(5.0) is None
    assert len(queue) == 3
    assert queue.remove("gone")
    assert queue.expired(5.0) == ["later", "late"]
    assert (queue.expired(5.0), len(queue)) == ([], 0)


@given(seed=st.integers(0, 2**32 - 1), rate=st.floats(0.5, 3.0))
@settings(max_examples=60, deadline=None)
def test_nothing_starves(seed: int, rate: float) -> None:
    """Nobody who comes thirty seconds later is served before; so a wait is bounded by what was there by then."""
    drawn, queue = random.Random(seed), RequestQueue[tuple[int, float]](10_000, "chat")
    now, served = 0.0, list[float]()
    for number in range(600):
        now += drawn.expovariate(rate)
        weights = (6, 3, 2, 1)
        queue.push((number, now), drawn.choices(ORDER, weights)[0], now)
        if drawn.random() < 0.6:
            item = queue.pop(now)
            assert item is not None
            served.append(item[1])
    while item := queue.pop(now):
        served.append(item[1])
    latest = 0.0
    for arrived in served:
        assert latest <= arrived + LOWEST_RANK * AGING_S
        latest = max(latest, arrived)


def test_thousands_who_come_and_go_cost_little() -> None:
    """Removed from the middle, expired or served: no operation walks the queue, and no entry stays behind."""
    queue = RequestQueue[int](50_000, "chat")
    started = time.perf_counter()
    for number in range(50_000):
        queue.push(number, ORDER[number % 4], 0.0, deadline=1e6)
    for number in range(0, 50_000, 2):
        assert queue.remove(number)
    while queue.pop(1.0) is not None:
        pass
    assert time.perf_counter() - started < 5.0
    for number in range(200_000, 210_000):
        queue.push(number, NORMAL, 2.0, deadline=1e6)
        queue.remove(number)
    assert len(queue._order) + len(queue._deadlines) < 300


@dataclass
class Waiting:
    """An item of the reference."""

    name: str
    rank: int
    since: float
    deadline: float
    expired: bool = False


class QueueMachine(RuleBasedStateMachine):
    """A queue beside a list that is searched each time."""

    @initialize(capacity=st.integers(0, 6))
    def begin(self, capacity: int) -> None:
        self.capacity, self.now = capacity, 0.0
        self.queue = queue_of(capacity)
        self.waiting: list[Waiting] = []

    def look(self) -> None:
        for item in self.waiting:
            item.expired = item.expired or item.deadline <= self.now

    @rule(by=st.sampled_from([0.5, 3.0, 10.0, 25.0]))
    def wait(self, by: float) -> None:
        self.now += by

    @rule(
        name=st.sampled_from("abcdefgh"),
        rank=st.integers(0, 3),
        ago=st.sampled_from([0.0, 0.0, 1.0, 10.0]),
        for_s=st.sampled_from([-1.0, 0.0, 2.0, 12.0, math.inf, math.inf]),
    )
    def push(self, name: str, rank: int, ago: float, for_s: float) -> None:
        if name in [item.name for item in self.waiting]:
            return
        arrived, deadline = self.now - ago, self.now + for_s
        if len(self.waiting) >= self.capacity:
            with pytest.raises(CaravanError):
                self.queue.push(name, ORDER[rank], arrived, deadline)
            return
        self.queue.push(name, ORDER[rank], arrived, deadline)
        self.waiting.append(Waiting(name, rank, arrived, deadline))

    @rule()
    def pop(self) -> None:
        self.look()
        ready = [item for item in self.waiting if not item.expired]
        # Whoever has the best rank after aging, and of equals who came first; min keeps the first.
        best = min(ready, key=lambda item: item.rank * 10 - (self.now - item.since), default=None)
        assert self.queue.pop(self.now) == (best and best.name)
        if best:
            self.waiting.remove(best)

    @rule(name=st.sampled_from("abcdefgh"))
    def remove(self, name: str) -> None:
        there = [item for item in self.waiting if item.name == name]
        assert self.queue.remove(name) == bool(there)
        self.waiting = [item for item in self.waiting if item not in there]

    @rule()
    def fetch_expired(self) -> None:
        self.look()
        late = sorted(item.name for item in self.waiting if item.expired)
        assert sorted(self.queue.expired(self.now)) == late
        self.waiting = [item for item in self.waiting if not item.expired]

    @invariant()
    def both_count_the_same(self) -> None:
        assert len(self.queue) == len(self.waiting)


QueueMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestQueueMachine = QueueMachine.TestCase


def test_long_walks_agree_with_the_reference() -> None:
    """The same machine, with steps drawn evenly and more that wait."""
    for seed in range(150):
        drawn, machine = random.Random(seed), QueueMachine()
        machine.begin(drawn.randint(1, 8))
        for _ in range(80):
            step = drawn.choices(("wait", "push", "pop", "remove", "expired"), (4, 9, 4, 2, 1))[0]
            if step == "wait":
                machine.wait(drawn.choice((0.5, 3.0, 10.0)))
            elif step == "push":
                ago, for_s = drawn.choice((0.0, 0.0, 1.0)), drawn.choice((0.0, 2.0, 12.0, math.inf))
                machine.push(drawn.choice("abcdefgh"), drawn.randint(0, 3), ago, for_s)
            elif step == "pop":
                machine.pop()
            elif step == "remove":
                machine.remove(drawn.choice("abcdefgh"))
            else:
                machine.fetch_expired()
            machine.both_count_the_same()
