"""Engines, as far as the KV cache sees them: a store, and FetchBlocks on a loopback port. No model."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from caravan.cache.v1 import cache_service_pb2 as cache_pb
from caravan.engine.v1 import engine_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2_grpc as pb_grpc

from services.engine.kv.block_file import LoadedBlock
from services.engine.kv.config import MIB, KvConfig, RootConfig
from services.engine.kv.keys import BLOCK_TOKENS, Namespace, block_keys
from services.engine.kv.kvc import Expected
from services.engine.kv.opening import KvCache, open_store
from services.engine.kv.root import Root
from services.engine.kv.store import FoundBlock, SavedBlock
from services.engine.kv.tiered_store import TieredStore
from services.runtime.clock import SystemClock, random_id
from services.runtime.server import ServiceServer
from tests.support.cache import until
from tests.support.kv import NAMESPACE

PATIENCE_S = 10.0


class _Servicer(pb_grpc.EngineServiceServicer):
    def __init__(self) -> None:
        self.store: TieredStore | None = None
        self.fetched: list[bytes] = []

    def FetchBlocks(
        self, request: pb.FetchBlocksRequest, context: object
    ) -> AsyncIterator[pb.FetchBlocksResponse]:
        assert self.store is not None
        self.fetched += request.keys
        return self.store.serve_blocks(request.keys)


@dataclass
class KvEngine:
    """A running store."""

    cache: KvCache
    store: TieredStore
    fetched: list[bytes]
    """Keys that other engines asked for."""

    async def find(
        self,
        prompt: Sequence[int],
        have: int = 0,
        *,
        namespace: Namespace = NAMESPACE,
        parent_key: bytes = b"",
    ) -> list[FoundBlock]:
        """Looks for the blocks of a prompt."""
        keys = block_keys(namespace, prompt)
        return await self.store.find(
            prompt, keys, have * BLOCK_TOKENS, namespace=namespace, parent_key=parent_key
        )

    async def joined(self) -> None:
        """Waits for the session with the cache service."""
        await until(lambda: self.store.joined)

    async def save(self, blocks: Sequence[SavedBlock]) -> None:
        """Saves blocks and waits until nothing is on its way to a root any more."""
        for block in blocks:
            assert self.store.save(block)
        await until(lambda: self.store.queued_bytes == 0)


class HangingRoot(Root):
    """A root whose disk hangs: reading the block of `key` waits for `released`."""

    key = b""

    def __init__(self, root: Root, key: bytes) -> None:
        super().__init__(root.path, root.root_id, writable=root.writable)
        self.key = key
        self.released = threading.Event()

    def read(self, expected: Expected) -> LoadedBlock:
        """See Root.read."""
        if expected.key == self.key:
            self.released.wait(30)
        return super().read(expected)


@contextmanager
def hanging_disk(engine: KvEngine, key: bytes) -> Iterator[None]:
    """The first root of the engine hangs whenever it reads the block of `key`."""
    holdings = engine.store._withdrawals._holdings
    before = dict(holdings.roots)
    (root_id, mounted), *_ = before.items()
    hanging = HangingRoot(mounted.root, key)
    holdings.roots = {**before, root_id: replace(mounted, root=hanging)}
    try:
        yield
    finally:
        hanging.released.set()
        holdings.roots = before


def disk(path: Path, quota_bytes: int = 64 * MIB) -> RootConfig:
    """A root on disk."""
    return RootConfig(cache_pb.TIER_DISK, path, quota_bytes)


@asynccontextmanager
async def running_engine(
    cache_address: str,
    *roots: RootConfig,
    engine_id: str = "engine-0",
    namespace: Namespace = NAMESPACE,
    joins: bool = True,
    whole_states: bool = False,
    **config: Any,
) -> AsyncIterator[KvEngine]:
    """A store with these roots; further fields of KvConfig as keywords.

    Lookups are patient unless a test says otherwise: with the default of 0.25 s, a busy machine makes them find nothing.
    """
    servicer = _Servicer()  # type: ignore[abstract]  # Nothing else is called.
    server = ServiceServer("127.0.0.1:0", [], drain_grace_s=0)
    pb_grpc.add_EngineServiceServicer_to_server(servicer, server.services)
    port = await server.start()
    address = f"127.0.0.1:{port}"
    config = {"acquire_seconds": PATIENCE_S, **config}
    chosen = KvConfig(engine_id, address, cache_address, tuple(roots), **config)
    async with AsyncExitStack() as opened:
        opened.push_async_callback(server.drain_and_stop)
        cache = await open_store(
            chosen, namespace, SystemClock(), random_id, lambda: 0.0, whole_states=whole_states
        )
        opened.push_async_callback(cache.close, 10.0)
        servicer.store = cache.store
        engine = KvEngine(cache, cache.store, servicer.fetched)
        if joins and cache_address:
            await engine.joined()
        yield engine


def covered(found: Sequence[FoundBlock], have: int = 0) -> int:
    """Tokens that the found blocks cover together with `have` resident blocks; they must follow each other."""
    at = have * 256
    for block in found:
        assert block.start == at
        assert block.start < block.end <= block.whole_end
        at = block.end
    return at


def states(found: Sequence[FoundBlock]) -> list[bytes]:
    """The bytes of the found states."""
    return [bytes(block.state) for block in found]
