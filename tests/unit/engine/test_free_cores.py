"""How many threads an engine takes from what others leave."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.free_cores import INTERVAL_S, STALE_S, FreeCores
from services.engine.threads import SMALL_MODEL_BYTES, thread_choice
from services.runtime.clock import ManualClock
from services.runtime.processor import ProcessorUsage, busy_seconds


class Machine:
    """A machine whose use is set by hand."""

    def __init__(self, most: int = 2, cores: int = 2) -> None:
        self.policy = FreeCores(most, cores)
        self.usage = ProcessorUsage(0.0, 0.0, 0.0)
        self.policy.observe(self.usage)

    def look(self, *, others: float, own: float, after_s: float = INTERVAL_S) -> int:
        """Threads after `after_s` in which others used `others` cores and the engine `own`."""
        last = self.usage
        everybody = last.everybody + (others + own) * after_s
        self.usage = ProcessorUsage(last.at + after_s, everybody, last.own + own * after_s)
        return self.policy.observe(self.usage)


def test_an_idle_machine_is_used_in_full() -> None:
    """The engine's own work is not a competitor, and neither are its front processes."""
    machine = Machine()
    assert machine.look(others=0.1, own=1.9) == 2


def test_busy_neighbours_keep_their_core() -> None:
    """Two busy processes share two cores with two threads: the engine goes down to one, and stays there."""
    machine = Machine()
    assert machine.look(others=1.0, own=1.0) == 1
    assert [machine.look(others=1.1, own=0.9) for _ in range(5)] == [1] * 5


def test_the_core_is_taken_again_when_it_is_free() -> None:
    """The neighbours end: the next look brings the second thread back."""
    machine = Machine()
    machine.look(others=1.0, own=1.0)
    assert machine.look(others=0.1, own=1.0) == 2


def test_a_neighbour_of_a_third_changes_nothing() -> None:
    """Between the two bounds the number stays what it was, so that it does not go to and fro."""
    machine = Machine()
    assert [machine.look(others=0.35, own=1.6) for _ in range(5)] == [2] * 5
    machine.look(others=1.0, own=1.0)
    assert [machine.look(others=0.35, own=1.0) for _ in range(5)] == [1] * 5


def test_a_pause_says_nothing_of_now() -> None:
    """What happened while the engine was idle for long is not held against it."""
    machine = Machine()
    assert machine.look(others=2.0, own=0.0, after_s=STALE_S + 1) == 2


def test_many_cores_lose_only_what_is_used() -> None:
    """Three busy processes on eight cores leave five."""
    assert Machine(8, 8).look(others=3.0, own=5.0) == 5


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 20)), max_size=20), st.integers(1, 8))
def test_there_is_always_a_thread_and_never_too_many(
    looks: list[tuple[float, float]], most: int
) -> None:
    """Whatever the counters say, even nonsense."""
    machine = Machine(most, 8)
    for others, own in looks:
        assert 1 <= machine.look(others=others, own=own) <= most


def test_more_threads_than_cores_are_refused() -> None:
    """They would wait for each other."""
    with pytest.raises(ValueError, match="one per core"):
        FreeCores(3, 2)


def test_busy_time_is_of_the_given_cores_and_without_idle() -> None:
    """user, nice, system, irq and softirq count; idle, iowait and steal do not; other cores do not."""
    stat = (
        "cpu  99 99 99 99 99 99 99 99 0 0\n"
        "cpu0 100 10 20 5000 7 3 2 50 0 0\n"
        "cpu1 1000 0 0 0 0 0 0 0 0 0\n"
        "intr 1 2 3\n"
    )
    assert busy_seconds(stat, frozenset({0}), 100) == 1.35


def test_what_is_asked_for_is_done() -> None:
    """A number in the settings is kept, whatever the model and the machine."""
    assert thread_choice(3, 1)() == 3
    assert thread_choice(3, 1 << 40)() == 3


def test_a_small_model_has_one_thread() -> None:
    """Its steps are too short to be worth a meeting."""
    assert thread_choice(0, SMALL_MODEL_BYTES - 1)() == 1


def test_the_machine_is_looked_at_once_per_interval() -> None:
    """Not before every batch: a batch may take less than a millisecond."""
    clock, looks = ManualClock(), []

    def read() -> ProcessorUsage:
        looks.append(clock.now)
        return ProcessorUsage(clock.now, 0.0, 0.0)

    choose = thread_choice(0, SMALL_MODEL_BYTES, read=read, clock=clock)
    for _ in range(100):
        choose()
        clock.advance(INTERVAL_S / 10)
    assert len(looks) <= 11
