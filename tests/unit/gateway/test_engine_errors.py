"""Errors of engines in the words of the API that the client used."""

from __future__ import annotations

import pytest

from services.gateway.engine_errors import in_openai_words, in_typed_words
from services.gateway.requests import Api
from services.runtime.errors import CaravanError


@pytest.mark.parametrize(
    ("theirs", "openai", "typed"),
    [
        ("messages[0].role", "messages[0].role", "prompt.messages[0].role"),
        ("messages[3].parts", "messages[3].content", "prompt.messages[3].parts"),
        ("messages[3].parts[1]", "messages[3].content[1]", "prompt.messages[3].parts[1]"),
        (
            "messages[3].parts[1].image.url",
            "messages[3].content[1].image_url.url",
            "prompt.messages[3].parts[1].image.url",
        ),
        ("tools", "tools", "prompt.tools"),
        ("tools[2].parameters", "tools[2].function.parameters", "prompt.tools[2].parameters_json"),
        ("tool_choice", "tool_choice", "prompt.tool_choice"),
        ("sampling.top_p", "top_p", "sampling.top_p"),
        ("sampling.logit_bias[3]", "logit_bias", "sampling.logit_bias[3]"),
        ("sampling.grammar", "response_format", "sampling.grammar"),
        ("stop.max_tokens", "max_tokens", "stop.max_tokens"),
        ("chat", "messages", "chat"),
        ("cache.session_id", "caravan.session_id", "cache.session_id"),
        ("cache.salt", "caravan.cache_salt", "cache.salt"),
        ("cache.newer", "caravan", "cache.newer"),
        (None, None, None),
    ],
)
def test_param(theirs: str | None, openai: str | None, typed: str | None) -> None:
    """The same field has a name in each API; everything else of the error stays."""
    error = CaravanError("INVALID_VALUE", "No.", param=theirs, retry_after_s=2.0)
    shown = in_openai_words(error, Api.CHAT)
    assert (shown.param, shown.message, shown.retry_after_s) == (openai, "No.", 2.0)
    assert in_typed_words(error, Api.CHAT).param == typed


@pytest.mark.parametrize(("api", "param"), [(Api.CHAT, "messages"), (Api.COMPLETION, "prompt")])
def test_a_prompt_that_is_too_long(api: Api, param: str) -> None:
    """Whatever the engine blames, the client hears of its prompt, with both numbers."""
    error = CaravanError(
        "CONTEXT_LENGTH_EXCEEDED",
        "Long.",
        param="max_tokens",
        prompt_tokens="9",
        context_tokens="8",
    )
    shown = in_openai_words(error, api)
    assert shown.metadata == {"param": param, "prompt_tokens": "9", "context_tokens": "8"}
