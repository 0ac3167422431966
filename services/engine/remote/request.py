"""A request to a provider, from its arrival to its end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum

from caravan.core.v1 import generation_pb2, scheduling_pb2

from services.engine.remote.outbox import Ending, Outbox
from services.engine.remote.wire import WireRequest
from services.runtime.telemetry import RequestSpan


class Phase(Enum):
    """Where a request stands; the values are those of engine.v1.RequestPhase."""

    QUEUED = 1
    """It waits for a worker, or for its next attempt."""
    CALLING = 2
    """A worker has it; nothing of the answer has come."""
    ANSWERING = 3


@dataclass(frozen=True, slots=True)
class Work:
    """What to ask the provider for, and on whose behalf.

    `prompt_tokens` are estimated, `tokens` are those with the longest answer. `deadline` is in seconds of the monotonic clock, or
    infinite. `gather_s` is the least time between two deltas.
    """

    call: WireRequest
    tenant: str
    priority: scheduling_pb2.Priority.ValueType
    deadline: float
    prompt_tokens: int
    tokens: int
    gather_s: float
    span: RequestSpan


@dataclass(slots=True, eq=False)
class Request:
    """One request in flight. Times are in seconds of the monotonic clock, None for what has not happened.

    `usage` is what is known of it so far, `cost_nanousd` follows from it.
    """

    request_id: str
    arrived: float
    phase: Phase = Phase.QUEUED
    called: float | None = None
    first_piece: float | None = None
    last_piece: float | None = None
    pieces: int = 0
    characters: int = 0
    """Of the text of its answer so far."""
    attempts: int = 0
    usage: generation_pb2.Usage = field(default_factory=generation_pb2.Usage)
    cost_nanousd: int = 0
    reason: generation_pb2.FinishReason.ValueType = generation_pb2.FINISH_REASON_UNSPECIFIED
    """Why its answer ended, once it has."""
    tenant: str = ""
    outcome: str = ""
    """What became of it, once its caller's call has ended."""
    task: asyncio.Task[float | None] | None = None
    """The worker's, while one has it."""
    timer: asyncio.TimerHandle | None = None
    """Until its next attempt."""
    outbox: Outbox = field(default_factory=Outbox)

    def end(
        self, reason: generation_pb2.FinishReason.ValueType, now: float, stop_text: str = ""
    ) -> None:
        """Its answer has ended."""
        if self.outbox.ended:
            return
        self.reason = reason
        called = now if self.called is None else self.called
        first = now if self.first_piece is None else self.first_piece
        last = first if self.last_piece is None else self.last_piece
        self.outbox.end(
            Ending(
                reason,
                self.usage,
                stop_text,
                queue_s=called - self.arrived,
                first_piece_s=first - called,
                pieces_s=last - first,
                cost_nanousd=self.cost_nanousd,
            )
        )
