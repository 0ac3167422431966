"""How long a root that failed is left alone."""

from __future__ import annotations

from services.engine.kv.root_pauses import MOST_S, RootPauses


def test_each_failure_in_a_row_pauses_twice_as_long_and_a_success_ends_it() -> None:
    pauses, now = RootPauses(), 100.0
    lengths = []
    for _ in range(9):
        assert not pauses.is_paused("a", now)
        pauses.failed("a", now)
        pauses.failed("a", now)
        assert pauses.is_paused("a", now)
        assert not pauses.is_paused("b", now)
        began = now
        while pauses.is_paused("a", now):
            now += 0.5
        lengths.append(now - began)
    assert lengths == [1, 2, 4, 8, 16, 32, MOST_S, MOST_S, MOST_S]
    pauses.worked("a")
    pauses.worked("b")
    pauses.failed("a", now)
    assert pauses.is_paused("a", now + 0.9)
    assert not pauses.is_paused("a", now + 1)
