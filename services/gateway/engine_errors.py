"""Errors of engines with `param` as the client's API names the field. Pure.

An engine names fields as caravan.engine.v1 does: `messages[0].parts[1]`, `prompt`, `tools[0].parameters`, `tool_choice`,
`sampling.temperature`, `stop.max_tokens`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from services.gateway.requests import Api
from services.runtime.errors import CaravanError

_ABOUT_THE_PROMPT: Final = frozenset({"CONTEXT_LENGTH_EXCEEDED", "TEMPLATE_FAILED"})
_OPENAI_CACHE: Final = {
    "cache.parent_key": "caravan.parent_key",
    "cache.session_id": "caravan.session_id",
    "cache.salt": "caravan.cache_salt",
}
_PARTS: Final = re.compile(r"(messages\[\d+\])\.parts\b")
_IMAGE: Final = re.compile(r"(content\[\d+\])\.image\b")
_TOOL_PARAMETERS: Final = re.compile(r"(tools\[\d+\])\.parameters")


def in_openai_words(error: CaravanError, api: Api) -> CaravanError:
    """The same error in the names of the OpenAI API."""
    whole = "messages" if api is Api.CHAT else "prompt"
    return _renamed(error, lambda param: _openai_name(param, whole), whole)


def _openai_name(param: str, whole: str) -> str:
    if param.startswith("cache."):
        return _OPENAI_CACHE.get(param, "caravan")
    if param.startswith("sampling.grammar"):
        return "response_format"
    if param.startswith("sampling.logit_bias"):
        return "logit_bias"
    param = _IMAGE.sub(r"\1.image_url", _PARTS.sub(r"\1.content", param))
    param = _TOOL_PARAMETERS.sub(r"\1.function.parameters", param)
    for prefix in ("sampling.", "stop."):
        param = param.removeprefix(prefix)
    return whole if param in {"chat", "text", "tokens"} else param


def in_typed_words(error: CaravanError, api: Api) -> CaravanError:
    """The same error in the names of caravan.inference.v1."""
    if api is Api.COMPLETION:
        return error
    if api is Api.PREFILL:
        # Its prompt may be a text too: the engine's own word says which it was.
        return _renamed(error, lambda param: _typed_name(param, "chat"), None)
    return _renamed(error, lambda param: _typed_name(param, "prompt"), "prompt.messages")


def _typed_name(param: str, field: str) -> str:
    param = _TOOL_PARAMETERS.sub(r"\1.parameters_json", param)
    ours = param.startswith(("messages", "tools", "tool_choice"))
    return f"{field}.{param}" if ours else param


def _renamed(error: CaravanError, rename: Callable[[str], str], whole: str | None) -> CaravanError:
    """`whole` is the name for the prompt as a whole; None: what the engine blames is renamed like any field."""
    if error.reason in _ABOUT_THE_PROMPT and whole is not None:
        param: str | None = whole
    else:
        param = None if error.param is None else rename(error.param)
    if param is None or param == error.param:
        return error
    return CaravanError(
        error.reason,
        error.message,
        retry_after_s=error.retry_after_s,
        **{**error.metadata, "param": param},
    )
