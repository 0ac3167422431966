"""Shapes of the OpenAI requests. msgspec checks types and unknown fields; openai_request.py checks the rest.

`null` equals absence for optional fields, as in the OpenAI API. Fields that are known and refused, or accepted without effect,
are not here but in openai_fields.py; they are taken out before these shapes are checked.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct


class _Strict(Struct, forbid_unknown_fields=True):
    pass


class TextPart(_Strict, tag_field="type", tag="text"):
    """A piece of text."""

    text: str


class ImageUrl(_Strict):
    """Where an image is, or the image itself, and how closely to look at it."""

    url: str
    detail: str | None = None


class ImagePart(_Strict, tag_field="type", tag="image_url"):
    """An image; the user's only."""

    image_url: ImageUrl


class AudioPart(Struct, tag_field="type", tag="input_audio"):
    """Sound; refused."""


class FilePart(Struct, tag_field="type", tag="file"):
    """A file; refused."""


class RefusalPart(_Strict, tag_field="type", tag="refusal"):
    """Why a model did not answer; the assistant's only."""

    refusal: str


Part = TextPart | ImagePart | AudioPart | FilePart | RefusalPart
Content = str | list[Part]


class FunctionCall(_Strict):
    """The function that a model called."""

    name: str
    arguments: str


class FunctionToolCall(_Strict, tag_field="type", tag="function"):
    """A call of a function, in a message of the assistant."""

    id: str
    function: FunctionCall


class CustomToolCall(Struct, tag_field="type", tag="custom"):
    """A call with free text; refused."""


ToolCall = FunctionToolCall | CustomToolCall


class SystemMessage(_Strict, tag_field="role", tag="system"):
    """Instructions."""

    content: Content
    name: str | None = None


class DeveloperMessage(_Strict, tag_field="role", tag="developer"):
    """Instructions, by their newer name."""

    content: Content
    name: str | None = None


class UserMessage(_Strict, tag_field="role", tag="user"):
    """What the user says."""

    content: Content
    name: str | None = None


class AssistantMessage(_Strict, tag_field="role", tag="assistant"):
    """What the model said. The last three fields are there because clients send answers back as they got them."""

    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None
    audio: Any = None
    function_call: Any = None
    annotations: Any = None


class ToolMessage(_Strict, tag_field="role", tag="tool"):
    """The result of a call."""

    content: Content
    tool_call_id: str


class FunctionMessage(Struct, tag_field="role", tag="function"):
    """The result of a call in the retired form; refused."""


Message = (
    SystemMessage
    | DeveloperMessage
    | UserMessage
    | AssistantMessage
    | ToolMessage
    | FunctionMessage
)


class Function(_Strict):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(_Strict, tag_field="type", tag="function"):
    """A tool that is a function."""

    function: Function


class CustomTool(Struct, tag_field="type", tag="custom"):
    """A tool that takes free text; refused."""


Tool = FunctionTool | CustomTool


class FunctionName(_Strict):
    """The function that must be called."""

    name: str


class NamedChoice(_Strict, tag_field="type", tag="function"):
    """One function must be called."""

    function: FunctionName


class CustomChoice(Struct, tag_field="type", tag="custom"):
    """One custom tool must be called; refused."""


class AllowedChoice(Struct, tag_field="type", tag="allowed_tools"):
    """Some of the tools may be called; refused."""


class TextFormat(_Strict, tag_field="type", tag="text"):
    """Any text."""


class JsonObjectFormat(_Strict, tag_field="type", tag="json_object"):
    """Some JSON object."""


class JsonSchema(_Strict):
    """A schema with its name."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(_Strict, tag_field="type", tag="json_schema"):
    """JSON that follows a schema."""

    json_schema: JsonSchema


class StreamOptions(_Strict):
    """Details of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Caravan(_Strict):
    """Our own extensions."""

    parent_key: str | None = None
    session_id: str | None = None
    cache_salt: str | None = None
    cache: bool | None = None
    priority: str | None = None
    max_wait: float | None = None


class _Shared(_Strict, kw_only=True):
    """Fields of both endpoints."""

    model: str
    cache_salt: str | None = None
    caravan: Caravan | None = None
    frequency_penalty: float | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    repeat_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


class ChatCompletion(_Shared, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[Message]
    logprobs: bool | None = None
    max_completion_tokens: int | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    tool_choice: str | NamedChoice | CustomChoice | AllowedChoice | None = None
    tools: list[Tool] | None = None
    top_logprobs: int | None = None


class Completion(_Shared, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
