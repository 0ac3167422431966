"""What became known of one request, merged until its one reader takes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Generic, TypeVar

Update = TypeVar("Update")
WHOLE_GATHER_S: Final = 0.25
"""The least time between two deltas of an answer that nobody reads before its end. Short beside the silence that gateways take for a
stall, and what is lost with an engine is computed again."""


class News(Generic[Update]):
    """Lives on the event loop. Whoever tells something adds it to `_pending` and calls `_wake`; a slow reader gets fewer
    and larger updates, and so does one who is not in a hurry (`gather`)."""

    __slots__ = (
        "_due",
        "_fresh",
        "_gather_s",
        "_new_update",
        "_pending",
        "_silent",
        "_timer",
        "_waiter",
    )

    def __init__(self, new_update: Callable[[], Update]) -> None:
        self._new_update = new_update
        self._pending = new_update()
        self._fresh = False
        self._silent = False
        self._waiter: asyncio.Future[None] | None = None
        self._gather_s = 0.0
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def gather(self, seconds: float) -> None:
        """From now on deltas are told not earlier than so long after each other, unless other news take them along."""
        self._gather_s = seconds

    def _was_silent(self) -> bool:
        """Whether nothing was told since the last time that this was asked."""
        silent, self._silent = self._silent, True
        return silent

    def _wake(self) -> None:
        self._silent = False
        self._announce()

    def _wake_in_time(self) -> None:
        """For a delta."""
        self._silent = False
        if not self._gather_s:
            self._announce()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            if loop.time() >= self._due:
                self._announce_delta()
            else:
                self._timer = loop.call_at(self._due, self._announce_delta)

    def _announce_delta(self) -> None:
        self._due = asyncio.get_running_loop().time() + self._gather_s
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
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        taken, self._pending, self._fresh = self._pending, self._new_update(), False
        return taken
