"""Reservations of the cache service, over real gRPC on loopback."""

from __future__ import annotations

import asyncio

import pytest
from caravan.cache.v1 import cache_service_pb2 as pb

from services.runtime.clock import ManualClock
from tests.support.cache import block, chain, key, refused, root, running_cache, until

GRANTED = pb.RESERVE_OUTCOME_GRANTED
PRESENT = pb.RESERVE_OUTCOME_ALREADY_PRESENT
CONFLICT = pb.RESERVE_OUTCOME_CONFLICT
NO_ROOM = pb.RESERVE_OUTCOME_NO_ROOM


async def test_one_writer_saves_a_block_at_a_time() -> None:
    """A second writer is told of the conflict, and of the presence afterwards (S2.24)."""
    async with running_cache() as cache:
        first, second = await cache.engine(), await cache.engine("second")
        granted = await first.reserve(block("a"))
        assert (granted.outcome, bool(granted.token)) == (GRANTED, True)
        refusal = await second.reserve(block("a"))
        assert (refusal.outcome, refusal.token) == (CONFLICT, "")
        assert await first.check(granted.token)
        assert await first.mark(granted.token)
        assert await first.announce(granted.token, block("a"))
        assert (await second.reserve(block("a"))).outcome == PRESENT
        assert not await first.announce(granted.token, block("a"))
        stats = await cache.stub.GetStats(pb.GetStatsRequest())
        assert (stats.rows, stats.saves, stats.duplicates, stats.reservations) == (1, 1, 2, 0)


async def test_a_token_holds_for_its_session_only() -> None:
    """Another engine cannot go on with a reservation, and an unknown token holds nowhere (S2.25)."""
    async with running_cache() as cache:
        writer, other = await cache.engine(), await cache.engine("other")
        token = (await writer.reserve(block("a"))).token
        for engine, text in ((other, token), (writer, "unknown")):
            assert not await engine.check(text)
            assert not await engine.mark(text)
            assert not await engine.announce(text, block("a"))
            assert not await engine.cancel(text)
            request = pb.RenewRequest(session_id=engine.session_id, tokens=[text])
            assert list((await cache.stub.Renew(request)).lost) == [text]
        assert await writer.cancel(token)
        assert (await other.reserve(block("a"))).outcome == GRANTED


async def test_an_announcement_may_be_smaller_but_not_larger() -> None:
    """What was reserved too much is free at once; more than that is refused, as is another block."""
    async with running_cache() as cache:
        engine = await cache.engine()
        token = (await engine.reserve(block("a", size=1000))).token
        error = await refused(engine.announce(token, block("a", size=1001)))
        assert (error.reason, error.param) == ("INVALID_VALUE", "block.size_bytes")
        error = await refused(engine.announce(token, block("b", size=10)))
        assert (error.reason, error.param) == ("INVALID_VALUE", "block.key")
        assert await engine.announce(token, block("a", size=400))
        places = (await cache.stub.GetStats(pb.GetStatsRequest())).places
        assert [(p.root_id, p.bytes, p.copies, p.engines) for p in places if p.root_id] == [
            ("disk", 400, 1, 1)
        ]


async def test_renewed_reservations_live_on() -> None:
    """Without a renewal the token does not hold after its time; with it, it does (W36)."""
    clock = ManualClock()
    async with running_cache(clock, reservation_ttl_s=10.0) as cache:
        engine = await cache.engine()
        renewed, forgotten = [(await engine.reserve(block(n))).token for n in ("a", "b")]
        clock.advance(6)
        request = pb.RenewRequest(session_id=engine.session_id, tokens=[renewed])
        assert not (await cache.stub.Renew(request)).lost
        clock.advance(6)
        assert await engine.check(renewed)
        assert not await engine.check(forgotten)
        assert (await engine.reserve(block("b"))).outcome == GRANTED


