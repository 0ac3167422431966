"""What engines have used of limits that they share, as counters that only grow (S3.14, W26). Pure.

One engine's counter of one epoch is written by that engine alone and only grows, so that of two the larger one is the newer. To
merge is to take the larger: late, repeated and reordered messages change nothing, and everybody who has heard the same knows
the same. An epoch has a number, so that a late message of the one before does not count in this one. Only the newest two epochs of
each engine are kept. An engine's epochs are by its own clock and are never compared with those of others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from caravan.coordinator.v1 import coordinator_service_pb2 as pb

EPOCH_S: Final = 10
EPOCHS_KEPT: Final = 2
KEY_BYTES_MAX: Final = 256


@dataclass(frozen=True, slots=True)
class Use:
    """What was used, wanted, and refused by the provider (`throttled`)."""

    requests: int = 0
    tokens: int = 0
    wanted_requests: int = 0
    wanted_tokens: int = 0
    throttled: int = 0

    def __add__(self, other: Use) -> Use:
        return Use(*(mine + its for mine, its in zip(self.figures, other.figures, strict=True)))

    def beyond(self, other: Use) -> Use:
        """What is more here than there; 0 where it is not."""
        return Use(
            *(max(0, mine - its) for mine, its in zip(self.figures, other.figures, strict=True))
        )

    def largest(self, other: Use) -> Use:
        """The larger of each figure."""
        return Use(*map(max, self.figures, other.figures))

    @property
    def figures(self) -> tuple[int, int, int, int, int]:
        """All figures, in the order of the fields."""
        return (
            self.requests,
            self.tokens,
            self.wanted_requests,
            self.wanted_tokens,
            self.throttled,
        )


NO_USE: Final = Use()


class EngineUse:
    """The newest two epochs of one engine."""

    def __init__(self) -> None:
        self._epochs: dict[int, Use] = {}

    def merge(self, epoch: int, use: Use) -> Use:
        """Learns of a counter; returns what was not known of it. An epoch older than those kept is not news any more."""
        if len(self._epochs) >= EPOCHS_KEPT and epoch < min(self._epochs):
            return NO_USE
        known = self._epochs.get(epoch, NO_USE)
        self._epochs[epoch] = known.largest(use)
        if len(self._epochs) > EPOCHS_KEPT:
            del self._epochs[min(self._epochs)]
        return use.beyond(known)

    def __iter__(self) -> Iterator[tuple[int, Use]]:
        """Epochs with their use, oldest first."""
        return iter(sorted(self._epochs.items()))


def use_of(counter: pb.LimitCounter) -> Use:
    """The figures of a message."""
    return Use(
        counter.requests,
        counter.tokens,
        counter.wanted_requests,
        counter.wanted_tokens,
        counter.throttled,
    )


def to_counters(
    key: str, incarnation: str, epochs: Iterable[tuple[int, Use]]
) -> list[pb.LimitCounter]:
    """The messages of one engine."""
    return [
        pb.LimitCounter(
            key=key,
            incarnation=incarnation,
            epoch=epoch,
            requests=use.requests,
            tokens=use.tokens,
            wanted_requests=use.wanted_requests,
            wanted_tokens=use.wanted_tokens,
            throttled=use.throttled,
        )
        for epoch, use in epochs
    ]
