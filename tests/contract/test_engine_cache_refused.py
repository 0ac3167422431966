"""Saved state that llama.cpp does not take: its request is answered all the same, and nobody meets it again."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.engine.backend import StateError
from tests.support.engine import EngineClient, running_engine
from tests.support.tiny_models import Kind, write_model

MODEL = "demo=scripted:?tokens=40&context=4096"


def tokens(client: EngineClient, text: str) -> list[int]:
    """A chat of one message, so that the scripted model knows where its answer begins."""
    return client.tokenize(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")


async def test_a_block_that_is_refused_is_withdrawn_also_where_a_part_of_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The request is answered all the same, and the block is not offered again."""
    async with running_engine(MODEL, RESIDENTS="0") as client:
        prompt = tokens(client, "word " * 200)
        first = await client.ask(prompt)
        await client.until_saved()
        assert client.engine.store is not None
        ram, backend = client.engine.store._ram, client.engine._decoder._backend
        join, parts = backend.join, []

        def refuse_parts(
            slot: int, state: memoryview, start: int, end: int, whole_end: int
        ) -> None:
            if end != whole_end:
                parts.append((start, end, whole_end))
                raise StateError("this state is refused")
            join(slot, state, start, end, whole_end)

        monkeypatch.setattr(backend, "join", refuse_parts)
        end = len(prompt) + len(first.tokens) - 1
        (tail,) = [entry.block.key for entry in ram.entries() if entry.block.end == end]
        start = end - end % 256
        # As far as the block before the tail, and a part of the tail.
        other = [*prompt, *first.tokens][: start + 5] + tokens(client, "no")
        answer = await client.ask(other)
        assert parts == [(start, start + 5, end)]
        assert answer.cached == start
        assert client.metric("caravan_kv_refused_states_total") == 1
        assert tail not in ram
        assert answer.tokens == (await client.ask(other, bypass=True)).tokens


async def test_a_whole_state_that_is_refused_is_withdrawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompt starts cold, is saved again, and starts warm after that."""
    model = f"tiny={write_model(Kind.HYBRID, tmp_path)}"
    async with running_engine(model, RESIDENTS="0", CELLS="2048") as client:
        prompt = [position % 251 for position in range(300)]
        first = await client.ask(prompt, max_tokens=8, ignore_eos=True)
        backend = client.engine._decoder._backend

        def refuse(*_arguments: object) -> None:
            raise StateError("this state is refused")

        hits = []
        for broken in (True, False):
            with monkeypatch.context() as patched:
                if broken:
                    patched.setattr(backend, "join", refuse)
                answer = await client.ask(prompt, max_tokens=8, ignore_eos=True)
            hits.append(answer.hit)
            assert answer.tokens == first.tokens
        assert hits == ["COLD", "EXACT"]
        assert client.metric("caravan_kv_refused_states_total") == 1
        assert (await client.until_idle()).free_cells == 2048
