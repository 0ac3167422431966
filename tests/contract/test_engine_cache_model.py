"""The KV cache with llama.cpp and the demo model: what is restored is what was computed, to the last bit."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from caravan.core.v1 import chat_pb2
from caravan.engine.v1 import engine_service_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.backend import Batch, StateError
from services.engine.llama import LlamaBackend
from services.engine.llama_loading import open_model
from services.engine.settings import EngineSettings
from services.runtime.settings import load
from tests.support.cache import running_cache
from tests.support.engine import DEMO_MODEL, Answer, EngineClient, running_engine

ROOT = Path(__file__).resolve().parents[2]
STABLE: list[dict[str, Any]] = json.loads((ROOT / "models/stable_prompts.json").read_text())
PLAIN = [case for case in STABLE if not case["tools"]]
ROLES = {
    "system": chat_pb2.ROLE_SYSTEM,
    "user": chat_pb2.ROLE_USER,
    "assistant": chat_pb2.ROLE_ASSISTANT,
}
LONG = "Tell me a story about a dog. " * 90
"""About 700 tokens."""
NOTHING_RESIDENT: dict[str, Any] = {"RESIDENTS": "0"}
# Short prompts are cached as well, so that the prompts with a known answer are.
ALL_CACHED: dict[str, Any] = {"KV_MIN_TOKENS": "8"}


def case_request(
    client: EngineClient, case: dict[str, Any], **fields: object
) -> pb.GenerateRequest:
    """The request of a prompt with a known answer."""
    request = client.request([0], max_tokens=200, **fields)
    request.ClearField("tokens")
    for message in case["messages"]:
        request.chat.messages.add(role=ROLES[message["role"]], content=message["content"])
    return request


def with_scores(
    client: EngineClient, prompt: str | list[int], **fields: object
) -> pb.GenerateRequest:
    """A greedy request whose log probabilities show every change of a logit."""
    request = client.request(prompt, max_tokens=12, ignore_eos=True, **fields)
    request.top_logprobs = 20
    return request


def scores(answer: Answer) -> list[tuple[int, float, tuple[tuple[int, float], ...]]]:
    """Tokens with the log probabilities of themselves and of 20 others: equal only if the logits are."""
    return [
        (e.token_id, e.logprob, tuple((t.token_id, t.logprob) for t in e.top))
        for e in answer.logprobs
    ]


async def test_logits_are_the_same_to_the_last_bit_from_cells_ram_and_disk(tmp_path: Path) -> None:
    """Threads fixed at one, the engine otherwise empty: a warm start repeats the arithmetic of the cold one."""
    async with running_engine(DEMO_MODEL) as client:
        cold = await client.run(with_scores(client, LONG))
        prompt = cold.started[0].prompt_tokens
        assert (cold.hit, prompt > 600) == ("COLD", True)
        resident = await client.run(with_scores(client, LONG))
        assert (resident.hit, resident.cached) == ("RESIDENT", prompt - 1)
        assert scores(resident) == scores(cold)
    async with running_cache() as cache:
        env: dict[str, Any] = {
            "CACHE": cache.address,
            "KV_ROOTS": f"disk:{tmp_path}/kv:64MiB",
            **NOTHING_RESIDENT,
        }
        async with running_engine(DEMO_MODEL, **env) as client:
            await client.until_joined()
            assert scores(await client.run(with_scores(client, LONG))) == scores(cold)
            await client.until_saved()
            ram = await client.run(with_scores(client, LONG))
            assert (ram.hit, ram.cached) == ("EXACT", prompt - 1)
            assert scores(ram) == scores(cold)
        async with running_engine(DEMO_MODEL, **env) as client:
            await client.until_joined()
            disk = await client.run(with_scores(client, LONG))
            assert (disk.hit, disk.cached) == ("EXACT", prompt - 1)
            assert scores(disk) == scores(cold)


async def test_logits_behind_shared_blocks_are_those_of_a_cold_run() -> None:
    """Another prompt with the same first two blocks: what is computed behind them is computed as without them."""
    async with running_engine(DEMO_MODEL) as client:
        tokens = client.tokenize(LONG)
        other = [*tokens[:512], *client.tokenize("What is the capital of France? " * 20)]
        cold = await client.run(with_scores(client, other))
    async with running_engine(DEMO_MODEL, **NOTHING_RESIDENT) as client:
        await client.run(with_scores(client, tokens[:700]))
        await client.until_saved()
        warm = await client.run(with_scores(client, other))
        assert (warm.hit, warm.cached) == ("PARTIAL", 512)
        assert scores(warm) == scores(cold)


async def test_a_prompt_that_goes_on_past_the_block_in_which_another_ended_begins_there() -> None:
    async with running_engine(DEMO_MODEL) as client:
        tokens = client.tokenize(LONG)[:700]
        longer = [*tokens, *client.tokenize("What is the capital of France? " * 20)]
        assert len(tokens) // 256 < len(longer) // 256
        cold = await client.run(with_scores(client, longer))
    async with running_engine(DEMO_MODEL, **NOTHING_RESIDENT) as client:
        await client.run(with_scores(client, tokens))
        await client.until_saved()
        warm = await client.run(with_scores(client, longer))
        assert (warm.hit, warm.cached) == ("PARTIAL", 700)
        assert warm.text == cold.text


@settings(deadline=None, max_examples=8)
@given(st.data())
async def test_known_answers_stay_the_same_in_every_order(data: st.DataObject) -> None:
    """Whatever was asked and saved before, at once or one by one, from cells or from RAM, or past the cache."""
    env: dict[str, Any] = {**ALL_CACHED, "RESIDENTS": data.draw(st.sampled_from(["0", "1", "16"]))}
    cases = data.draw(st.lists(st.sampled_from(PLAIN), min_size=8, max_size=16))
    async with running_engine(DEMO_MODEL, **env) as client:
        while cases:
            together = data.draw(st.integers(1, 4))
            now, cases = cases[:together], cases[together:]
            bypass = data.draw(st.booleans())
            # The last of them is asked again at once: both find what the other computes, or saved, or neither.
            asks = [case_request(client, case, bypass=bypass) for case in [*now, now[-1]]]
            answers = await asyncio.gather(*map(client.run, asks))
            for case, answer in zip([*now, now[-1]], answers, strict=True):
                assert answer.text == case["answer"], case["messages"]
            if data.draw(st.booleans()):
                await client.until_saved()


async def test_answers_to_long_prompts_are_the_same_warm_and_cold() -> None:
    """Conversations of several turns, longer than two blocks: each turn from cells, from RAM, and cold."""
    history = [
        message
        for case in PLAIN[:20]
        for message in (
            {"role": "user", "content": case["messages"][-1]["content"]},
            {"role": "assistant", "content": case["answer"]},
        )
    ]
    questions = [case for case in PLAIN[20:30] if len(case["messages"]) == 1]
    turns = [{"messages": [*history, *case["messages"]]} for case in questions]
    texts: list[list[str]] = []
    for env in ({"KV_RAM_BYTES": "0", **NOTHING_RESIDENT}, {}, NOTHING_RESIDENT):
        async with running_engine(DEMO_MODEL, **env) as client:
            answers = []
            for turn in turns:
                answer = await client.run(case_request(client, turn))
                if client.engine.store is not None:
                    await client.until_saved()
                answers.append(answer)
            warm = "KV_RAM_BYTES" not in env
            assert all((answer.cached >= 256) == warm for answer in answers[1:])
            texts.append([answer.text for answer in answers])
    assert texts[0] == texts[1] == texts[2]


async def test_a_crowd_in_few_cells_gives_the_known_answers() -> None:
    """Swapped in and out, with and without room for the state, and each still says what it says alone."""
    stories = [case for case in PLAIN if case["answer"].startswith("Once upon")]
    for swap in ("64MiB", "0"):
        env: dict[str, Any] = {"CELLS": "256", "CONTEXT_TOKENS": "256", "SWAP_BYTES": swap}
        async with running_engine(DEMO_MODEL, **env) as client:
            asks = [case_request(client, case, bypass=True) for case in [*stories, *stories]]
            answers = await asyncio.gather(*map(client.run, asks))
            assert [a.text for a in answers] == [c["answer"] for c in [*stories, *stories]]
            assert client.metric("caravan_kv_swap_outs_total") > 0
            assert client.metric("caravan_kv_refused_states_total") == 0
            assert (await client.until_idle()).free_cells == 256


async def test_a_model_that_seems_to_slide_is_cached_as_whole_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its status says so, and known answers stay what they are: in a crowd, swapped, and from RAM."""
    monkeypatch.setattr(llama_cpp, "llama_model_n_swa", lambda _model: 512)
    stories = [case for case in PLAIN if case["answer"].startswith("Once upon")]
    env: dict[str, Any] = {**ALL_CACHED, "CELLS": "256", "CONTEXT_TOKENS": "256"}
    async with running_engine(DEMO_MODEL, **env) as client:
        status = await client.status()
        assert status.model.cache_support == pb.CACHE_SUPPORT_WHOLE
        assert "sliding window of 512 tokens" in status.model.cache_note
        for hit in ("COLD", "EXACT"):
            answers = await asyncio.gather(
                *(client.run(case_request(client, case)) for case in stories)
            )
            assert [answer.text for answer in answers] == [case["answer"] for case in stories]
            assert all(answer.hit == hit for answer in answers)
        assert client.metric("caravan_kv_swap_outs_total") > 0


