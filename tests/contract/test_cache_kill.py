"""kill -9 of the cache service's process before and after every call that engines make: nothing is lost or poisoned (I6, I7).

The engine's side is the real one, over real files. A call that is cut while it is under way looks like one that was never
sent: the caller gets no answer, and the service that comes back knows nothing of either.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.engine.kv.root import Root, RootError, RootTrouble
from services.engine.kv.store import FoundBlock
from services.runtime.clock import random_id
from tests.support.cache import until
from tests.support.cache_process import CacheProcess, SteppedStub
from tests.support.kv_engines import KvEngine, disk, running_engine, states
from tests.support.kv_steps import BLOCK, PROMPT, QUOTA, SteppedFiles

STATE = [bytes(BLOCK.state)]
BOUND_S = 10.0
"""No caller waits longer for an answer, whatever dies; half of the time for which a lookup would wait for a save."""
WAIT_S = 20.0
SAVING = ("Reserve", "CheckReservation", "MarkPublished", "Announce")
MOMENTS = ("before", "after")


@pytest.fixture(scope="module")
def service() -> Iterator[CacheProcess]:
    """A service that is killed and started again from test to test. Saves are renewed once a second."""
    process = CacheProcess(CARAVAN_CACHE_RESERVATION_TTL_S="3")
    yield process
    process.kill()


def kill_at(engine: KvEngine, service: CacheProcess, step: str) -> asyncio.Event:
    """Kills the service when a call of the engine is at a step, once; the event says that it happened."""
    killed = asyncio.Event()

    async def at(here: str) -> None:
        if here == step and not killed.is_set():
            await asyncio.to_thread(service.kill)
            killed.set()

    link = engine.store._link
    assert link is not None
    stub: object = SteppedStub(link.ledger._stub, at)
    link.ledger._stub = stub  # type: ignore[assignment]
    return killed


def at_writing(engine: KvEngine, act: Callable[[], None]) -> None:
    """Has a save do something on its thread, before it writes its file."""
    link = engine.store._link
    assert link is not None
    publisher = link.publisher

    def at(step: str) -> None:
        if step == "write:before":
            act()

    publisher._roots = [SteppedFiles(root, at) for root in publisher._roots]


def named(folder: Path, suffix: str) -> list[Path]:
    """The files whose names end so."""
    return list(folder.glob(f"*{suffix}"))


async def recover(service: CacheProcess, folder: Path, *engines: KvEngine) -> None:
    """After a kill: what has a name is whole; the service comes back and knows just that; the block can be used by all."""
    root = Root.open(folder, random_id)
    for path in named(folder, ".kvc"):
        assert root.read_whole(bytes.fromhex(path.stem)).state == BLOCK.state
    for engine in engines:
        await until(lambda engine=engine: not engine.store.joined)  # type: ignore[misc]
        async with asyncio.timeout(BOUND_S):
            assert await engine.find(PROMPT) == []
    await service.start()
    for engine in engines:
        await engine.joined()
    visible = len(named(folder, ".kvc"))
    await service.until(lambda stats: len(stats.places) > 0 and stats.rows == visible)
    for engine in engines:
        async with asyncio.timeout(BOUND_S):
            # A root whose disk failed is left alone for a second: until then nothing is saved there.
            while not (found := await engine.find(PROMPT)):
                await engine.save([BLOCK])
        assert states(found) == STATE
    await service.until(lambda stats: stats.claims == stats.reservations == stats.waiters == 0)
    assert (await service.stats()).rows == 1
    list(root.scan())
    assert named(folder, ".tmp") == []


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("method", SAVING)
async def test_while_a_block_is_saved(
    tmp_path: Path, service: CacheProcess, method: str, moment: str
) -> None:
    await service.start()
    async with running_engine(service.address, disk(tmp_path, QUOTA), ram_quota_bytes=0) as engine:
        killed = kill_at(engine, service, f"{method}:{moment}")
        async with asyncio.timeout(BOUND_S):
            await engine.save([BLOCK])
        assert killed.is_set()
        await recover(service, tmp_path, engine)


@pytest.mark.parametrize("moment", MOMENTS)
async def test_while_a_save_is_renewed(tmp_path: Path, service: CacheProcess, moment: str) -> None:
    """The file takes longer than a third of a reservation's life; its writer does not notice until it checks."""
    await service.start()
    async with running_engine(service.address, disk(tmp_path, QUOTA), ram_quota_bytes=0) as engine:
        killed = kill_at(engine, service, f"Renew:{moment}")
        goes_on = threading.Event()
        at_writing(engine, lambda: assert_set(goes_on))
        assert engine.store.save(BLOCK)
        async with asyncio.timeout(BOUND_S):
            await killed.wait()
        goes_on.set()
        await until(lambda: engine.store.queued_bytes == 0)
        await recover(service, tmp_path, engine)


