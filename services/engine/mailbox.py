"""From the decode thread to the event loop: calls that pile up while the loop is busy cost one wake-up together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

Call = tuple[Callable[..., object], tuple[Any, ...]]


class Mailbox:
    """Runs calls on the loop, in order. `post` collects, `flush` wakes the loop if it is not yet awake."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[Call] = deque()
        self._waking = False

    def post(self, call: Callable[..., object], *arguments: Any) -> None:
        """Adds a call. Any thread."""
        self._calls.append((call, arguments))

    def flush(self) -> None:
        """Makes sure that the loop comes for what was posted. Any thread."""
        if self._calls and not self._waking:
            self._waking = True
            try:
                self._loop.call_soon_threadsafe(self._run)
            except RuntimeError:
                # The loop is closed: nobody is left to tell.
                self._calls.clear()

    def _run(self) -> None:
        # Cleared first: a call posted from here on is counted below or wakes the loop again.
        self._waking = False
        # Not until it is empty: a fast decode thread must not keep the loop here for ever.
        for _ in range(len(self._calls)):
            call, arguments = self._calls.popleft()
            call(*arguments)
