"""Requests to the OpenAI API and to those that speak it: chat/completions and completions. Pure."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
from caravan.core.v1 import chat_pb2
from caravan.engine.v1 import engine_service_pb2 as pb

from services.engine.remote import openai_errors
from services.engine.remote.explanation import retry_after_s
from services.engine.remote.failure import ProviderError
from services.engine.remote.json_values import is_any_object, json_object, tool_parameters
from services.engine.remote.openai_answer import OpenAiReader
from services.engine.remote.provider import Provider, provider_model
from services.engine.remote.request_checks import (
    asked_seed,
    check_request,
    check_stop_count,
    logit_bias,
    sampling_numbers,
    unsupported,
)
from services.engine.remote.wire import PLAIN, WireRequest
from services.runtime.clock import Clock, IdSource

_STOPS_MAX: Final = 4
_COMPLETION_LOGPROBS_MAX: Final = 5
_ROLES: Final = {
    chat_pb2.ROLE_SYSTEM: "system",
    chat_pb2.ROLE_USER: "user",
    chat_pb2.ROLE_ASSISTANT: "assistant",
    chat_pb2.ROLE_TOOL: "tool",
}
_DETAILS: Final = {
    chat_pb2.Image.DETAIL_AUTO: "auto",
    chat_pb2.Image.DETAIL_LOW: "low",
    chat_pb2.Image.DETAIL_HIGH: "high",
}
_MODES: Final = {
    chat_pb2.ToolChoice.MODE_AUTO: "auto",
    chat_pb2.ToolChoice.MODE_REQUIRED: "required",
}
_NUMBERS: Final = {
    name: name for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty")
}
# What servers of open models understand besides, under vLLM's names, which LiteLLM and most others took over.
_OPEN_NUMBERS: Final = {
    **_NUMBERS,
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
}


class OpenAiWire:
    """The wire of OpenAI, LiteLLM and compatible servers. The last two may serve open models, and are let do what those can."""

    def __init__(
        self, provider: Provider, redact: Callable[[str], str], clock: Clock, ids: IdSource
    ) -> None:
        self._provider = provider
        self._open = provider is not Provider.OPENAI
        self._redact = redact
        self._clock = clock
        self._ids = ids

    def request(
        self, generate: pb.GenerateRequest, model: str, *, plain: bool = False
    ) -> WireRequest:
        """See Wire. `cache` has no effect: the provider caches on its own."""
        check_request(generate, self._provider)
        body: dict[str, Any] = {
            "model": provider_model(self._provider, model),
            "stream": not plain,
            **sampling_numbers(
                generate.sampling, _OPEN_NUMBERS if self._open else _NUMBERS, self._provider
            ),
        }
        if not plain:
            # Without it no usage is told, and nothing can be charged.
            body["stream_options"] = {"include_usage": True}
        self._add_choice_of_tokens(generate, body)
        headers = PLAIN if plain else {}
        if generate.WhichOneof("prompt") == "chat":
            self._add_chat(generate, body)
            return WireRequest("chat/completions", msgspec.json.encode(body), headers)
        self._add_prompt(generate, body)
        return WireRequest("completions", msgspec.json.encode(body), headers)

    def credential_headers(self, secret: str) -> Mapping[str, str]:
        """See Wire."""
        return {"authorization": f"Bearer {secret}"}

    def reader(self) -> OpenAiReader:
        """See Wire."""
        return OpenAiReader(self._provider, self._redact, self._ids)

    def error(self, status: int, headers: Mapping[str, str], body: bytes) -> ProviderError:
        """See Wire."""
        retry_s = retry_after_s(headers, self._clock.wall())
        return openai_errors.error_of_response(self._provider, status, body, retry_s, self._redact)

    def _add_choice_of_tokens(self, generate: pb.GenerateRequest, body: dict[str, Any]) -> None:
        """Seed, biases and stops: the same for chats and texts."""
        seed = asked_seed(generate, self._provider, 64)
        if seed is not None:
            body["seed"] = seed
        if generate.sampling.logit_bias:
            body["logit_bias"] = logit_bias(generate.sampling)
        if generate.stop.stop:
            if not self._open:
                check_stop_count(generate, self._provider, _STOPS_MAX)
            body["stop"] = list(generate.stop.stop)
        if generate.stop.ignore_eos:
            if not self._open:
                raise unsupported(self._provider, "stop.ignore_eos", "has no ignore_eos.")
            body["ignore_eos"] = True

    def _add_chat(self, generate: pb.GenerateRequest, body: dict[str, Any]) -> None:
        chat = generate.chat
        body["messages"] = [_message(message) for message in chat.messages]
        mode = chat.tool_choice.mode
        if chat.tools and mode != chat_pb2.ToolChoice.MODE_NONE:
            body["tools"] = [_tool(tool, index) for index, tool in enumerate(chat.tools)]
            if mode == chat_pb2.ToolChoice.MODE_NAMED:
                function = {"name": chat.tool_choice.name}
                body["tool_choice"] = {"type": "function", "function": function}
            elif mode in _MODES:
                body["tool_choice"] = _MODES[mode]
        if generate.sampling.HasField("grammar"):
            body["response_format"] = _response_format(generate.sampling.grammar.json_schema)
        if generate.stop.HasField("max_tokens"):
            # OpenAI's newer models refuse the old name; most others know only that.
            name = "max_tokens" if self._open else "max_completion_tokens"
            body[name] = generate.stop.max_tokens
        if generate.HasField("top_logprobs"):
            body["logprobs"] = True
            body["top_logprobs"] = generate.top_logprobs

    def _add_prompt(self, generate: pb.GenerateRequest, body: dict[str, Any]) -> None:
        if generate.WhichOneof("prompt") == "text":
            body["prompt"] = generate.text
        elif self._open:
            body["prompt"] = list(generate.tokens.ids)
        else:
            raise unsupported(self._provider, "prompt", "gets texts, not tokens of a vocabulary.")
        if generate.sampling.HasField("grammar"):
            if not self._open:
                raise unsupported(
                    self._provider, "sampling.grammar", "has grammars for chats only."
                )
            body["response_format"] = _response_format(generate.sampling.grammar.json_schema)
        if generate.stop.HasField("max_tokens"):
            body["max_tokens"] = generate.stop.max_tokens
        if generate.HasField("top_logprobs"):
            if not self._open and generate.top_logprobs > _COMPLETION_LOGPROBS_MAX:
                raise unsupported(
                    self._provider,
                    "top_logprobs",
                    f"tells at most {_COMPLETION_LOGPROBS_MAX} alternatives for texts.",
                )
            body["logprobs"] = generate.top_logprobs


def _message(message: chat_pb2.ChatMessage) -> dict[str, Any]:
    shown: dict[str, Any] = {"role": _ROLES[message.role], "content": message.content}
    if message.parts:
        shown["content"] = [_part(part) for part in message.parts]
    if message.name:
        shown["name"] = message.name
    if message.tool_call_id:
        shown["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        shown["content"] = message.content or None
        shown["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments_json},
            }
            for call in message.tool_calls
        ]
    return shown


def _part(part: chat_pb2.ContentPart) -> dict[str, Any]:
    if part.WhichOneof("kind") == "text":
        return {"type": "text", "text": part.text}
    image = part.image
    url = image.url
    if image.WhichOneof("source") == "data":
        url = f"data:{image.media_type};base64,{base64.b64encode(image.data).decode()}"
    shown = {"url": url}
    if image.detail in _DETAILS:
        shown["detail"] = _DETAILS[image.detail]
    return {"type": "image_url", "image_url": shown}


def _tool(tool: chat_pb2.Tool, index: int) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    parameters = tool_parameters(tool, index)
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


def _response_format(schema: str) -> dict[str, Any]:
    if is_any_object(schema):
        return {"type": "json_object"}
    raw = json_object(schema, "sampling.grammar", "The grammar's schema")
    # Strict: a grammar must be followed; otherwise it is a hint. OpenAI then refuses schemas that it cannot force.
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": raw},
    }
