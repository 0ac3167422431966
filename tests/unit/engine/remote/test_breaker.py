"""When a provider is left alone, and that no call of the past decides about the present."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import pytest
from caravan.engine.v1 import remote_service_pb2 as pb
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.engine.remote.breaker import (
    Breaker,
    BreakerConfig,
    CircuitOpenError,
    Permit,
    State,
    Transition,
)
from services.engine.remote.failure import Failure


class Watched:
    """A breaker and what it told."""

    def __init__(self, threshold: int = 3, open_s: float = 10.0, probes: int = 1) -> None:
        self.told: list[Transition] = []
        config = BreakerConfig(threshold, open_s, probes)
        self.breaker = Breaker(config, self.told.append)

    def fail(self, times: int, now: float) -> None:
        for _ in range(times):
            self.breaker.acquire(now).fail(now)

    def refusal(self, now: float) -> float:
        """The retry time of the refusal, which there must be."""
        with pytest.raises(CircuitOpenError) as caught:
            self.breaker.acquire(now)
        assert caught.value.failure is Failure.CIRCUIT_OPEN
        assert caught.value.retry_after_s is not None
        return caught.value.retry_after_s


def test_it_opens_at_the_threshold_and_says_when_to_come_back() -> None:
    """Failures in a row count; a success between them starts again."""
    watched = Watched(threshold=3)
    watched.fail(2, 0.0)
    watched.breaker.acquire(0.0).succeed(0.0)
    watched.fail(2, 1.0)
    assert watched.breaker.state(1.0) is State.CLOSED
    watched.fail(1, 2.0)
    assert watched.refusal(5.0) == 7.0
    assert watched.told == [Transition(State.CLOSED, State.OPEN, "failures")]


def test_a_threshold_of_zero_never_opens() -> None:
    """However often it fails."""
    watched = Watched(threshold=0)
    watched.fail(1000, 0.0)
    assert watched.breaker.state(0.0) is State.CLOSED
    assert not watched.told


def test_open_times_double_up_to_ten_times() -> None:
    """With each probe that fails; an answer that is complete starts again from the first."""
    watched = Watched(threshold=1, open_s=10.0)
    now, waits = 0.0, []
    watched.fail(1, now)
    for _ in range(40):
        waits.append(watched.refusal(now))
        now += waits[-1]
        watched.fail(1, now)
    assert waits == [10.0, 20.0, 40.0, 80.0] + [100.0] * 36
    now += watched.refusal(now)
    watched.breaker.acquire(now).succeed(now)
    watched.fail(1, now)
    assert watched.refusal(now) == 10.0


def test_an_answer_that_is_cut_off_again_and_again_does_not_reset_the_open_time() -> None:
    """The first byte closes a half-open breaker; the provider that then fails is left alone for longer."""
    watched = Watched(threshold=1, open_s=10.0)
    watched.fail(1, 0.0)
    probe = watched.breaker.acquire(10.0)
    probe.answering(10.0)
    assert watched.breaker.state(10.0) is State.CLOSED
    probe.fail(11.0)
    assert watched.refusal(11.0) == 20.0


def test_a_half_open_breaker_lets_only_probes_through() -> None:
    """As many at a time as configured, and one more for each that ends without a result: cancelled ones leak nothing."""
    watched = Watched(threshold=1, probes=2)
    watched.fail(1, 0.0)
    for _ in range(50):
        first, second = watched.breaker.acquire(10.0), watched.breaker.acquire(10.0)
        assert 0 < watched.refusal(10.0) <= 1.0
        for probe in (first, second):
            probe.abandon(10.0)
            probe.abandon(10.0)
            probe.succeed(10.0)  # Too late: it has ended.
    assert watched.breaker.state(10.0) is State.HALF_OPEN


def test_a_probe_that_hangs_does_not_keep_others_from_probing_for_ever() -> None:
    """After the open time another is let through, and its answer closes the breaker."""
    watched = Watched(threshold=1, open_s=10.0)
    watched.fail(1, 0.0)
    watched.breaker.acquire(10.0)
    watched.refusal(19.9)
    watched.breaker.acquire(20.0).succeed(20.5)
    assert watched.breaker.state(20.5) is State.CLOSED


def test_late_results_of_an_older_state_change_nothing() -> None:
    """A late success does not close an open breaker, nor does a late failure open one that has recovered (W23)."""
    watched = Watched(threshold=1)
    old = [watched.breaker.acquire(0.0) for _ in range(3)]
    watched.fail(1, 0.0)
    old[0].succeed(1.0)
    assert watched.breaker.state(1.0) is State.OPEN
    probe = watched.breaker.acquire(10.0)
    old[1].succeed(10.0)
    assert watched.breaker.state(10.0) is State.HALF_OPEN
    watched.refusal(10.0)
    probe.succeed(11.0)
    old[2].fail(12.0)
    assert watched.breaker.state(12.0) is State.CLOSED


@pytest.mark.parametrize(
    ("failure", "state"),
    [
        (None, State.CLOSED),
        (Failure.SERVER_ERROR, State.OPEN),
        (Failure.NETWORK, State.OPEN),
        (Failure.TIMEOUT, State.OPEN),
        (Failure.RATE_LIMITED, State.HALF_OPEN),
        (Failure.REJECTED, State.CLOSED),
        (Failure.UNAUTHORIZED, State.CLOSED),
        (Failure.CONTENT_FILTERED, State.CLOSED),
    ],
)
def test_what_the_end_of_a_probe_means(failure: Failure | None, state: State) -> None:
    """Only what says that the provider is not well opens (S3.10); one that finds mistakes is well."""
    watched = Watched(threshold=1)
    watched.fail(1, 0.0)
    watched.breaker.acquire(10.0).end(failure, 10.0)
    assert watched.breaker.state(10.0) is state


def test_mistakes_of_callers_neither_open_nor_outweigh_failures() -> None:
    """Two failures, a rejected request, a third failure: open."""
    watched = Watched(threshold=3)
    watched.fail(2, 0.0)
    for _ in range(10):
        watched.breaker.acquire(0.0).end(Failure.REJECTED, 0.0)
    watched.fail(1, 0.0)
    assert watched.breaker.state(0.0) is State.OPEN


def test_it_can_be_held_open_and_closed_for_a_while() -> None:
    """The retry time is the rest of the while (W24); then it goes by failures again, from the start."""
    watched = Watched(threshold=1)
    watched.breaker.force_open(0.0, 100.0)
    assert watched.refusal(40.0) == 60.0
    status = watched.breaker.status(40.0)
    assert (status.state, status.forced) == (pb.BREAKER_STATE_OPEN, True)
    assert status.remaining.ToTimedelta().total_seconds() == 60.0
    assert watched.breaker.state(100.0) is State.CLOSED
    watched.breaker.force_closed(100.0, 50.0)
    watched.fail(20, 120.0)
    assert watched.breaker.state(149.0) is State.CLOSED
    watched.fail(1, 150.0)
    assert watched.breaker.state(150.0) is State.OPEN
    assert [t.why for t in watched.told] == ["forced", "force_ended", "failures"]


def test_it_can_be_held_without_an_end_and_let_go() -> None:
    """A retry time is told all the same, and status shows no remaining time."""
    watched = Watched(threshold=1, open_s=10.0)
    watched.breaker.force_open(0.0, None)
    assert watched.refusal(1e6) == 10.0
    assert not watched.breaker.status(1e6).HasField("remaining")
    watched.breaker.automatic(1e6)
    watched.breaker.acquire(1e6).fail(1e6)
    assert watched.refusal(1e6) == 10.0


def test_a_refusal_says_who_wants_it() -> None:
    """An operator who reads "has failed too often" of a breaker that is held open would look for failures."""
    breaker = Breaker(BreakerConfig(failure_threshold=1), lambda _: None)
    breaker.acquire(0.0).fail(0.0)
    with pytest.raises(CircuitOpenError, match="failed too often"):
        breaker.acquire(0.0)
    breaker.force_open(0.0, None)
    with pytest.raises(CircuitOpenError, match="operator has suspended calls"):
        breaker.acquire(0.0)


@dataclass(eq=False)
class Period:
    """A time without a change of state, in the reference."""

    state: State
    until: float = math.inf
    forced: bool = False
    failures: int = 0
    probes: dict[int, float] = field(default_factory=dict)


@dataclass(eq=False)
class Call:
    """A call that runs, or has ended."""

    permit: Permit
    number: int
    period: Period
    ended: bool = False


class BreakerMachine(RuleBasedStateMachine):
    """A breaker beside a reference that keeps periods, and asks calls in which of them they began."""

    @initialize(threshold=st.integers(0, 3), probes=st.integers(1, 2))
    def begin(self, threshold: int, probes: int) -> None:
        self.threshold, self.probes_max = threshold, probes
        self.watched = Watched(threshold, 10.0, probes)
        self.now = 0.0
        self.period = Period(State.CLOSED)
        self.openings = 0
        self.calls: list[Call] = []
        self.seen = [State.CLOSED]

    def enter(self, period: Period) -> None:
        self.period = period
        if self.seen[-1] is not period.state:
            self.seen.append(period.state)

    def look(self) -> None:
        if self.now >= self.period.until:
            forced, failures = self.period.forced, self.period.failures
            closed = Period(State.CLOSED)
            self.enter(closed if forced else Period(State.HALF_OPEN, failures=failures))

    @rule(by=st.sampled_from([0.1, 1.0, 5.0, 10.0, 40.0, 100.0]))
    def wait(self, by: float) -> None:
        self.now += by

    @rule()
    def acquire(self) -> None:
        self.look()
        fresh = [s for s in self.period.probes.values() if self.now - s < 10.0]
        half_open = self.period.state is State.HALF_OPEN
        refused = self.period.state is State.OPEN or (half_open and len(fresh) >= self.probes_max)
        if refused:
            retry_after_s = self.watched.refusal(self.now)
            assert 0 < retry_after_s <= max(100.0, self.period.until - self.now)
            return
        call = Call(self.watched.breaker.acquire(self.now), len(self.calls), self.period)
        self.calls.append(call)
        if half_open:
            self.period.probes[call.number] = self.now

    @rule(times=st.integers(1, 3))
    def fail(self, times: int) -> None:
        """Calls that fail at once."""
        for _ in range(times):
            before = len(self.calls)
            self.acquire()
            if len(self.calls) > before:
                self.tell(0, "fail")

    @precondition(lambda self: self.calls)
    @rule(back=st.integers(0, 5), how=st.sampled_from(["answering", "succeed", "fail", "abandon"]))
    def tell(self, back: int, how: str) -> None:
        call = self.calls[-1 - back % len(self.calls)]
        getattr(call.permit, how)(self.now)
        if call.ended:
            return
        call.ended = how != "answering"
        call.period.probes.pop(call.number, None)
        if call.period is self.period and not self.period.forced:
            self.result(call, how)

    def result(self, call: Call, how: str) -> None:
        if how == "fail":
            self.period.failures += 1
            enough = 0 < self.threshold <= self.period.failures
            if enough or self.period.state is State.HALF_OPEN:
                self.openings += 1
                grown = min(10.0 * 2 ** (self.openings - 1), 100.0)
                failures = self.period.failures
                self.enter(Period(State.OPEN, self.now + grown, failures=failures))
        elif how != "abandon" and self.period.state is State.HALF_OPEN:
            self.enter(Period(State.CLOSED))
            call.period = self.period
        if how == "succeed":
            self.period.failures = self.openings = 0

    # Rare: all the time that it is held, nothing else happens.
    @rule(
        how=st.sampled_from(["nothing"] * 6 + ["open", "closed", "let go"]),
        duration=st.sampled_from([None, 1.0, 20.0, 20.0]),
    )
    def force(self, how: str, duration: float | None) -> None:
        if how == "nothing":
            return
        self.look()
        until = math.inf if duration is None else self.now + duration
        self.openings = 0
        breaker = self.watched.breaker
        if how == "open":
            breaker.force_open(self.now, duration)
            failures = self.period.failures
            self.enter(Period(State.OPEN, until, forced=True, failures=failures))
        elif how == "closed":
            breaker.force_closed(self.now, duration)
            self.enter(Period(State.CLOSED, until, forced=True))
        else:
            breaker.automatic(self.now)
            self.enter(Period(State.CLOSED))

    @invariant()
    def both_agree(self) -> None:
        self.look()
        status = self.watched.breaker.status(self.now)
        assert status.state == self.period.state.value
        assert status.forced == self.period.forced
        assert status.failures == self.period.failures
        assert status.HasField("remaining") == math.isfinite(self.period.until)
        told = [State.CLOSED, *(t.after for t in self.watched.told)]
        assert told == self.seen
        assert all(t.before is b for t, b in zip(self.watched.told, told, strict=False))


BreakerMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestBreakerMachine = BreakerMachine.TestCase


def test_long_walks_agree_with_the_reference() -> None:
    """The same machine, with steps drawn evenly: hypothesis tries the odd ones, and seldom comes to the end of a long story."""
    ways = ("answering", "succeed", "fail", "abandon")
    for seed in range(200):
        drawn, machine = random.Random(seed), BreakerMachine()
        machine.begin(threshold=drawn.randint(0, 3), probes=drawn.randint(1, 2))
        for _ in range(80):
            step = drawn.choices(("wait", "acquire", "fail", "tell", "force"), (6, 8, 3, 9, 1))[0]
            if step == "wait":
                machine.wait(drawn.choice((0.1, 1.0, 5.0, 10.0, 40.0)))
            elif step == "acquire":
                machine.acquire()
            elif step == "fail":
                machine.fail(drawn.randint(1, 3))
            elif step == "tell" and machine.calls:
                machine.tell(drawn.randint(0, 5), drawn.choice(ways))
            elif step == "force":
                machine.force(
                    drawn.choice(("open", "closed", "let go")), drawn.choice((None, 20.0))
                )
            machine.both_agree()
