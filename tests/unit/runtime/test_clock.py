"""Time and ids as arguments."""

from __future__ import annotations

import pytest

from services.runtime.clock import CountingIds, ManualClock, SystemClock, random_id, random_seed


def test_a_manual_clock_moves_only_by_hand_and_forward() -> None:
    """Both times move together, and never back."""
    clock = ManualClock(5.0)
    clock.advance(1.5)
    assert (clock.monotonic(), clock.wall()) == (6.5, 6.5)
    with pytest.raises(ValueError, match="back"):
        clock.advance(-0.1)


def test_the_clock_of_the_machine_goes_on() -> None:
    """Monotonic time never goes back, and the wall shows this century."""
    clock = SystemClock()
    first = clock.monotonic()
    assert clock.monotonic() >= first
    assert clock.wall() > 1.7e9


def test_ids_do_not_repeat() -> None:
    """Ids carry their prefix; seeds fit 32 bits."""
    assert len({random_id("req") for _ in range(1000)}) == 1000
    assert random_id("lease").startswith("lease-")
    ids = CountingIds()
    assert [ids("a"), ids("b")] == ["a-1", "b-2"]
    assert all(0 <= random_seed() < 2**32 for _ in range(100))
