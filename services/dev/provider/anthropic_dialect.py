"""The messages of Anthropic. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from services.dev.provider.answers import Answer
from services.dev.provider.asked import (
    Asked,
    AskedError,
    forced,
    list_of,
    object_of,
    text_of,
    tokens_of,
)
from services.dev.provider.dialect import Frames, bearer, data_event
from services.dev.provider.received import Received

_FINISHES: Final = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}
_ERRORS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}
_REASONS: Final = {
    "context_length": (400, "invalid_request_error"),
    "content_filter": (400, "invalid_request_error"),
    "quota": (429, "rate_limit_error"),
    "overloaded": (529, "overloaded_error"),
}
_BLOCKED: Final = "Output blocked by content filtering policy"


class AnthropicDialect:
    """POST .../messages."""

    def serves(self, path: str) -> bool:
        return path.endswith("/messages")

    def key(self, headers: Mapping[str, str], query: Mapping[str, str]) -> str:
        return headers.get("x-api-key") or bearer(headers)

    def asked(self, received: Received, body: Mapping[str, Any]) -> Asked:
        if "anthropic-version" not in received.headers:
            raise AskedError(400, "anthropic-version: header is required")
        if body.get("max_tokens") is None:
            raise AskedError(400, "max_tokens: Field required")
        texts, last_user, images = _messages(body)
        tools = _tools(body.get("tools"))
        return Asked(
            model=text_of(body.get("model"), "model"),
            stream=bool(body.get("stream")),
            last_user=last_user,
            prompt_characters=sum(map(len, texts)),
            images=images,
            max_tokens=tokens_of(body["max_tokens"], "max_tokens"),
            stop=tuple(body.get("stop_sequences") or ()),
            tools=tools,
            forced_tool=forced(_choice(body.get("tool_choice")), tools),
            schema=_schema(body),
        )

    def frames(self, asked: Asked, answer: Answer, number: int) -> Frames:
        # Anthropic tells the tokens of the prompt at the start, and those of the answer at its end.
        message = _message(asked, answer, number)
        message |= {"content": [], "stop_reason": None, "stop_sequence": None}
        message["usage"]["output_tokens"] = 1
        block: dict[str, Any] = {"type": "text", "text": ""}
        deltas = [{"type": "text_delta", "text": piece} for piece in _texts(answer)]
        if answer.call is not None:
            block = {"type": "tool_use", "id": answer.call.id, "name": answer.call.name}
            block["input"] = {}
            deltas = [
                {"type": "input_json_delta", "partial_json": part} for part in answer.call.arguments
            ]
        opening = _event("message_start", message=message)
        opening += _event("content_block_start", index=0, content_block=block)
        opening += _event("ping")
        pieces = tuple(_event("content_block_delta", index=0, delta=delta) for delta in deltas)
        closing = _event("content_block_stop", index=0)
        closing += _event(
            "message_delta",
            delta=_ending(answer),
            usage={"output_tokens": answer.completion_tokens},
        )
        return Frames(opening, pieces, closing, _event("message_stop"))

    def plain(self, asked: Asked, answer: Answer, number: int) -> dict[str, Any]:
        return _message(asked, answer, number)

    def refusal(self, status: int, message: str, reason: str) -> tuple[int, dict[str, Any]]:
        kind = _ERRORS.get(status, "api_error")
        if reason:
            status, kind = _REASONS[reason]
        if reason == "content_filter":
            message = _BLOCKED
        return status, {"type": "error", "error": {"type": kind, "message": message}}

    def error_event(self, body: Mapping[str, Any]) -> bytes:
        return data_event(body, "error")


def _event(kind: str, **values: object) -> bytes:
    return data_event({"type": kind, **values}, kind)


def _texts(answer: Answer) -> tuple[str, ...]:
    return answer.pieces or answer.refusal


def _ending(answer: Answer) -> dict[str, Any]:
    if answer.stop_text:
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop_text}
    reason = "refusal" if answer.refusal else _FINISHES[answer.finish]
    return {"stop_reason": reason, "stop_sequence": None}


def _message(asked: Asked, answer: Answer, number: int) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": "".join(_texts(answer))}]
    if answer.call is not None:
        call = answer.call
        content = [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments_value()}
        ]
    return {
        "id": f"msg_{number}",
        "type": "message",
        "role": "assistant",
        "model": asked.model,
        "content": content,
        **_ending(answer),
        "usage": {
            "input_tokens": answer.prompt_tokens - answer.cached_tokens,
            "cache_read_input_tokens": answer.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": answer.completion_tokens,
        },
    }


def _blocks(content: object, what: str) -> Sequence[Mapping[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [object_of(block, what) for block in list_of(content, what)]


def _text(blocks: Sequence[Mapping[str, Any]]) -> str:
    return "".join(block["text"] for block in blocks if block.get("type") == "text")


def _messages(body: Mapping[str, Any]) -> tuple[list[str], str, int]:
    texts = [_text(_blocks(body.get("system") or [], "system"))]
    last_user = ""
    images = 0
    messages = list_of(body.get("messages"), "messages")
    if not messages:
        raise AskedError(400, "messages: at least one message is required")
    for message in messages:
        role = object_of(message, "a message").get("role")
        if role not in {"user", "assistant"}:
            raise AskedError(400, f"messages: Unexpected role {role!r}")
        blocks = _blocks(message.get("content"), "content")
        texts.append(_text(blocks))
        images += sum(block.get("type") == "image" for block in blocks)
        if role == "user":
            last_user = texts[-1]
    return texts, last_user, images


def _tools(tools: object) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    listed = [object_of(tool, "a tool") for tool in list_of(tools or [], "tools")]
    return tuple(
        (text_of(tool.get("name"), "name"), object_of(tool.get("input_schema"), "input_schema"))
        for tool in listed
    )


def _choice(choice: object) -> str:
    if not isinstance(choice, dict):
        return ""
    if choice.get("type") == "tool":
        return text_of(choice.get("name"), "tool_choice.name")
    return "*" if choice.get("type") == "any" else ""


def _schema(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    wanted = (body.get("output_config") or {}).get("format") or body.get("output_format")
    if wanted is None:
        return None
    return object_of(object_of(wanted, "format").get("schema"), "format.schema")
