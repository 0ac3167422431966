"""Requests to the Anthropic API: messages. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import msgspec
from caravan.core.v1 import chat_pb2
from caravan.engine.v1 import engine_service_pb2 as pb

from services.engine.remote import anthropic_errors
from services.engine.remote.anthropic_answer import AnthropicReader
from services.engine.remote.explanation import retry_after_s
from services.engine.remote.failure import ProviderError
from services.engine.remote.json_values import (
    call_arguments,
    is_any_object,
    json_object,
    tool_parameters,
)
from services.engine.remote.provider import Provider, provider_model
from services.engine.remote.request_checks import (
    asked_seed,
    check_request,
    refuse_logit_bias,
    sampling_numbers,
    split_system,
    unsupported,
)
from services.engine.remote.wire import PLAIN, WireRequest
from services.runtime.clock import Clock, IdSource

VERSION: Final = "2023-06-01"
"""Of the API; the newest there is."""
_ANTHROPIC: Final = Provider.ANTHROPIC
_NUMBERS: Final = {name: name for name in ("temperature", "top_p", "top_k")}
_NO_PARAMETERS: Final = msgspec.Raw(b'{"type":"object","properties":{}}')
_MODES: Final = {
    chat_pb2.ToolChoice.MODE_NONE: "none",
    chat_pb2.ToolChoice.MODE_AUTO: "auto",
    chat_pb2.ToolChoice.MODE_REQUIRED: "any",
    chat_pb2.ToolChoice.MODE_NAMED: "tool",
}


class AnthropicWire:
    """The wire of Anthropic. `default_max_tokens` limits answers whose request sets no limit: the API must be told one."""

    def __init__(
        self,
        redact: Callable[[str], str],
        clock: Clock,
        ids: IdSource,
        default_max_tokens: int,
    ) -> None:
        self._redact = redact
        self._clock = clock
        self._ids = ids
        self._default_max_tokens = default_max_tokens

    def request(
        self, generate: pb.GenerateRequest, model: str, *, plain: bool = False
    ) -> WireRequest:
        """See Wire. `cache` has no effect: the provider caches on its own."""
        check_request(generate, _ANTHROPIC)
        _check_possible(generate)
        system, messages = split_system(generate.chat, _ANTHROPIC)
        numbers = sampling_numbers(generate.sampling, _NUMBERS, _ANTHROPIC)
        if numbers.get("temperature", 0) > 1:
            raise unsupported(
                _ANTHROPIC, "sampling.temperature", "takes temperatures of at most 1."
            )
        body: dict[str, Any] = {
            "model": provider_model(_ANTHROPIC, model),
            "max_tokens": generate.stop.max_tokens or self._default_max_tokens,
            "messages": _merged(messages),
            "stream": not plain,
            **numbers,
        }
        if system:
            body["system"] = system
        if generate.stop.stop:
            body["stop_sequences"] = list(generate.stop.stop)
        _add_tools(generate.chat, body)
        if generate.sampling.HasField("grammar"):
            body["output_config"] = {"format": _format(generate.sampling.grammar.json_schema)}
        headers = {"anthropic-version": VERSION, **(PLAIN if plain else {})}
        return WireRequest("messages", msgspec.json.encode(body), headers)

    def credential_headers(self, secret: str) -> Mapping[str, str]:
        """See Wire."""
        return {"x-api-key": secret}

    def reader(self) -> AnthropicReader:
        """See Wire."""
        return AnthropicReader(self._redact, self._ids)

    def error(self, status: int, headers: Mapping[str, str], body: bytes) -> ProviderError:
        """See Wire."""
        retry_s = retry_after_s(headers, self._clock.wall())
        return anthropic_errors.error_of_response(status, body, retry_s, self._redact)


def _check_possible(generate: pb.GenerateRequest) -> None:
    """Raises UNSUPPORTED_FIELD for what the API does not have."""
    if generate.WhichOneof("prompt") != "chat":
        raise unsupported(_ANTHROPIC, "prompt", "answers chats only.")
    if generate.HasField("top_logprobs"):
        raise unsupported(_ANTHROPIC, "top_logprobs", "tells no log probabilities.")
    if generate.stop.ignore_eos:
        raise unsupported(_ANTHROPIC, "stop.ignore_eos", "has no ignore_eos.")
    if asked_seed(generate, _ANTHROPIC, 64) is not None:
        raise unsupported(_ANTHROPIC, "sampling.seed", "takes no seed.")
    refuse_logit_bias(generate.sampling, _ANTHROPIC)


def _add_tools(chat: chat_pb2.ChatPrompt, body: dict[str, Any]) -> None:
    """Tools are sent with the choice of none too: the API wants them where earlier messages call them."""
    if not chat.tools:
        return
    body["tools"] = [_tool(tool, index) for index, tool in enumerate(chat.tools)]
    mode = chat.tool_choice.mode
    if mode in _MODES:
        body["tool_choice"] = {"type": _MODES[mode]}
    if mode == chat_pb2.ToolChoice.MODE_NAMED:
        body["tool_choice"]["name"] = chat.tool_choice.name


def _tool(tool: chat_pb2.Tool, index: int) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": tool.name}
    if tool.description:
        shown["description"] = tool.description
    parameters = tool_parameters(tool, index)
    shown["input_schema"] = _NO_PARAMETERS if parameters is None else parameters
    return shown


def _format(schema: str) -> dict[str, Any]:
    if is_any_object(schema):
        raise unsupported(_ANTHROPIC, "sampling.grammar", "forces JSON with a schema only.")
    raw = json_object(schema, "sampling.grammar", "The grammar's schema")
    return {"type": "json_schema", "schema": raw}


def _merged(messages: Iterator[tuple[int, chat_pb2.ChatMessage]]) -> list[dict[str, Any]]:
    """One message per turn: results of calls that were made together must come together, and in the user's name."""
    merged: list[dict[str, Any]] = []
    for index, message in messages:
        role = "assistant" if message.role == chat_pb2.ROLE_ASSISTANT else "user"
        blocks = list(_blocks(message, f"messages[{index}]"))
        if merged and merged[-1]["role"] == role:
            merged[-1]["content"] += blocks
        else:
            merged.append({"role": role, "content": blocks})
    return merged


def _blocks(message: chat_pb2.ChatMessage, at: str) -> Iterator[dict[str, Any]]:
    if message.role == chat_pb2.ROLE_TOOL:
        yield {
            "type": "tool_result",
            "tool_use_id": message.tool_call_id,
            "content": message.content,
        }
        return
    if message.content:
        yield {"type": "text", "text": message.content}
    for index, part in enumerate(message.parts):
        yield _part(part, f"{at}.parts[{index}]")
    for index, call in enumerate(message.tool_calls):
        yield {
            "type": "tool_use",
            "id": call.id,
            "name": call.name,
            "input": call_arguments(call, f"{at}.tool_calls[{index}]"),
        }


def _part(part: chat_pb2.ContentPart, at: str) -> dict[str, Any]:
    if part.WhichOneof("kind") == "text":
        return {"type": "text", "text": part.text}
    image = part.image
    if image.detail > chat_pb2.Image.DETAIL_AUTO:
        raise unsupported(_ANTHROPIC, f"{at}.image.detail", "chooses the detail of images itself.")
    if image.WhichOneof("source") == "url":
        return {"type": "image", "source": {"type": "url", "url": image.url}}
    source = {"type": "base64", "media_type": image.media_type, "data": image.data}
    return {"type": "image", "source": source}
