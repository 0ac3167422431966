"""What runs a model of which only the name is told (S1.20, W14). Pure."""

from __future__ import annotations

from typing import Final

from services.coordinator.deployment import Runtime

SCRIPTED: Final = "scripted:"
_PREFIXES: Final = {
    Runtime.OPENAI: ("gpt-3.5", "gpt-4", "gpt-5", "o1-", "o3-", "o4-", "chatgpt-"),
    Runtime.ANTHROPIC: ("claude-", "anthropic/"),
    Runtime.GEMINI: ("gemini-", "google/gemini"),
    Runtime.LITELLM: ("litellm/",),
}
_WHOLE_NAMES: Final = {"o1": Runtime.OPENAI, "o3": Runtime.OPENAI, "o4": Runtime.OPENAI}
"""Too short for prefixes: any name might begin with them."""


def infer_runtime(model: str) -> Runtime:
    """What runs a model where nothing says so: a provider by the names that it gives its models, else llama.cpp.

    A name that only contains that of a family of models, such as "mistral", says nothing of who runs it.
    """
    if model.startswith(SCRIPTED):
        return Runtime.SCRIPTED
    name = model.lower()
    if name.endswith(".gguf"):
        return Runtime.LLAMA_CPP
    if name in _WHOLE_NAMES:
        return _WHOLE_NAMES[name]
    for runtime, prefixes in _PREFIXES.items():
        if name.startswith(prefixes):
            return runtime
    return Runtime.LITELLM if "via-litellm" in name else Runtime.LLAMA_CPP
