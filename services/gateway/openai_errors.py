"""Errors of engines in the words of the OpenAI API. Pure."""

from __future__ import annotations

from typing import Final

from services.gateway.requests import Api
from services.runtime.errors import CaravanError

_PROMPT: Final = frozenset({"CONTEXT_LENGTH_EXCEEDED", "TEMPLATE_FAILED"})
_NAMES: Final = {
    "sampling.grammar": "response_format",
    "sampling.grammar.json_schema": "response_format.json_schema.schema",
    "top_logprobs": "top_logprobs",
}


def in_openai_words(error: CaravanError, api: Api) -> CaravanError:
    """The same error, its `param` named as the OpenAI API names the field."""
    param = _param(error, api)
    if param == error.param:
        return error
    metadata = {**error.metadata, "param": param} if param is not None else error.metadata
    return CaravanError(error.reason, error.message, retry_after_s=error.retry_after_s, **metadata)


def _param(error: CaravanError, api: Api) -> str | None:
    whole = "messages" if api is Api.CHAT else "prompt"
    if error.reason in _PROMPT:
        return whole
    param = error.param
    if param is None:
        return None
    if param in _NAMES:
        return _NAMES[param]
    for prefix in ("sampling.", "stop.", "chat."):
        param = param.removeprefix(prefix)
    if param == "tokens" or param.startswith(("tokens.", "text", "chat")):
        return whole
    return param
