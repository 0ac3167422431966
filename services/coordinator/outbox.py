"""What waits to be sent on the streams of sessions, bounded, without repeats."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import Generic, TypeVar

OUTBOX_MESSAGES_MAX = 4_096
"""Messages that wait for a peer that does not read; one more ends its session. Not below the most leases per engine."""


Message = TypeVar("Message", bound=Hashable)


class Outbox(Generic[Message]):
    """Messages to one peer, in order, each waiting at most once: the last put counts. Iterating ends when the box is closed."""

    def __init__(self) -> None:
        self._waiting: dict[Message, None] = {}
        self._changed = asyncio.Event()
        self._closed = False
        self._error: Exception | None = None

    def put(self, message: Message) -> bool:
        """Adds a message; False where the box is full. A closed box takes and drops it."""
        if self._closed:
            return True
        if message not in self._waiting and len(self._waiting) >= OUTBOX_MESSAGES_MAX:
            return False
        self._waiting.pop(message, None)
        self._waiting[message] = None
        self._changed.set()
        return True

    def close(self, error: Exception | None = None) -> None:
        """Ends the iteration, by raising `error` if given. The first close counts; what waits is dropped."""
        if not self._closed:
            self._closed, self._error = True, error
            self._waiting.clear()
            self._changed.set()

    def __aiter__(self) -> Outbox[Message]:
        return self

    async def __anext__(self) -> Message:
        while not self._waiting:
            if self._closed:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        message = next(iter(self._waiting))
        del self._waiting[message]
        return message