async def test_room_is_made_by_dropping_the_leaf_least_worth() -> None:
    """The reserving engine deletes a last block of a chain, confirms, and has its reservation; never above the quota."""
    async with running_cache() as cache:
        engine = await cache.engine(roots=[root(quota=300)])
        await engine.save(*chain("a", "b", size=100), block("x", size=100))
        held = await engine.acquire(["a", "b"])
        await engine.release(held.claim_id)
        reserving = asyncio.create_task(engine.reserve(block("y", size=100)))
        drop = await engine.drop()
        assert (drop.root_id, list(drop.keys)) == ("disk", [key("x")])
        assert not reserving.done()
        assert (await cache.stub.GetStats(pb.GetStatsRequest())).places[0].bytes == 300
        await engine.confirm(drop)
        assert (await reserving).outcome == GRANTED
        # Next is `b`, the end of its chain: dropping `a` first would leave a hole in front of it.
        reserving = asyncio.create_task(engine.reserve(block("z", size=100)))
        drop = await engine.drop()
        assert list(drop.keys) == [key("b")]
        await engine.confirm(drop)
        assert (await reserving).outcome == GRANTED
        assert cache.metric("caravan_cache_evictions_total") == 2


async def test_no_room_while_everything_is_in_use() -> None:
    """Pinned and unfinished blocks stay, so the save is refused; a block above the quota is refused always."""
    async with running_cache() as cache:
        engine = await cache.engine(roots=[root(quota=200)])
        await engine.save(block("a", size=100))
        claim = (await engine.acquire(["a"])).claim_id
        token = (await engine.reserve(block("b", size=100))).token
        assert (await engine.reserve(block("c", size=100))).outcome == NO_ROOM
        assert (await engine.reserve(block("big", size=201))).outcome == NO_ROOM
        assert await engine.cancel(token)
        assert (await engine.reserve(block("c", size=100))).outcome == GRANTED
        assert await engine.release(claim)
        assert cache.metric("caravan_cache_refused_total") == 2


async def test_the_wait_for_room_is_bounded() -> None:
    """An engine that does not confirm in time makes the save fail, not hang."""
    async with running_cache(room_wait_s=0.05) as cache:
        engine = await cache.engine(roots=[root(quota=100)])
        await engine.save(block("a", size=100))
        assert (await engine.reserve(block("b", size=100))).outcome == NO_ROOM
        await engine.confirm(await engine.drop())
        await until(lambda: len(cache.state.core.index) == 0)
        assert (await engine.reserve(block("b", size=100))).outcome == GRANTED


async def test_another_engine_of_the_root_is_told_when_the_first_dies() -> None:
    """A drop that was not confirmed is asked of who is left, and the reservation is granted then."""
    async with running_cache(room_wait_s=5.0) as cache:
        first = await cache.engine("first", [root(quota=100)])
        await first.save(block("a", size=100))
        second = await cache.engine("second", [root(quota=100)], held=[block("a", size=100)])
        evicting = await cache.stub.Evict(pb.EvictRequest(bytes=1))
        assert (evicting.copies, evicting.bytes) == (1, 100)
        assert list((await first.drop()).keys) == [key("a")]
        reserving = asyncio.create_task(second.reserve(block("b", size=100)))
        await until(lambda: len(cache.state.core.reservations) == 1)
        first.die()
        await second.confirm(await second.drop())
        assert (await reserving).outcome == GRANTED


async def test_a_caller_that_leaves_gives_its_reservation_up() -> None:
    """A Reserve that is cancelled while it waits for room leaves no reservation behind."""
    async with running_cache(room_wait_s=60.0) as cache:
        engine = await cache.engine(roots=[root(quota=100)])
        await engine.save(block("a", size=100))
        reserving = asyncio.create_task(engine.reserve(block("b", size=100)))
        drop = await engine.drop()
        reserving.cancel()
        await until(lambda: len(cache.state.core.reservations) == 0)
        await engine.confirm(drop)
        await until(lambda: len(cache.state.core.index) == 0)


async def test_a_writer_lost_before_the_link_leaves_nothing() -> None:
    """Its placeholder is dropped, so that another may save the block (S2.26)."""
    async with running_cache() as cache:
        writer, other = await cache.engine(), await cache.engine("other")
        assert (await writer.reserve(block("a"))).outcome == GRANTED
        writer.die()
        await until(lambda: len(cache.state.core.sessions) == 1)
        assert (await other.reserve(block("a"))).outcome == GRANTED


