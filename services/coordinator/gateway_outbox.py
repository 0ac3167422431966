"""What waits to be sent to one gateway: answers to its routes, all of them in one message, and to its heartbeats."""

from __future__ import annotations

import asyncio

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from google.protobuf.duration_pb2 import Duration

GATEWAY_ANSWERS_MAX = 16_384
"""Answers that wait for a gateway that does not read; one more ends its session. A message of a gateway asks for fewer routes."""


class GatewayOutbox:
    """Messages to one gateway. Iterating ends when the box is closed and what was put in before has been taken out.

    `interval` is the time between heartbeats, which their answers tell.
    """

    def __init__(self, interval: Duration) -> None:
        self._interval = interval
        self._answers: list[pb.RouteAnswer] = []
        self._heartbeats = 0
        self._changed = asyncio.Event()
        self._closed = False
        self._error: Exception | None = None

    def put(self, answer: pb.RouteAnswer) -> bool:
        """Adds the answer to a route; False where the box is full. A closed box takes and drops it."""
        if self._closed:
            return True
        if len(self._answers) >= GATEWAY_ANSWERS_MAX:
            return False
        self._answers.append(answer)
        self._changed.set()
        return True

    def put_heartbeat(self) -> None:
        """Adds the answer to a heartbeat. There is one for each: it tells the gateway that what it wrote before was taken."""
        if not self._closed:
            self._heartbeats += 1
            self._changed.set()

    def close(self, error: Exception | None = None) -> None:
        """Ends the iteration after what waits, by raising `error` if given. The first close counts."""
        if not self._closed:
            self._closed, self._error = True, error
            self._changed.set()

    def __aiter__(self) -> GatewayOutbox:
        return self

    async def __anext__(self) -> pb.JoinGatewayResponse:
        while True:
            # Heartbeats first: under load there are always answers, and the gateway would take the coordinator for silent.
            if self._heartbeats:
                self._heartbeats -= 1
                return pb.JoinGatewayResponse(heartbeat_interval=self._interval)
            if self._answers:
                answers, self._answers = self._answers, []
                return pb.JoinGatewayResponse(routes=answers)
            if self._closed:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
