"""The model of random weights loads, tokenizes any text, and never ends by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import prompts

pytest.importorskip("gguf", reason="the package that writes GGUF files comes with `make bench`")

from bench import make_model
from bench.rawloop import RawModel, generate


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RawModel:
    """The tiny shape, loaded."""
    path = make_model.make("tiny", tmp_path_factory.mktemp("models") / "tiny.gguf")
    return RawModel(str(path), threads=1, sequences=4, cells=512)


def test_the_same_seed_makes_the_same_file(tmp_path: Path) -> None:
    """Figures of two machines are about the same weights."""
    first, second = (make_model.make("tiny", tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert first.read_bytes() == second.read_bytes()


def test_any_text_tokenizes(model: RawModel) -> None:
    """Every byte has a token, so no prompt is refused."""
    assert model.tokenize("caravan ünïcode \x01 \U0001f42a")


def test_prompts_are_as_long_as_documented_and_distinct(model: RawModel) -> None:
    """No prompt is a prefix of another beyond the template, and all have the length of a short question."""
    texts = [prompts.chat_prompt(round_, s) for round_ in range(3) for s in range(8)]
    assert len(set(texts)) == len(texts)
    lengths = [len(model.tokenize(prompts.rendered(text))) for text in texts]
    assert 30 < min(lengths) <= max(lengths) < 80


def test_batched_streams_give_what_was_asked(model: RawModel) -> None:
    """Each stream gives exactly its tokens: nothing ends the loop early."""
    tokens = [model.tokenize(prompts.rendered(prompts.chat_prompt(0, s))) for s in range(3)]
    run = generate(model, tokens, 5)
    assert (run.tokens, len(run.step_s)) == (15, 4)
    assert 0 < run.prefill_s < run.wall_s
