"""Which wire a provider speaks. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from services.engine.remote.anthropic_wire import AnthropicWire
from services.engine.remote.gemini_wire import GeminiWire
from services.engine.remote.openai_wire import OpenAiWire
from services.engine.remote.provider import Provider
from services.engine.remote.wire import Wire
from services.runtime.clock import Clock, IdSource

DEFAULT_MAX_TOKENS: Final = 4096


def wire_for(
    provider: Provider,
    *,
    redact: Callable[[str], str],
    clock: Clock,
    ids: IdSource,
    default_max_tokens: int = DEFAULT_MAX_TOKENS,
) -> Wire:
    """The wire of a provider.

    `redact` removes credentials from what the provider wrote; `clock` tells the wall time that HTTP dates are measured against; `ids`
    names tool calls that the provider does not name; `default_max_tokens` limits answers where a request sets no limit and the
    provider wants to be told.
    """
    if provider is Provider.ANTHROPIC:
        return AnthropicWire(redact, clock, ids, default_max_tokens)
    if provider is Provider.GEMINI:
        return GeminiWire(redact, clock, ids)
    return OpenAiWire(provider, redact, clock, ids)
