"""The scripted backend: deterministic, resumable, strict about positions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.backend import Batch, DecodeError, ModelError
from services.engine.scripted import Script, ScriptedBackend, ScriptedShape
from services.engine.scripted_vocabulary import MESSAGE_END, ScriptedVocabulary

SHAPE = ScriptedShape(4, 0, 0, 512)


def backend(path: str = "scripted:") -> ScriptedBackend:
    return ScriptedBackend(Script.parse(path), SHAPE, lambda _share: None)


def answer(model: ScriptedBackend, prompt: list[int], count: int, slot: int = 0) -> list[int]:
    model.clear(slot)
    tokens, given_tokens = list(prompt), list[int]()
    held = 0
    while len(given_tokens) < count:
        fresh = range(held, len(tokens))
        model.decode(
            Batch([tokens[i] for i in fresh], list(fresh), [slot] * len(fresh), [len(fresh) - 1])
        )
        held = len(tokens)
        token = int(model.logits()[0].argmax())
        tokens.append(token)
        given_tokens.append(token)
    return given_tokens


def chat(text: str) -> list[int]:
    rendered = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return ScriptedVocabulary(512).tokenize(rendered, parse_special=True)


def test_the_same_prompt_has_the_same_answer_and_another_has_another() -> None:
    """Deterministic per prompt, ending after `tokens` tokens."""
    model = backend("scripted:?tokens=8")
    first = answer(model, chat("hi"), 9)
    assert first == answer(model, chat("hi"), 9, slot=1)
    assert first != answer(model, chat("ho"), 9)
    assert first.index(MESSAGE_END) == 8


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 8))
def test_an_answer_resumed_from_its_own_tokens_goes_on(cut: int) -> None:
    """A chat with a part of its answer continues as it would have."""
    model = backend("scripted:?tokens=8")
    whole = answer(model, chat("hi"), 9)
    assert answer(model, chat("hi") + whole[:cut], 9 - cut) == whole[cut:]


def test_a_position_out_of_order_is_an_error() -> None:
    """A scheduler that skips or repeats a position is found here."""
    model = backend()
    model.decode(Batch([1], [0], [0], []))
    for position in (0, 2):
        with pytest.raises(DecodeError):
            model.decode(Batch([1], [position], [0], []))


def test_the_script_can_fail() -> None:
    """fail_at fails one decode call, load_error the loading."""
    model = backend("scripted:?fail_at=2")
    model.decode(Batch([1], [0], [0], []))
    with pytest.raises(DecodeError):
        model.decode(Batch([1], [1], [0], []))
    model.decode(Batch([1], [1], [0], []))
    with pytest.raises(ModelError, match="gone"):
        backend("scripted:?load_error=gone")


@pytest.mark.parametrize(
    "path", ["scripted:?x=1", "scripted:?tokens=a", "scripted:?tokens=0", "scripted:?vocab=5"]
)
def test_a_wrong_script_is_refused(path: str) -> None:
    """Unknown keys and wrong values are mistakes, not defaults."""
    with pytest.raises(ValueError):
        Script.parse(path)


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_the_vocabulary_is_reversible(text: str) -> None:
    """The bytes of the tokens of a text are the text; those of control tokens, where these are parsed, are none."""
    vocabulary = ScriptedVocabulary(512)
    for special in (False, not any(control in text for control in vocabulary.control_texts)):
        tokens = vocabulary.tokenize(text, parse_special=special)
        assert b"".join(map(vocabulary.token_bytes, tokens)).decode() == text
