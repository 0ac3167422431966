"""Who is free: by identity, also after crashes and with messages that come twice or late."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.engine.remote.workers import RESTARTS_MAX, RESTARTS_WITHIN_S, WorkerPool


def test_the_worker_that_finishes_is_the_one_that_is_free() -> None:
    """A long call on one does not make the next request wait behind it while the other is idle (W15)."""
    pool = WorkerPool(2)
    long, short = pool.take("long", 0.0), pool.take("short", 0.0)
    assert (long, short) == ("worker-0", "worker-1")
    assert pool.take("third", 0.0) is None
    assert pool.idle("worker-1", "short")
    assert pool.take("third", 0.0) == "worker-1"


def test_a_message_that_comes_twice_or_late_frees_nobody() -> None:
    """Worker and dispatch must both be right."""
    pool = WorkerPool(1)
    worker = pool.take("first", 0.0)
    assert worker is not None
    assert not pool.idle(worker, "other")
    assert not pool.idle("worker-7", "first")
    assert pool.idle(worker, "first")
    assert pool.take("second", 0.0) == worker
    assert not pool.idle(worker, "first")
    assert not pool.crashed(worker, "first", 0.0)
    assert (pool.busy, pool.replaced) == (1, 0)
    assert pool.idle(worker, "second")


def test_a_worker_that_crashes_is_replaced_at_once_and_then_rests() -> None:
    """No capacity is lost for good (W16), and one that always crashes is started four times a minute at most."""
    pool, now, starts = WorkerPool(1), 0.0, list[float]()
    while now < 600.0:
        worker = pool.take(f"d{len(starts)}", now)
        if worker is None:
            now += 0.05
            continue
        starts.append(now)
        assert pool.crashed(worker, f"d{len(starts) - 1}", now)
        now += 0.001
    assert starts[:4] == pytest.approx([0.0, 0.001, 0.002, 0.003])
    assert starts[4] >= RESTARTS_WITHIN_S
    for at in starts[1:]:
        within = [s for s in starts[1:] if at <= s < at + RESTARTS_WITHIN_S - 0.1]
        assert len(within) <= RESTARTS_MAX
    assert len(starts) >= RESTARTS_MAX * 10


def test_the_rest_of_one_is_not_the_rest_of_all() -> None:
    """Others go on while it rests, and rare crashes cost no rest."""
    pool = WorkerPool(2)
    for number in range(4):
        taken = [pool.take(f"d{number}-{n}", 0.0) for n in range(2)]
        assert pool.crashed("worker-0", f"d{number}-{taken.index('worker-0')}", 0.0)
        assert pool.idle("worker-1", f"d{number}-{taken.index('worker-1')}")
    assert pool.take("next", 0.0) == "worker-1"
    assert pool.take("more", 0.0) is None
    assert pool.take("more", RESTARTS_WITHIN_S) == "worker-0"
    rare = WorkerPool(1)
    for minute in range(100):
        assert rare.take(f"r{minute}", minute * 30.0) == "worker-0"
        assert rare.crashed("worker-0", f"r{minute}", minute * 30.0)


class PoolMachine(RuleBasedStateMachine):
    """A pool beside a reference: who has which dispatch, and when each crashed."""

    @initialize(count=st.integers(1, 3))
    def begin(self, count: int) -> None:
        self.pool, self.now, self.dispatches = WorkerPool(count), 0.0, 0
        self.workers = [f"worker-{n}" for n in range(count)]
        self.holds: dict[str, str] = {}
        self.back_at = dict.fromkeys(self.workers, -math.inf)
        self.returns: dict[str, list[float]] = {worker: [] for worker in self.workers}
        self.past: list[tuple[str, str]] = [("worker-0", "never")]

    @rule(by=st.sampled_from([0.1, 5.0, 21.0, 60.0]))
    def wait(self, by: float) -> None:
        self.now += by

    @rule()
    def take(self) -> None:
        self.dispatches += 1
        dispatch = f"d{self.dispatches}"
        free = {w for w in self.workers if w not in self.holds and self.back_at[w] <= self.now}
        worker = self.pool.take(dispatch, self.now)
        if worker is None:
            assert not free
            return
        assert worker in free
        self.holds[worker] = dispatch
        self.past.append((worker, dispatch))

    @rule(back=st.integers(0, 4), crash=st.booleans())
    def end(self, back: int, *, crash: bool) -> None:
        worker, dispatch = self.past[-1 - back % len(self.past)]
        current = self.holds.get(worker) == dispatch
        if crash:
            assert self.pool.crashed(worker, dispatch, self.now) == current
        else:
            assert self.pool.idle(worker, dispatch) == current
        if current:
            del self.holds[worker]
        if current and crash:
            returns = self.returns[worker]
            third = returns[-3] if len(returns) >= 3 else -math.inf
            returns.append(max(self.now, third + 60.0))
            self.back_at[worker] = returns[-1]

    @invariant()
    def nobody_is_lost(self) -> None:
        assert self.pool.busy == len(self.holds)
        assert self.pool.replaced == sum(len(returns) for returns in self.returns.values())


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def test_long_walks_agree_with_the_reference() -> None:
    """The same machine, with steps drawn evenly: crashes enough for a rest are rare otherwise."""
    for seed in range(100):
        drawn, machine = random.Random(seed), PoolMachine()
        machine.begin(drawn.randint(1, 3))
        for _ in range(100):
            step = drawn.choices(("wait", "take", "end"), (1, 5, 5))[0]
            if step == "wait":
                machine.wait(drawn.choice((0.1, 5.0, 21.0, 60.0)))
            elif step == "take":
                machine.take()
            else:
                machine.end(drawn.randint(0, 4), crash=drawn.random() < 0.7)
            machine.nobody_is_lost()
