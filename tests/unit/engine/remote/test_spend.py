"""What an engine tells of its costs."""

from __future__ import annotations

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.core.v1 import generation_pb2

from services.engine.remote.spend import OTHERS, TENANTS_MAX, SpendCounters

USAGE = generation_pb2.Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=3)


def test_each_tenant_is_counted_by_itself() -> None:
    """Requests that cost nothing count as requests."""
    counters = SpendCounters()
    counters.add("ants", 5, USAGE)
    counters.add("", 0)
    counters.add("ants", 7, USAGE)
    assert counters.report() == [
        pb.SpendCounter(
            tenant="ants",
            nanousd=12,
            requests=2,
            prompt_tokens=20,
            cached_tokens=8,
            completion_tokens=6,
        ),
        pb.SpendCounter(requests=1),
    ]


def test_no_more_cached_tokens_than_tokens() -> None:
    """Some providers count a cached prompt apart from the prompt."""
    counters = SpendCounters()
    counters.add("", 1, generation_pb2.Usage(prompt_tokens=2, cached_tokens=9))
    assert counters.report()[0].cached_tokens == 2


def test_tenants_are_bounded_and_nothing_is_lost() -> None:
    """Those beyond share a counter; who has one keeps it."""
    counters = SpendCounters()
    for number in range(2 * TENANTS_MAX):
        counters.add(f"t{number}", 1)
    counters.add("t0", 1)
    report = {counter.tenant: counter.nanousd for counter in counters.report()}
    assert len(report) == TENANTS_MAX
    assert report["t0"] == 2
    assert report[OTHERS] == TENANTS_MAX + 1
    assert sum(report.values()) == 2 * TENANTS_MAX + 1
