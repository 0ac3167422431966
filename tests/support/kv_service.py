"""A cache service that dies and comes back on its port with empty memory, and one that takes calls and never answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from caravan.cache.v1 import cache_service_pb2 as pb
from caravan.cache.v1 import cache_service_pb2_grpc as pb_grpc
from prometheus_client import CollectorRegistry

from services.cache.__main__ import compose, sweep
from services.cache.servicer import CacheServicer, register
from services.cache.settings import CacheSettings
from services.cache.state import CacheState
from services.runtime.clock import SystemClock, random_id
from services.runtime.server import ServiceServer, cancel_all
from tests.support.ports import free_port


class MortalCache:
    """`start` and `die` at will."""

    def __init__(self, **settings: Any) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._settings = CacheSettings(**settings)
        self._server: ServiceServer | None = None
        self._servicer: CacheServicer | None = None
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def state(self) -> CacheState:
        """What it knows."""
        assert self._servicer is not None
        return self._servicer.state

    @property
    def rows(self) -> int:
        """Blocks that it knows."""
        return len(self.state.core.index.rows)

    async def start(self) -> None:
        """Starts with nothing in memory."""
        self._servicer = compose(self._settings, CollectorRegistry(), SystemClock(), random_id)
        self._server = ServiceServer(self.address, [], drain_grace_s=0)
        register(self._servicer, self._server.services)
        await self._server.start()
        self._sweeper = asyncio.create_task(sweep(self._servicer, self._settings.heartbeat_s / 2))

    async def die(self) -> None:
        """Drops all connections and forgets everything."""
        if self._server is not None and self._sweeper is not None:
            await cancel_all([self._sweeper])
            await self._server.grpc.stop(None)
            self._server = None


@asynccontextmanager
async def mortal_cache(**settings: Any) -> AsyncIterator[MortalCache]:
    """A running one."""
    cache = MortalCache(**settings)
    await cache.start()
    try:
        yield cache
    finally:
        await cache.die()


class _Mute(pb_grpc.CacheServiceServicer):
    def __init__(self) -> None:
        self.acquires = 0

    async def Join(
        self, request_iterator: AsyncIterator[pb.JoinRequest], context: Any
    ) -> AsyncIterator[pb.JoinResponse]:
        welcome = pb.Welcome(session_id="session-1", live_session_ids=["session-1"])
        welcome.heartbeat_interval.FromSeconds(1)
        welcome.reservation_ttl.FromSeconds(60)
        yield pb.JoinResponse(welcome=welcome)
        async for _ in request_iterator:
            pass

    async def Acquire(self, request: pb.AcquireRequest, context: Any) -> pb.AcquireResponse:
        self.acquires += 1
        await asyncio.Event().wait()
        raise AssertionError


@asynccontextmanager
async def mute_cache() -> AsyncIterator[tuple[str, _Mute]]:
    """A service that welcomes engines and never answers a lookup: its address, and its count of them."""
    servicer = _Mute()  # type: ignore[abstract]  # Nothing else is called.
    server = ServiceServer("127.0.0.1:0", [], drain_grace_s=0)
    pb_grpc.add_CacheServiceServicer_to_server(servicer, server.services)
    port = await server.start()
    try:
        yield f"127.0.0.1:{port}", servicer
    finally:
        await server.grpc.stop(None)
