"""Tells silent streams that their requests are alive: one timer for all of them, nothing between two tokens.

It speaks only if the decode thread has gone round its loop since the last time. An engine whose decode hangs falls silent, and
its gateways notice; so a request waits in its queue in good hope only while others make steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol


class Stream(Protocol):
    """What a request tells its reader."""

    def alive(self, prompt_tokens_done: int) -> None:
        """Called once an interval, whether or not the stream was silent in it."""
        ...


class ProgressTimer:
    """Runs until it is cancelled. `rounds` counts those of what does the work, `streams` gives each stream and the prompt tokens that
    are done."""

    def __init__(
        self,
        interval_s: float,
        rounds: Callable[[], int],
        streams: Callable[[], Iterable[tuple[Stream, int]]],
    ) -> None:
        self._interval_s = interval_s
        self._rounds = rounds
        self._streams = streams
        self._seen = 0

    async def run(self) -> None:
        """Speaks once an interval."""
        while True:
            await asyncio.sleep(self._interval_s)
            self.tick()

    def tick(self) -> None:
        """An interval has passed."""
        rounds = self._rounds()
        if rounds == self._seen:
            return
        self._seen = rounds
        for stream, prompt_tokens_done in self._streams():
            stream.alive(prompt_tokens_done)
