"""The store against a real cache service and real files: what is saved is found, wherever it is, and nothing else is."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from caravan.cache.v1 import cache_service_pb2 as pb

from services.engine.kv.config import RootConfig
from services.engine.kv.root import RootError
from services.engine.kv.store import SaveReason, Source
from services.runtime.errors import CaravanError
from tests.support.cache import running_cache, until
from tests.support.kv import NAMESPACE, chain_of, prompt_of
from tests.support.kv_engines import covered, disk, running_engine, states

PROMPT = prompt_of(1, 1_000)
BLOCKS = chain_of(PROMPT, prompt_end=1_000)
STATES = [bytes(block.state) for block in BLOCKS]
NO_RAM = 0


def files(folder: Path) -> list[Path]:
    return list(folder.glob("*.kvc"))


async def test_ram_serves_without_a_cache_service() -> None:
    async with running_engine("") as engine:
        await engine.save(BLOCKS)
        found = await engine.find(PROMPT)
        assert covered(found) == 1_000
        assert states(found) == STATES
        assert {block.source for block in found} == {Source.RAM}
        assert found[0].state is BLOCKS[0].state
        assert covered(await engine.find(PROMPT, 2), have=2) == 1_000
        assert await engine.find(prompt_of(2, 1_000)) == []
        assert all(engine.store.holds(block.key) for block in BLOCKS)
        assert engine.store.stats.misses == 1


async def test_what_one_life_saved_the_next_one_finds_on_disk(tmp_path: Path) -> None:
    async with running_cache() as service:
        async with running_engine(service.address, disk(tmp_path)) as engine:
            await engine.save(BLOCKS)
            assert engine.store.stats.saves[SaveReason.COLD] == len(BLOCKS)
        async with running_engine(service.address, disk(tmp_path)) as engine:
            await until(lambda: service.metric("caravan_cache_rows") == len(BLOCKS))
            found = await engine.find(PROMPT)
            assert covered(found) == 1_000
            assert states(found) == STATES
            assert {block.source for block in found} == {Source.DISK}
            again = await engine.find(PROMPT)
            assert {block.source for block in again} == {Source.RAM}
            assert again[0].state is found[0].state
            await until(lambda: service.metric("caravan_cache_claims") == 0)


async def test_ram_file_is_preferred_to_disk(tmp_path: Path) -> None:
    fast = RootConfig(pb.TIER_RAM_FILE, tmp_path / "fast", 1 << 20)
    async with (
        running_cache() as service,
        running_engine(
            service.address, fast, disk(tmp_path / "slow"), ram_quota_bytes=NO_RAM
        ) as engine,
    ):
        await engine.save(BLOCKS)
        assert len(files(tmp_path / "slow")) == len(BLOCKS)
        assert {block.source for block in await engine.find(PROMPT)} == {Source.RAM_FILE}, (
            engine.store.stats
        )


async def test_a_part_of_a_block_is_found_token_exact(tmp_path: Path) -> None:
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path), ram_quota_bytes=NO_RAM) as engine,
    ):
        await engine.save(BLOCKS)
        for common in (769, 900, 999):
            prompt = [*PROMPT[:common], *prompt_of(3, 20)]
            found = await engine.find(prompt[:1_010])
            assert covered(found) == common
            assert (found[-1].end, found[-1].whole_end) == (common, 1_000)
        shorter = await engine.find(PROMPT[:800])
        assert covered(shorter) == 800
        assert covered(await engine.find(PROMPT[:768])) == 768
        assert covered(await engine.find([*PROMPT[:768], *prompt_of(3, 9)])) == 768


async def test_what_ends_within_a_block_is_found_by_a_prompt_that_goes_on_past_it(
    tmp_path: Path,
) -> None:
    longer = [*PROMPT[:1_000], *prompt_of(3, 600)]
    alike = [*PROMPT[:788], *prompt_of(3, 600)]
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path), ram_quota_bytes=NO_RAM) as one,
    ):
        await one.save(BLOCKS)
        assert covered(await one.find(longer)) == 1_000
        # A block is not loaded for the few tokens with which all prompts begin.
        assert covered(await one.find(alike)) == 768
    async with running_engine("") as alone:
        await alone.save(BLOCKS)
        assert covered(await alone.find(longer)) == 1_000
        assert covered(await alone.find(alike)) == 768


async def test_a_prompt_shorter_than_a_block_finds_its_part(tmp_path: Path) -> None:
    prompt = prompt_of(5, 100)
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path), ram_quota_bytes=NO_RAM) as engine,
    ):
        await engine.save(chain_of(prompt))
        assert covered(await engine.find(prompt[:70])) == 70


async def test_tenants_do_not_find_each_other(tmp_path: Path) -> None:
    salted = NAMESPACE.salted(b"tenant")
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path), ram_quota_bytes=NO_RAM) as engine,
    ):
        await engine.save(chain_of(PROMPT, namespace=salted, prompt_end=1_000))
        assert await engine.find(PROMPT) == []
        assert await engine.find(PROMPT, namespace=NAMESPACE.salted(b"other")) == []
        assert covered(await engine.find(PROMPT, namespace=salted)) == 1_000


async def test_engines_of_one_host_share_a_root(tmp_path: Path) -> None:
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path), ram_quota_bytes=NO_RAM) as one,
        running_engine(service.address, disk(tmp_path), engine_id="engine-1") as other,
    ):
        await one.save(BLOCKS)
        found = await other.find(PROMPT)
        assert states(found) == STATES
        assert {block.source for block in found} == {Source.DISK}
        assert one.fetched == []
        # Both save the same at once: each file is written once.
        both = chain_of(prompt_of(9, 2_560))
        await asyncio.gather(one.save(both), other.save(both))
        saved = sum(e.store.stats.saves[SaveReason.COLD] for e in (one, other))
        dropped = sum(e.store.stats.duplicate_dropped for e in (one, other))
        assert saved == len(BLOCKS) + len(both)
        assert dropped == len(both)
        assert covered(await one.find(prompt_of(9, 2_560))) == 2_560


async def test_engines_of_two_hosts_fetch_from_each_other(tmp_path: Path) -> None:
    large = chain_of(PROMPT, state_bytes=2_500_000, prompt_end=1_000)
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path / "a"), ram_quota_bytes=NO_RAM) as one,
        running_engine(service.address, disk(tmp_path / "b"), engine_id="engine-1") as other,
    ):
        await one.save(large)
        found = await other.find(PROMPT)
        assert states(found) == [bytes(block.state) for block in large]
        assert {block.source for block in found} == {Source.REMOTE}
        assert one.fetched == [block.key for block in large]
        assert {block.source for block in await other.find(PROMPT)} == {Source.RAM}


async def test_the_ram_of_another_engine_is_within_reach() -> None:
    async with (
        running_cache() as service,
        running_engine(service.address) as one,
        running_engine(service.address, engine_id="engine-1") as other,
    ):
        await one.save(BLOCKS)
        await until(lambda: service.metric("caravan_cache_rows") == len(BLOCKS))
        found = await other.find(PROMPT)
        assert states(found) == STATES
        assert {block.source for block in found} == {Source.REMOTE}


async def test_a_resident_front_is_not_looked_for(tmp_path: Path) -> None:
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path), ram_quota_bytes=NO_RAM) as engine,
    ):
        await engine.save(BLOCKS[2:])
        assert await engine.find(PROMPT) == []
        found = await engine.find(PROMPT, 2)
        assert covered(found, have=2) == 1_000
        assert states(found) == STATES[2:]
        assert covered(await engine.find(PROMPT, 3), have=3) == 1_000


async def test_what_llama_refuses_is_withdrawn_and_can_be_saved_again(tmp_path: Path) -> None:
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path)) as engine,
    ):
        await engine.save(BLOCKS)
        engine.store.bad(BLOCKS[1].key)
        await until(lambda: service.metric("caravan_cache_rows") == len(BLOCKS) - 1)
        assert not engine.store.holds(BLOCKS[1].key)
        assert covered(await engine.find(PROMPT)) == 256
        await engine.save([BLOCKS[1]])
        assert covered(await engine.find(PROMPT)) == 1_000


async def test_an_eviction_by_the_service_deletes_files_and_ram(tmp_path: Path) -> None:
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path)) as engine,
    ):
        await engine.save(BLOCKS)
        rows = service.state.core.index.rows
        await until(lambda: [len(row.copies) for row in rows.values()] == [2] * len(BLOCKS))
        await service.stub.Evict(pb.EvictRequest(bytes=1 << 40))
        await until(lambda: not files(tmp_path) and not engine.store.ram_bytes)
        await until(lambda: service.metric("caravan_cache_rows") == 0)
        assert await engine.find(PROMPT) == []
        assert not any(engine.store.holds(block.key) for block in BLOCKS)


async def test_a_root_that_is_no_folder_fails_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RootError):
        async with running_engine("", disk(tmp_path / "file")):
            pass
    with pytest.raises(RootError):
        async with running_engine("", disk(tmp_path / "a"), disk(tmp_path / "a")):
            pass


async def test_closing_writes_what_is_queued(tmp_path: Path) -> None:
    async with running_cache() as service:
        async with running_engine(service.address, disk(tmp_path), ram_quota_bytes=NO_RAM) as one:
            for block in BLOCKS:
                assert one.store.save(block)
            assert one.store.queued_bytes > 0
        assert not one.store.save(chain_of(prompt_of(8, 256))[0])
        assert len(files(tmp_path)) == len(BLOCKS)


async def test_blocks_that_are_not_there_are_said_to_be_missing() -> None:
    async with running_engine("") as engine:
        await engine.save(BLOCKS)
        wanted = [bytes(32), BLOCKS[0].key]
        pieces = [piece async for piece in engine.store.serve_blocks(wanted)]
        assert [(piece.key, piece.missing) for piece in pieces[:2]] == [
            (bytes(32), True),
            (BLOCKS[0].key, False),
        ]
        assert [piece.last for piece in pieces[1:]] == [False] * (len(pieces) - 2) + [True]
        for wrong in ([b"short"], [bytes(32)] * 65_537):
            with pytest.raises(CaravanError, match="keys"):
                async for _ in engine.store.serve_blocks(wrong):
                    pass
