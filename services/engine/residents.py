"""Finished sequences whose KV stays in its cells until these are needed: the next turn of a chat goes on without a copy.

Pure. Those of a session are kept in preference to others while the session is fresh; both are bounded by number and by age, so
that nobody's pins starve anybody (S2.58, W50, W52).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from services.engine.sequence import TokenArray, common_prefix


@dataclass(slots=True)
class Resident:
    """What a slot holds. `used_at` is the time of the last use, in seconds."""

    slot: int
    tokens: TokenArray
    salt: bytes
    session_id: str
    used_at: float


class Residents:
    """In the order of their last use. `session_s`: seconds for which a session's are preferred after a use."""

    def __init__(self, session_s: float) -> None:
        self._session_s = session_s
        self._by_slot: dict[int, Resident] = {}

    def __len__(self) -> int:
        return len(self._by_slot)

    def __iter__(self) -> Iterator[Resident]:
        return iter(self._by_slot.values())

    def add(self, resident: Resident) -> None:
        """Adds one, as used just now."""
        self._by_slot[resident.slot] = resident

    def remove(self, resident: Resident) -> None:
        """Takes one out; its slot is the caller's."""
        del self._by_slot[resident.slot]

    def use(self, resident: Resident, now: float) -> None:
        """It was of use: it goes last."""
        resident.used_at = now
        self._by_slot[resident.slot] = self._by_slot.pop(resident.slot)

    def victim(self, now: float) -> Resident | None:
        """The one to give up first."""
        oldest = None
        for resident in self:
            if not resident.session_id or now - resident.used_at > self._session_s:
                return resident
            oldest = oldest or resident
        return oldest

    def of_session(self, salt: bytes, session_id: str) -> list[Resident]:
        """Those of a session. Each salt has its own: who guesses another's id must not end or replace what is kept for it."""
        return [
            resident
            for resident in self
            if (resident.salt, resident.session_id) == (salt, session_id)
        ]

    def covering(self, salt: bytes, tokens: TokenArray) -> Resident | None:
        """One that begins with all of `tokens`."""
        for resident in self:
            if resident.salt == salt and common_prefix(resident.tokens, tokens) == len(tokens):
                return resident
        return None

    def covered_by(self, salt: bytes, tokens: TokenArray) -> list[Resident]:
        """Those that are a beginning of `tokens`, and so of no more use beside them."""
        return [
            resident
            for resident in self
            if resident.salt == salt
            and common_prefix(resident.tokens, tokens) == len(resident.tokens)
        ]
