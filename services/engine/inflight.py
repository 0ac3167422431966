"""A request that llama.cpp computes, from its arrival to its end, and the table of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from services.engine.outbox import Outbox
from services.engine.request_table import RequestTable


class RequestPhase(Enum):
    """Where a request stands; the values are those of engine.v1.RequestPhase."""

    QUEUED = 1
    PREFILLING = 2
    GENERATING = 3


@dataclass(slots=True, eq=False)
class Inflight:
    """One request. The decode thread writes phase and counts, which are plain values; everybody may read them."""

    request_id: str
    arrived: float
    phase: RequestPhase = RequestPhase.QUEUED
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cancelled: bool = False
    outbox: Outbox = field(default_factory=Outbox)


class InflightTable(RequestTable[Inflight]):
    """At most `capacity` requests of a model, by id, oldest first."""

    def __init__(self, model: str, capacity: int, retry_after_s: float) -> None:
        super().__init__(model, capacity, retry_after_s, Inflight)
