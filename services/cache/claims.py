"""The claims of one session: which copies it is reading (S2.20 to S2.22).

Pure. A claim is a list of pinned copies under an id. Giving it back twice is harmless, because the id is gone after the first
time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from services.cache.rows import Copy


@dataclass(frozen=True, slots=True)
class Claim:
    """Copies that are pinned together, since a monotonic second."""

    copies: tuple[Copy, ...]
    since: float


class Claims:
    """Claims by id, oldest first."""

    def __init__(self) -> None:
        self._claims: dict[str, Claim] = {}

    def __len__(self) -> int:
        return len(self._claims)

    def add(self, claim_id: str, claim: Claim) -> None:
        """Adds a claim under a new id. Its copies have been pinned."""
        assert claim_id not in self._claims
        self._claims[claim_id] = claim

    def remove(self, claim_id: str) -> Claim | None:
        """Removes and returns a claim, for its copies to be unpinned; None if it is not held."""
        return self._claims.pop(claim_id, None)

    def remove_until(self, then: float) -> list[Claim]:
        """Removes and returns the claims that are as old as `then`; O(of those)."""
        old = []
        for claim_id, claim in self._claims.items():
            if claim.since > then:
                break
            old.append(claim_id)
        return [self._claims.pop(claim_id) for claim_id in old]

    def __iter__(self) -> Iterator[Claim]:
        return iter(self._claims.values())
