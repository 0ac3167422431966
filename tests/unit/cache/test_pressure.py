"""How much memory to give back (S2.43, W47)."""

from __future__ import annotations

import pytest

from services.cache.pressure import RELEASE_BYTES_MIN, bytes_to_free

GIB = 1 << 30


@pytest.mark.parametrize(
    ("used", "total", "freed"),
    [
        (0, 0, 0),
        (5, 0, 0),
        (84, 100, 0),
        (85, 100, 10),
        (99, 100, 24),
        (100, 100, 25),
    ],
)
def test_the_target_is_the_low_mark(used: int, total: int, freed: int) -> None:
    """However far above the high mark, one round comes down to the low mark; unknown memory asks for nothing."""
    assert bytes_to_free(used * GIB, total * GIB, 0.85, 0.75) == freed * GIB


def test_little_is_not_worth_the_trouble() -> None:
    """At least one MiB is asked for."""
    assert bytes_to_free(80, 100, 0.8, 0.79) == RELEASE_BYTES_MIN
