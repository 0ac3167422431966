"""Saves cut at every step: by the death of the writer, and by that of the cache service. Nothing is ever half there (I6, I7)."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.engine.kv.root import Root
from services.engine.kv.store import FoundBlock
from services.runtime.clock import random_id
from tests.support.cache import running_cache, until
from tests.support.kv_engines import KvEngine, disk, running_engine, states
from tests.support.kv_service import MortalCache, mortal_cache
from tests.support.kv_steps import BLOCK, PROMPT, QUOTA, STEPS, SteppedFiles, SteppedSaves

ROOT = Path(__file__).resolve().parents[2]
STATE = [bytes(BLOCK.state)]


@asynccontextmanager
async def writer_stopped_at(
    address: str, folder: Path, step: str
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A process that stands still in the middle of a save."""
    child = subprocess.Popen(  # noqa: ASYNC220 - it takes a millisecond
        [sys.executable, "-m", "tests.support.kv_steps", address, str(folder), step],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"},
    )
    with child:
        assert child.stdout is not None
        try:
            assert await asyncio.to_thread(child.stdout.readline) == b"stopped\n"
            yield child
        finally:
            child.kill()


def visible(folder: Path) -> list[Path]:
    return list(folder.glob("*.kvc"))


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def assert_whole(folder: Path) -> None:
    """Every file that has a name passes all checks."""
    root = Root.open(folder, random_id)
    for path in visible(folder):
        assert root.read_whole(bytes.fromhex(path.stem)).state == BLOCK.state


async def assert_usable(engine: KvEngine, folder: Path) -> None:
    """The block is found or not, exactly; it can be saved; then it is found."""
    found = await engine.find(PROMPT)
    assert states(found) in ([], STATE)
    if not found:
        await engine.save([BLOCK])
    assert states(await engine.find(PROMPT)) == STATE
    assert len(visible(folder)) == 1
    list(Root.open(folder, random_id).scan())
    assert not any(name.endswith(".tmp") for name in names(folder))


@pytest.mark.parametrize("step", STEPS)
async def test_the_writer_is_killed(tmp_path: Path, step: str) -> None:
    async with (
        running_cache() as service,
        running_engine(
            service.address,
            disk(tmp_path, QUOTA),
            engine_id="engine-other",
            ram_quota_bytes=0,
            wait_seconds=20,
        ) as other,
    ):
        waiting: asyncio.Task[list[FoundBlock]] | None = None
        async with writer_stopped_at(service.address, tmp_path, step):
            assert_whole(tmp_path)
            if service.metric("caravan_cache_reservations") == 1:
                waiting = asyncio.create_task(other.find(PROMPT, parent_key=BLOCK.key))
                await until(lambda: service.metric("caravan_cache_waiters") == 1)
        if waiting is not None:
            async with asyncio.timeout(10):  # Half of the time for which it would wait.
                assert states(await waiting) in ([], STATE)
        await until(lambda: service.metric("caravan_cache_sessions") == 1)
        await until(lambda: service.metric("caravan_cache_reservations") == 0)
        await until(lambda: service.metric("caravan_cache_claims") == 0)
        assert_whole(tmp_path)
        # What has a name by now is known, and the other way round.
        assert len(visible(tmp_path)) == service.metric("caravan_cache_rows")
        await assert_usable(other, tmp_path)


def step_through(engine: KvEngine, service: MortalCache, step: str) -> asyncio.Event:
    """Lets the cache service die when a save of the engine is at a step; the event says that it has."""
    loop = asyncio.get_running_loop()
    died = asyncio.Event()

    async def at(here: str) -> None:
        if here == step and not died.is_set():
            await service.die()
            died.set()

    def at_in_thread(here: str) -> None:
        asyncio.run_coroutine_threadsafe(at(here), loop).result()

    link = engine.store._link
    assert link is not None
    publisher = link.publisher
    publisher._saves = SteppedSaves(publisher._saves, at)
    publisher._roots = [SteppedFiles(root, at_in_thread) for root in publisher._roots]
    return died


@pytest.mark.parametrize("step", STEPS)
async def test_the_cache_service_is_killed(tmp_path: Path, step: str) -> None:
    async with (
        mortal_cache() as service,
        running_engine(service.address, disk(tmp_path, QUOTA), ram_quota_bytes=0) as engine,
    ):
        died = step_through(engine, service, step)
        await engine.save([BLOCK])
        assert died.is_set()
        assert_whole(tmp_path)
        assert await engine.find(PROMPT) == []
        await until(lambda: not engine.store.joined)
        await service.start()
        await engine.joined()
        await until(lambda: service.rows == len(visible(tmp_path)))
        await assert_usable(engine, tmp_path)