@pytest.mark.parametrize("steps", ["check", "mark"])
@pytest.mark.parametrize("good", [True, False])
async def test_a_writer_lost_when_the_file_may_be_there_is_settled(steps: str, good: bool) -> None:
    """Another engine of the root looks: a good file is adopted and waiters are told, a bad one is forgotten (S2.26)."""
    async with running_cache() as cache:
        writer, other = await cache.engine(), await cache.engine("other")
        token = (await writer.reserve(block("a", size=7))).token
        assert await writer.check(token)
        if steps == "mark":
            assert await writer.mark(token)
        waiting = asyncio.create_task(other.wait("a", 60))
        await until(lambda: len(cache.state.core.waiters) == 1)
        writer.die()
        settle = await other.settle()
        assert (settle.root_id, settle.key) == ("disk", key("a"))
        assert (await other.reserve(block("a"))).outcome == CONFLICT
        await other.settled(settle, block("a", size=7) if good else None)
        outcome = pb.WAIT_OUTCOME_AVAILABLE if good else pb.WAIT_OUTCOME_FAILED
        assert await waiting == outcome
        assert (await other.reserve(block("a"))).outcome == (PRESENT if good else GRANTED)
        assert cache.metric("caravan_cache_adopted_total") == int(good)


async def test_a_lost_file_waits_until_somebody_can_look() -> None:
    """With nobody at the root the row stays WRITING; the next engine there is asked."""
    async with running_cache() as cache:
        writer = await cache.engine()
        token = (await writer.reserve(block("a"))).token
        assert await writer.mark(token)
        writer.die()
        await until(lambda: len(cache.state.core.sessions) == 0)
        (row,) = [row async for row in cache.stub.Dump(pb.DumpRequest())]
        assert [copy.state for copy in row.copies] == [pb.COPY_STATE_WRITING]
        later = await cache.engine("later", held=[block("a")])
        await later.settled(await later.settle(), block("a"))
        await until(lambda: cache.available("a") == 1)


async def test_a_longer_tail_replaces_the_shorter_one() -> None:
    """Of two siblings one of which begins with the other, the shorter goes, once nobody reads it."""
    async with running_cache() as cache:
        engine = await cache.engine()
        await engine.save(block("one", tokens=[1, 2]), block("other", tokens=[1, 9]))
        claim = (await engine.acquire([], tail=[1, 2])).claim_id
        await engine.save(block("two", tokens=[1, 2, 3]))
        assert cache.available("one") == 1
        assert await engine.release(claim)
        drop = await engine.drop()
        assert list(drop.keys) == [key("one")]
        await engine.confirm(drop)
        await until(lambda: len(cache.state.core.index) == 2)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"key": b"short"}, "block.key"),
        ({"parent_key": b"x" * 31}, "block.parent_key"),
        ({"parent_key": key("a")}, "block.parent_key"),
        ({"start": 256}, "block.end"),
        ({"size_bytes": 0}, "block.size_bytes"),
        ({"size_bytes": 2**63}, "block.size_bytes"),
        ({"tokens": [1, 2]}, "block.tokens"),
        ({"end": 2000, "tokens": [1] * 2000}, "block.tokens"),
    ],
)
async def test_wrong_blocks_are_refused_by_name(change: dict[str, object], param: str) -> None:
    """Each field of a block is checked."""
    async with running_cache() as cache:
        engine = await cache.engine()
        wrong = block("a")
        wrong.MergeFrom(pb.Block(**change))  # type: ignore[arg-type]
        if change.get("size_bytes") == 0:
            wrong.size_bytes = 0
        error = await refused(engine.reserve(wrong))
        assert (error.reason, error.param) == ("INVALID_VALUE", param)


async def test_a_root_must_be_declared_and_writable() -> None:
    """A root of others is unknown to a session, and one that it only reads takes no save."""
    async with running_cache() as cache:
        await cache.engine("other", [root("other")])
        engine = await cache.engine(roots=[root(writable=False)])
        for name in ("other", "disk", ""):
            error = await refused(engine.reserve(block("a"), name))
            assert (error.reason, error.param) == ("INVALID_VALUE", "root_id")
