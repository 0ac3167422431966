"""The internal request that both public APIs build. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from caravan.core.v1 import scheduling_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb


class Api(Enum):
    """What was asked for; the value labels metrics and names spans."""

    CHAT = "chat"
    COMPLETION = "completion"
    PREFILL = "prefill"


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """A valid request: what the engine must do, and how the answer is shown.

    For Api.PREFILL `generate` has a prompt and cache options only. The session that takes the request sets `generate.request_id`; nobody else changes `generate`.
    """

    api: Api
    model: str
    generate: engine_pb.GenerateRequest
    stream: bool = False
    """Server-sent events instead of one JSON answer. OpenAI API only."""
    include_usage: bool = False
    """A last chunk with the usage. Only with `stream`."""
    show_cache: bool = False
    """Tell what the KV cache did. OpenAI API only."""
    scheduling: scheduling_pb2.Scheduling = field(default_factory=scheduling_pb2.Scheduling)
    """When it starts, relative to others."""
