"""Tasks that outlive the request they belong to: routes that nobody waits for any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_LOG = logging.getLogger(__name__)


class Background:
    """Keeps tasks alive until they end. Each one is bounded in time by what it runs."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Runs it to its end, whoever waits for it or not."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._discard)
        return task

    async def finish(self, within_s: float) -> None:
        """Waits for all tasks; cancels those that take longer."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=within_s)
        left = list(self._tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _discard(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Marks an error as seen: whoever waits for the task has it, and where nobody does nobody needs it.
            task.exception()
