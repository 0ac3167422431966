"""Acquire, Release and Wait of the cache service, over real gRPC on loopback."""

from __future__ import annotations

import asyncio

import pytest
from caravan.cache.v1 import cache_service_pb2 as pb

from services.runtime.clock import ManualClock
from tests.support.cache import (
    ROOT_KEY,
    EnginePeer,
    block,
    chain,
    key,
    refused,
    root,
    running_cache,
    until,
)

TMPFS = root("tmpfs", pb.TIER_RAM_FILE)


async def test_the_longest_chain_is_found_and_pinned() -> None:
    """The blocks come in order up to the first that is missing; the claim pins them until it is released once."""
    async with running_cache() as cache:
        engine = await cache.engine()
        await engine.save(*chain("a", "b", "c"))
        found = await engine.acquire(["a", "b", "c", "d"])
        assert [copy.block.key for copy in found.blocks] == [key("a"), key("b"), key("c")]
        assert [copy.root_id for copy in found.blocks] == ["disk"] * 3
        assert [copy.tier for copy in found.blocks] == [pb.TIER_DISK] * 3
        first = found.blocks[1].block
        assert (first.parent_key, first.start, first.end) == (key("a"), 256, 512)
        assert (first.size_bytes, first.save_reason) == (1, pb.SAVE_REASON_COLD)
        evicted = await cache.stub.Collect(pb.CollectRequest())
        assert evicted.copies == 0
        assert await engine.release(found.claim_id)
        assert not await engine.release(found.claim_id)
        assert (await cache.stub.Collect(pb.CollectRequest())).copies == 3


async def test_what_the_engine_has_is_skipped() -> None:
    """Blocks in front that it has already need not be known; nothing found is no claim."""
    async with running_cache() as cache:
        engine = await cache.engine(held=[block("b", "a", start=256)])
        found = await engine.acquire(["a", "b"], skip=1)
        assert [copy.block.key for copy in found.blocks] == [key("b")]
        nothing = await engine.acquire(["a", "b"])
        assert (nothing.claim_id, len(nothing.blocks)) == ("", 0)
        assert (await engine.acquire(["a", "b"], skip=2)).claim_id == ""


async def test_own_roots_come_first_then_other_engines() -> None:
    """tmpfs before disk before another engine's RAM; a root that only others have is fetched from one of them."""
    async with running_cache() as cache:
        near = await cache.engine("near", [TMPFS, root()])
        far = await cache.engine("far", [root("far-disk")])
        await near.save(block("a"))
        await near.save(block("a"), root_id="tmpfs")
        await far.ram([block("a"), block("b", "a", start=256)])
        await far.save(block("c", "b", start=512), root_id="far-disk")
        await until(lambda: cache.available("b") == 1)
        found = await near.acquire(["a", "b", "c"])
        places = [(copy.tier, copy.root_id or copy.address) for copy in found.blocks]
        assert places == [
            (pb.TIER_RAM_FILE, "tmpfs"),
            (pb.TIER_RAM, "far:7010"),
            (pb.TIER_DISK, "far:7010"),
        ]
        far.die()
        await until(lambda: cache.available("b") == 0)
        assert len((await near.acquire(["a", "b", "c"])).blocks) == 1


async def test_a_block_after_the_chain_may_match_in_part() -> None:
    """Once the whole chain is there, the block with the longest common prefix with the rest of the prompt is found."""
    async with running_cache() as cache:
        engine = await cache.engine()
        await engine.save(block("a"))
        await engine.save(block("t1", "a", start=256, tokens=[1, 2, 3, 4]))
        await engine.save(block("t2", "a", start=256, tokens=[1, 2, 9]))
        found = await engine.acquire(["a"], tail=[1, 2, 3, 7])
        assert found.partial.block.key == key("t1")
        assert (found.partial_tokens, list(found.partial.block.tokens)) == (3, [1, 2, 3, 4])
        assert found.partial.root_id == "disk"
        assert not (await engine.acquire(["a"], tail=[5])).HasField("partial")
        assert not (await engine.acquire(["a", "missing"], tail=[1])).HasField("partial")
        alone = await engine.acquire(["a"], skip=1, tail=[1, 2, 9])
        assert (alone.partial.block.key, alone.partial_tokens) == (key("t2"), 3)


async def test_short_prompts_match_after_the_empty_prompt() -> None:
    """Without any key the parent is the empty prompt."""
    async with running_cache() as cache:
        engine = await cache.engine()
        await engine.save(block("short", tokens=[5, 6]))
        found = await engine.acquire([], tail=[5, 7])
        assert (found.partial.block.key, found.partial_tokens) == (key("short"), 1)
        request = pb.AcquireRequest(session_id=engine.session_id, tail=[5])
        error = await refused(cache.stub.Acquire(request))
        assert (error.reason, error.param) == ("MISSING_FIELD", "root_key")


async def test_a_save_under_way_can_be_waited_for() -> None:
    """Acquire names the key that is being saved; Wait is answered at the announcement (S2.31)."""
    async with running_cache() as cache:
        engine, other = await cache.engine(), await cache.engine("other")
        saving = block("a")
        granted = await engine.reserve(saving)
        assert (await other.acquire(["a", "b"])).pending_key == key("a")
        waiting = asyncio.create_task(other.wait("a"))
        await until(lambda: len(cache.state.core.waiters) == 1)
        assert await engine.announce(granted.token, saving)
        assert await waiting == pb.WAIT_OUTCOME_AVAILABLE
        assert await other.wait("a") == pb.WAIT_OUTCOME_AVAILABLE
        assert await other.wait("b") == pb.WAIT_OUTCOME_ABSENT


