"""How much of the memory tiers to give back when a host runs short of memory (S2.43, S2.44).

Pure. The goal is to come down to `low`, however far above `high` the memory is (W47).
"""

from __future__ import annotations

from typing import Final

from services.cache.rows import Tier

RELEASE_BYTES_MIN: Final = 1024 * 1024
"""Below this, dropping is not worth the trouble."""
INTERVAL_S: Final = 5.0
"""Seconds between two rounds for one engine: what was dropped must show in its reports first."""
TIERS: Final = frozenset({Tier.RAM, Tier.RAM_FILE})
"""Tiers that live in memory; dropping from disk would free none."""


def bytes_to_free(used: int, total: int, high: float, low: float) -> int:
    """Bytes to free on a host that uses `used` of `total`; 0 below `high` (a share of `total`) or where unknown."""
    if total <= 0 or used < high * total:
        return 0
    return max(int(used - low * total), RELEASE_BYTES_MIN)
