"""Releases on their way to the coordinator, each until it was surely taken, over as many sessions as that needs. Pure.

A stream keeps its order, so the answer to a heartbeat says that all that was written before the heartbeat was taken. What is
not confirmed when a session ends is written again in the next one: ending a lease twice is no error, and where the old
session's end has swept the lease, the release tells that nobody comes back for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from caravan.coordinator.v1 import coordinator_service_pb2 as pb

UNCONFIRMED_MAX: Final = 4096
"""Releases that were written and are kept. Beyond it the oldest, if they were not taken, end with the session."""


class Releases:
    """`count_failed` is told how many were not taken in a session, or came while there was none.

    Those that were not written yet are at most as many as there were leases.
    """

    def __init__(self, count_failed: Callable[[int], None]) -> None:
        self._count_failed = count_failed
        self._joined = False
        self._waiting: list[pb.ReleaseRequest] = []
        # With the number of heartbeats that were written before.
        self._written: deque[tuple[int, pb.ReleaseRequest]] = deque(maxlen=UNCONFIRMED_MAX)
        self._beats = 0
        self._answers = 0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._written)

    @property
    def some_waiting(self) -> bool:
        """Whether there are any that are not written yet."""
        return bool(self._waiting)

    def add(self, release: pb.ReleaseRequest) -> None:
        """A lease has ended."""
        if not self._joined:
            self._count_failed(1)
        self._waiting.append(release)

    def begin(self) -> None:
        """A session has been joined."""
        self._joined = True
        self._beats = self._answers = 0

    def take(self) -> list[pb.ReleaseRequest]:
        """Those that are to be written, which are written now."""
        taken, self._waiting = self._waiting, []
        self._written.extend((self._beats, release) for release in taken)
        return taken

    def beat(self) -> None:
        """A heartbeat is written."""
        self._beats += 1

    def confirm(self) -> None:
        """A heartbeat was answered; they are answered in their order."""
        self._answers += 1
        while self._written and self._written[0][0] < self._answers:
            self._written.popleft()

    def forget(self) -> None:
        """The coordinator ended the session for what was written: the next one would end by it too, and this one's end sweeps."""
        self._written.clear()

    def end(self) -> None:
        """The session is over: what is not confirmed waits for the next one."""
        self._joined = False
        unconfirmed = [release for _, release in self._written]
        self._written.clear()
        self._waiting = unconfirmed + self._waiting
        if self._waiting:
            self._count_failed(len(self._waiting))
