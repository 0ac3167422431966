"""What becomes of a request whose engine is lost or refuses it: another lease, or the end. Pure.

Moved are requests whose engine is gone (ENGINE_LOST), silent (ENGINE_STALLED), going (DRAINING), or not ready for one more
(CAPACITY_EXHAUSTED, MODEL_LOADING, and DUPLICATE_REQUEST where the other is its own former attempt). Not moved are DECODE_FAILED,
because the engine lives and says that computing this very request fails, and it would fail the next one too; INTERNAL, because a
defect has effects that nobody knows; and whatever is wrong with the request itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

GONE: Final = frozenset({"ENGINE_LOST", "ENGINE_STALLED"})
"""The engine said nothing, so it may have begun, and it is not asked again in this life."""
_REFUSED: Final = frozenset({"DRAINING", "CAPACITY_EXHAUSTED", "MODEL_LOADING"})
"""The engine's own words; before its first event they mean that it has not begun. It may take the request a moment later."""
_OWN_GHOST: Final = "DUPLICATE_REQUEST"
"""Of a request that has moved: a life that it left in silence, and came back to, has not noticed yet that it had left."""
MOVED: Final = GONE | _REFUSED | {_OWN_GHOST}

BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MOST_S: Final = 2.0
AVOIDED_MAX: Final = 16
"""As many as a route may name."""


@dataclass(frozen=True, slots=True)
class Loss:
    """How a lease ended without an answer.

    `began`: the engine sent an event. `resumable`: another engine can go on with what the client has of the answer.
    """

    reason: str
    incarnation: str
    began: bool
    resumable: bool = True


class Migration:
    """The moves of one request, `moves_max` at most; the count is never reset."""

    def __init__(self, moves_max: int) -> None:
        self._moves_max = moves_max
        self._moves = 0
        self._avoided: list[str] = []

    @property
    def has_moved(self) -> bool:
        """Whether a lease of the request was lost or refused before."""
        return self._moves > 0

    @property
    def avoided(self) -> tuple[str, ...]:
        """Lives of engines that the request must not go to again."""
        return tuple(self._avoided)

    def after(
        self, loss: Loss, *, idempotent: bool, remaining_s: float | None, fraction: float
    ) -> float | None:
        """Seconds to wait before the next lease is asked for; None: the request ends here.

        `remaining_s` is what is left of the deadline, `fraction` a random number within [0, 1).
        """
        if loss.reason not in MOVED or not loss.resumable or self._moves >= self._moves_max:
            return None
        if loss.reason == _OWN_GHOST and not self.has_moved:
            return None  # Another request has the id.
        may_have_begun = loss.began or loss.reason not in _REFUSED
        if may_have_begun and not idempotent:
            return None
        delay_s = self._delay_s(loss.reason, fraction)
        if remaining_s is not None and remaining_s <= delay_s:
            return None
        self._moves += 1
        if loss.reason in GONE and loss.incarnation:
            self._avoided = [*self._avoided, loss.incarnation][-AVOIDED_MAX:]
        return delay_s

    def _delay_s(self, reason: str, fraction: float) -> float:
        """Another engine can take over at once, so the first move does not wait; one that refused needs a moment."""
        doublings = self._moves - 1 if reason in GONE else self._moves
        if doublings < 0:
            return 0.0
        longest: float = min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2.0 ** min(doublings, 16))
        return longest * (0.5 + fraction / 2)
