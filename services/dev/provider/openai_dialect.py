"""The chat completions of OpenAI, which LiteLLM and many others speak too. Pure."""

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
from services.dev.provider.dialect import Frames, bearer, compact, data_event
from services.dev.provider.received import Received

CREATED: Final = 1_700_000_000
_ERRORS: Final = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("invalid_request_error", "unsupported_country_region_territory"),
    404: ("invalid_request_error", "model_not_found"),
    429: ("requests", "rate_limit_exceeded"),
}
_REASONS: Final = {
    "context_length": (400, "invalid_request_error", "context_length_exceeded"),
    "content_filter": (400, "content_filter", "content_filter"),
    "quota": (429, "insufficient_quota", "insufficient_quota"),
    "overloaded": (503, "server_error", "overloaded"),
}


class OpenAIDialect:
    """POST .../chat/completions."""

    def serves(self, path: str) -> bool:
        return path.endswith("/chat/completions")

    def key(self, headers: Mapping[str, str], query: Mapping[str, str]) -> str:
        return bearer(headers)

    def asked(self, received: Received, body: Mapping[str, Any]) -> Asked:
        if body.get("n", 1) not in {1, None}:
            raise AskedError(400, "the scripted provider gives one choice only")
        texts, last_user, images = _messages(body)
        tools = _tools(body.get("tools"))
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        stops = body.get("stop") or []
        options = body.get("stream_options") or {}
        return Asked(
            model=text_of(body.get("model"), "model"),
            stream=bool(body.get("stream")),
            last_user=last_user,
            prompt_characters=sum(map(len, texts)),
            images=images,
            max_tokens=tokens_of(limit, "max_tokens"),
            stop=(stops,) if isinstance(stops, str) else tuple(stops),
            tools=tools,
            forced_tool=forced(_choice(body.get("tool_choice")), tools),
            schema=_schema(body.get("response_format")),
            include_usage=bool(options.get("include_usage")),
            top_logprobs=int(body.get("top_logprobs") or 0) if body.get("logprobs") else None,
        )

    def frames(self, asked: Asked, answer: Answer, number: int) -> Frames:
        head = _head(asked, number, "chat.completion.chunk")
        # The part that is the same for all pieces is encoded once: this is the other side of benches.
        before = b"data: " + compact(head)[:-1]
        before += b',"choices":[{"index":0,"delta":{"content":'
        after = b'},"finish_reason":null}]}\n\n'

        def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            return data_event({**head, "choices": [choice]})

        pieces = [b"".join((before, compact(piece), after)) for piece in answer.pieces]
        if asked.top_logprobs is not None:
            pieces = [
                data_event({**head, "choices": [_choice_with_logprobs(piece, asked.top_logprobs)]})
                for piece in answer.pieces
            ]
        pieces += [event({"refusal": piece}) for piece in answer.refusal]
        if answer.call is not None:
            function = {"name": answer.call.name, "arguments": ""}
            call = {"index": 0, "id": answer.call.id, "type": "function", "function": function}
            pieces.append(event({"tool_calls": [call]}))
            pieces += [
                event({"tool_calls": [{"index": 0, "function": {"arguments": part}}]})
                for part in answer.call.arguments
            ]
        closing = event({}, answer.finish)
        if asked.include_usage:
            closing += data_event({**head, "choices": [], "usage": _usage(answer)})
        opening = event({"role": "assistant", "content": None if answer.call else ""})
        return Frames(opening, tuple(pieces), closing, b"data: [DONE]\n\n")

    def plain(self, asked: Asked, answer: Answer, number: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(answer.pieces) or None}
        message["refusal"] = "".join(answer.refusal) or None
        if answer.call is not None:
            function = {"name": answer.call.name, "arguments": "".join(answer.call.arguments)}
            message["tool_calls"] = [
                {"id": answer.call.id, "type": "function", "function": function}
            ]
        choice = {"index": 0, "message": message, "finish_reason": answer.finish}
        if asked.top_logprobs is not None:
            content = [_logprob(piece, asked.top_logprobs) for piece in answer.pieces]
            choice["logprobs"] = {"content": content, "refusal": None}
        head = _head(asked, number, "chat.completion")
        return {**head, "choices": [choice], "usage": _usage(answer)}

    def refusal(self, status: int, message: str, reason: str) -> tuple[int, dict[str, Any]]:
        kind, code = _ERRORS.get(status, ("server_error", None))
        if reason:
            status, kind, code = _REASONS[reason]
        error = {"message": message, "type": kind, "param": None, "code": code}
        return status, {"error": error}

    def error_event(self, body: Mapping[str, Any]) -> bytes:
        return data_event(body)


def _head(asked: Asked, number: int, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{number}",
        "object": kind,
        "created": CREATED,
        "model": asked.model,
    }


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


def _messages(body: Mapping[str, Any]) -> tuple[list[str], str, int]:
    texts: list[str] = []
    last_user = ""
    images = 0
    messages = list_of(body.get("messages"), "messages")
    if not messages:
        raise AskedError(400, "messages must not be empty")
    for message in messages:
        content = object_of(message, "a message").get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [object_of(part, "a part") for part in list_of(parts, "content")]
        text = "".join(part["text"] for part in parts if part.get("type") == "text")
        images += sum(part.get("type") == "image_url" for part in parts)
        texts.append(text)
        if message.get("role") == "user":
            last_user = text
    return texts, last_user, images


def _tools(tools: object) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    functions = [
        object_of(object_of(tool, "a tool").get("function"), "function")
        for tool in list_of(tools or [], "tools")
    ]
    return tuple((text_of(f.get("name"), "name"), f.get("parameters") or {}) for f in functions)


def _choice(choice: object) -> str:
    if isinstance(choice, dict):
        function = object_of(choice.get("function"), "tool_choice.function")
        return text_of(function.get("name"), "tool_choice.function.name")
    return "*" if choice == "required" else ""


def _schema(wanted: object) -> Mapping[str, Any] | None:
    if not isinstance(wanted, dict) or wanted.get("type") == "text":
        return None
    if wanted.get("type") == "json_object":
        return {}
    named = object_of(wanted.get("json_schema"), "response_format.json_schema")
    return object_of(named.get("schema"), "response_format.json_schema.schema")


def _logprob(piece: str, top: int) -> dict[str, Any]:
    alternatives = [
        _token(piece if place == 0 else f"{piece}{place}", -0.25 - place) for place in range(top)
    ]
    return {**_token(piece, -0.25), "top_logprobs": alternatives}


def _token(text: str, logprob: float) -> dict[str, Any]:
    as_bytes: Sequence[int] = list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": as_bytes}


def _choice_with_logprobs(piece: str, top: int) -> dict[str, Any]:
    logprobs = {"content": [_logprob(piece, top)], "refusal": None}
    return {
        "index": 0,
        "delta": {"content": piece},
        "logprobs": logprobs,
        "finish_reason": None,
    }
