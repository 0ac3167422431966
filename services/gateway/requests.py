"""The internal request that both public APIs build. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from caravan.engine.v1 import engine_service_pb2 as engine_pb


class Api(Enum):
    """What was asked for; the value labels metrics and names spans."""

    CHAT = "chat"
    COMPLETION = "completion"


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """A valid request: what the engine must do, and how the answer is shown.

    The session that takes the request sets `generate.request_id`; nobody else changes `generate`.
    """

    api: Api
    model: str
    generate: engine_pb.GenerateRequest
    stream: bool = False
    """Server-sent events instead of one JSON answer. OpenAI API only."""
    include_usage: bool = False
    """A last chunk with the usage. Only with `stream`."""

    @property
    def prompt_field(self) -> str:
        """Name of the field that holds the prompt in the OpenAI API."""
        return "messages" if self.api is Api.CHAT else "prompt"
