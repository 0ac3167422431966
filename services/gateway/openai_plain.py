"""Events of an engine as one JSON answer of the OpenAI API. Pure."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from caravan.core.v1 import generation_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.gateway.openai_answer import (
    SYSTEM_FINGERPRINT,
    AnswerHead,
    Served,
    caravan_part,
    finish_reason,
    usage,
)
from services.gateway.openai_logprobs import CompletionLogprobs, chat_tokens
from services.gateway.requests import Api, InferenceRequest

CONTENT_TYPE: Final = "application/json"


class PlainAnswer:
    """Collects the deltas of one answer. Their number is bounded by the context of the model."""

    def __init__(self, request: InferenceRequest, head: AnswerHead) -> None:
        self._api = request.api
        self._wants_logprobs = request.generate.HasField("top_logprobs")
        self._show_cache = request.show_cache
        self._head = head
        self._texts: list[str] = []
        self._refusals: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._logprobs: list[generation_pb2.TokenLogprob] = []

    def delta(self, delta: engine_pb.Delta) -> None:
        """Takes the next tokens."""
        if delta.text:
            self._texts.append(delta.text)
        if delta.refusal:
            # The form of a completion has no place of its own for it.
            (self._refusals if self._api is Api.CHAT else self._texts).append(delta.refusal)
        if self._wants_logprobs:
            self._logprobs.extend(delta.logprobs)
        for piece in delta.tool_calls:
            call = self._calls.setdefault(piece.index, {"id": "", "name": "", "arguments": []})
            call["id"] = call["id"] or piece.id
            call["name"] = call["name"] or piece.name
            call["arguments"].append(piece.arguments_json)

    def finished(self, finished: engine_pb.Finished, served: Served) -> bytes:
        """The JSON. Raises CANCELLED for a request that was cancelled."""
        chat = self._api is Api.CHAT
        reason = finish_reason(finished.reason)
        answer = {
            "id": self._head.answer_id(self._api),
            "object": "chat.completion" if chat else "text_completion",
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
            "choices": [self._chat_choice(reason) if chat else self._text_choice(reason)],
            "usage": usage(finished.usage),
        }
        if self._show_cache:
            answer["caravan"] = caravan_part(finished, served, self._head.model)
        return msgspec.json.encode(answer)

    def _chat_choice(self, reason: str) -> dict[str, Any]:
        text = "".join(self._texts)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if (self._calls or self._refusals) and not text else text,
            "refusal": "".join(self._refusals) or None,
        }
        if self._calls:
            message["tool_calls"] = [
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {"name": call["name"], "arguments": "".join(call["arguments"])},
                }
                for _, call in sorted(self._calls.items())
            ]
        logprobs = None
        if self._wants_logprobs:
            logprobs = {"content": chat_tokens(self._logprobs), "refusal": None}
        return {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _text_choice(self, reason: str) -> dict[str, Any]:
        logprobs = CompletionLogprobs().take(self._logprobs) if self._wants_logprobs else None
        return {
            "text": "".join(self._texts),
            "index": 0,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
