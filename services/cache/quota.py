"""The bytes of one place against its quota.

Pure. Reserved bytes count from the grant on, and dropped ones until their deletion is confirmed, so what lies in the place
never passes the quota (W45).
"""

from __future__ import annotations


class Ledger:
    """Bytes of a place.

    `held` counts all copies, those being written and dropped included; `evicting` those of them that are being dropped,
    `pinned` those that a claim pins; `wanted` is asked for by reservations that wait for room.
    """

    __slots__ = ("evicting", "held", "pinned", "quota", "wanted")

    def __init__(self, quota: int) -> None:
        self.quota = quota
        self.held = 0
        self.evicting = 0
        self.pinned = 0
        self.wanted = 0

    def fits(self, size: int) -> bool:
        """Whether `size` more bytes are within the quota now."""
        return self.held + size <= self.quota

    @property
    def shortage(self) -> int:
        """Bytes to drop beside those being dropped, so that all that wait fit; 0 or less if none."""
        return self.held - self.evicting + self.wanted - self.quota

    @property
    def droppable_max(self) -> int:
        """No more than these bytes can be dropped now; fewer where something is being written or in front of others."""
        return self.held - self.evicting - self.pinned

    @property
    def is_over(self) -> bool:
        """More is held than the quota: files that were found, or a quota that was lowered."""
        return self.held > self.quota
