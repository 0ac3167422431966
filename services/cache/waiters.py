"""Calls that wait for a block that somebody is saving (S2.31).

Pure. A waiter is an id under which the edge holds a call; it is answered once, because answering removes it. Time is up when
the edge says so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiter:
    """A call of a session that waits for a key."""

    waiter_id: str
    session_id: str
    key: bytes


class WaiterTable:
    """Waiters by id and by key."""

    def __init__(self) -> None:
        self._waiters: dict[str, Waiter] = {}
        self._by_key: dict[bytes, dict[str, Waiter]] = {}

    def __len__(self) -> int:
        return len(self._waiters)

    def add(self, waiter: Waiter) -> None:
        """Adds a waiter with a new id."""
        assert waiter.waiter_id not in self._waiters
        self._waiters[waiter.waiter_id] = waiter
        self._by_key.setdefault(waiter.key, {})[waiter.waiter_id] = waiter

    def remove(self, waiter_id: str) -> bool:
        """Removes a waiter; False where it has been answered."""
        waiter = self._waiters.pop(waiter_id, None)
        if waiter is None:
            return False
        group = self._by_key[waiter.key]
        del group[waiter_id]
        if not group:
            del self._by_key[waiter.key]
        return True

    def of_key(self, key: bytes) -> tuple[Waiter, ...]:
        """Those who wait for a key, longest first."""
        return tuple(self._by_key.get(key, {}).values())

    def of_session(self, session_id: str) -> tuple[Waiter, ...]:
        """Those of a session. O(waiters)."""
        return tuple(one for one in self._waiters.values() if one.session_id == session_id)
