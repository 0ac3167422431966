"""The silence of engines, in ticks that the test gives."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from services.gateway.stalls import StallWatch, WatchedCall
from services.runtime.errors import CaravanError

TICKS = 5
"""One more than there are in the longest silence."""


class _Call:
    """A call whose events the test gives; a cancel makes a read raise, as in grpc.aio."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[object] = asyncio.Queue()
        self._reading: asyncio.Task[object] | None = None
        self.cancelled = False

    def give(self, event: object) -> None:
        self._events.put_nowait(event)

    async def read(self) -> Any:
        self._reading = asyncio.create_task(self._events.get())
        return await self._reading

    async def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.CANCELLED if self.cancelled else grpc.StatusCode.OK

    def cancel(self) -> bool:
        self.cancelled = True
        if self._reading is not None:
            self._reading.cancel()
        return True


async def _reading(watched: WatchedCall) -> asyncio.Task[Any]:
    task = asyncio.create_task(watched.read())
    await asyncio.sleep(0)
    return task


async def test_silence_ends_the_call() -> None:
    """After the whole time without an event the read fails with the engine's name, and nothing is watched any more."""
    watch, call = StallWatch(1.0), _Call()
    task = await _reading(watch.watch(call, "engine-7"))
    for _ in range(TICKS - 1):
        watch.tick()
    assert not call.cancelled
    watch.tick()
    with pytest.raises(CaravanError) as caught:
        await task
    assert caught.value.reason == "ENGINE_STALLED"
    assert caught.value.metadata["engine_id"] == "engine-7"
    assert len(watch) == 0


async def test_an_event_starts_the_time_anew() -> None:
    """Each read has the whole time."""
    watch, call = StallWatch(1.0), _Call()
    watched = watch.watch(call, "engine-0")
    for number in range(10):
        task = await _reading(watched)
        for _ in range(TICKS - 1):
            watch.tick()
        call.give(number)
        assert await task == number
    assert not call.cancelled


async def test_a_slow_client_is_no_stall() -> None:
    """While the gateway does not read, because its client does not, time does not count."""
    watch, call = StallWatch(1.0), _Call()
    watched = watch.watch(call, "engine-0")
    task = await _reading(watched)
    call.give(1)
    await task
    for _ in range(10 * TICKS):
        watch.tick()
    assert not call.cancelled
    watched.cancel()
    assert len(watch) == 0


async def test_a_session_that_is_cancelled_stays_cancelled() -> None:
    """A client that leaves in the moment of the stall has left: its session must not go to another engine."""
    watch, call = StallWatch(1.0), _Call()
    task = await _reading(watch.watch(call, "engine-0"))
    task.cancel()
    for _ in range(TICKS):
        watch.tick()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_watch_ticks_by_itself() -> None:
    """The task of the gateway ends a silent call."""
    watch, call = StallWatch(0.05), _Call()
    running = asyncio.create_task(watch.run())
    task = await _reading(watch.watch(call, "engine-0"))
    with pytest.raises(CaravanError):
        async with asyncio.timeout(10):
            await task
    running.cancel()
