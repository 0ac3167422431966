"""Connections to engines: one channel per address, bounded, closed when no request has used it for a while."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
from caravan.engine.v1 import engine_service_pb2_grpc as engine_grpc

from services.runtime.clock import Clock
from services.runtime.errors import CaravanError


@dataclass(slots=True)
class _Entry:
    channel: grpc.aio.Channel
    stub: engine_grpc.EngineServiceAsyncStub
    users: int
    used_at: float


class EnginePool:
    """Channels by address. `channels_max` counts channels, `idle_s` is in seconds."""

    def __init__(
        self,
        open_channel: Callable[[str], grpc.aio.Channel],
        clock: Clock,
        channels_max: int,
        idle_s: float,
    ) -> None:
        self._open = open_channel
        self._clock = clock
        self._channels_max = channels_max
        self._idle_s = idle_s
        self._entries: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @asynccontextmanager
    async def use(self, address: str) -> AsyncIterator[engine_grpc.EngineServiceAsyncStub]:
        """The engine at an address. Raises SERVICE_UNAVAILABLE where every channel is in use by others."""
        entry = self._entries.get(address) or await self._add(address)
        entry.users += 1
        try:
            yield entry.stub
        finally:
            entry.users -= 1
            entry.used_at = self._clock.monotonic()
            if entry.users == 0 and self._entries.get(address) is not entry:
                await entry.channel.close()

    async def forget(self, address: str) -> None:
        """The next use connects anew: the engine was lost, and a channel that failed waits before it tries again."""
        entry = self._entries.get(address)
        if entry is not None:
            del self._entries[address]
            if entry.users == 0:
                await entry.channel.close()
            # Else its last user closes it.

    async def close_idle(self) -> None:
        """Closes what nobody has used for a while."""
        before = self._clock.monotonic() - self._idle_s
        idle = [a for a, e in self._entries.items() if e.users == 0 and e.used_at <= before]
        for address in idle:
            await self._remove(address)

    async def close(self) -> None:
        """Closes all."""
        for address in list(self._entries):
            await self._remove(address)

    async def _add(self, address: str) -> _Entry:
        while len(self._entries) >= self._channels_max:
            idle = [(e.used_at, a) for a, e in self._entries.items() if e.users == 0]
            if not idle:
                raise CaravanError(
                    "SERVICE_UNAVAILABLE",
                    "The gateway has too many connections to engines.",
                    retry_after_s=1.0,
                    service="gateway",
                )
            await self._remove(min(idle)[1])
        if address in self._entries:
            # Another task connected while this one closed a channel.
            return self._entries[address]
        channel = self._open(address)
        stub = engine_grpc.EngineServiceStub(channel)
        entry = _Entry(channel, stub, users=0, used_at=self._clock.monotonic())
        self._entries[address] = entry
        return entry

    async def _remove(self, address: str) -> None:
        entry = self._entries.pop(address, None)
        if entry is not None:
            await entry.channel.close()
