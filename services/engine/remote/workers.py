"""Which workers make a call, and for whom (S3.4, S3.5; W15, W16). Pure.

A worker is known by its id, a call by its dispatch id; both together say who has finished, so a message that comes twice or too late
frees nobody else. A worker that crashes is replaced at once, three times within a minute; then its place rests, so that a defect that
crashes every call does not keep the process busy with replacing.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import Final, TypeAlias

WorkerId: TypeAlias = str

RESTARTS_MAX: Final = 3
RESTARTS_WITHIN_S: Final = 60.0


class WorkerPool:
    """The state of `count` workers, worker-0 and so on. Times are monotonic seconds and never go back."""

    def __init__(self, count: int) -> None:
        self._idle: deque[WorkerId] = deque(f"worker-{number}" for number in range(count))
        self._busy: dict[WorkerId, str] = {}
        self._resting: list[tuple[float, WorkerId]] = []
        # The last crashes of each worker that has crashed, at most RESTARTS_MAX.
        self._crashes: dict[WorkerId, deque[float]] = {}
        self._count = count
        self._replaced = 0

    @property
    def count(self) -> int:
        """All workers."""
        return self._count

    @property
    def busy(self) -> int:
        """Workers that make a call."""
        return len(self._busy)

    @property
    def replaced(self) -> int:
        """Crashes so far."""
        return self._replaced

    def take(self, dispatch_id: str, now: float) -> WorkerId | None:
        """An idle worker, busy from now on; None where there is none."""
        while self._resting and self._resting[0][0] <= now:
            self._idle.append(heapq.heappop(self._resting)[1])
        if not self._idle:
            return None
        worker_id = self._idle.popleft()
        self._busy[worker_id] = dispatch_id
        return worker_id

    def idle(self, worker_id: WorkerId, dispatch_id: str) -> bool:
        """The worker has finished this dispatch. False, and nothing changes, where it was not at it."""
        if self._busy.get(worker_id) != dispatch_id:
            return False
        del self._busy[worker_id]
        self._idle.append(worker_id)
        return True

    def crashed(self, worker_id: WorkerId, dispatch_id: str, now: float) -> bool:
        """The worker has crashed in this dispatch, and is replaced. False, and nothing changes, where it was not at it."""
        if self._busy.get(worker_id) != dispatch_id:
            return False
        del self._busy[worker_id]
        self._replaced += 1
        crashes = self._crashes.setdefault(worker_id, deque(maxlen=RESTARTS_MAX))
        # It may be back when the third crash before this one is a minute old.
        back_at = crashes[0] + RESTARTS_WITHIN_S if len(crashes) == RESTARTS_MAX else now
        crashes.append(max(now, back_at))
        if back_at > now:
            heapq.heappush(self._resting, (back_at, worker_id))
        else:
            self._idle.append(worker_id)
        return True
