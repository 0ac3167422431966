"""Models whose state cannot be cut, tiny and real: what starts from a whole state goes on as what was computed from the start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from caravan.engine.v1 import engine_service_pb2 as pb

from services.engine.engine import Engine
from services.engine.job import Job
from tests.support.cache import running_cache
from tests.support.engine import Answer, EngineClient, running_engine
from tests.support.tiny_models import Kind, write_model

pytestmark = pytest.mark.parametrize("kind", Kind)
NOTHING_RESIDENT: dict[str, Any] = {"RESIDENTS": "0"}
SMALL: dict[str, Any] = {"CONTEXT_TOKENS": "2048", "CELLS": "8192"}
TOLERANCE = 0.01
"""Of log probabilities: other cells change the order of sums, and company in the batch does more so; one wrong token changes
them by far more."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], str]:
    """The setting of a model of a kind."""
    folder = tmp_path_factory.mktemp("models")
    return lambda kind: f"tiny={write_model(kind, folder)}"


def prompt_of(seed: int, length: int) -> list[int]:
    """A prompt of bytes; different seeds differ from the first token on."""
    tokens: list[int] = np.random.default_rng(seed).integers(0, 256, length).tolist()
    return tokens


def asked(client: EngineClient, prompt: list[int], **fields: object) -> pb.GenerateRequest:
    """A greedy request whose log probabilities show a wrong state."""
    request = client.request(prompt, max_tokens=20, ignore_eos=True, **fields)
    request.top_logprobs = 5
    return request


async def answered(client: EngineClient, prompt: list[int], **fields: object) -> Answer:
    """The answer to it, when all that is to be saved is saved."""
    answer = await client.run(asked(client, prompt, **fields))
    if client.engine.store is not None:
        await client.until_saved()
    return answer


def same(one: Answer, other: Answer, tolerance: float = TOLERANCE) -> None:
    """The same tokens for the same reasons, up to a tie that two orders of the same sums break differently."""
    for step, (left, right) in enumerate(zip(one.logprobs, other.logprobs, strict=True)):
        expected = {top.token_id: top.logprob for top in right.top}
        for top in left.top[:-1]:
            # The last of them may be another one.
            assert top.logprob == pytest.approx(expected.get(top.token_id), abs=tolerance), step
        if left.token_id != right.token_id:
            assert right.top[0].logprob - right.top[1].logprob < 2 * tolerance, "no tie"
            return
    assert one.tokens == other.tokens


async def cold(client: EngineClient, prompt: list[int]) -> Answer:
    """The answer past the cache."""
    answer = await answered(client, prompt, bypass=True)
    assert answer.hit == "COLD"
    return answer


async def test_status_says_that_states_are_kept_whole(
    kind: Kind, model: Callable[[Kind], str]
) -> None:
    """And why they are not cut."""
    async with running_engine(model(kind), **SMALL) as client:
        status = await client.status()
        assert status.model.cache_support == pb.CACHE_SUPPORT_WHOLE
        assert "cannot be cut" in status.model.cache_note
        await answered(client, prompt_of(1, 100))
        assert client.engine.store is not None


async def test_a_prompt_is_found_again_in_ram_and_after_a_restart(
    kind: Kind, model: Callable[[Kind], str], tmp_path: Path
) -> None:
    """All of it but its last token; and so is what goes on from its last block boundary in another way."""
    prompt = prompt_of(1, 700)
    other = [*prompt[:512], *prompt_of(2, 200)]
    async with running_cache() as cache:
        env = {
            **SMALL,
            **NOTHING_RESIDENT,
            "CACHE": cache.address,
            "KV_ROOTS": f"disk:{tmp_path}/kv:64MiB",
        }
        async with running_engine(model(kind), **env) as client:
            await client.until_joined()
            expected, expected_other = await cold(client, prompt), await cold(client, other)
            first = await answered(client, prompt)
            assert first.hit == "COLD"
            again = await answered(client, prompt)
            assert (again.hit, again.cached) == ("EXACT", 699)
            branch = await answered(client, other)
            assert (branch.hit, branch.cached) == ("PARTIAL", 512)
            assert client.metric("caravan_kv_blocks_found_total", source="ram") == 2
            for answer in (first, again):
                same(answer, expected)
            same(branch, expected_other)
        async with running_engine(model(kind), **env) as client:
            await client.until_joined()
            longer = [*other, *prompt_of(3, 300)]
            for asked_for, hit, cached in [
                (prompt, "EXACT", 699),
                (other, "EXACT", 711),
                # Its state at this length is in RAM since the line before.
                (longer, "PARTIAL", 711),
            ]:
                answer = await answered(client, asked_for)
                assert (answer.hit, answer.cached) == (hit, cached)
                same(answer, await cold(client, asked_for))
            assert client.metric("caravan_kv_blocks_found_total", source="disk") == 2
            assert client.metric("caravan_kv_refused_states_total") == 0


