"""Watch, Dump, Evict, Collect and GetStats of the cache service, over real gRPC on loopback."""

from __future__ import annotations

import asyncio

import grpc
from caravan.cache.v1 import cache_service_pb2 as pb

from services.runtime.clock import ManualClock
from tests.support.cache import (
    CALL_TIMEOUT_S,
    block,
    chain,
    key,
    refused,
    root,
    running_cache,
    until,
)

TMPFS = root("tmpfs", pb.TIER_RAM_FILE)
Watch = grpc.aio.UnaryStreamCall[pb.WatchRequest, pb.WatchResponse]


async def _rest(watch: Watch) -> None:
    while await watch.read() is not grpc.aio.EOF:
        pass


async def following(watch: Watch) -> pb.WatchResponse:
    """The next message of a watch."""
    async with asyncio.timeout(CALL_TIMEOUT_S):
        response = await watch.read()
    assert isinstance(response, pb.WatchResponse), "the stream ended"
    return response


async def test_a_watch_tells_what_is_there_and_what_changes() -> None:
    """Present copies, then the mark, then what is published and evicted, in order."""
    async with running_cache() as cache:
        engine = await cache.engine(held=chain("a", "b"))
        watch = cache.stub.Watch(pb.WatchRequest(with_present=True))
        present = [await following(watch) for _ in range(2)]
        assert [p.published.key for p in present] == [key("a"), key("b")]
        first = present[1].published
        assert (first.parent_key, first.end, first.tier) == (key("a"), 512, pb.TIER_DISK)
        assert (first.root_id, list(first.engine_ids)) == ("disk", ["engine-0"])
        assert (await following(watch)).present_done
        await engine.save(block("c", "b", start=512))
        assert (await following(watch)).published.key == key("c")
        await cache.stub.Evict(pb.EvictRequest(bytes=1))
        assert (await following(watch)).evicted.key in {key("c")}
        await engine.ram([block("r")])
        published = (await following(watch)).published
        assert (published.tier, list(published.engine_ids)) == (pb.TIER_RAM, ["engine-0"])
        engine.die()
        assert (await following(watch)).evicted.key == key("r")
        watch.cancel()


async def test_without_present_only_changes_are_told() -> None:
    """A watch begins with the next change."""
    async with running_cache() as cache:
        engine = await cache.engine(held=[block("a")])
        watch = cache.stub.Watch(pb.WatchRequest())
        await until(lambda: cache.state.core.watched)
        await engine.save(block("b"))
        assert (await following(watch)).published.key == key("b")
        watch.cancel()
        await until(lambda: not cache.state.core.watched)


async def test_a_watcher_that_falls_behind_is_ended() -> None:
    """The queue of changes is bounded; passing it ends the watch with a typed error."""
    async with running_cache(max_changes=3) as cache:
        engine = await cache.engine()
        watch = cache.stub.Watch(pb.WatchRequest())
        await until(lambda: cache.state.core.watched)
        await engine.ram([block(number) for number in range(4)])
        async with asyncio.timeout(CALL_TIMEOUT_S):
            error = await refused(_rest(watch))
        assert error.reason == "CAPACITY_EXHAUSTED"
        assert len((await engine.acquire([0, 1])).blocks) == 2


async def test_watches_are_bounded() -> None:
    """One watch too many is refused."""
    async with running_cache(max_watchers=1) as cache:
        watch = cache.stub.Watch(pb.WatchRequest(with_present=True))
        assert (await following(watch)).present_done
        error = await refused(following(cache.stub.Watch(pb.WatchRequest(with_present=True))))
        assert error.reason == "CAPACITY_EXHAUSTED"
        watch.cancel()


