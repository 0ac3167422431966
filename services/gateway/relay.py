"""A bounded way from the task that reads events to the call that shows them.

The reader of the way may wait with a limit of silence; that never disturbs the task at the other end, whose read of the
engine would be lost if it were cancelled.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, Generic, TypeVar

T = TypeVar("T")
RELAY_ITEMS_MAX: Final = 8
"""Enough to keep both ends busy. A reader that stops is noticed at once: the writer waits, and the engine sends no more."""


class Relay(Generic[T]):
    """One writer, one reader, one end."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._over = False
        self._error: Exception | None = None
        self._reader: asyncio.Future[bool] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waiting_since = 0.0

    @property
    def over(self) -> bool:
        """Whether the end was written."""
        return self._over

    async def put(self, item: T) -> None:
        """Writes an item; waits while too many are unread."""
        assert not self._over, "nothing follows the end"
        while len(self._items) >= RELAY_ITEMS_MAX:
            self._writer = asyncio.get_running_loop().create_future()
            await self._writer
        self._items.append(item)
        self._wake(by_silence=False)

    def end(self, error: Exception | None = None) -> None:
        """Writes the end, as an error if there is one. Only the first end counts; what was written before is still read."""
        if not self._over:
            self._over, self._error = True, error
            self._wake(by_silence=False)

    async def get(self, silence_s: float | None = None) -> T | None:
        """The next item, or None after `silence_s` seconds without one.

        Raises the error of the end, or EOFError where it has none.
        """
        while not self._items:
            if self._over:
                raise self._error or EOFError
            if not await self._wait(silence_s):
                return None
        return self._take()

    def get_ready(self) -> T | None:
        """The next item, if it is there already."""
        return self._take() if self._items else None

    def close(self) -> None:
        """Forgets the timer. The reader reads no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _take(self) -> T:
        item = self._items.popleft()
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)
        return item

    async def _wait(self, silence_s: float | None) -> bool:
        loop = asyncio.get_running_loop()
        self._reader = loop.create_future()
        if silence_s is not None:
            self._waiting_since = loop.time()
            if self._timer is None:
                # One timer per silence, not one per item: it is set anew only when it rings too early.
                self._timer = loop.call_later(silence_s, self._ring, silence_s)
        try:
            return await self._reader
        finally:
            self._reader = None

    def _ring(self, silence_s: float) -> None:
        self._timer = None
        if self._reader is None:
            return
        loop = asyncio.get_running_loop()
        rest_s = self._waiting_since + silence_s - loop.time()
        if rest_s > 0:
            self._timer = loop.call_later(rest_s, self._ring, silence_s)
        else:
            self._wake(by_silence=True)

    def _wake(self, *, by_silence: bool) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(not by_silence)