@pytest.mark.parametrize(
    ("broken", "support"),
    [("seq_cp", pb.CACHE_SUPPORT_WHOLE), ("set_data", pb.CACHE_SUPPORT_OFF)],
)
async def test_what_does_not_work_in_a_trial_at_loading_is_not_relied_on(
    monkeypatch: pytest.MonkeyPatch, broken: str, support: int
) -> None:
    """State that does not come back cut may come back whole; one that does not come back at all is not cached."""
    if broken == "seq_cp":
        copy = llama_cpp.llama_memory_seq_cp

        def copy_from_the_start(
            memory: Any, source: int, target: int, start: int, end: int
        ) -> None:
            if start == 0:
                copy(memory, source, target, start, end)

        monkeypatch.setattr(llama_cpp, "llama_memory_seq_cp", copy_from_the_start)
    else:
        monkeypatch.setattr(llama_cpp, "llama_state_seq_set_data", lambda *_arguments: 0)
    case = next(case for case in PLAIN if case["answer"].startswith("Once upon"))
    async with running_engine(DEMO_MODEL, **ALL_CACHED) as client:
        status = await client.status()
        assert status.model.cache_support == support
        assert "trial at loading" in status.model.cache_note
        for _ in range(2):
            answer = await client.run(case_request(client, case))
            assert answer.text == case["answer"]
        assert (answer.hit == "COLD") == (support == pb.CACHE_SUPPORT_OFF)


