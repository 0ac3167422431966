"""The coordinator's watch of a real cache service: what it learns, and what it does when the service is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

from caravan.cache.v1 import cache_service_pb2 as pb
from caravan.cache.v1 import cache_service_pb2_grpc as pb_grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as coordinator_pb

from services.coordinator.cache_watch import CacheWatch
from services.coordinator.policies import policy_factory
from services.coordinator.published import PublishedBlocks
from services.runtime.channel import open_channel
from services.runtime.server import cancel_all
from tests.support.cache import CacheRig, EnginePeer, block, chain, key, root, running_cache, until
from tests.support.coordinator import running_coordinator
from tests.support.ports import free_port
from tests.support.processes import process


@asynccontextmanager
async def watching(address: str) -> AsyncIterator[PublishedBlocks]:
    """What a watch of the service at the address has heard."""
    published = PublishedBlocks()
    task = asyncio.create_task(CacheWatch(address, published).run())
    try:
        yield published
        assert not task.done()
    finally:
        await cancel_all([task])


async def evict(cache: CacheRig, engine: EnginePeer, name: str) -> None:
    """Drops all copies of a block."""
    await cache.stub.Evict(pb.EvictRequest(keys=[key(name)]))
    await engine.confirm(await engine.drop())


async def test_what_was_there_and_what_changes() -> None:
    """Blocks of a root that two engines share, and of their RAM, with their parents."""
    async with running_cache(heartbeat_s=20.0) as cache:
        first = await cache.engine("first", held=chain("a", "b"))
        second = await cache.engine("second", held=chain("a", "b"))
        async with watching(cache.address) as published:
            await until(lambda: published.holders(key("b")) == [("first", "second")])
            await second.ram([block("b", "a", start=256)])
            await until(lambda: published.holders(key("b")) == [("second",), ("first", "second")])
            await second.save(block("c", "b", start=512))
            await until(lambda: published.holders(key("c")) is not None)
            await evict(cache, first, "c")
            # What is left of the chain is known; the block was never saved anywhere else.
            await until(lambda: published.holders(key("c")) == published.holders(key("b")))
            await second.ram(removed=[key("b")])
            await until(lambda: published.holders(key("b")) == [("first", "second")])
        first.die()
        second.die()


async def test_the_ram_of_an_engine_that_left_is_gone() -> None:
    """Its session ended, and with it what only it held; that is known, not merely unknown."""
    async with running_cache(heartbeat_s=20.0) as cache:
        engine = await cache.engine("engine", [])
        await engine.ram(chain("a"))
        async with watching(cache.address) as published:
            await until(lambda: published.holders(key("a")) == [("engine",)])
            engine.die()
            await until(lambda: published.holders(key("a")) == [])
            published.check_integrity()


async def test_a_service_that_comes_back_is_watched_again() -> None:
    """While it is away nothing is known; afterwards what engines tell the new one is."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    async with watching(address) as published:
        for _ in range(2):
            async with (
                process("cache", CARAVAN_CACHE_ADDRESS=address) as service,
                open_channel(address) as channel,
            ):
                await channel.channel_ready()
                engine = EnginePeer(pb_grpc.CacheServiceStub(channel), "engine", [root()])
                await engine.join()
                await engine.inventory(chain("a"))
                await until(lambda: published.holders(key("a")) == [("engine",)])
                service.kill()
                await until(lambda: published.holders(key("a")) is None)
                engine.die()


async def test_routing_heeds_what_is_saved_where() -> None:
    """From Release.finish_key over the watch to the next grant: bound while the state is there, and free when it is gone."""
    async with running_cache(heartbeat_s=20.0) as cache, watching(cache.address) as published:
        factory = policy_factory("affinity", Random(1).random, 1.25, published)
        async with running_coordinator(new_policy=factory) as coordinator:
            for name in ("engine-a", "engine-b"):
                await coordinator.engine(name, max_sequences=8)
            gateway = await coordinator.gateway()

            async def serve(request_id: str, *, keep: bool = False) -> str:
                lease = (await gateway.ask(request_id, affinity=[b"prompt"])).lease
                if not keep:
                    release = coordinator_pb.ReleaseRequest(
                        lease_id=lease.lease_id, finish_key=key("state")
                    )
                    assert (await coordinator.stub.Release(release)).released
                return lease.engine_id

            home = await serve("first")
            engine = await cache.engine(home)
            await engine.save(block("state"))
            await until(lambda: published.holders(key("state")) == [(home,)])
            assert await serve("second", keep=True) == home
            # It is busier than the other one, and taken all the same.
            assert await serve("third") == home
            await evict(cache, engine, "state")
            await until(lambda: published.holders(key("state")) == [])
            assert await serve("fourth") != home
            engine.die()


async def test_without_an_address_nothing_is_watched() -> None:
    """The task ends at once."""
    async with asyncio.timeout(5):
        await CacheWatch("", PublishedBlocks()).run()
