"""Events of an engine as server-sent events of the OpenAI API, byte for byte. Pure.

The hot path of the gateway: one call per delta, all its tokens in one chunk, and only the text is encoded anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import msgspec
from caravan.core.v1 import chat_pb2
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
from services.runtime.errors import CaravanError

CONTENT_TYPE: Final = "text/event-stream; charset=utf-8"
KEEPALIVE: Final = b": keepalive\n\n"
DONE: Final = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode
# Line ends for readers that split text as Unicode does; JSON leaves them as they are, and so they are escaped.
_UNICODE_LINE_ENDS: Final = (
    ("\u0085".encode(), b"\\u0085"),
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
)


class AnswerStream(Protocol):
    """Makes the bytes of one streamed answer."""

    def delta(self, delta: engine_pb.Delta) -> bytes:
        """The events for one delta; empty where it shows nothing."""
        ...

    def finished(self, finished: engine_pb.Finished, served: Served) -> bytes:
        """The last events. Raises CANCELLED for a request that was cancelled."""
        ...


def open_stream(request: InferenceRequest, head: AnswerHead) -> AnswerStream:
    """The stream for a request."""
    logprobs = request.generate.HasField("top_logprobs")
    if request.api is Api.CHAT:
        return _ChatStream(_Chunks("chat.completion.chunk", request, head), logprobs)
    return _CompletionStream(_Chunks("text_completion", request, head), logprobs)


def error_event(error: CaravanError) -> bytes:
    """The event that tells of an error after the first byte. Nothing follows it, not even [DONE]."""
    return _event(error.openai_body())


def _json(value: object) -> bytes:
    encoded = _encode(value)
    if not encoded.isascii():
        for raw, escaped in _UNICODE_LINE_ENDS:
            encoded = encoded.replace(raw, escaped)
    return encoded


def _event(value: object) -> bytes:
    return b"data: %b\n\n" % _json(value)


class _Chunks:
    """The parts of chunks that never change: head, then `choices`, then tail."""

    def __init__(self, kind: str, request: InferenceRequest, head: AnswerHead) -> None:
        fields = {
            "id": head.answer_id(request.api),
            "object": kind,
            "created": head.created,
            "model": head.model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }
        self.head = b'data: %b,"choices":' % _json(fields)[:-1]
        self.tail = (b',"usage":null' if request.include_usage else b"") + b"}\n\n"
        self._model = head.model
        self._include_usage = request.include_usage
        self._show_cache = request.show_cache

    def choice(self, choice: dict[str, Any]) -> bytes:
        """A whole chunk with one choice."""
        return b"%b%b%b" % (self.head, _json([choice]), self.tail)

    def last(self, choice: dict[str, Any], finished: engine_pb.Finished, served: Served) -> bytes:
        """The chunk that ends the choice, the usage chunk if asked for, and [DONE]."""
        cache = b""
        if self._show_cache:
            cache = b',"caravan":%b' % _json(caravan_part(finished, served, self._model))
        ended = b"%b%b%b%b" % (self.head, _json([choice]), cache, self.tail)
        if not self._include_usage:
            return ended + DONE
        used = b'%b[],"usage":%b}\n\n' % (self.head, _json(usage(finished.usage)))
        return ended + used + DONE


class _ChatStream:
    def __init__(self, chunks: _Chunks, logprobs: bool) -> None:
        self._chunks = chunks
        self._logprobs = logprobs
        self._before_text = self._chunks.head + b'[{"index":0,"delta":{"content":'
        self._after_text = b'},"logprobs":null,"finish_reason":null}]' + self._chunks.tail
        self._opened = False

    def delta(self, delta: engine_pb.Delta) -> bytes:
        if self._logprobs or delta.tool_calls or delta.refusal:
            shown = self._rich(delta)
        elif delta.text:
            shown = b"%b%b%b" % (self._before_text, _json(delta.text), self._after_text)
        else:
            return b""
        if self._opened or not shown:
            return shown
        return self._role() + shown

    def finished(self, finished: engine_pb.Finished, served: Served) -> bytes:
        choice = self._choice({}, None, finish_reason(finished.reason))
        role = b"" if self._opened else self._role()
        return role + self._chunks.last(choice, finished, served)

    def _role(self) -> bytes:
        self._opened = True
        return self._chunks.choice(self._choice({"role": "assistant", "content": ""}, None, None))

    def _rich(self, delta: engine_pb.Delta) -> bytes:
        content: dict[str, Any] = {}
        logprobs = None
        if delta.text:
            content["content"] = delta.text
        if delta.refusal:
            content["refusal"] = delta.refusal
        if delta.tool_calls:
            content["tool_calls"] = tool_call_deltas(delta.tool_calls)
        if self._logprobs and delta.logprobs:
            content.setdefault("content", "")
            logprobs = {"content": chat_tokens(delta.logprobs), "refusal": None}
        return self._chunks.choice(self._choice(content, logprobs, None)) if content else b""

    @staticmethod
    def _choice(delta: dict[str, Any], logprobs: object, reason: str | None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def tool_call_deltas(pieces: Sequence[chat_pb2.ToolCallDelta]) -> list[dict[str, Any]]:
    """The `tool_calls` of a delta: id, type and name stand in the first piece of a call only."""
    shown: list[dict[str, Any]] = []
    for piece in pieces:
        function: dict[str, str] = {"arguments": piece.arguments_json}
        if piece.id:
            shown.append(
                {
                    "index": piece.index,
                    "id": piece.id,
                    "type": "function",
                    "function": {"name": piece.name, **function},
                }
            )
        else:
            shown.append({"index": piece.index, "function": function})
    return shown


class _CompletionStream:
    def __init__(self, chunks: _Chunks, logprobs: bool) -> None:
        self._chunks = chunks
        self._logprobs = CompletionLogprobs() if logprobs else None
        self._before_text = self._chunks.head + b'[{"text":'
        self._after_text = b',"index":0,"logprobs":null,"finish_reason":null}]' + self._chunks.tail

    def delta(self, delta: engine_pb.Delta) -> bytes:
        # The form has no place of its own for a refusal.
        text = delta.text + delta.refusal
        if self._logprobs is not None and delta.logprobs:
            logprobs = self._logprobs.take(delta.logprobs)
            return self._chunks.choice(self._choice(text, logprobs, None))
        if not text:
            return b""
        return b"%b%b%b" % (self._before_text, _json(text), self._after_text)

    def finished(self, finished: engine_pb.Finished, served: Served) -> bytes:
        choice = self._choice("", None, finish_reason(finished.reason))
        return self._chunks.last(choice, finished, served)

    @staticmethod
    def _choice(text: str, logprobs: object, reason: str | None) -> dict[str, Any]:
        return {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": reason}
