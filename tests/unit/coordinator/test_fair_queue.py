"""Shares of tenants, and that nothing starves."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.backpressure import Backpressure
from services.coordinator.deadlines import Deadlines
from services.coordinator.fair_queue import FairQueue
from services.coordinator.tasks import Boundary, Priority


@given(
    weights=st.lists(st.floats(0.2, 5.0), min_size=2, max_size=5),
    starts=st.integers(20, 200),
)
def test_service_follows_the_weights(weights: list[float], starts: int) -> None:
    """Tenants that always have something waiting differ in service per weight by less than a start of each."""
    names = {f"t{i}": weight for i, weight in enumerate(weights)}
    queue = FairQueue(names)
    for name in names:
        for number in range(starts):
            queue.add(f"{name}-{number}", name, 0.0)
    served = Counter(queue.pop().split("-")[0] for _ in range(starts))
    for one, weight in names.items():
        for other, other_weight in names.items():
            gap = served[one] / weight - served[other] / other_weight
            assert gap <= 1 / weight + 1 / other_weight + 1e-9


def test_a_flood_does_not_delay_the_others() -> None:
    """A tenant with one request at a time is next but one, however long the queue of another tenant is."""
    queue = FairQueue({})
    for number in range(200):
        queue.add(f"flood-{number}", "flood", 0.0)
    for number in range(50):
        queue.add(f"small-{number}", "small", 0.0)
        assert "small" in {queue.pop().split("-")[0], queue.pop().split("-")[0]}


def test_to_have_been_away_earns_nothing() -> None:
    """Who comes back after a hundred starts of another tenant shares evenly from then on."""
    queue = FairQueue({})
    for number in range(300):
        queue.add(f"a-{number}", "a", 0.0)
    queue.add("b-first", "b", 0.0)
    for _ in range(101):
        queue.pop()
    for number in range(50):
        queue.add(f"b-{number}", "b", 0.0)
    served = Counter(queue.pop().split("-")[0] for _ in range(20))
    assert served == {"a": 10, "b": 10}


def test_leaving_after_each_start_does_not_dodge_the_share() -> None:
    """Who comes back at once is still the one that was just served: with a quarter of the weight it is every fifth."""
    queue = FairQueue({"small": 0.25})
    for number in range(50):
        queue.add(f"flood-{number}", "flood", 0.0)
    queue.add("small-0", "small", 0.0)
    served = ""
    for number in range(1, 17):
        served += queue.pop()[0]
        if served.endswith("s"):
            queue.add(f"small-{number}", "small", 0.0)
    assert served == "fsfffsffffsffffs"


def test_an_endless_row_of_new_tenants_starves_nobody() -> None:
    """A second request of a tenant is behind in its share; strangers who come for ever do not keep it waiting for ever."""
    queue = FairQueue({})
    for name in ("old-1", "old-2"):
        queue.add(name, "old", 0.0)
    assert queue.pop() == "old-1"
    for number in range(100):
        queue.add(f"new-{number}", f"tenant-{number}", 0.0)
        if queue.pop() == "old-2":
            break
    assert number < 5


def test_tenants_are_remembered_only_while_somebody_waits() -> None:
    """However many tenants came, an empty queue holds none; a long one holds few that have gone (I4)."""
    queue = FairQueue({})
    queue.add("stays", "stays", 0.0)
    for number in range(1000):
        queue.add(f"k{number}", f"tenant-{number}", 0.0)
        queue.discard(f"k{number}")
        queue.add(f"j{number}", f"tenant-{number}", 0.0)
        queue.add(f"s{number}", "stays", 0.0)
        queue.pop()
        queue.pop()
    assert queue.tenants <= 4
    while queue:
        queue.pop()
    assert queue.tenants == 0


@pytest.mark.parametrize("flood", [Priority.CRITICAL, Priority.HIGH])
def test_nothing_starves_behind_a_higher_priority(flood: Priority) -> None:
    """Under an endless flood, a background task starts when it is older than the flood by three steps of aging."""
    core = Backpressure(Boundary(max_in_flight=1, max_queued=100, aging_s=10.0))
    core.enqueue("patient", 0.0, priority=Priority.BACKGROUND)
    now, number = 0.0, 0
    while core.state("patient").label == "queued":  # type: ignore[union-attr]
        while core.queued_count < 90:
            number += 1
            core.enqueue(f"flood-{number}", now, priority=flood, tenant=f"t{number % 7}")
        for key in core.start_available(now):
            core.succeed(key) if key != "patient" else None
        now += 0.1
    steps = Priority.BACKGROUND - flood
    # The 90 that came before its time are served first, one in each tenth of a second.
    assert 10.0 * steps <= now <= 10.0 * steps + 10.0


def test_without_a_flood_priorities_are_strict() -> None:
    """What came at the same time starts in the order of priority."""
    core = Backpressure(Boundary(max_in_flight=0))
    for priority in (Priority.NORMAL, Priority.BACKGROUND, Priority.CRITICAL, Priority.HIGH):
        core.enqueue(priority.name, 0.0, priority=priority)
    core.resize(4)
    assert core.start_available(1.0) == [priority.name for priority in Priority]


def test_deadlines_do_not_grow_with_what_was_removed() -> None:
    """Times of keys that went leave with them, long before they are due (I4)."""
    deadlines = Deadlines()
    for number in range(10_000):
        deadlines.add(f"k{number}", 1e9 + number)
        deadlines.discard(f"k{number}")
    assert len(deadlines) == 0
    assert len(deadlines._heap) < 200
    deadlines.add("k", 2.0)
    deadlines.discard("k")
    deadlines.add("k", 5.0)
    assert deadlines.due(4.0) == []
    assert deadlines.due(5.0) == ["k"]
