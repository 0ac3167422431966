"""Messages that wait to be sent on one stream, bounded."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

M = TypeVar("M")


class Outbox(Generic[M]):
    """Messages to one peer, in order. Iterating ends when the box is closed."""

    def __init__(self, messages_max: int) -> None:
        self._max = messages_max
        self._waiting: deque[M] = deque()
        self._changed = asyncio.Event()
        self._closed = False
        self._error: Exception | None = None

    def put(self, message: M) -> bool:
        """Adds a message; False where the box is full. A closed box takes and drops it."""
        if self._closed:
            return True
        if len(self._waiting) >= self._max:
            return False
        self._waiting.append(message)
        self._changed.set()
        return True

    def close(self, error: Exception | None = None) -> None:
        """Ends the iteration, by raising `error` if given. The first close counts; what waits is dropped."""
        if not self._closed:
            self._closed, self._error = True, error
            self._waiting.clear()
            self._changed.set()

    def __aiter__(self) -> Outbox[M]:
        return self

    async def __anext__(self) -> M:
        while not self._waiting:
            if self._closed:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._waiting.popleft()
