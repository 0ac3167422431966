"""What stream and plain answers of the OpenAI API share: identity, usage, finish reasons. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from caravan.core.v1 import generation_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.gateway.requests import Api
from services.runtime.errors import CaravanError

SYSTEM_FINGERPRINT: Final = "caravan-1"
"""Names the configuration that answers; it changes when the same seed may give another answer."""

_REASONS: Final = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
    generation_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
    generation_pb2.FINISH_REASON_CONTENT_FILTER: "content_filter",
}

_HITS: Final = {
    generation_pb2.CACHE_HIT_COLD: "cold",
    generation_pb2.CACHE_HIT_PARTIAL: "partial",
    generation_pb2.CACHE_HIT_EXACT: "exact",
    generation_pb2.CACHE_HIT_RESIDENT: "resident",
}


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What every object of one answer repeats. `created` is in seconds since the epoch."""

    request_id: str
    model: str
    created: int

    def answer_id(self, api: Api) -> str:
        """The id that clients see; it holds the request's."""
        prefix = "chatcmpl" if api is Api.CHAT else "cmpl"
        return f"{prefix}-{self.request_id.removeprefix('req-')}"


@dataclass(frozen=True, slots=True)
class Served:
    """Who made the answer: the engine that finished it, and the deployment, which may be a fallback of the one asked for."""

    engine_id: str
    deployment: str


def finish_reason(reason: generation_pb2.FinishReason.ValueType) -> str:
    """The word of the OpenAI API. Raises CANCELLED, which has no word: such an answer ends with an error."""
    if reason == generation_pb2.FINISH_REASON_CANCELLED:
        raise CaravanError("CANCELLED", "The request was cancelled.")
    # A reason of a newer engine ends the answer like any stop.
    return _REASONS.get(reason, "stop")


def usage(used: generation_pb2.Usage) -> dict[str, Any]:
    """The `usage` object, in tokens."""
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
    }


def caravan_part(finished: engine_pb.Finished, served: Served, asked_for: str) -> dict[str, Any]:
    """The `caravan` object of an answer. A key that was not kept, and a hit of a newer engine, are null."""
    part: dict[str, Any] = {
        "finish_key": finished.finish_key.hex() or None,
        "cache_hit": _HITS.get(finished.cache_hit),
        "engine_id": served.engine_id,
    }
    if served.deployment != asked_for:
        part["deployment"] = served.deployment
    if finished.cost_nanousd:
        part["cost_usd"] = finished.cost_nanousd / 1e9
    return part