async def test_waiters_are_told_at_once_when_the_save_fails() -> None:
    """A cancelled reservation and a lost writer fail those who wait, not their deadline (W34)."""
    async with running_cache() as cache:
        engine, other = await cache.engine(), await cache.engine("other")
        granted = await engine.reserve(block("a"))
        waiting = asyncio.create_task(other.wait("a", 60))
        await until(lambda: len(cache.state.core.waiters) == 1)
        assert await engine.cancel(granted.token)
        assert await waiting == pb.WAIT_OUTCOME_FAILED
        await engine.reserve(block("a"))
        waiting = asyncio.create_task(other.wait("a", 60))
        await until(lambda: len(cache.state.core.waiters) == 1)
        engine.die()
        assert await waiting == pb.WAIT_OUTCOME_FAILED


async def test_a_wait_ends_with_its_time_its_caller_or_its_session() -> None:
    """The end of the time is an outcome, a caller that leaves is forgotten, a session that ends is told so."""
    async with running_cache() as cache:
        engine, other = await cache.engine(), await cache.engine("other")
        await engine.reserve(block("a"))
        assert await other.wait("a", 0.01) == pb.WAIT_OUTCOME_TIMED_OUT
        assert await other.wait("a", 0) == pb.WAIT_OUTCOME_TIMED_OUT
        leaving = asyncio.create_task(other.wait("a", 60))
        await until(lambda: len(cache.state.core.waiters) == 1)
        leaving.cancel()
        await until(lambda: len(cache.state.core.waiters) == 0)
        ended = asyncio.create_task(refused(other.wait("a", 60)))
        await until(lambda: len(cache.state.core.waiters) == 1)
        other.die()
        assert (await ended).reason == "SESSION_UNKNOWN"


async def test_claims_end_with_their_session_and_their_age() -> None:
    """A dead engine's claims are released, and so is one whose answer got lost."""
    clock = ManualClock()
    async with running_cache(clock, claim_ttl_s=2.0, heartbeat_s=1.0) as cache:
        engine, other = await cache.engine(), await cache.engine("other")
        await engine.save(block("a"))
        copy = cache.state.core.index.rows[key("a")].copies[0]
        await other.acquire(["a"])
        await engine.acquire(["a"])
        other.die()
        await until(lambda: copy.claims == 1)
        for _ in range(2):
            clock.advance(1)
            cache.servicer.expire()
        assert copy.claims == 0


async def test_a_caller_that_leaves_keeps_no_claim() -> None:
    """An Acquire that is cancelled at any moment pins nothing for long: its claim is released, or ends with its age."""
    async with running_cache(claim_ttl_s=0.2, heartbeat_s=0.5) as cache, asyncio.timeout(30):
        engine = await cache.engine(held=chain(*range(50)))
        beating = asyncio.create_task(_beat(engine))
        session = cache.state.session(engine.session_id)
        turns = 0
        # On a busy machine none of the first forty calls gets as far as the service.
        while turns < 40 or cache.state.core.counters.acquires == 0:
            call = asyncio.create_task(engine.acquire(list(range(50))))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            turns += 1
        await until(lambda: len(session.claims) == 0)
        beating.cancel()


async def _beat(engine: EnginePeer) -> None:
    while True:
        await engine.send(pb.JoinRequest(heartbeat=pb.Heartbeat()))
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"keys": b"x" * 33}, "keys"),
        ({"keys": b"x" * 32 * 5}, "keys"),
        ({"keys": b"x" * 64, "skip": 3}, "skip"),
        ({"keys": b"x" * 32, "root_key": b"short"}, "root_key"),
        ({"root_key": ROOT_KEY, "tail": [1] * 1025}, "tail"),
    ],
)
async def test_wrong_chains_are_refused_by_name(fields: dict[str, object], param: str) -> None:
    """Each field of Acquire is checked."""
    async with running_cache(max_keys=4) as cache:
        engine = await cache.engine()
        request = pb.AcquireRequest(session_id=engine.session_id, **fields)  # type: ignore[arg-type]
        error = await refused(cache.stub.Acquire(request))
        assert (error.reason, error.param) == ("INVALID_VALUE", param)


async def test_calls_of_an_unknown_session_are_refused() -> None:
    """Every call that belongs to a session says that it has ended."""
    async with running_cache() as cache:
        stub, a = cache.stub, block("a")
        for call in (
            stub.Acquire(pb.AcquireRequest(session_id="?", root_key=ROOT_KEY)),
            stub.Release(pb.ReleaseRequest(session_id="?", claim_id="c")),
            stub.Reserve(pb.ReserveRequest(session_id="?", root_id="disk", block=a)),
            stub.Renew(pb.RenewRequest(session_id="?", tokens=["t"])),
            stub.CheckReservation(pb.CheckReservationRequest(session_id="?", token="t")),
            stub.MarkPublished(pb.MarkPublishedRequest(session_id="?", token="t")),
            stub.Announce(pb.AnnounceRequest(session_id="?", token="t", block=a)),
            stub.CancelReservation(pb.CancelReservationRequest(session_id="?", token="t")),
            stub.Wait(pb.WaitRequest(session_id="?", key=a.key)),
        ):
            assert (await refused(call)).reason == "SESSION_UNKNOWN"


async def test_claims_of_an_engine_are_bounded() -> None:
    """One claim too many is refused; the engine goes cold."""
    async with running_cache(max_claims=1) as cache:
        engine = await cache.engine()
        await engine.save(block("a"))
        await engine.acquire(["a"])
        assert (await refused(engine.acquire(["a"]))).reason == "CAPACITY_EXHAUSTED"
