"""What runs a model of which only the name is told."""

from __future__ import annotations

import pytest

from services.coordinator.deployment import Runtime
from services.coordinator.runtime_inference import infer_runtime


@pytest.mark.parametrize(
    ("model", "runtime"),
    [
        ("gpt-4", Runtime.OPENAI),
        ("GPT-4o-mini", Runtime.OPENAI),
        ("gpt-4-turbo", Runtime.OPENAI),
        ("gpt-3.5-turbo", Runtime.OPENAI),
        ("gpt-5", Runtime.OPENAI),
        ("gpt-5.1-mini", Runtime.OPENAI),
        ("chatgpt-4o-latest", Runtime.OPENAI),
        ("o1", Runtime.OPENAI),
        ("O3", Runtime.OPENAI),
        ("o4", Runtime.OPENAI),
        ("o1-mini", Runtime.OPENAI),
        ("o4-mini", Runtime.OPENAI),
        ("claude-sonnet-4", Runtime.ANTHROPIC),
        ("anthropic/claude-opus-4", Runtime.ANTHROPIC),
        ("gemini-2.0-flash", Runtime.GEMINI),
        ("google/gemini-2.5-pro", Runtime.GEMINI),
        ("litellm/anything", Runtime.LITELLM),
        ("mistral-via-litellm", Runtime.LITELLM),
        ("scripted:?tokens=3", Runtime.SCRIPTED),
        ("/models/gpt-4-at-home.gguf", Runtime.LLAMA_CPP),
        ("gpt-4-at-home.GGUF", Runtime.LLAMA_CPP),
        ("o10", Runtime.LLAMA_CPP),
        ("o1x", Runtime.LLAMA_CPP),
        ("mistral-large", Runtime.LLAMA_CPP),
        ("/models/gemini-like", Runtime.LLAMA_CPP),
        ("claudette", Runtime.LLAMA_CPP),
        ("", Runtime.LLAMA_CPP),
    ],
)
def test_names(model: str, runtime: Runtime) -> None:
    """Providers by the beginning of their names or the whole of short ones; all else is a path."""
    assert infer_runtime(model) is runtime