def assert_set(event: threading.Event) -> None:
    """Waits for it on a thread."""
    assert event.wait(BOUND_S)


@pytest.mark.parametrize("moment", MOMENTS)
async def test_while_a_save_is_given_up(tmp_path: Path, service: CacheProcess, moment: str) -> None:
    """The disk fails once; the next save works."""
    await service.start()
    async with running_engine(service.address, disk(tmp_path, QUOTA), ram_quota_bytes=0) as engine:
        killed = kill_at(engine, service, f"CancelReservation:{moment}")

        def fail_once() -> None:
            if not killed.is_set():
                raise RootError(RootTrouble.FAILED, "the disk fails")

        at_writing(engine, fail_once)
        async with asyncio.timeout(BOUND_S):
            await engine.save([BLOCK])
        assert killed.is_set()
        assert named(tmp_path, ".kvc") == []
        await recover(service, tmp_path, engine)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("method", ["Acquire", "Release"])
async def test_while_a_block_is_looked_up(
    tmp_path: Path, service: CacheProcess, method: str, moment: str
) -> None:
    """Who has an answer reads the files that it names: they stay. Who has none goes on without."""
    await service.start()
    async with running_engine(service.address, disk(tmp_path, QUOTA), ram_quota_bytes=0) as engine:
        await engine.save([BLOCK])
        killed = kill_at(engine, service, f"{method}:{moment}")
        async with asyncio.timeout(BOUND_S):
            found = await engine.find(PROMPT)
        assert states(found) == ([] if (method, moment) == ("Acquire", "before") else STATE)
        await asyncio.wait_for(killed.wait(), BOUND_S)
        await recover(service, tmp_path, engine)


@pytest.mark.parametrize("moment", ["before", "parked"])
async def test_while_somebody_waits_for_a_save(
    tmp_path: Path, service: CacheProcess, moment: str
) -> None:
    """One engine waits for what another writes: it gets its answer at once, not after its time."""
    await service.start()
    root = disk(tmp_path, QUOTA)
    async with (
        running_engine(service.address, root, ram_quota_bytes=0) as writer,
        running_engine(
            service.address, root, engine_id="waiter", ram_quota_bytes=0, wait_seconds=WAIT_S
        ) as waiter,
    ):
        killed = kill_at(waiter, service, f"Wait:{moment}")
        is_writing, goes_on = threading.Event(), threading.Event()

        def stop() -> None:
            is_writing.set()
            assert_set(goes_on)

        at_writing(writer, stop)
        assert writer.store.save(BLOCK)
        await asyncio.to_thread(assert_set, is_writing)
        waiting = asyncio.create_task(waiter.find(PROMPT, parent_key=BLOCK.key))
        if moment == "parked":
            await service.until(lambda stats: stats.waiters == 1)
            await asyncio.to_thread(service.kill)
            killed.set()
        assert await answer_of(waiting) == []
        assert killed.is_set()
        goes_on.set()
        await until(lambda: writer.store.queued_bytes == 0)
        await recover(service, tmp_path, writer, waiter)


async def answer_of(waiting: asyncio.Task[list[FoundBlock]]) -> list[FoundBlock]:
    """What a lookup found, within the bound."""
    async with asyncio.timeout(BOUND_S):
        return await waiting
