"""Keys that are remembered for a while, within a bound. Pure."""

from __future__ import annotations

from collections.abc import Iterable


class KnownKeys:
    """A set that forgets its oldest members. Changed on any thread: each operation is one step of a dict."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._keys: dict[bytes, None] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __bool__(self) -> bool:
        return bool(self._keys)

    def add(self, key: bytes) -> None:
        """Remembers a key, as the newest."""
        self._keys.pop(key, None)
        self._keys[key] = None
        if len(self._keys) > self._most:
            self._keys.pop(next(iter(self._keys)), None)

    def discard(self, keys: Iterable[bytes]) -> None:
        """Forgets keys."""
        for key in keys:
            self._keys.pop(key, None)
