"""All request sessions of this gateway, within a bound."""

from __future__ import annotations

import asyncio

from services.gateway.requests import Api, InferenceRequest
from services.gateway.session import RequestSession, SessionParts, outcome_of
from services.runtime.errors import CaravanError
from services.runtime.telemetry import Metadata, Tracing

_OPERATIONS = {Api.CHAT: "chat", Api.COMPLETION: "text_completion", Api.PREFILL: "prefill"}
CLIENT_REQUEST_ID_MAX = 128


class Sessions:
    """Opens sessions and knows those that run. `requests_max` counts sessions, and routes that some have left behind."""

    def __init__(self, requests_max: int, tracing: Tracing) -> None:
        self._requests_max = requests_max
        self._tracing = tracing
        self._parts: SessionParts | None = None
        self._running: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._running)

    def equip(self, parts: SessionParts) -> None:
        """Gives the parts that sessions use; they in turn report on the sessions."""
        self._parts = parts

    def refuse(self, api: Api, error: CaravanError) -> None:
        """Counts a request that never became a session."""
        assert self._parts is not None
        self._parts.metrics.count_request(api, outcome_of(error), 0.0)

    def open(
        self,
        request: InferenceRequest,
        request_id: str,
        metadata: Metadata,
        remaining_s: float | None,
    ) -> RequestSession:
        """Starts a session. Raises CAPACITY_EXHAUSTED. `remaining_s` is what is left of the client's deadline."""
        parts = self._parts
        assert parts is not None
        active = max(len(self._running), len(parts.background))
        if active >= self._requests_max:
            raise CaravanError(
                "CAPACITY_EXHAUSTED",
                f"The gateway holds {active} requests, as many as it may. Try again later.",
                retry_after_s=1.0,
                model=request.model,
                active=str(active),
                capacity=str(self._requests_max),
            )
        span = self._tracing.start(
            request.api.value,
            metadata,
            gen_ai__operation__name=_OPERATIONS[request.api],
            gen_ai__request__model=request.model,
            caravan__request_id=request_id,
        )
        client_id = _client_request_id(metadata)
        if client_id:
            span.set(caravan__client_request_id=client_id)
        deadline = None if remaining_s is None else parts.clock.monotonic() + remaining_s
        session = RequestSession(request, request_id, span, deadline, parts)
        self._running.add(session.task)
        session.task.add_done_callback(self._running.discard)
        return session

    async def finish(self) -> None:
        """Waits for the end of sessions whose calls are over."""
        if self._running:
            await asyncio.wait(set(self._running))


def _client_request_id(metadata: Metadata) -> str:
    for name, value in metadata:
        if name == "x-request-id" and isinstance(value, str):
            return value[:CLIENT_REQUEST_ID_MAX]
    return ""
