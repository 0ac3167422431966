"""Which request a fault hits, and which faults there can be."""

from __future__ import annotations

from typing import Any

import pytest

from services.dev.provider.faults import FAULTS_MAX, Fault, FaultError, FaultPlan, Kind, fault_of


def test_the_oldest_fault_hits_as_often_as_it_says() -> None:
    plan = FaultPlan()
    busy = plan.add(Fault(Kind.STATUS, status=503, times=2))
    cut = plan.add(Fault(Kind.CUT))
    assert [plan.take() for _ in range(4)] == [busy, busy, cut, None]


def test_a_fault_without_an_end_goes_on_until_it_is_removed() -> None:
    plan = FaultPlan()
    hang = plan.add(Fault(Kind.HANG, times=None))
    assert [plan.take() for _ in range(3)] == [hang] * 3
    plan.remove(hang)
    assert plan.take() is None


def test_listed_faults_tell_what_is_left_of_them() -> None:
    plan = FaultPlan()
    plan.add(Fault(Kind.CUT, times=3))
    plan.take()
    assert [fault.times for fault in plan.listed()] == [2]
    plan.clear()
    assert plan.listed() == []


def test_there_is_a_limit() -> None:
    plan = FaultPlan()
    for _ in range(FAULTS_MAX):
        plan.add(Fault(Kind.CUT))
    with pytest.raises(FaultError):
        plan.add(Fault(Kind.CUT))


def test_a_fault_from_json() -> None:
    found = fault_of({"kind": "status", "status": 429, "retry_after": "2", "times": None})
    assert found == Fault(Kind.STATUS, status=429, retry_after="2", times=None)
    assert fault_of({"kind": "hang", "times": "always"}) == Fault(Kind.HANG, times=None)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "kind"),
        ({"kind": "melt"}, "kind"),
        ({"kind": "cut", "aftr": 1}, "aftr"),
        ({"kind": "cut", "after": "1"}, "after"),
        ({"kind": "cut", "after": True}, "after"),
        ({"kind": "cut", "after": -1}, "after"),
        ({"kind": "cut", "times": 0}, "times"),
        ({"kind": "status", "status": 200}, "status"),
        ({"kind": "status", "reason": "spite"}, "reason"),
        ({"kind": "status", "retry_after": "1\r\nx: y"}, "retry_after"),
        ({"kind": "pause", "seconds": -1}, "seconds"),
        ({"kind": "pause", "seconds": None}, "seconds"),
        ({"kind": "oversized", "size": 1 << 40}, "size"),
    ],
)
def test_faults_that_make_no_sense_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(FaultError, match=said):
        fault_of(values)
