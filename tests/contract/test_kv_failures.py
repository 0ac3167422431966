"""The cache is an optimisation (I7): whatever is down, slow, full, broken or gone costs a bounded time and never a wrong byte."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from services.engine.kv import kvc
from services.engine.kv.config import KvConfig
from services.engine.kv.opening import mount
from services.engine.kv.root import Root, RootError, RootTrouble
from services.engine.kv.store import Source
from services.runtime.clock import random_id
from tests.support.cache import running_cache, until
from tests.support.kv import chain_of, prompt_of
from tests.support.kv_engines import covered, disk, hanging_disk, running_engine
from tests.support.kv_service import MortalCache, mortal_cache, mute_cache

PROMPT = prompt_of(1, 1_000)
BLOCKS = chain_of(PROMPT, state_bytes=20_000)
NO_RAM = 0


def file_of(folder: Path, index: int) -> Path:
    return folder / f"{BLOCKS[index].key.hex()}.kvc"


def block_files(folder: Path) -> list[Path]:
    return list(folder.glob("*.kvc"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# --- the cache service -------------------------------------------------------------------------------------------


async def test_without_the_service_ram_works_and_is_published_when_it_comes(tmp_path: Path) -> None:
    service = MortalCache()
    async with running_engine(service.address, disk(tmp_path), joins=False) as engine:
        for block in BLOCKS:
            assert engine.store.save(block)
        await until(lambda: engine.store.stats.saves_dropped == len(BLOCKS))
        assert covered(await engine.find(PROMPT)) == 1_000
        assert await engine.find(prompt_of(2, 1_000)) == []
        await service.start()
        try:
            await until(lambda: len(block_files(tmp_path)) == len(BLOCKS))
            await until(lambda: service.rows == len(BLOCKS))
        finally:
            await service.die()


async def test_a_slow_service_delays_one_lookup_and_not_the_next() -> None:
    async with (
        mute_cache() as (address, mute),
        running_engine(address, acquire_seconds=0.1) as engine,
    ):
        began = time.monotonic()
        assert await engine.find(PROMPT) == []
        assert 0.09 < time.monotonic() - began < 2
        for _ in range(50):
            assert await engine.find(PROMPT) == []
        assert mute.acquires == 1
        assert engine.store.stats.acquire_failures == 51


async def test_a_service_that_restarts_learns_everything_again(tmp_path: Path) -> None:
    async with (
        mortal_cache() as service,
        running_engine(service.address, disk(tmp_path), ram_quota_bytes=NO_RAM) as engine,
    ):
        await engine.save(BLOCKS)
        assert covered(await engine.find(PROMPT)) == 1_000
        await service.die()
        assert await engine.find(PROMPT) == []
        await until(lambda: not engine.store.joined)
        await service.start()
        await until(lambda: service.rows == len(BLOCKS))
        assert covered(await engine.find(PROMPT)) == 1_000


async def test_a_service_that_forgot_the_session_is_joined_anew(tmp_path: Path) -> None:
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path), ram_quota_bytes=NO_RAM) as engine,
    ):
        await engine.save(BLOCKS)
        # Another engine of the same id replaces the session; this one joins again and replaces it in turn.
        peer = await service.engine("engine-0", [])
        await peer.end()
        await engine.joined()
        await until(lambda: service.metric("caravan_cache_rows") == len(BLOCKS))
        assert covered(await engine.find(PROMPT)) == 1_000


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 30, 700, 15_000])
async def test_a_corrupt_file_cuts_the_chain_and_is_saved_again(tmp_path: Path, at: int) -> None:
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path), ram_quota_bytes=NO_RAM) as engine,
    ):
        await engine.save(BLOCKS)
        flip(file_of(tmp_path, 2), at)
        assert covered(await engine.find(PROMPT)) == 512
        assert engine.store.stats.corrupt_files == 1
        await until(lambda: service.metric("caravan_cache_rows") == len(BLOCKS) - 1)
        assert not file_of(tmp_path, 2).exists()
        assert not engine.store.holds(BLOCKS[2].key)
        await engine.save([BLOCKS[2]])
        assert covered(await engine.find(PROMPT)) == 1_000


async def test_a_corrupt_tail_is_no_part_of_an_answer(tmp_path: Path) -> None:
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path), ram_quota_bytes=NO_RAM) as engine,
    ):
        await engine.save(BLOCKS)
        # The valid file of another conversation under this one's name, parent and place: only the key can tell.
        forged = chain_of([*prompt_of(2, 768), *PROMPT[768:]], state_bytes=20_000)[-1]
        root = Root.open(tmp_path, random_id)
        _forge(root, forged.state, forged.key)
        assert covered(await engine.find([*PROMPT, 1])) == 768
        assert engine.store.stats.corrupt_files == 1


def _forge(root: Root, state: memoryview, key: bytes) -> None:
    path = root.file_of(BLOCKS[3].key)
    meta = root.head(BLOCKS[3].key).meta
    changed = replace(meta, token_bytes=meta.token_bytes[:-4] + key[:4])
    path.write_bytes(kvc.seal(changed, state) + bytes(state))


async def test_a_missing_file_is_forgotten(tmp_path: Path) -> None:
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path), ram_quota_bytes=NO_RAM) as engine,
    ):
        await engine.save(BLOCKS)
        file_of(tmp_path, 1).unlink()
        assert covered(await engine.find(PROMPT)) == 256
        await until(lambda: service.metric("caravan_cache_rows") == len(BLOCKS) - 1)
        await engine.save([BLOCKS[1]])
        assert covered(await engine.find(PROMPT)) == 1_000


async def test_what_is_no_file_is_no_block(tmp_path: Path) -> None:
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path), ram_quota_bytes=NO_RAM) as engine,
    ):
        await engine.save(BLOCKS)
        pipe = file_of(tmp_path, 1)
        pipe.unlink()
        os.mkfifo(pipe)
        assert len(list(Root.open(tmp_path, random_id).scan())) == len(BLOCKS) - 1
        assert covered(await engine.find(PROMPT)) == 256
        assert engine.store.stats.corrupt_files == 1
        await until(lambda: service.metric("caravan_cache_rows") == len(BLOCKS) - 1)
        os.mkfifo(pipe)
        await engine.save([BLOCKS[1]])
        assert covered(await engine.find(PROMPT)) == 1_000


async def test_a_disk_that_hangs_costs_a_bounded_time_once(tmp_path: Path) -> None:
    async with (
        running_cache() as service,
        running_engine(
            service.address, disk(tmp_path), ram_quota_bytes=NO_RAM, stall_seconds=0.2
        ) as engine,
    ):
        await engine.save(BLOCKS)
        with hanging_disk(engine, BLOCKS[2].key):
            began = time.monotonic()
            assert covered(await engine.find(PROMPT)) == 512
            assert 0.19 < time.monotonic() - began < 3
            assert engine.store.stats.read_failures == 1
            assert await engine.find(PROMPT) == []  # The root rests for a while.
            assert engine.store.stats.read_failures == 1
            await until(lambda: service.metric("caravan_cache_claims") == 0)


async def test_a_cancelled_find_gives_its_claim_back(tmp_path: Path) -> None:
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path), ram_quota_bytes=NO_RAM) as engine,
    ):
        await engine.save(BLOCKS)
        with hanging_disk(engine, BLOCKS[0].key):
            finding = asyncio.create_task(engine.find(PROMPT))
            await until(lambda: service.metric("caravan_cache_claims") == 1)
            finding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await finding
            await until(lambda: service.metric("caravan_cache_claims") == 0)


# --- folders that do not take files ------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files end at 8 KiB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_192, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_full_disk_fails_the_save_and_leaves_nothing(
    tmp_path: Path, small_files: None, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried, and complained of, once in a while and not for every block; when there is room again, blocks are saved."""
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path)) as engine,
    ):
        await engine.save(BLOCKS)
        assert engine.store.stats.saves_failed == len(BLOCKS)
        # As many as there are writers.
        assert caplog.text.count("a block is not saved") <= 2
        assert names(tmp_path) == {"root-id"}
        await until(lambda: service.metric("caravan_cache_reservations") == 0)
        assert covered(await engine.find(PROMPT)) == 1_000
        assert {block.source for block in await engine.find(PROMPT)} == {Source.RAM}
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        link = engine.store._link
        assert link is not None
        pauses, (root_id,) = link.publisher._pauses, [one.root_id for one in link.publisher._roots]
        await until(lambda: not pauses.is_paused(root_id, time.monotonic()))
        more = chain_of(prompt_of(2, 512), state_bytes=20_000)
        await engine.save(more)
        assert len(block_files(tmp_path)) == len(more)


