"""States that cannot be cut, in the store: found by their exact lengths, wherever they are, and never where they do not belong."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from services.engine.kv.store import FoundBlock, SavedBlock, Source
from services.engine.kv.whole_finder import BOUNDARIES_MAX
from tests.support.cache import running_cache, until
from tests.support.kv import NAMESPACE, prompt_of, whole_of
from tests.support.kv_engines import disk, running_engine
from tests.support.kv_service import mute_cache
from tests.support.kv_steps import SteppedFiles

PROMPT = prompt_of(1, 1_000)
NO_RAM = 0


def place(found: list[FoundBlock]) -> tuple[int, Source] | None:
    """How long the state is, and where it was; None for none."""
    if not found:
        return None
    (state,) = found
    assert (state.start, state.whole_end) == (0, state.end)
    return state.end, state.source


def file_of(folder: Path, state: SavedBlock) -> Path:
    return folder / f"{state.key.hex()}.kvc"


async def test_the_longest_state_is_found_in_ram() -> None:
    """At a boundary, at the last token but one, and at any length that RAM has; behind what the cells hold."""
    async with running_engine("", whole_states=True) as engine:
        await engine.save([whole_of(PROMPT, end) for end in (256, 300, 512, 999, 1_000)])
        found = await engine.find(PROMPT)
        assert place(found) == (999, Source.RAM)
        assert found[0].key == whole_of(PROMPT, 999).key
        assert found[0].state == whole_of(PROMPT, 999).state
        for length, end in ((1_001, 1_000), (999, 512), (513, 512), (512, 300), (300, 256)):
            prompt = [*PROMPT, 5][:length]
            assert place(await engine.find(prompt)) == (end, Source.RAM)
        assert await engine.find(PROMPT[:256]) == []
        assert await engine.find(PROMPT[:513], 2) == [], "the cells hold as much"
        assert await engine.find(prompt_of(2, 1_000)) == []
        assert await engine.find([PROMPT[0] + 1, *PROMPT[1:]]) == []


async def test_the_next_life_finds_them_on_disk(tmp_path: Path) -> None:
    """By boundary, by the last token but one, and by the key that the request names; then in RAM."""
    states = [whole_of(PROMPT, end) for end in (256, 600, 999)]
    async with running_cache() as service:
        async with running_engine(service.address, disk(tmp_path), whole_states=True) as engine:
            await engine.save(states)
        async with running_engine(service.address, disk(tmp_path), whole_states=True) as engine:
            await until(lambda: service.metric("caravan_cache_rows") == 3)
            assert place(await engine.find(PROMPT[:700])) == (256, Source.DISK)
            parent_key = states[1].key
            # The key leads to it for its own continuation only.
            for wrong in (PROMPT[:600], PROMPT[:500], prompt_of(2, 700)):
                found = await engine.find(wrong, parent_key=parent_key)
                assert place(found) in {None, (256, Source.RAM)}
            assert place(await engine.find(PROMPT[:700], parent_key=parent_key)) == (
                600,
                Source.DISK,
            )
            assert place(await engine.find(PROMPT[:700])) == (600, Source.RAM)
            assert place(await engine.find(PROMPT)) == (999, Source.DISK)
            await until(lambda: service.metric("caravan_cache_claims") == 0)


async def test_tenants_do_not_find_each_other(tmp_path: Path) -> None:
    """Nor by the key of the other's state."""
    salted = NAMESPACE.salted(b"tenant")
    state = whole_of(PROMPT, 512, namespace=salted)
    async with (
        running_cache() as service,
        running_engine(
            service.address, disk(tmp_path), ram_quota_bytes=NO_RAM, whole_states=True
        ) as engine,
    ):
        await engine.save([state])
        assert await engine.find(PROMPT, parent_key=state.key) == []
        assert place(await engine.find(PROMPT, namespace=salted)) == (512, Source.DISK)


