"""What the engine reuses, from where, and that nobody can tell: with the scripted backend and the real store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from caravan.core.v1 import generation_pb2 as generation
from caravan.engine.v1 import engine_service_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.engine import Engine
from services.engine.kv.store import FoundBlock
from services.runtime.errors import from_rpc_error
from tests.support.cache import running_cache
from tests.support.engine import Answer, EngineClient, running_engine

MODEL = "demo=scripted:?tokens=40&context=4096"
TEXT = "word " * 200
"""About a thousand tokens of the scripted vocabulary."""
KEEP_NOTHING_RESIDENT: dict[str, Any] = {"RESIDENTS": "0"}


def tokens(client: EngineClient, text: str) -> list[int]:
    """A chat of one message, so that the scripted model knows where its answer begins."""
    return client.tokenize(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")


async def test_the_same_prompt_again_is_found_in_the_cells() -> None:
    """All but the last token, which is computed again; the answer is the same."""
    async with running_engine(MODEL) as client:
        prompt = tokens(client, TEXT)
        cold, warm = await client.ask(prompt), await client.ask(prompt)
        assert (cold.hit, cold.cached) == ("COLD", 0)
        assert (warm.hit, warm.cached) == ("RESIDENT", len(prompt) - 1)
        assert warm.tokens == cold.tokens
        assert cold.finished[0].finish_key == warm.finished[0].finish_key != b""
        load = (await client.status()).load
        assert load.last_hit == generation.CACHE_HIT_RESIDENT
        assert load.last_hit_tokens == len(prompt) - 1
        assert load.resident_cells == len(prompt) + len(cold.tokens) - 1


async def test_the_next_turn_computes_only_what_is_new() -> None:
    """Prompt, answer and a new message: from the cells, and from RAM where nothing stays in them."""
    for env in (dict[str, Any](), KEEP_NOTHING_RESIDENT):
        async with running_engine(MODEL, **env) as client:
            first_prompt = tokens(client, TEXT)
            first = await client.ask(first_prompt)
            if env:
                await client.until_saved()
            turn = [*first_prompt, *first.tokens, *tokens(client, "and then? " * 20)]
            second = await client.ask(turn, parent_key=first.finished[0].finish_key)
            # The last token of an answer was chosen but not computed.
            assert second.cached == len(first_prompt) + len(first.tokens) - 1
            assert second.hit == ("PARTIAL" if env else "RESIDENT")
            # Whole blocks that stand in the cells are not looked for: only the tail is.
            found = client.metric("caravan_kv_blocks_found_total", source="ram")
            assert found == (second.cached // 256 + 1 if env else 1)
            assert second.tokens == (await client.ask(turn, bypass=True)).tokens


async def test_a_prompt_is_exact_from_ram_and_partial_where_it_differs() -> None:
    """Blocks of the common part, and the front of the block in which they differ."""
    async with running_engine(MODEL, **KEEP_NOTHING_RESIDENT) as client:
        prompt = tokens(client, TEXT)
        cold = await client.ask(prompt)
        await client.until_saved()
        exact = await client.ask(prompt)
        assert (exact.hit, exact.cached, exact.tokens) == ("EXACT", len(prompt) - 1, cold.tokens)
        other = [*prompt[:900], *tokens(client, "no")]
        partial = await client.ask(other)
        assert (partial.hit, partial.cached) == ("PARTIAL", 900)
        assert (await client.ask(other, bypass=True)).tokens == partial.tokens
        assert client.metric("caravan_kv_prompts_total", hit="exact") == 1
        assert client.metric("caravan_kv_cached_prompt_tokens_total") == len(prompt) - 1 + 900


async def test_what_bypasses_the_cache_neither_uses_nor_feeds_it() -> None:
    """Nor do prompts that are too short for it."""
    async with running_engine(MODEL, KV_MIN_TOKENS="100") as client:
        prompt = tokens(client, TEXT)
        first = await client.ask(prompt, bypass=True)
        assert first.finished[0].finish_key == b""
        assert (await client.ask(prompt)).hit == "COLD"
        assert (await client.ask(prompt, bypass=True)).hit == "COLD"
        short = tokens(client, "short")
        assert (await client.ask(short)).finished[0].finish_key == b""
        assert (await client.ask(short)).hit == "COLD"


async def test_tenants_see_nothing_of_each_other() -> None:
    """Neither in the cells nor in RAM: a salt has a space of its own."""
    for env in (dict[str, Any](), KEEP_NOTHING_RESIDENT):
        async with running_engine(MODEL, **env) as client:
            prompt = tokens(client, TEXT)
            own = await client.ask(prompt, salt="a")
            await client.until_saved()
            assert (await client.ask(prompt, salt="b")).hit == "COLD"
            assert (await client.ask(prompt)).hit == "COLD"
            again = await client.ask(prompt, salt="a")
            assert again.cached == len(prompt) - 1
            assert again.finished[0].finish_key == own.finished[0].finish_key


async def test_many_with_one_prompt_at_once_compute_it_once() -> None:
    """The others wait for the first and compute their last token; all get their answer."""
    async with running_engine(MODEL) as client:
        prompt = tokens(client, TEXT)
        answers = await asyncio.gather(*(client.ask(prompt) for _ in range(12)))
        assert len({tuple(answer.tokens) for answer in answers}) == 1
        assert sorted(answer.cached for answer in answers) == [0, *[len(prompt) - 1] * 11]
        assert client.metric("caravan_prompt_tokens_total") == len(prompt) + 11


@settings(deadline=None, max_examples=15)
@given(st.data())
async def test_swapping_changes_nothing_but_the_time(data: st.DataObject) -> None:
    """Many answers in few cells, with room for what is swapped out, with little, and with none."""
    swap = data.draw(st.sampled_from(["0", "4KiB", "64KiB"]))
    cells = data.draw(st.sampled_from(["300", "512", "777"]))
    alike = data.draw(st.booleans())
    lengths = data.draw(st.lists(st.integers(1, 200), min_size=4, max_size=10))
    async with running_engine(
        "demo=scripted:?tokens=120&context=300", CELLS=cells, SWAP_BYTES=swap
    ) as client:
        # Some begin alike, some do not.
        texts = [("x" if alike else f"{at}") * length for at, length in enumerate(lengths)]
        prompts = [tokens(client, text) for text in texts]
        asks = (client.ask(prompt, max_tokens=80, ignore_eos=True) for prompt in prompts)
        crowd = await asyncio.gather(*asks)
        assert all(answer.reason == generation.FINISH_REASON_LENGTH for answer in crowd)
        for prompt, answer in zip(prompts, crowd, strict=True):
            alone = await client.ask(prompt, max_tokens=80, ignore_eos=True, bypass=True)
            assert answer.tokens == alone.tokens
        assert client.metric("caravan_kv_refused_states_total") == 0
        load = await client.until_idle()
        assert (load.swapped_sequences, load.free_cells + load.resident_cells) == (0, int(cells))


async def test_a_crowd_in_few_cells_is_swapped() -> None:
    """The test above would prove nothing if nobody were."""
    slow = "demo=scripted:?tokens=120&context=300&step_ms=1"
    async with running_engine(slow, CELLS="300") as client:
        asks = (client.ask(tokens(client, f"{n}" * 100), max_tokens=80) for n in range(4))
        await asyncio.gather(*asks)
        assert client.metric("caravan_kv_swap_outs_total") > 0


async def test_a_session_keeps_its_cells_until_it_ends() -> None:
    """In preference to others; EndSession frees them, once."""
    async with running_engine(MODEL, RESIDENTS="2", KV_RAM_BYTES="0") as client:
        kept = tokens(client, TEXT)
        await client.ask(kept, session_id="talk")
        for word in ("one ", "two ", "three "):
            await client.ask(tokens(client, word * 100))
        assert (await client.ask(kept, session_id="talk")).cached == len(kept) - 1
        before = (await client.until_idle()).resident_cells
        assert (await client.stub.EndSession(pb.EndSessionRequest(session_id="talk"))).found
        assert (await client.status()).load.resident_cells < before
        assert not (await client.stub.EndSession(pb.EndSessionRequest(session_id="talk"))).found
        assert (await client.ask(kept)).hit == "COLD"


async def test_a_session_of_another_salt_is_another_session() -> None:
    """Who knows its id can neither end it nor put something else in its place."""
    async with running_engine(MODEL, RESIDENTS="4", KV_RAM_BYTES="0") as client:
        kept = tokens(client, TEXT)
        await client.ask(kept, session_id="talk", salt="a")
        await client.ask(tokens(client, "another " * 100), session_id="talk", salt="b")
        for salt in ("", "c"):
            request = pb.EndSessionRequest(session_id="talk", salt=salt)
            assert not (await client.stub.EndSession(request)).found
        assert (await client.ask(kept, session_id="talk", salt="a")).cached == len(kept) - 1
        for salt in ("a", "b"):
            request = pb.EndSessionRequest(session_id="talk", salt=salt)
            assert (await client.stub.EndSession(request)).found


async def test_prefill_only_makes_the_next_request_warm() -> None:
    """It computes the prompt and samples nothing; its key is that of the prompt."""
    async with running_engine(MODEL, **KEEP_NOTHING_RESIDENT) as client:
        prompt = tokens(client, TEXT)
        request = pb.PrefillOnlyRequest(request_id="p", tokens=pb.TokenPrompt(ids=prompt))
        done = await client.stub.PrefillOnly(request)
        assert (done.prompt_tokens, done.cached_tokens) == (len(prompt), 0)
        assert done.cache_hit == generation.CACHE_HIT_COLD
        assert len(done.finish_key) == 32
        assert client.metric("caravan_generated_tokens_total") == 0
        await client.until_saved()
        warm = await client.ask(prompt, parent_key=done.finish_key)
        assert (warm.hit, warm.cached) == ("EXACT", len(prompt) - 1)
        again = await client.stub.PrefillOnly(request)
        assert (again.cached_tokens, again.finish_key) == (len(prompt) - 1, done.finish_key)


@pytest.mark.parametrize(
    ("field", "value"),
    [("parent_key", b"short"), ("session_id", "é" * 65), ("salt", "é" * 129)],
)
async def test_wrong_cache_options_are_refused_by_name(field: str, value: object) -> None:
    """Sizes, in bytes; of PrefillOnly and EndSession as well."""
    async with running_engine(MODEL) as client:
        request = client.request("hi", **{field: value})
        error = await client.refusal(request)
        assert (error.reason, error.param) == ("INVALID_VALUE", f"cache.{field}")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.stub.PrefillOnly(
                pb.PrefillOnlyRequest(request_id="p", text="hi", cache=request.cache)
            )
        assert from_rpc_error(raised.value, service="engine").param == f"cache.{field}"
        for session_id in ("", "é" * 65):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await client.stub.EndSession(pb.EndSessionRequest(session_id=session_id))
            assert from_rpc_error(raised.value, service="engine").param == "session_id"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.stub.EndSession(pb.EndSessionRequest(session_id="s", salt="é" * 129))
        assert from_rpc_error(raised.value, service="engine").param == "salt"


class _StalledStore:
    """A lookup that never ends by itself."""

    def __init__(self, engine: Engine) -> None:
        assert engine.store is not None
        self.namespace = engine.store.namespace
        self.searching = asyncio.Event()
        self.left = asyncio.Event()
        engine._store = self  # type: ignore[assignment]

    ram_bytes = 0

    async def find(self, *_args: object, **_options: object) -> Sequence[FoundBlock]:
        """Waits for ever."""
        self.searching.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()
        return []


async def test_a_cancel_during_a_lookup_ends_it_and_leaves_nothing() -> None:
    """Both ways: CancelRequest finishes the stream as cancelled, a client that leaves ends its call (I5)."""
    async with running_engine(MODEL) as client:
        store = _StalledStore(client.engine)
        request = client.request(tokens(client, TEXT))
        running = asyncio.ensure_future(client.run(request))
        await store.searching.wait()
        await client.stub.Cancel(pb.CancelRequest(request_id=request.request_id))
        answer = await running
        assert answer.reason == generation.FINISH_REASON_CANCELLED
        assert store.left.is_set()
        store.searching.clear()
        store.left.clear()
        leaving = asyncio.ensure_future(client.ask(tokens(client, TEXT)))
        await store.searching.wait()
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        async with asyncio.timeout(10):
            await store.left.wait()
        load = await client.until_idle()
        assert load.free_cells == 32 * 4096
        assert not client.engine._jobs
        assert client.engine._finder.searches == 0


async def test_cancelled_answers_are_saved_as_well() -> None:
    """What was computed is of use to the next one (S2.54)."""
    async with running_engine(
        "demo=scripted:?step_ms=5&tokens=4000&context=8000", **KEEP_NOTHING_RESIDENT
    ) as client:
        request = client.request(tokens(client, TEXT))
        running = asyncio.ensure_future(client.run(request))
        await client.until(lambda load: load.phase == pb.ENGINE_PHASE_GENERATING)
        await client.stub.Cancel(pb.CancelRequest(request_id=request.request_id))
        cancelled = await running
        assert len(cancelled.finished[0].finish_key) == 32
        await client.until_saved()
        again = await client.ask(tokens(client, TEXT), max_tokens=3)
        assert again.hit == "EXACT"


async def test_a_long_answer_is_saved_while_it_grows() -> None:
    """A block each time it has computed one, for whoever comes before it ends."""
    async with running_engine("demo=scripted:?step_ms=1&tokens=4000&context=8000") as client:
        running = asyncio.ensure_future(client.ask(tokens(client, TEXT)))
        continued = "caravan_kv_pack_seconds_count", {"reason": "continued"}
        read = client.metrics.registry.get_sample_value
        async with asyncio.timeout(20):
            while not read(*continued):  # noqa: ASYNC110 - of another thread
                await asyncio.sleep(0.005)
        assert (await client.status()).load.active_sequences == 1
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await client.until_saved()


def _disk(path: Path) -> dict[str, Any]:
    return {"KV_ROOTS": f"disk:{path}:64MiB", **KEEP_NOTHING_RESIDENT}


async def _ask_and_save(client: EngineClient, prompt: list[int]) -> Answer:
    answer = await client.ask(prompt)
    await client.until_saved()
    return answer


async def test_a_restarted_engine_is_warm_from_disk(tmp_path: Path) -> None:
    """The second time it reads nothing: what was read stays in RAM."""
    async with running_cache() as cache:
        env: dict[str, Any] = {"CACHE": cache.address, **_disk(tmp_path / "kv")}
        async with running_engine(MODEL, **env) as client:
            await client.until_joined()
            prompt = tokens(client, TEXT)
            cold = await _ask_and_save(client, prompt)
        async with running_engine(MODEL, **env) as client:
            await client.until_joined()
            warm = await client.ask(prompt)
            assert (warm.hit, warm.cached) == ("EXACT", len(prompt) - 1)
            assert warm.tokens == cold.tokens
            assert client.metric("caravan_kv_blocks_found_total", source="disk") == 4
            assert (await client.ask(prompt)).hit == "EXACT"
            assert client.metric("caravan_kv_blocks_found_total", source="ram") == 4


async def test_an_engine_that_stops_saves_what_runs(tmp_path: Path) -> None:
    """Its answers are cut off, not their state: the next start goes on from it."""
    slow = "demo=scripted:?step_ms=5&tokens=4000&context=8000"
    async with running_cache() as cache:
        env: dict[str, Any] = {"CACHE": cache.address, **_disk(tmp_path / "kv")}
        async with running_engine(slow, **env) as client:
            await client.until_joined()
            prompt = tokens(client, TEXT)
            running = asyncio.ensure_future(client.ask(prompt))
            await client.until(lambda load: load.phase == pb.ENGINE_PHASE_GENERATING)
        await asyncio.gather(running, return_exceptions=True)
        async with running_engine(slow, **env) as client:
            await client.until_joined()
            warm = await client.ask(prompt, max_tokens=2)
            assert (warm.hit, warm.cached) == ("EXACT", len(prompt) - 1)


async def test_an_engine_fetches_blocks_from_another(tmp_path: Path) -> None:
    """Two engines without a common folder: the second asks the first, over gRPC."""
    async with (
        running_cache() as cache,
        running_engine(MODEL, CACHE=cache.address, ID="one", **_disk(tmp_path / "one")) as one,
        running_engine(MODEL, CACHE=cache.address, ID="two", **_disk(tmp_path / "two")) as two,
    ):
        await one.until_joined()
        await two.until_joined()
        prompt = tokens(one, TEXT)
        cold = await _ask_and_save(one, prompt)
        warm = await two.ask(prompt, parent_key=cold.finished[0].finish_key)
        assert (warm.hit, warm.tokens) == ("EXACT", cold.tokens)
        assert two.metric("caravan_kv_blocks_found_total", source="remote") == 4


async def test_requests_go_on_without_the_cache_service(tmp_path: Path) -> None:
    """It is gone, and with it nothing but what lies in the roots (I7); RAM and cells serve as before."""
    async with AsyncExitStack() as service:
        cache = await service.enter_async_context(running_cache())
        env: dict[str, Any] = {"CACHE": cache.address, **_disk(tmp_path / "kv")}
        async with running_engine(MODEL, **env) as client:
            await client.until_joined()
            prompt = tokens(client, TEXT)
            cold = await _ask_and_save(client, prompt)
            await service.aclose()
            warm = await client.ask(prompt)
            assert (warm.hit, warm.tokens) == ("EXACT", cold.tokens)
            other = await client.ask(tokens(client, "other " * 200))
            assert other.reason == generation.FINISH_REASON_STOP


async def test_blocks_that_are_not_there_are_said_to_be_missing() -> None:
    """By an engine with a store and by one without."""
    for ram in ("0", "1MiB"):
        async with running_engine(MODEL, KV_RAM_BYTES=ram) as client:
            call = client.stub.FetchBlocks(pb.FetchBlocksRequest(keys=[b"k" * 32]))
            assert [piece.missing async for piece in call] == [True]
