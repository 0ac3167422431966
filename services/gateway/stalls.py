"""Notices engines that hold a request and say nothing.

An engine that works sends an event about once a second. Silence is counted in ticks of one task for all calls, so that an
event costs no timer; a gateway that stood still itself counts one tick for all that time.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import grpc

from services.gateway.engine_calls import EngineCall
from services.runtime.errors import CaravanError

_TICKS: Final = 4
"""Ticks within the time that a call may be silent: the error of the measure is at most one of them."""


class StallWatch:
    """Watches the calls that are being read. `stall_s` is the longest silence, in seconds."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._calls: set[WatchedCall] = set()

    def __len__(self) -> int:
        return len(self._calls)

    def watch(self, call: EngineCall, engine_id: str) -> WatchedCall:
        """The call, watched until it is cancelled."""
        watched = WatchedCall(call, engine_id, self._calls)
        self._calls.add(watched)
        return watched

    async def run(self) -> None:
        """Ticks until it is cancelled."""
        while True:
            await asyncio.sleep(self._stall_s / _TICKS)
            self.tick()

    def tick(self) -> None:
        """Cancels the calls that have been silent for too long."""
        for call in list(self._calls):
            call.tick()


class WatchedCall:
    """A call of an engine that must not be silent for long while it is read. An EngineCall."""

    def __init__(self, call: EngineCall, engine_id: str, calls: set[WatchedCall]) -> None:
        self._call = call
        self._engine_id = engine_id
        self._calls = calls
        self._reading = False
        self._silent_ticks = 0
        self._stalled = False

    async def read(self) -> Any:
        """The next event. Raises ENGINE_STALLED where none comes in time."""
        # While nobody reads, a slow client holds the engine back, and not the other way round.
        self._reading, self._silent_ticks = True, 0
        try:
            return await self._call.read()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._stalled and task is not None and not task.cancelling():
                raise self._error() from None
            raise
        finally:
            self._reading = False

    async def code(self) -> grpc.StatusCode:
        """Waits for the end of the call, whose silence does not matter any more."""
        return await self._call.code()

    def cancel(self) -> bool:
        """Ends the call and the watch."""
        self._calls.discard(self)
        return self._call.cancel()

    def tick(self) -> None:
        """A share of the time that the call may be silent has passed."""
        if not self._reading:
            return
        self._silent_ticks += 1
        if self._silent_ticks > _TICKS:
            self._stalled = True
            self.cancel()

    def _error(self) -> CaravanError:
        return CaravanError(
            "ENGINE_STALLED",
            "The engine that served the request has stopped answering.",
            retry_after_s=1.0,
            engine_id=self._engine_id,
        )