@pytest.fixture
def backend() -> LlamaBackend:
    """The demo model in this thread."""
    model = f"demo={ROOT}/models/caravan-demo.gguf"
    environ = {"CARAVAN_ENGINE_MODEL": model, "CARAVAN_ENGINE_CELLS": "768"}
    return open_model(load(EngineSettings, environ))(lambda _share: None)  # type: ignore[return-value]


def fill(backend: LlamaBackend, slot: int, tokens: list[int], start: int = 0) -> None:
    """Computes tokens of a sequence."""
    count = len(tokens)
    backend.decode(Batch(tokens, list(range(start, start + count)), [slot] * count, [count - 1]))


def test_state_that_is_refused_changes_nothing(backend: LlamaBackend) -> None:
    """Damaged, cut off, of other positions, or without room: StateError, the slot as it was, no cell lost."""
    tokens = list(range(300, 500))
    fill(backend, 0, tokens)
    state = backend.pack(0, 64, 128)
    damaged = memoryview(np.frombuffer(state, np.uint8).copy().data)
    damaged[0] ^= 255
    fill(backend, 1, tokens[:64])
    for bad, start, end, whole_end in [
        (damaged, 64, 128, 128),
        (state[: len(state) // 2], 64, 128, 128),
        (state[:3], 64, 128, 128),
        (state, 64, 120, 127),
        (state, 32, 96, 128),
    ]:
        with pytest.raises(StateError):
            backend.join(1, bad, start, end, whole_end)
        assert backend.held_positions(1) == 64
    backend.join(1, state, 64, 100, 128)
    assert backend.held_positions(1) == 100
    for slot in (2, 3):
        fill(backend, slot, tokens)
    with pytest.raises(StateError):
        backend.join(4, backend.pack(0, 0, 200), 0, 200, 200)
    backend.cut(1, 64)
    assert backend.held_positions(1) == 64
    for slot in range(4):
        backend.clear(slot)
    fill(backend, 5, list(range(300, 700)))
    fill(backend, 6, list(range(300, 668)))
    assert backend.held_positions(6) == 368, "all 768 cells are there"
    backend.close()
