"""Composes the KV cache of an engine, and takes it apart in order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Final

import grpc
from caravan.cache.v1 import cache_service_pb2 as pb
from caravan.cache.v1 import cache_service_pb2_grpc as pb_grpc

from services.engine.kv.block_finder import BlockFinder
from services.engine.kv.blocking import BlockingPool
from services.engine.kv.config import KvConfig
from services.engine.kv.fetch import BlockServer
from services.engine.kv.holdings import Holdings, MountedRoot
from services.engine.kv.keys import Namespace
from services.engine.kv.known import KnownKeys
from services.engine.kv.ledger import Ledger
from services.engine.kv.publisher import Publisher
from services.engine.kv.ram import RamTier
from services.engine.kv.restore import Restorer
from services.engine.kv.root import Root, RootError, RootTrouble
from services.engine.kv.session import CacheSession
from services.engine.kv.state_finder import FindingParts
from services.engine.kv.stats import KvStats
from services.engine.kv.tiered_store import CacheLink, TieredStore
from services.engine.kv.whole_finder import WholeFinder
from services.engine.kv.withdrawals import Withdrawals
from services.runtime.channel import open_channel
from services.runtime.clock import Clock, IdSource
from services.runtime.server import cancel_all

PUBLISHED_MAX: Final = 1 << 17
"""Keys that are remembered as published: 32 million tokens, about 20 MB."""

LEAVE_SECONDS: Final = 1.0
"""For giving claims back and deleting bad files at the end; the end of the session and the next scan do the rest."""


class KvCache:
    """A running KV cache: `store`, and what runs behind it."""

    def __init__(
        self,
        store: TieredStore,
        link: CacheLink | None,
        channel: grpc.aio.Channel | None,
        pools: Sequence[BlockingPool],
    ) -> None:
        self.store = store
        self._link = link
        self._channel = channel
        self._pools = pools
        self._joining: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Joins the cache service, and begins to write."""
        if self._link is not None:
            self._link.publisher.start()
            self._joining.append(asyncio.create_task(self._link.session.run()))

    async def close(self, seconds: float) -> None:
        """Writes what is queued, for `seconds` at most, then leaves the cache service."""
        if self._link is not None:
            await self._link.publisher.close(seconds)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LEAVE_SECONDS):
                    await self.store.settle()
                    await self._link.ledger.close()
        await cancel_all(self._joining)
        if self._channel is not None:
            await self._channel.close()
        for pool in self._pools:
            pool.close()


async def open_store(
    config: KvConfig,
    namespace: Namespace,
    clock: Clock,
    new_id: IdSource,
    jitter: Callable[[], float],
    *,
    whole_states: bool = False,
) -> KvCache:
    """Opens the roots; returns a running KV cache, which joins the cache service behind. `jitter` gives numbers in [0, 1);
    `whole_states` says that the state of the model cannot be cut into blocks.

    Raises RootError where a root cannot be used: a wrong configuration must not start. The caller closes what it gets.
    """
    keeper = BlockingPool(1, "kv-keeper")
    try:
        mounted = await keeper(lambda: mount(config, new_id))
    except RootError:
        keeper.close()
        raise
    readers = {one.root.root_id: BlockingPool(config.reader_threads, "kv-read") for one in mounted}
    checkers, servers = BlockingPool(1, "kv-check"), BlockingPool(1, "kv-serve")
    writers = BlockingPool(config.writer_threads, "kv-write")
    stats = KvStats()
    known = KnownKeys(PUBLISHED_MAX)
    holdings = Holdings(mounted, RamTier(config.ram_quota_bytes), known.discard)
    channel = open_channel(config.cache_address) if config.cache_address else None
    link = None
    if channel is not None:
        stub: pb_grpc.CacheServiceAsyncStub = pb_grpc.CacheServiceStub(channel)
        registration = _registration(config, mounted)
        session = CacheSession(stub, holdings, registration, blocking=keeper, jitter=jitter)
        ledger = Ledger(stub, session, clock, config.acquire_seconds)
        publisher = Publisher(
            ledger,
            [one.root for one in mounted if one.root.writable],
            namespace,
            blocking=writers,
            writers=config.writer_threads,
            queue_bytes=config.queue_bytes,
            ttl_s=lambda: session.reservation_ttl_s,
            stats=stats,
            clock=clock,
            new_id=new_id,
            on_published=known.add,
        )
        link = CacheLink(session, ledger, publisher)
    parts = FindingParts(
        namespace,
        holdings.ram,
        link.ledger if link is not None else None,
        Restorer(holdings, readers, clock, config.stall_seconds),
        Withdrawals(holdings, link.session if link is not None else None, keeper, known, stats),
        known,
        stats,
        clock,
        config.wait_seconds,
    )
    store = TieredStore(
        parts,
        link,
        WholeFinder(parts, checkers) if whole_states else BlockFinder(parts, checkers),
        BlockServer(holdings, namespace, servers, clock),
    )
    cache = KvCache(store, link, channel, [keeper, checkers, servers, writers, *readers.values()])
    cache.start()
    return cache


def mount(config: KvConfig, new_id: IdSource) -> list[MountedRoot]:
    """Opens the configured roots. Raises RootError. Blocking."""
    mounted: dict[str, MountedRoot] = {}
    for one in config.roots:
        root = Root.open(one.path, new_id)
        if root.root_id in mounted:
            raise RootError(RootTrouble.FAILED, f"{one.path} is given twice")
        mounted[root.root_id] = MountedRoot(root, one.tier, one.quota_bytes)
    return list(mounted.values())


def _registration(config: KvConfig, mounted: Sequence[MountedRoot]) -> pb.Registration:
    return pb.Registration(
        engine_id=config.engine_id,
        address=config.address,
        roots=[one.to_proto() for one in mounted],
        ram_quota_bytes=config.ram_quota_bytes,
    )
