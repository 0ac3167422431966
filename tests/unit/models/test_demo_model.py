"""The demo model file: what it carries, and answers that are clear-cut enough to compare."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.corpus.tables import COPIED
from models.grading import parsed_calls
from models.llama_runner import LlamaRunner
from models.stable import SMALLEST_MARGIN, answer_both_ways
from models.template import TEMPLATE

MODELS = Path(__file__).resolve().parents[3] / "models"
MODEL = MODELS / "caravan-demo.gguf"
STABLE: list[dict[str, Any]] = json.loads((MODELS / "stable_prompts.json").read_text())


@pytest.fixture(scope="module")
def runner() -> Iterator[LlamaRunner]:
    """The model with one context, for all tests of this file."""
    runner = LlamaRunner(MODEL)
    yield runner
    runner.close()


def test_the_file_is_small() -> None:
    """The model is kept in the repository: at most 8 MB."""
    assert MODEL.stat().st_size <= 8_000_000


def test_the_file_carries_the_template(runner: LlamaRunner) -> None:
    """What servers render is what the model was trained on."""
    assert runner.chat_template() == TEMPLATE


def test_marks_are_single_tokens_and_only_those_of_calls_print(runner: LlamaRunner) -> None:
    """Servers see the marks of calls as text, and never those of turns."""
    for mark in ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>"):
        assert [runner.piece(token) for token in runner.tokenize(mark)] == [mark.encode()]
    for mark in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert [runner.piece(token) for token in runner.tokenize(mark)] == [b""]


@pytest.mark.parametrize("text", ["Hello!", "naïve café 東京 🙂", "a\r\nb\n\n c\t1234 x_y", "  "])
def test_any_text_survives_the_tokenizer(runner: LlamaRunner, text: str) -> None:
    """The tokenizer knows every byte."""
    assert b"".join(runner.piece(token) for token in runner.tokenize(text)).decode() == text


@pytest.mark.parametrize("form", ["{}", " {}"])
def test_what_is_copied_is_one_token(runner: LlamaRunner, form: str) -> None:
    """A table word and a number up to 99 are copied in one step."""
    for item in (*COPIED, *range(100)):
        assert len(runner.tokenize(form.format(item))) == 1, item


@pytest.mark.parametrize("number", range(len(STABLE)))
def test_stable_prompts_are_answered_exactly(runner: LlamaRunner, number: int) -> None:
    """The answers that other tests compare with are those of the file that is shipped."""
    prompt = STABLE[number]
    answer, agree = answer_both_ways(runner, prompt)
    assert answer.text == prompt["answer"]
    assert agree
    assert answer.stopped
    assert answer.margin > SMALLEST_MARGIN * 0.8


def test_stable_prompts_include_calls() -> None:
    """Tests of tools have answers to compare with: a call, and an answer from its result."""
    calls = [prompt for prompt in STABLE if parsed_calls(prompt["answer"])]
    results = [prompt for prompt in STABLE if prompt["messages"][-1]["role"] == "tool"]
    assert calls
    assert results
