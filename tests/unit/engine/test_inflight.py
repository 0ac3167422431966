"""The table of requests in flight (S0)."""

from __future__ import annotations

import pytest

from services.engine.inflight import InflightTable
from services.runtime.errors import CaravanError


def table(capacity: int = 4) -> InflightTable:
    return InflightTable("demo", capacity, 1.0)


def test_depth_follows_register_and_unregister() -> None:
    """The depth is the number of rows; removing twice removes once (S0.2, S0.4)."""
    rows = table()
    first, second = rows.register("a", 1), rows.register("b", 2)
    assert rows.depth == 2
    assert rows.unregister(first)
    assert not rows.unregister(first)
    assert rows.depth == 1
    assert rows.lookup("a") is None
    assert rows.lookup("b") is second


def test_an_id_is_in_flight_once() -> None:
    """A second request of the same id is refused, and the first stays."""
    rows = table()
    first = rows.register("a", 1)
    with pytest.raises(CaravanError) as caught:
        rows.register("a", 2)
    assert caught.value.reason == "DUPLICATE_REQUEST"
    assert caught.value.metadata == {"request_id": "a"}
    assert rows.lookup("a") is first


def test_a_late_removal_does_not_take_a_newer_request_of_the_same_id() -> None:
    """Rows are removed by record, not by id (W57)."""
    rows = table()
    old = rows.register("a", 1)
    rows.unregister(old)
    new = rows.register("a", 2)
    assert not rows.unregister(old)
    assert rows.lookup("a") is new


def test_the_table_is_bounded() -> None:
    """Beyond its capacity a request is refused, with a time to come again."""
    rows = table(2)
    rows.register("a", 1)
    rows.register("b", 1)
    with pytest.raises(CaravanError) as caught:
        rows.register("c", 1)
    assert caught.value.reason == "CAPACITY_EXHAUSTED"
    assert caught.value.metadata == {"model": "demo", "active": "2", "capacity": "2"}
    assert caught.value.retry_after_s == 1.0


def test_requests_are_listed_oldest_first() -> None:
    """In the order of arrival, whatever ended in between."""
    rows = table()
    kept = [rows.register(name, at) for at, name in enumerate("abc")]
    rows.unregister(kept[0])
    rows.register("a", 9)
    assert [row.request_id for row in rows.oldest_first()] == ["b", "c", "a"]