async def test_the_next_turn_goes_on_where_the_answer_ended(
    kind: Kind, model: Callable[[Kind], str], tmp_path: Path
) -> None:
    """In its cells; from RAM; and from disk, where the finish key leads to it."""
    prompt = prompt_of(4, 300)
    async with running_cache() as cache:
        disk: dict[str, Any] = {
            "CACHE": cache.address,
            "KV_ROOTS": f"disk:{tmp_path}/kv:64MiB",
            **NOTHING_RESIDENT,
        }
        finish_key = b""
        for env, hit in ((dict[str, Any](), "RESIDENT"), (NOTHING_RESIDENT, "PARTIAL"), (disk, "")):
            async with running_engine(model(kind), **SMALL, **env) as client:
                if env is disk:
                    await client.until_joined()
                first = await answered(client, prompt)
                finish_key = first.finished[0].finish_key
                turn = [*prompt, *first.tokens, *prompt_of(5, 90)]
                if not hit:
                    continue
                second = await answered(client, turn)
                assert (second.hit, second.cached) == (hit, len(prompt) + len(first.tokens) - 1)
                same(second, await cold(client, turn))
        async with running_engine(model(kind), **SMALL, **disk) as client:
            await client.until_joined()
            second = await answered(client, turn, parent_key=finish_key)
            assert (second.hit, second.cached) == ("PARTIAL", len(prompt) + len(first.tokens) - 1)
            same(second, await cold(client, turn))


async def test_who_comes_third_with_a_system_message_starts_behind_it(
    kind: Kind, model: Callable[[Kind], str]
) -> None:
    """The second shows where prompts part; questions are longer than a block, so that no state of the first is of use."""
    system = prompt_of(60, 600)
    env: dict[str, Any] = {**SMALL, **NOTHING_RESIDENT}
    async with running_engine(model(kind), **env) as client:
        hits = []
        for seed in range(61, 65):
            prompt = [*system, *prompt_of(seed, 300)]
            answer = await answered(client, prompt)
            hits.append((answer.hit, answer.cached))
            same(answer, await cold(client, prompt))
        assert hits == [("COLD", 0), ("COLD", 0), ("PARTIAL", 512), ("PARTIAL", 512)]
        other_tenant = await answered(client, prompt, salt="other")
        assert other_tenant.hit == "COLD"
        packed = client.metric("caravan_kv_pack_seconds_count", reason="cold")
        # Two of each prompt, that of the other tenant too, and one where the second left the first.
        assert packed == 2 * 5 + 1


async def test_an_answer_goes_on_elsewhere_from_its_state(
    kind: Kind, model: Callable[[Kind], str], tmp_path: Path
) -> None:
    """Another engine restores what the first one held, and computes one token of what it is given."""
    prompt = prompt_of(80, 300)
    async with running_cache() as cache:
        env = {**SMALL, "CACHE": cache.address, "KV_ROOTS": f"disk:{tmp_path}/kv:64MiB"}
        async with running_engine(model(kind), **env) as client:
            await client.until_joined()
            whole = await cold(client, prompt)
            begun = asked(client, prompt)
            begun.stop.max_tokens = 12
            first = await client.run(begun)
            await client.until_saved()
        async with running_engine(model(kind), **env, ID="engine-1") as client:
            await client.until_joined()
            request = asked(client, prompt)
            request.resume.token_ids.extend(first.tokens)
            rest = await client.run(request)
            assert (rest.hit, rest.cached) == ("EXACT", 300)
            assert client.metric("caravan_prompt_tokens_total") == 1
    assert first.tokens == whole.tokens[:12], "seeds without a tie"
    same(rest, Answer(tokens=whole.tokens[12:], logprobs=whole.logprobs[12:]))


async def test_a_prompt_that_differs_never_starts_from_a_wrong_state(
    kind: Kind, model: Callable[[Kind], str]
) -> None:
    """Not from a resident, not from RAM, and not from the state that a wrong finish key names."""
    prompt = prompt_of(6, 600)

    def changed(at: int) -> list[int]:
        return [*prompt[:at], prompt[at] ^ 1, *prompt[at + 1 :]]

    for env in (dict[str, Any](), NOTHING_RESIDENT):
        async with running_engine(model(kind), **SMALL, **env) as client:
            first = await answered(client, prompt)
            key = first.finished[0].finish_key
            longer = [*changed(50), *first.tokens, *prompt_of(7, 50)]
            for wrong in (changed(100), longer, prompt[:550]):
                answer = await answered(client, wrong, parent_key=key)
                # Of the shorter prompt, the state at the boundary is right.
                assert answer.cached == (512 if wrong == prompt[:550] else 0)
                same(answer, await cold(client, wrong))


async def test_a_resident_is_gone_on_from_once_and_only_as_it_is(
    kind: Kind, model: Callable[[Kind], str]
) -> None:
    """Without RAM behind it: the second who wants it, and who wants less of it, start cold."""
    env: dict[str, Any] = {**SMALL, "KV_RAM_BYTES": "0"}
    async with running_engine(model(kind), **env) as client:
        prompt = prompt_of(8, 300)
        first = await answered(client, prompt)
        turns = [[*prompt, *first.tokens, *prompt_of(seed, 40)] for seed in (9, 10)]
        hits = []
        for turn in (prompt, *turns):
            answer = await answered(client, turn)
            hits.append(answer.hit)
            same(answer, await cold(client, turn))
        assert hits == ["COLD", "RESIDENT", "COLD"]


