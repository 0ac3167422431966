"""Which revision began an answer, so that no other one goes on with it: tokens of one model mean nothing to another. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

LIVES_MAX: Final = 4_096
"""Lives of engines that are remembered; beyond it the one seen first is forgotten."""


class Lineage:
    """The revision of each life of an engine, also after it has left: its requests ask for another engine just then."""

    def __init__(self) -> None:
        self._revisions: dict[str, str] = {}

    def note(self, incarnation: str, revision: str) -> None:
        """An engine has joined. Without an incarnation it cannot be told apart from others, and is not remembered."""
        if incarnation:
            self._revisions[incarnation] = revision
        if len(self._revisions) > LIVES_MAX:
            del self._revisions[next(iter(self._revisions))]

    def of(self, incarnations: Iterable[str]) -> frozenset[str]:
        """The revisions of those lives that are known; the empty one is that of engines started by hand."""
        known = self._revisions
        return frozenset(known[life] for life in incarnations if life in known)
