"""Saves against a real cache service: renewals, expiry, lost answers, and those who wait for a save (S2.24-S2.31, W36, W38)."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
from caravan.cache.v1 import cache_service_pb2 as pb

from services.engine.kv import kvc
from services.engine.kv.ledger import CacheDown, Reservation
from services.engine.kv.root import Root
from services.engine.kv.rows import meta_of, row_of_head, row_of_meta
from services.runtime.clock import random_id
from tests.support.cache import CacheRig, EnginePeer, root, running_cache, until
from tests.support.kv import NAMESPACE, chain_of, prompt_of
from tests.support.kv_engines import KvEngine, covered, disk, running_engine
from tests.support.kv_steps import BLOCK, PROMPT, SteppedFiles, SteppedSaves

NO_RAM = 0


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"root-id"}


async def nowhere(step: str) -> None:
    """Stops at no step."""


def wrap_files(engine: KvEngine, held: threading.Event) -> None:
    """Writes wait for the event, before the first byte."""

    def at(step: str) -> None:
        if step == "write:middle":
            assert held.wait(20)

    link = engine.store._link
    assert link is not None
    link.publisher._roots = [SteppedFiles(one, at) for one in link.publisher._roots]


def wrap_saves(engine: KvEngine, saves: type[SteppedSaves]) -> SteppedSaves:
    """Calls to the service go through `saves`."""
    link = engine.store._link
    assert link is not None
    wrapped = saves(link.publisher._saves, nowhere)
    link.publisher._saves = wrapped
    return wrapped


class Counting(SteppedSaves):
    """Counts renewals."""

    renewals = 0

    async def renew(self, reservation: Reservation) -> None:
        await super().renew(reservation)
        self.renewals += 1


class NeverRenewing(SteppedSaves):
    """A writer that stands still."""

    async def renew(self, reservation: Reservation) -> None:
        pass


async def test_a_write_longer_than_the_ttl_is_renewed(tmp_path: Path) -> None:
    held = threading.Event()
    async with (
        running_cache(reservation_ttl_s=0.3, heartbeat_s=0.1) as service,
        running_engine(service.address, disk(tmp_path), ram_quota_bytes=NO_RAM) as engine,
    ):
        wrap_files(engine, held)
        saves = wrap_saves(engine, Counting)
        assert isinstance(saves, Counting)
        assert engine.store.save(BLOCK)
        await until(lambda: saves.renewals >= 7)  # More than twice the time to live.
        held.set()
        await until(lambda: engine.store.queued_bytes == 0)
        assert engine.store.stats.saves_expired == 0
        assert covered(await engine.find(PROMPT)) == 256


async def test_a_writer_that_stood_still_too_long_publishes_nothing(tmp_path: Path) -> None:
    held = threading.Event()
    async with (
        running_cache(reservation_ttl_s=0.2, heartbeat_s=0.1) as service,
        running_engine(service.address, disk(tmp_path), ram_quota_bytes=NO_RAM) as engine,
    ):
        wrap_files(engine, held)
        wrap_saves(engine, NeverRenewing)
        assert engine.store.save(BLOCK)
        await until(lambda: service.metric("caravan_cache_reservations") == 1)
        await until(lambda: service.metric("caravan_cache_reservations") == 0)
        held.set()
        await until(lambda: engine.store.queued_bytes == 0)
        assert engine.store.stats.saves_expired == 1
        assert names(tmp_path) == set()
        await engine.save([BLOCK])
        assert covered(await engine.find(PROMPT)) == 256


class Losing(SteppedSaves):
    """Loses one request or one answer, while the session goes on."""

    call = ""
    loses_answer = False
    lost = 0

    async def _lose(self, call: str) -> None:
        if call == self.call and not self.lost:
            type(self).lost += 1
            raise CacheDown("lost")

    async def check(self, reservation: Reservation) -> bool:
        return await self._through("check", reservation)

    async def mark_published(self, reservation: Reservation) -> bool:
        return await self._through("mark_published", reservation)

    async def announce(self, reservation: Reservation, row: pb.Block) -> bool:
        return await self._through("announce", reservation, row)

    async def _through(self, call: str, *arguments: object) -> bool:
        if not self.loses_answer:
            await self._lose(call)
        answer: bool = await getattr(self._saves, call)(*arguments)
        if self.loses_answer:
            await self._lose(call)
        return answer


@pytest.mark.parametrize("loses_answer", [False, True], ids=["request", "answer"])
@pytest.mark.parametrize("call", ["check", "mark_published", "announce"])
async def test_a_lost_message_leaves_no_file_unknown(
    tmp_path: Path, call: str, loses_answer: bool
) -> None:
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path), ram_quota_bytes=NO_RAM) as engine,
    ):
        losing = type("LosingOnce", (Losing,), {"call": call, "loses_answer": loses_answer})
        wrap_saves(engine, losing)
        assert engine.store.save(BLOCK)
        await until(lambda: engine.store.queued_bytes == 0)
        await engine.joined()
        await until(lambda: service.metric("caravan_cache_reservations") == 0)
        await until(lambda: len(names(tmp_path)) == service.metric("caravan_cache_rows"))
        await engine.save([BLOCK])
        assert covered(await engine.find(PROMPT)) == 256


# --- waiting -----------------------------------------------------------------------------------------------------

TURN = prompt_of(3, 700)
NEXT_TURN = [*TURN, *prompt_of(4, 50)]
BLOCKS = chain_of(TURN)


async def another_writer(service: CacheRig, folder: Path) -> EnginePeer:
    """Another engine on the same root, moved by hand."""
    opened = Root.open(folder, random_id)
    peer = EnginePeer(service.stub, "engine-9", [root(opened.root_id, quota=64 << 20)])
    await peer.join()
    await peer.inventory([row_of_head(head) for head in opened.scan()], opened.root_id)
    return peer


async def begin(peer: EnginePeer) -> str:
    """Begins to save the last block of the turn; returns the token."""
    meta = meta_of(BLOCKS[-1], NAMESPACE, 1)
    row = row_of_meta(meta, kvc.prefix_bytes(meta) + len(BLOCKS[-1].state))
    granted = await peer.reserve(row, peer.roots[0].root_id)
    assert granted.outcome == pb.RESERVE_OUTCOME_GRANTED
    return granted.token


async def finish(peer: EnginePeer, folder: Path, token: str) -> None:
    """Ends that save."""
    opened = Root.open(folder, random_id)
    meta = meta_of(BLOCKS[-1], NAMESPACE, 1)
    state = BLOCKS[-1].state
    temporary = opened.write(meta.key, "peer", "1", (kvc.seal(meta, state), state))
    expected = kvc.Expected(meta.key, meta.parent, NAMESPACE, meta.start, meta.token_bytes)
    assert await peer.check(token)
    opened.link(temporary, expected)
    assert await peer.mark(token)
    assert await peer.announce(token, row_of_head(opened.head(meta.key)))


async def test_a_save_in_flight_is_waited_for(tmp_path: Path) -> None:
    async with (
        running_cache() as service,
        running_engine(
            service.address, disk(tmp_path), ram_quota_bytes=NO_RAM, wait_seconds=20
        ) as engine,
    ):
        await engine.save(BLOCKS[:-1])
        peer = await another_writer(service, tmp_path)
        token = await begin(peer)
        finding = asyncio.create_task(engine.find(NEXT_TURN, parent_key=BLOCKS[-1].key))
        await until(lambda: service.metric("caravan_cache_waiters") == 1)
        # Others are not held up meanwhile, and without the parent key nobody waits.
        assert covered(await engine.find(NEXT_TURN)) == 512
        assert not finding.done()
        await finish(peer, tmp_path, token)
        assert covered(await finding) == 700
        assert engine.store.stats.waits == 1
        peer.die()


async def test_a_save_that_fails_ends_the_wait_at_once(tmp_path: Path) -> None:
    async with (
        running_cache() as service,
        running_engine(
            service.address, disk(tmp_path), ram_quota_bytes=NO_RAM, wait_seconds=20
        ) as engine,
    ):
        await engine.save(BLOCKS[:-1])
        peer = await another_writer(service, tmp_path)
        token = await begin(peer)
        finding = asyncio.create_task(engine.find(NEXT_TURN, parent_key=BLOCKS[-1].key))
        await until(lambda: service.metric("caravan_cache_waiters") == 1)
        await peer.cancel(token)
        async with asyncio.timeout(10):
            assert covered(await finding) == 512
        peer.die()


async def test_a_wait_is_bounded(tmp_path: Path) -> None:
    async with (
        running_cache() as service,
        running_engine(
            service.address, disk(tmp_path), ram_quota_bytes=NO_RAM, wait_seconds=0.2
        ) as engine,
    ):
        await engine.save(BLOCKS[:-1])
        peer = await another_writer(service, tmp_path)
        await begin(peer)
        began = time.monotonic()
        assert covered(await engine.find(NEXT_TURN, parent_key=BLOCKS[-1].key)) == 512
        assert 0.19 < time.monotonic() - began < 3
        peer.die()


@pytest.mark.parametrize("parent_key", [BLOCKS[-1].key, BLOCKS[0].key, b"\x07" * 32])
async def test_nobody_waits_for_what_is_there_or_is_not_being_saved(
    tmp_path: Path, parent_key: bytes
) -> None:
    async with (
        running_cache() as service,
        running_engine(
            service.address, disk(tmp_path), ram_quota_bytes=NO_RAM, wait_seconds=20
        ) as engine,
    ):
        await engine.save(BLOCKS)
        async with asyncio.timeout(10):
            assert covered(await engine.find(NEXT_TURN, parent_key=parent_key)) == 700