async def test_rows_are_listed_in_the_order_of_their_keys() -> None:
    """All rows, those with a prefix, or the first few."""
    async with running_cache(ManualClock(1000.0)) as cache:
        engine = await cache.engine(held=[block(n, hits=2) for n in range(600)])
        await engine.acquire([7])
        rows = [row async for row in cache.stub.Dump(pb.DumpRequest())]
        keys = [row.block.key for row in rows]
        assert keys == sorted(key(n) for n in range(600))
        few = [row async for row in cache.stub.Dump(pb.DumpRequest(limit=5))]
        assert [row.block.key for row in few] == keys[:5]
        prefix = pb.DumpRequest(key_prefix=key(7)[:4])
        (row,) = [row async for row in cache.stub.Dump(prefix)]
        (copy,) = row.copies
        assert (row.block.hits, copy.claims, copy.root_id, copy.state) == (
            3,
            1,
            "disk",
            pb.COPY_STATE_AVAILABLE,
        )
        assert copy.last_used.ToSeconds() == 1000
        whole = pb.DumpRequest(key_prefix=key(7))
        assert len([row async for row in cache.stub.Dump(whole)]) == 1
        too_long = cache.stub.Dump(pb.DumpRequest(key_prefix=b"x" * 33))
        error = await refused(too_long.read())
        assert (error.reason, error.param) == ("INVALID_VALUE", "key_prefix")


async def test_evicting_takes_what_is_asked_for() -> None:
    """By bytes, by tier, by root, by key; nothing for nothing; pinned copies stay (S2.41)."""
    async with running_cache() as cache:
        engine = await cache.engine(roots=[root(), TMPFS], held=chain("a", "b", "c", size=10))
        await engine.save(block("t", size=10), root_id="tmpfs")
        assert (await cache.stub.Evict(pb.EvictRequest())).copies == 0
        assert (await cache.stub.Evict(pb.EvictRequest(bytes=1, root_id="?"))).copies == 0
        by_tier = pb.EvictRequest(bytes=99, tiers=[pb.TIER_RAM_FILE])
        assert (await cache.stub.Evict(by_tier)).bytes == 10
        assert list((await engine.drop()).keys) == [key("t")]
        claim = (await engine.acquire(["a", "b", "c"])).claim_id
        assert (await cache.stub.Evict(pb.EvictRequest(keys=[key("c")]))).copies == 0
        await engine.release(claim)
        evicted = await cache.stub.Evict(pb.EvictRequest(keys=[key("b"), key("c")]))
        assert (evicted.copies, evicted.bytes) == (2, 20)
        assert list((await engine.drop()).keys) == [key("c"), key("b")]
        assert (await cache.stub.Evict(pb.EvictRequest(bytes=11))).copies == 1


async def test_collecting_drops_all_that_nobody_uses() -> None:
    """A pinned block keeps itself and those in front of it; everything else goes (S2.41)."""
    async with running_cache() as cache:
        engine = await cache.engine(held=[*chain("a", "b", "c"), block("x")])
        await engine.reserve(block("writing"))
        await engine.acquire(["a", "b"])
        collected = await cache.stub.Collect(pb.CollectRequest())
        assert (collected.copies, collected.bytes) == (2, 2)
        assert set((await engine.drop()).keys) == {key("c"), key("x")}


async def test_statistics_add_up() -> None:
    """Counters since the start, sizes of now, and the same as metrics."""
    async with running_cache() as cache:
        engine = await cache.engine(held=chain("a", "b", size=10))
        await engine.save(block("t", "b", start=512, tokens=[1, 2], size=5))
        await engine.acquire(["a", "b"], tail=[1, 5])
        await engine.acquire(["a", "missing"])
        await engine.reserve(block("w", size=3))
        stats = await cache.stub.GetStats(pb.GetStatsRequest())
        assert (stats.rows, stats.claims, stats.reservations, stats.sessions) == (4, 2, 1, 1)
        assert (stats.acquires, stats.blocks_wanted, stats.blocks_found) == (2, 4, 3)
        assert (stats.partial_hits, stats.saves, stats.waiters) == (1, 1, 0)
        disk = next(place for place in stats.places if place.root_id == "disk")
        assert (disk.copies, disk.bytes, disk.engines, disk.engine_id) == (4, 28, 1, "")
        assert cache.metric("caravan_cache_bytes", tier="disk") == 28
        assert cache.metric("caravan_cache_rows") == 4
        assert cache.metric("caravan_cache_saves_total", reason="cold") == 1
        assert cache.metric("caravan_cache_acquire_seconds_count") == 2