def submit_together(engine: Engine, requests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode thread gets none of the next requests before all of them are prepared."""
    submit, held = engine._decoder.submit, list[Job]()

    def hold(job: Job) -> None:
        held.append(job)
        if len(held) == requests:
            monkeypatch.setattr(engine._decoder, "submit", submit)
            for each in held:
                submit(each)

    monkeypatch.setattr(engine._decoder, "submit", hold)


async def test_many_with_one_prompt_at_once_compute_it_once(
    kind: Kind, model: Callable[[Kind], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait, and go on from a copy of exactly its length; so do those who part from it, from a boundary on."""
    async with running_engine(model(kind), **SMALL, KV_RAM_BYTES="0") as client:
        prompt = prompt_of(70, 600)
        prompts = [prompt] * 5 + [[*prompt[:550], *prompt_of(seed, 40)] for seed in (71, 72)]
        submit_together(client.engine, len(prompts), monkeypatch)
        answers = await asyncio.gather(*(client.run(asked(client, one)) for one in prompts))
        assert sorted(answer.cached for answer in answers) == [0, 512, 512, 599, 599, 599, 599]
        assert client.metric("caravan_prompt_tokens_total") == 600 + 4 + 2 * 78
        for one, answer in zip(prompts, answers, strict=True):
            same(answer, await cold(client, one), tolerance=5 * TOLERANCE)


async def test_a_crowd_in_few_cells_says_what_it_says_alone(
    kind: Kind, model: Callable[[Kind], str]
) -> None:
    """Swapped in and out as whole states, or computed again where these have no room."""
    prompts = [prompt_of(20 + seed, 60 + 11 * seed) for seed in range(6)]
    for swap in ("64MiB", "0"):
        env: dict[str, Any] = {"CELLS": "256", "CONTEXT_TOKENS": "256", "SWAP_BYTES": swap}
        async with running_engine(model(kind), **env) as client:
            asks = [asked(client, prompt) for prompt in prompts]
            for ask in asks:
                ask.stop.max_tokens = 100
            crowd = await asyncio.gather(*map(client.run, asks))
            assert client.metric("caravan_kv_swap_outs_total") > 0
            assert client.metric("caravan_kv_refused_states_total") == 0
            for ask, answer in zip(asks, crowd, strict=True):
                ask.request_id += "-alone"
                ask.cache.bypass = True
                same(answer, await client.run(ask), tolerance=5 * TOLERANCE)
                ask.cache.bypass = False
                warm = await client.run(ask)
                # Shorter prompts are not worth it.
                assert warm.hit == ("EXACT" if warm.started[0].prompt_tokens >= 64 else "COLD")
                same(answer, warm, tolerance=5 * TOLERANCE)
            load = await client.until_idle()
            assert load.free_cells + load.resident_cells == 256


async def test_states_keep_within_their_quotas(
    kind: Kind, model: Callable[[Kind], str], tmp_path: Path
) -> None:
    """More states than RAM and disk hold: the least worth go, and requests do not notice."""
    async with running_cache() as cache:
        env: dict[str, Any] = {
            **SMALL,
            **NOTHING_RESIDENT,
            "CACHE": cache.address,
            "KV_ROOTS": f"disk:{tmp_path}/kv:1MiB",
            "KV_RAM_BYTES": "1MiB",
        }
        async with running_engine(model(kind), **env) as client:
            await client.until_joined()
            for seed in range(30 if kind is Kind.RECURRENT else 6):
                last = prompt_of(40 + seed, 600)
                await answered(client, last)
                files = list((tmp_path / "kv").glob("*.kvc"))
                assert sum(file.stat().st_size for file in files) <= 1 << 20
                assert (await client.status()).load.ram_bytes <= 1 << 20
            assert client.engine.store is not None
            assert client.engine.store.evictions > 0
            again = await answered(client, last)
            assert (again.hit, again.cached) == ("EXACT", 599)


async def test_a_model_whose_state_does_not_come_back_is_served_without_a_cache(
    kind: Kind, model: Callable[[Kind], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial at loading finds out, and status says so."""
    set_data = llama_cpp.llama_state_seq_set_data

    def forgetful(context: Any, data: Any, size: int, slot: int) -> int:
        wrong = np.ctypeslib.as_array(data, (size,)).copy()
        wrong[size // 2 :: 4] ^= 0x10
        read: int = set_data(context, wrong.ctypes.data_as(type(data)), size, slot)
        return read

    monkeypatch.setattr(llama_cpp, "llama_state_seq_set_data", forgetful)
    async with running_engine(model(kind), **SMALL) as client:
        status = await client.status()
        assert status.model.cache_support == pb.CACHE_SUPPORT_OFF
        assert "trial at loading" in status.model.cache_note
        prompt = prompt_of(50, 300)
        answers = [await client.run(asked(client, prompt)) for _ in range(2)]
        assert [answer.hit for answer in answers] == ["COLD", "COLD"]
        assert client.engine.store is None
