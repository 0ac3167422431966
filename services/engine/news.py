"""What became known of one request, merged until its one reader takes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

Update = TypeVar("Update")


class News(Generic[Update]):
    """Lives on the event loop. Whoever tells something adds it to `_pending` and calls `_wake`; a slow reader gets fewer
    and larger updates."""

    __slots__ = ("_fresh", "_new_update", "_pending", "_silent", "_waiter")

    def __init__(self, new_update: Callable[[], Update]) -> None:
        self._new_update = new_update
        self._pending = new_update()
        self._fresh = False
        self._silent = False
        self._waiter: asyncio.Future[None] | None = None

    def _was_silent(self) -> bool:
        """Whether nothing was told since the last time that this was asked."""
        silent, self._silent = self._silent, True
        return silent

    def _wake(self) -> None:
        self._silent = False
        self._announce()

    def _announce(self) -> None:
        # By itself for what is said because there is nothing to say: that does not end a silence.
        self._fresh = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> Update:
        """Waits for news and takes all of them."""
        if not self._fresh:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        taken, self._pending, self._fresh = self._pending, self._new_update(), False
        return taken
