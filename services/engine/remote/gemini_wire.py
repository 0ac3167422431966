"""Requests to the Gemini API: streamGenerateContent. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote

import msgspec
from caravan.core.v1 import chat_pb2
from caravan.engine.v1 import engine_service_pb2 as pb

from services.engine.remote import gemini_errors
from services.engine.remote.explanation import retry_after_s
from services.engine.remote.failure import ProviderError
from services.engine.remote.gemini_answer import GeminiReader
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
    check_stop_count,
    invalid,
    refuse_logit_bias,
    sampling_numbers,
    split_system,
    unsupported,
)
from services.engine.remote.wire import PLAIN, WireRequest
from services.runtime.clock import Clock, IdSource

_GEMINI: Final = Provider.GEMINI
_STOPS_MAX: Final = 5
_SEED_BITS: Final = 32
_NUMBERS: Final = {
    "temperature": "temperature",
    "top_p": "topP",
    "top_k": "topK",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
}
_MODES: Final = {
    chat_pb2.ToolChoice.MODE_AUTO: "AUTO",
    chat_pb2.ToolChoice.MODE_REQUIRED: "ANY",
    chat_pb2.ToolChoice.MODE_NAMED: "ANY",
}
# Models from Gemini 3 on refuse calls in the history without the signature of the thoughts that led to them. The contract of
# engines has no place for it, so the API is told, in its own words, that it is not there.
_NO_SIGNATURE: Final = "skip_thought_signature_validator"
_UNSIGNED_MODELS: Final = re.compile(r"gemini-[12][.-]")


class GeminiWire:
    """The wire of Gemini."""

    def __init__(self, redact: Callable[[str], str], clock: Clock, ids: IdSource) -> None:
        self._redact = redact
        self._clock = clock
        self._ids = ids

    def request(
        self, generate: pb.GenerateRequest, model: str, *, plain: bool = False
    ) -> WireRequest:
        """See Wire. `cache` has no effect: the provider caches on its own."""
        check_request(generate, _GEMINI)
        if generate.WhichOneof("prompt") != "chat":
            raise unsupported(_GEMINI, "prompt", "answers chats only.")
        name = provider_model(_GEMINI, model)
        system, messages = split_system(generate.chat, _GEMINI)
        signed = _UNSIGNED_MODELS.match(name) is None
        body: dict[str, Any] = {"contents": _Contents(signed).of(messages)}
        if system:
            body["systemInstruction"] = {"parts": [{"text": system}]}
        _add_tools(generate.chat, body)
        config = _generation_config(generate)
        if config:
            body["generationConfig"] = config
        method = "generateContent" if plain else "streamGenerateContent?alt=sse"
        path = f"models/{quote(name, safe='')}:{method}"
        return WireRequest(path, msgspec.json.encode(body), PLAIN if plain else {})

    def credential_headers(self, secret: str) -> Mapping[str, str]:
        """See Wire. Not in the URL, which ends up in logs."""
        return {"x-goog-api-key": secret}

    def reader(self) -> GeminiReader:
        """See Wire."""
        return GeminiReader(self._redact, self._ids)

    def error(self, status: int, headers: Mapping[str, str], body: bytes) -> ProviderError:
        """See Wire."""
        retry_s = retry_after_s(headers, self._clock.wall())
        return gemini_errors.error_of_response(status, body, retry_s, self._redact)


def _generation_config(generate: pb.GenerateRequest) -> dict[str, Any]:
    config: dict[str, Any] = dict(sampling_numbers(generate.sampling, _NUMBERS, _GEMINI))
    refuse_logit_bias(generate.sampling, _GEMINI)
    if generate.stop.ignore_eos:
        raise unsupported(_GEMINI, "stop.ignore_eos", "has no ignore_eos.")
    seed = asked_seed(generate, _GEMINI, _SEED_BITS)
    if seed is not None:
        config["seed"] = seed
    if generate.stop.HasField("max_tokens"):
        config["maxOutputTokens"] = generate.stop.max_tokens
    if generate.stop.stop:
        check_stop_count(generate, _GEMINI, _STOPS_MAX)
        config["stopSequences"] = list(generate.stop.stop)
    if generate.HasField("top_logprobs"):
        config["responseLogprobs"] = True
        if generate.top_logprobs:
            config["logprobs"] = generate.top_logprobs
    if generate.sampling.HasField("grammar"):
        schema = generate.sampling.grammar.json_schema
        config["responseMimeType"] = "application/json"
        if not is_any_object(schema):
            what = "The grammar's schema"
            config["responseJsonSchema"] = json_object(schema, "sampling.grammar", what)
    return config


def _add_tools(chat: chat_pb2.ChatPrompt, body: dict[str, Any]) -> None:
    mode = chat.tool_choice.mode
    if not chat.tools or mode == chat_pb2.ToolChoice.MODE_NONE:
        return
    declarations = [_tool(tool, index) for index, tool in enumerate(chat.tools)]
    body["tools"] = [{"functionDeclarations": declarations}]
    if mode in _MODES:
        calling: dict[str, Any] = {"mode": _MODES[mode]}
        if mode == chat_pb2.ToolChoice.MODE_NAMED:
            calling["allowedFunctionNames"] = [chat.tool_choice.name]
        body["toolConfig"] = {"functionCallingConfig": calling}


def _tool(tool: chat_pb2.Tool, index: int) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": tool.name}
    if tool.description:
        shown["description"] = tool.description
    parameters = tool_parameters(tool, index)
    if parameters is not None:
        shown["parametersJsonSchema"] = parameters
    return shown


class _Contents:
    """Turns messages into contents. Results go by the name of the function, so calls are remembered by their ids."""

    def __init__(self, signed: bool) -> None:
        self._signed = signed
        self._functions: dict[str, str] = {}

    def of(self, messages: Iterator[tuple[int, chat_pb2.ChatMessage]]) -> list[dict[str, Any]]:
        """One content per turn: results of calls that were made together must come together."""
        contents: list[dict[str, Any]] = []
        for index, message in messages:
            role = "model" if message.role == chat_pb2.ROLE_ASSISTANT else "user"
            parts = list(self._parts(message, f"messages[{index}]"))
            if contents and contents[-1]["role"] == role:
                contents[-1]["parts"] += parts
            else:
                contents.append({"role": role, "parts": parts})
        return contents

    def _parts(self, message: chat_pb2.ChatMessage, at: str) -> Iterator[dict[str, Any]]:
        if message.role == chat_pb2.ROLE_TOOL:
            name = self._functions.get(message.tool_call_id)
            if name is None:
                what = f"No earlier message has a call {message.tool_call_id!r}."
                raise invalid(f"{at}.tool_call_id", what)
            yield {"functionResponse": {"name": name, "response": {"result": message.content}}}
            return
        if message.content:
            yield {"text": message.content}
        for index, part in enumerate(message.parts):
            yield _part(part, f"{at}.parts[{index}]")
        for index, call in enumerate(message.tool_calls):
            self._functions[call.id] = call.name
            arguments = call_arguments(call, f"{at}.tool_calls[{index}]")
            shown: dict[str, Any] = {"functionCall": {"name": call.name, "args": arguments}}
            if self._signed and index == 0:  # Of calls that were made together, the first bears it.
                shown["thoughtSignature"] = _NO_SIGNATURE
            yield shown


def _part(part: chat_pb2.ContentPart, at: str) -> dict[str, Any]:
    if part.WhichOneof("kind") == "text":
        return {"text": part.text}
    image = part.image
    if image.detail > chat_pb2.Image.DETAIL_AUTO:
        raise unsupported(_GEMINI, f"{at}.image.detail", "chooses the detail of images itself.")
    if image.WhichOneof("source") == "url":
        return {"fileData": {"fileUri": image.url}}
    return {"inlineData": {"mimeType": image.media_type, "data": image.data}}
