"""The content generation of Gemini. Pure."""

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

_STREAM: Final = ":streamGenerateContent"
_PLAIN: Final = ":generateContent"
# Gemini ends an answer of calls with STOP too.
_FINISHES: Final = {
    "stop": "STOP",
    "length": "MAX_TOKENS",
    "tool_calls": "STOP",
    "content_filter": "SAFETY",
}
_STATUSES: Final = {
    400: "INVALID_ARGUMENT",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_REASONS: Final = {
    "context_length": (400, ""),
    "content_filter": (400, "The prompt was blocked for safety reasons"),
    "quota": (429, "You exceeded your current quota"),
    "overloaded": (503, "The model is overloaded. Please try again later."),
}


class GeminiDialect:
    """POST .../models/MODEL:streamGenerateContent?alt=sse and :generateContent."""

    def serves(self, path: str) -> bool:
        return path.endswith((_STREAM, _PLAIN))

    def key(self, headers: Mapping[str, str], query: Mapping[str, str]) -> str:
        return headers.get("x-goog-api-key") or query.get("key") or bearer(headers)

    def asked(self, received: Received, body: Mapping[str, Any]) -> Asked:
        stream = received.path.endswith(_STREAM)
        if stream and received.query.get("alt") != "sse":
            raise AskedError(400, "the scripted provider streams with alt=sse only")
        config = object_of(body.get("generationConfig") or {}, "generationConfig")
        texts, last_user, images = _contents(body)
        tools = _tools(body.get("tools"))
        return Asked(
            model=received.path.rpartition("/")[2].partition(":")[0],
            stream=stream,
            last_user=last_user,
            prompt_characters=sum(map(len, texts)),
            images=images,
            max_tokens=tokens_of(config.get("maxOutputTokens"), "maxOutputTokens"),
            stop=tuple(config.get("stopSequences") or ()),
            tools=tools,
            forced_tool=forced(_choice(body.get("toolConfig")), tools),
            schema=_schema(config),
        )

    def frames(self, asked: Asked, answer: Answer, number: int) -> Frames:
        # Every chunk tells the tokens so far, not those that it adds. What ends an answer is the finish reason of the last.
        texts = answer.pieces or answer.refusal
        pieces = [
            data_event(_chunk(asked, answer, number, [{"text": text}], count))
            for count, text in enumerate(texts, 1)
        ]
        if answer.call is not None:
            count = answer.completion_tokens
            pieces.append(data_event(_chunk(asked, answer, number, _call(answer), count)))
        last = _chunk(asked, answer, number, [{"text": ""}], answer.completion_tokens)
        last["candidates"][0]["finishReason"] = _FINISHES[answer.finish]
        return Frames(b"", tuple(pieces), b"", data_event(last))

    def plain(self, asked: Asked, answer: Answer, number: int) -> dict[str, Any]:
        parts = [{"text": "".join(answer.pieces or answer.refusal)}]
        if answer.call is not None:
            parts = _call(answer)
        whole = _chunk(asked, answer, number, parts, answer.completion_tokens)
        whole["candidates"][0]["finishReason"] = _FINISHES[answer.finish]
        return whole

    def refusal(self, status: int, message: str, reason: str) -> tuple[int, dict[str, Any]]:
        details: list[dict[str, Any]] = []
        if status == 401:
            # A wrong key is a bad argument for Gemini.
            status = 400
            message = f"API key not valid. {message}"
            info = "type.googleapis.com/google.rpc.ErrorInfo"
            details = [{"@type": info, "reason": "API_KEY_INVALID"}]
        if reason:
            status, text = _REASONS[reason]
            message = text or message
        error = {"code": status, "message": message, "status": _STATUSES.get(status, "UNKNOWN")}
        return status, {"error": {**error, "details": details} if details else error}

    def error_event(self, body: Mapping[str, Any]) -> bytes:
        return data_event(body)


def _chunk(
    asked: Asked, answer: Answer, number: int, parts: list[dict[str, Any]], so_far: int
) -> dict[str, Any]:
    usage = {
        "promptTokenCount": answer.prompt_tokens,
        "candidatesTokenCount": so_far,
        "totalTokenCount": answer.prompt_tokens + so_far,
    }
    if answer.cached_tokens:
        usage["cachedContentTokenCount"] = answer.cached_tokens
    candidate = {"content": {"parts": parts, "role": "model"}, "index": 0}
    return {
        "candidates": [candidate],
        "usageMetadata": usage,
        "modelVersion": asked.model,
        "responseId": f"response-{number}",
    }


def _call(answer: Answer) -> list[dict[str, Any]]:
    if answer.call is None:
        return []
    return [{"functionCall": {"name": answer.call.name, "args": answer.call.arguments_value()}}]


def _parts(content: object) -> Sequence[Mapping[str, Any]]:
    parts = list_of(object_of(content, "a content").get("parts"), "parts")
    return [object_of(part, "a part") for part in parts]


def _contents(body: Mapping[str, Any]) -> tuple[list[str], str, int]:
    texts = []
    last_user = ""
    images = 0
    if body.get("systemInstruction"):
        texts += [part.get("text", "") for part in _parts(body["systemInstruction"])]
    contents = list_of(body.get("contents"), "contents")
    if not contents:
        raise AskedError(400, "contents are required")
    for content in contents:
        parts = _parts(content)
        text = "".join(part.get("text", "") for part in parts)
        images += sum("inlineData" in part or "fileData" in part for part in parts)
        texts.append(text)
        if content.get("role", "user") == "user" and text:
            last_user = text
    return texts, last_user, images


def _tools(tools: object) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    declared = [
        object_of(function, "a function")
        for tool in list_of(tools or [], "tools")
        for function in list_of(object_of(tool, "a tool").get("functionDeclarations"), "functions")
    ]
    return tuple(
        (text_of(f.get("name"), "name"), f.get("parameters") or f.get("parametersJsonSchema") or {})
        for f in declared
    )


def _choice(config: object) -> str:
    if not isinstance(config, dict):
        return ""
    calling = object_of(config.get("functionCallingConfig") or {}, "functionCallingConfig")
    if calling.get("mode") != "ANY":
        return ""
    allowed = calling.get("allowedFunctionNames")
    return text_of(allowed[0], "allowedFunctionNames") if allowed else "*"


def _schema(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if config.get("responseMimeType") != "application/json":
        return None
    schema = config.get("responseJsonSchema") or config.get("responseSchema") or {}
    return object_of(schema, "responseSchema")