@pytest.fixture
def read_only_folder(tmp_path: Path) -> Iterator[Path]:
    """A root that was filled once and cannot be written any more, not even by the superuser."""
    Root.open(tmp_path, random_id)
    tmp_path.chmod(0o555)
    mounted = False
    if os.access(tmp_path, os.W_OK):
        command = ["mount", "--bind", "-o", "ro", str(tmp_path), str(tmp_path)]
        mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
        if not mounted:
            pytest.skip("the superuser may write everywhere, and may not mount here")
    yield tmp_path
    if mounted:
        subprocess.run(["umount", str(tmp_path)], check=True)
    tmp_path.chmod(0o755)


async def test_a_read_only_root_is_read_and_never_written(read_only_folder: Path) -> None:
    async with (
        running_cache() as service,
        running_engine(service.address, disk(read_only_folder)) as engine,
    ):
        await engine.save(BLOCKS)
        assert engine.store.stats.saves_failed == 0
        assert block_files(read_only_folder) == []
        assert covered(await engine.find(PROMPT)) == 1_000
        root = Root.open(read_only_folder, random_id)
        assert not root.writable
        with pytest.raises(RootError) as caught:
            root.write(BLOCKS[0].key, "writer", "save", [b"x"])
        assert caught.value.trouble is RootTrouble.READ_ONLY


