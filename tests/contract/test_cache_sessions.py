"""Sessions of engines with the cache service, over real gRPC on loopback."""

from __future__ import annotations

import pytest
from caravan.cache.v1 import cache_service_pb2 as pb

from services.runtime.clock import ManualClock
from tests.support.cache import (
    MIB,
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


async def test_joining_tells_the_times_and_who_else_lives() -> None:
    """The welcome names the session, the heartbeat, the reservation's life and all live sessions."""
    async with running_cache(heartbeat_s=0.25, reservation_ttl_s=9.0) as cache:
        first = await cache.engine("first")
        welcome = await EnginePeer(cache.stub, "second", []).join()
        assert welcome.heartbeat_interval.ToMilliseconds() == 250
        assert welcome.reservation_ttl.ToMilliseconds() == 9000
        assert list(welcome.live_session_ids) == [first.session_id, welcome.session_id]


async def test_an_inventory_makes_rows_and_removes_what_is_gone() -> None:
    """A restarted service knows what it is told; what a later listing does not name is gone, unless saved since."""
    async with running_cache() as cache:
        first = await cache.engine("first", held=chain("a", "b"))
        assert len((await first.acquire(["a", "b"])).blocks) == 2
        second = EnginePeer(cache.stub, "second", [root()])
        await second.join()
        await first.save(block("new"))
        await second.inventory(chain("a"), complete=False)
        assert cache.available("b") == 1
        await second.inventory([])
        await until(lambda: cache.available("b") == 0)
        assert (cache.available("a"), cache.available("new")) == (1, 1)


async def test_what_was_dropped_while_a_root_was_listed_stays_gone() -> None:
    """An older listing does not bring back a block whose file was deleted meanwhile."""
    async with running_cache() as cache:
        first = await cache.engine("first", held=[block("a")])
        second = EnginePeer(cache.stub, "second", [root()])
        await second.join()
        await cache.stub.Evict(pb.EvictRequest(keys=[key("a")]))
        await first.confirm(await first.drop())
        await until(lambda: len(cache.state.core.index) == 0)
        await second.inventory([block("a"), block("b")])
        await until(lambda: cache.available("b") == 1)
        assert cache.available("a") == 0


async def test_ram_comes_and_goes_with_its_engine() -> None:
    """Blocks in RAM are told by the engine, and vanish with its session."""
    async with running_cache() as cache:
        holder, other = await cache.engine("holder"), await cache.engine("other", [])
        await holder.ram([block("a"), block("b")])
        await until(lambda: cache.available("b") == 1)
        await holder.ram(removed=[key("b")])
        await until(lambda: cache.available("b") == 0)
        assert (await other.acquire(["a"])).blocks[0].address == "holder:7010"
        await holder.leave()
        await until(lambda: cache.available("a") == 0)
        assert len(cache.state.core.index) == 0


async def test_files_stay_known_without_anybody_to_reach_them() -> None:
    """Rows of a root that nobody has are not given out, until the root is declared again."""
    async with running_cache() as cache:
        first, other = await cache.engine("first", held=[block("a")]), await cache.engine("o", [])
        assert len((await other.acquire(["a"])).blocks) == 1
        first.die()
        await until(lambda: len(cache.state.core.sessions) == 1)
        assert len((await other.acquire(["a"])).blocks) == 0
        assert len(cache.state.core.index) == 1
        again = await cache.engine("first", held=[block("a")])
        assert (await again.acquire(["a"])).blocks[0].root_id == "disk"


async def test_an_engine_that_joins_again_replaces_its_session() -> None:
    """The newer session wins, the older stream is told so, its RAM and its claims are gone."""
    async with running_cache() as cache:
        first = await cache.engine()
        await first.ram([block("a")])
        await until(lambda: cache.available("a") == 1)
        second = await cache.engine()
        error = await first.end()
        assert error.reason == "SESSION_UNKNOWN"
        assert "replaced" in error.message
        assert cache.available("a") == 0
        assert (await refused(first.acquire(["a"]))).reason == "SESSION_UNKNOWN"
        assert not (await second.acquire(["a"])).blocks
        assert cache.metric("caravan_cache_sessions_ended_total", why="replaced") == 1


async def test_silent_engines_are_taken_for_dead() -> None:
    """After three heartbeats of silence a session ends; those who speak stay."""
    clock = ManualClock()
    async with running_cache(clock, heartbeat_s=1.0) as cache:
        silent, lively = await cache.engine("silent"), await cache.engine("lively", [])
        session = cache.state.session(lively.session_id)
        for _ in range(3):
            clock.advance(1)
            await lively.send(pb.JoinRequest(heartbeat=pb.Heartbeat()))
            await until(lambda: session.heard_at == clock.now)
            cache.servicer.expire()
        error = await silent.end()
        assert (error.reason, "silent" in error.message) == ("SESSION_UNKNOWN", True)
        assert len(cache.state.core.sessions) == 1


async def test_corrupt_copies_are_withdrawn_and_can_be_saved_again() -> None:
    """A bad file does not poison its key (W30)."""
    async with running_cache() as cache:
        engine = await cache.engine(held=[block("a")])
        withdrawal = pb.Withdrawal(root_id="disk", keys=[key("a")], corrupt=True)
        await engine.send(pb.JoinRequest(withdrawal=withdrawal))
        await until(lambda: cache.available("a") == 0)
        await engine.save(block("a"))
        assert cache.metric("caravan_cache_corrupt_total") == 1


async def test_the_smallest_quota_counts_and_is_enforced() -> None:
    """An engine that declares less for a shared root shrinks it; what is over goes."""
    async with running_cache() as cache:
        first = await cache.engine("first", [root(quota=300)], held=chain("a", "b", "c", size=100))
        await cache.engine("second", [root(quota=150)], held=chain("a", "b", "c", size=100))
        drop = await first.drop()
        assert list(drop.keys) == [key("c"), key("b")]
        await first.confirm(drop)
        await until(lambda: len(cache.state.core.index) == 1)


async def test_memory_pressure_drops_from_memory_only() -> None:
    """A host above the high mark gets RAM and tmpfs copies dropped, down to the low mark; disk stays (S2.43)."""
    async with running_cache(pressure_high=0.85, pressure_low=0.75) as cache:
        engine = await cache.engine(roots=[TMPFS, root()])
        await engine.save(block("a", size=MIB))
        await engine.save(block("t", size=MIB), root_id="tmpfs")
        await engine.ram([block("r", size=MIB)])
        await until(lambda: cache.available("r") == 1)
        used = pb.Heartbeat(memory_used_bytes=84 * MIB, memory_total_bytes=100 * MIB)
        await engine.send(pb.JoinRequest(heartbeat=used))
        short = pb.Heartbeat(memory_used_bytes=86 * MIB, memory_total_bytes=100 * MIB)
        await engine.send(pb.JoinRequest(heartbeat=short))
        drops = [await engine.drop(), await engine.drop()]
        assert {(drop.root_id, *drop.keys) for drop in drops} == {
            ("", key("r")),
            ("tmpfs", key("t")),
        }
        assert cache.available("a") == 1


async def test_sessions_are_bounded() -> None:
    """One engine too many is refused; the one that is there may replace itself."""
    async with running_cache(max_sessions=1) as cache:
        await cache.engine("only")
        more = EnginePeer(cache.stub, "more", [])
        register = pb.Registration(engine_id="more", address="h:1")
        await more.send(pb.JoinRequest(register=register))
        error = await more.end()
        assert error.reason == "CAPACITY_EXHAUSTED"
        await cache.engine("only")


async def test_rows_are_bounded() -> None:
    """With no room for rows, a save is refused and makes room for the next; files beyond it are deleted."""
    async with running_cache(max_rows=2) as cache:
        engine = await cache.engine(held=[block("a"), block("b"), block("c")])
        assert list((await engine.drop()).keys) == [key("c")]
        assert (await engine.reserve(block("d"))).outcome == pb.RESERVE_OUTCOME_NO_ROOM
        await engine.confirm(await engine.drop())
        await until(lambda: len(cache.state.core.index) == 1)
        assert (await engine.reserve(block("d"))).outcome == pb.RESERVE_OUTCOME_GRANTED


@pytest.mark.parametrize(
    ("register", "reason", "param"),
    [
        (pb.Registration(address="h:1"), "MISSING_FIELD", "register.engine_id"),
        (pb.Registration(engine_id="e"), "MISSING_FIELD", "register.address"),
        (pb.Registration(engine_id="e", address="h"), "INVALID_VALUE", "register.address"),
        (
            pb.Registration(engine_id="e", address="h:1", roots=[root(), root()]),
            "INVALID_VALUE",
            "register.roots",
        ),
        (
            pb.Registration(engine_id="e", address="h:1", roots=[root(tier=pb.TIER_RAM)]),
            "INVALID_VALUE",
            "register.roots[0].tier",
        ),
        (
            pb.Registration(engine_id="e", address="h:1", roots=[root(quota=0)]),
            "INVALID_VALUE",
            "register.roots[0].quota_bytes",
        ),
        (
            pb.Registration(engine_id="e", address="h:1", roots=[root("x" * 65)]),
            "INVALID_VALUE",
            "register.roots[0].root_id",
        ),
        (
            pb.Registration(engine_id="e", address="h:1", roots=[root(tier=pb.TIER_RAM_FILE)]),
            "INVALID_VALUE",
            "register.roots[0].tier",
        ),
    ],
)
async def test_wrong_registrations_are_refused_by_name(
    register: pb.Registration, reason: str, param: str
) -> None:
    """Each field is checked; a root keeps the tier that others have declared."""
    async with running_cache() as cache:
        await cache.engine()
        peer = EnginePeer(cache.stub, "e", [])
        await peer.send(pb.JoinRequest(register=register))
        error = await peer.end()
        assert (error.reason, error.param) == (reason, param)


@pytest.mark.parametrize(
    ("message", "reason", "param"),
    [
        (pb.JoinRequest(), "MISSING_FIELD", "message"),
        (pb.JoinRequest(register=pb.Registration()), "INVALID_VALUE", "register"),
        (pb.JoinRequest(inventory=pb.Inventory(root_id="?")), "INVALID_VALUE", "root_id"),
        (
            pb.JoinRequest(inventory=pb.Inventory(root_id="disk", blocks=[pb.Block()])),
            "MISSING_FIELD",
            "inventory.blocks[0].key",
        ),
        (
            pb.JoinRequest(ram=pb.RamChange(removed=[b"short"])),
            "INVALID_VALUE",
            "ram.removed[0]",
        ),
        (
            pb.JoinRequest(settled=pb.Settled(root_id="disk", key=key("a"), block=block("b"))),
            "INVALID_VALUE",
            "settled.block.key",
        ),
    ],
)
async def test_wrong_messages_end_the_session(
    message: pb.JoinRequest, reason: str, param: str
) -> None:
    """What cannot be understood ends the stream with its name; the engine joins again."""
    async with running_cache() as cache:
        engine = await cache.engine()
        await engine.send(message)
        error = await engine.end()
        assert (error.reason, error.param) == (reason, param)
        await until(lambda: len(cache.state.core.sessions) == 0)
