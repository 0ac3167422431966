"""Hears from the cache service what is saved where, for routing. Without it routing goes on by what was served where (I7)."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import grpc
from caravan.cache.v1 import cache_service_pb2 as pb
from caravan.cache.v1 import cache_service_pb2_grpc as pb_grpc

from services.coordinator.published import PublishedBlocks
from services.runtime.channel import open_channel

_LOG = logging.getLogger(__name__)
_BACKOFF_MIN_S: Final = 0.1
_BACKOFF_MAX_S: Final = 5.0


class CacheWatch:
    """Watches the cache service at an address, host:port; without an address it does nothing."""

    def __init__(self, address: str, published: PublishedBlocks) -> None:
        self._address = address
        self._published = published
        self._heard = False

    async def run(self) -> None:
        """Watches, and watches again after each end, until cancelled."""
        if not self._address:
            return
        backoff_s = _BACKOFF_MIN_S
        async with open_channel(self._address) as channel:
            stub: pb_grpc.CacheServiceAsyncStub = pb_grpc.CacheServiceStub(channel)
            while True:
                self._heard = False
                await self._watch(stub)
                # What changes from here on is not told: better to know nothing than to believe what was.
                self._published.clear()
                backoff_s = _BACKOFF_MIN_S if self._heard else min(2 * backoff_s, _BACKOFF_MAX_S)
                await asyncio.sleep(backoff_s)

    async def _watch(self, stub: pb_grpc.CacheServiceAsyncStub) -> None:
        """One watch, to its end."""
        call = stub.Watch(pb.WatchRequest(with_present=True))
        try:
            async for change in call:
                self._take(change)
        except grpc.aio.AioRpcError as error:
            level = logging.WARNING if self._heard else logging.DEBUG
            _LOG.log(level, "no watch of the cache service: %s", error.details())
        finally:
            call.cancel()

    def _take(self, response: pb.WatchResponse) -> None:
        self._heard = True
        match response.WhichOneof("change"):
            case "published":
                change = response.published
                self._published.published(
                    change.key,
                    change.parent_key,
                    change.tier,
                    change.root_id,
                    change.engine_ids,
                )
            case "evicted":
                change = response.evicted
                self._published.evicted(
                    change.key, change.parent_key, change.root_id, change.engine_ids
                )
            case "present_done":
                self._published.complete()
                _LOG.info("watching the cache service: %d blocks", len(self._published))
            case _:  # Of a newer cache service.
                return