def test_a_folder_without_an_id_cannot_be_opened_read_only(read_only_folder: Path) -> None:
    config = KvConfig("engine-0", "127.0.0.1:1", roots=(disk(read_only_folder / "new"),))
    with pytest.raises(RootError) as caught:
        mount(config, random_id)
    assert caught.value.trouble is RootTrouble.READ_ONLY


# --- queues ------------------------------------------------------------------------------------------------------


async def test_a_full_queue_drops_and_says_so(tmp_path: Path) -> None:
    async with (
        running_cache() as service,
        running_engine(
            service.address, disk(tmp_path), ram_quota_bytes=NO_RAM, queue_bytes=50_000
        ) as engine,
    ):
        taken = [engine.store.save(block) for block in BLOCKS]
        assert taken == [True, True, False, False]
        assert engine.store.stats.saves_dropped == 2
        assert [engine.store.holds(block.key) for block in BLOCKS] == taken
        await until(lambda: engine.store.queued_bytes == 0)
        await engine.save(BLOCKS[2:])
        assert covered(await engine.find(PROMPT)) == 1_000


async def test_a_root_beyond_its_quota_keeps_within_it(tmp_path: Path) -> None:
    quota = 70_000
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path, quota), ram_quota_bytes=NO_RAM) as engine,
    ):
        for seed in range(10):
            await engine.save(chain_of(prompt_of(seed, 512), state_bytes=20_000))
            assert sum(path.stat().st_size for path in block_files(tmp_path)) <= quota
        assert service.metric("caravan_cache_rows") == 3