async def test_another_engine_sends_them(tmp_path: Path) -> None:
    """An engine that cannot read the root asks the one that can."""
    async with (
        running_cache() as service,
        running_engine(
            service.address, disk(tmp_path), ram_quota_bytes=NO_RAM, whole_states=True
        ) as one,
        running_engine(service.address, engine_id="engine-1", whole_states=True) as other,
    ):
        state = whole_of(PROMPT, 768, state_bytes=3_000_000)
        await one.save([state])
        found = await other.find(PROMPT)
        assert place(found) == (768, Source.REMOTE)
        assert found[0].state == state.state
        assert one.fetched == [state.key]


@pytest.mark.parametrize("damage", ["flipped", "gone", "another"])
async def test_behind_a_bad_file_the_next_shorter_state_is_used(
    tmp_path: Path, damage: str
) -> None:
    """The bad one is withdrawn, and can be saved again."""
    short, long = whole_of(PROMPT, 256), whole_of(PROMPT, 768)
    async with (
        running_cache() as service,
        running_engine(
            service.address,
            disk(tmp_path),
            ram_quota_bytes=NO_RAM,
            wait_seconds=20,
            whole_states=True,
        ) as engine,
    ):
        await engine.save([short, long])
        path = file_of(tmp_path, long)
        if damage == "gone":
            path.unlink()
        elif damage == "another":
            path.write_bytes(file_of(tmp_path, short).read_bytes())
        else:
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        assert place(await engine.find(PROMPT)) == (256, Source.DISK)
        await until(lambda: service.metric("caravan_cache_rows") == 1)
        await until(lambda: not path.exists())
        await engine.save([long])
        assert place(await engine.find(PROMPT)) == (768, Source.DISK)


async def test_a_refused_state_is_not_offered_again(tmp_path: Path) -> None:
    """Until it is saved anew."""
    short, long = whole_of(PROMPT, 256), whole_of(PROMPT, 768)
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path), whole_states=True) as engine,
    ):
        await engine.save([short, long])
        engine.store.bad(long.key)
        assert place(await engine.find(PROMPT)) == (256, Source.RAM)
        await until(lambda: service.metric("caravan_cache_rows") == 1)
        await engine.save([long])
        assert place(await engine.find(PROMPT)) == (768, Source.RAM)


async def test_a_save_in_flight_of_the_parent_is_waited_for(tmp_path: Path) -> None:
    """Its file is being written when it is asked for."""
    state = whole_of(PROMPT, 600)
    written = threading.Event()

    def hold(step: str) -> None:
        if step == "write:middle":
            assert written.wait(20)

    async with (
        running_cache() as service,
        running_engine(
            service.address, disk(tmp_path), ram_quota_bytes=NO_RAM, whole_states=True
        ) as engine,
    ):
        link = engine.store._link
        assert link is not None
        link.publisher._roots = [SteppedFiles(one, hold) for one in link.publisher._roots]
        assert engine.store.save(state)
        await until(lambda: service.metric("caravan_cache_rows") == 1)
        finding = asyncio.ensure_future(engine.find(PROMPT, parent_key=state.key))
        await until(lambda: engine.store.stats.waits == 1)
        assert not finding.done()
        written.set()
        assert place(await finding) == (600, Source.DISK)


async def test_lookups_are_bounded(tmp_path: Path) -> None:
    """A long prompt of which nothing is there asks a few times; a service that does not answer is asked once."""
    prompt = prompt_of(3, 20_000)
    async with (
        running_cache() as service,
        running_engine(service.address, disk(tmp_path), whole_states=True) as engine,
    ):
        assert await engine.find(prompt, parent_key=b"k" * 32) == []
        asked = service.metric("caravan_cache_acquires_total")
        assert 3 <= asked <= BOUNDARIES_MAX + 2
        await engine.save([whole_of(prompt, 19_999)])
        assert place(await engine.find(prompt)) == (19_999, Source.RAM)
        assert service.metric("caravan_cache_acquires_total") == asked, "RAM has all of it"
    async with (
        mute_cache() as (address, mute),
        running_engine(address, acquire_seconds=0.1, whole_states=True) as engine,
    ):
        assert engine.store.save(whole_of(prompt, 512))
        assert place(await engine.find(prompt)) == (512, Source.RAM)
        assert mute.acquires == 1
        assert engine.store.stats.acquire_failures == 1
