"""Roots that failed are left alone for a while: a full disk is not tried, nor complained of, for every block. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FIRST_S: Final = 1.0
MOST_S: Final = 60.0


@dataclass(slots=True)
class _Pause:
    until: float
    seconds: float


class RootPauses:
    """Times are in seconds of one clock."""

    def __init__(self) -> None:
        self._pauses: dict[str, _Pause] = {}

    def is_paused(self, root_id: str, now: float) -> bool:
        """Whether nothing should be written there now."""
        pause = self._pauses.get(root_id)
        return pause is not None and now < pause.until

    def failed(self, root_id: str, now: float) -> None:
        """A write failed: the root rests, each time twice as long, at most a minute."""
        if self.is_paused(root_id, now):
            return  # Two writers met the same trouble.
        before = self._pauses.get(root_id)
        seconds = FIRST_S if before is None else min(2 * before.seconds, MOST_S)
        self._pauses[root_id] = _Pause(now + seconds, seconds)

    def worked(self, root_id: str) -> None:
        """A write succeeded."""
        self._pauses.pop(root_id, None)
