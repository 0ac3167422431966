"""Requests of caravan.inference.v1 to internal requests, by the same rules. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from caravan.core.v1 import chat_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from caravan.inference.v1 import inference_service_pb2 as pb

from services.gateway import images, rules
from services.gateway.cache_options import check_cache
from services.gateway.requests import Api, InferenceRequest
from services.gateway.rules import invalid
from services.gateway.scheduling import check_scheduling
from services.runtime.errors import CaravanError

_ROLES: Final = frozenset(chat_pb2.Role.values()) - {chat_pb2.ROLE_UNSPECIFIED}


def from_chat(request: pb.ChatRequest) -> InferenceRequest:
    """The request of Chat. Raises CaravanError."""
    _check_shared(request)
    _check_chat(request.prompt, request.sampling.HasField("grammar"), "prompt")
    generate = engine_pb.GenerateRequest(
        chat=request.prompt, sampling=request.sampling, stop=request.stop, cache=request.cache
    )
    if request.HasField("top_logprobs"):
        generate.top_logprobs = request.top_logprobs
    return InferenceRequest(
        Api.CHAT, request.model, generate, stream=True, scheduling=request.scheduling
    )


def from_complete(request: pb.CompleteRequest) -> InferenceRequest:
    """The request of Complete. Raises CaravanError."""
    _check_shared(request)
    generate = engine_pb.GenerateRequest(
        sampling=request.sampling, stop=request.stop, cache=request.cache
    )
    _add_text(request, generate)
    if request.HasField("top_logprobs"):
        generate.top_logprobs = request.top_logprobs
    return InferenceRequest(
        Api.COMPLETION, request.model, generate, stream=True, scheduling=request.scheduling
    )


def from_prefill_only(request: pb.PrefillOnlyRequest) -> InferenceRequest:
    """The request of PrefillOnly. Raises CaravanError."""
    rules.check_model_name(request.model)
    check_cache(request.cache, _under("cache"))
    check_scheduling(request.scheduling, _under("scheduling"))
    generate = engine_pb.GenerateRequest(cache=request.cache)
    if request.HasField("chat"):
        _check_chat(request.chat, grammar=False, at="chat")
        generate.chat.CopyFrom(request.chat)
    else:
        _add_text(request, generate)
    return InferenceRequest(Api.PREFILL, request.model, generate, scheduling=request.scheduling)


def _add_text(
    request: pb.CompleteRequest | pb.PrefillOnlyRequest, generate: engine_pb.GenerateRequest
) -> None:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise CaravanError("MISSING_FIELD", "Missing required parameter: 'prompt'.", param="prompt")
    if kind == "text":
        if not request.text:
            raise invalid("text", "it is empty.")
        generate.text = request.text
    else:
        if not request.tokens.ids:
            raise invalid("tokens.ids", "it is empty.")
        generate.tokens.ids.extend(request.tokens.ids)


def _under(prefix: str) -> Callable[[str], str]:
    return lambda name: f"{prefix}.{name}"


def _check_shared(request: pb.ChatRequest | pb.CompleteRequest) -> None:
    rules.check_model_name(request.model)
    rules.check_sampling(request.sampling, _under("sampling"))
    rules.check_stop_conditions(request.stop, _under("stop"))
    check_cache(request.cache, _under("cache"))
    check_scheduling(request.scheduling, _under("scheduling"))
    if request.HasField("top_logprobs"):
        rules.check_range("top_logprobs", request.top_logprobs, "top_logprobs")


def _check_chat(prompt: chat_pb2.ChatPrompt, grammar: bool, at: str) -> None:
    if not prompt.messages:
        raise invalid(f"{at}.messages", "it is empty.")
    for index, message in enumerate(prompt.messages):
        _check_message(message, f"{at}.messages[{index}]")
    rules.check_tool_names(
        [tool.name for tool in prompt.tools],
        lambda index: f"{at}.tools[{index}].name",
        f"{at}.tools",
    )
    for index, tool in enumerate(prompt.tools):
        if tool.parameters_json:
            rules.check_schema(tool.parameters_json, f"{at}.tools[{index}].parameters_json")
    rules.check_tool_choice(prompt, grammar, _under(at))


def _check_message(message: chat_pb2.ChatMessage, at: str) -> None:
    if message.role not in _ROLES:
        raise invalid(f"{at}.role", "it is not known.")
    images.check_parts(message, at)
    if message.tool_calls and message.role != chat_pb2.ROLE_ASSISTANT:
        raise invalid(f"{at}.tool_calls", "only the assistant calls tools.")
    if message.role == chat_pb2.ROLE_TOOL and not message.tool_call_id:
        raise CaravanError(
            "MISSING_FIELD",
            f"Missing required parameter: '{at}.tool_call_id'.",
            param=f"{at}.tool_call_id",
        )
    if message.role != chat_pb2.ROLE_TOOL and message.tool_call_id:
        raise invalid(f"{at}.tool_call_id", "only the result of a tool has it.")
    for index, call in enumerate(message.tool_calls):
        where = f"{at}.tool_calls[{index}]"
        rules.check_function_name(call.name, f"{where}.name")
        rules.check_depth(
            rules.check_json_object(call.arguments_json, f"{where}.arguments_json"),
            f"{where}.arguments_json",
        )
