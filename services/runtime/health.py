"""grpc.health.v1 whose watches end with the drain.

The servicer of grpcio-health-checking keeps its Watch streams open for ever, so that one watcher holds each shutdown for the
whole grace, and it writes to watchers under a lock that `set` needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN: Final = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
_Context = grpc.aio.ServicerContext[Any, Any]


class Health(health_pb2_grpc.HealthServicer):
    """The state of each service of this process; "" is the process itself."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._draining = False
        self._changed = asyncio.Event()

    def set(self, name: str, serving: bool) -> None:
        """Tells the state of a service. After `drain` nothing serves any more."""
        self._serving[name] = serving and not self._draining
        self._wake()

    def drain(self) -> None:
        """Nothing serves any more; watchers are told, and their streams end."""
        self._draining = True
        self._serving = dict.fromkeys(self._serving, False)
        self._wake()

    async def Check(  # noqa: N802 - the contract names the methods
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> health_pb2.HealthCheckResponse:
        """The state now. An unknown name fails with NOT_FOUND."""
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return self._response(request.service)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The state now and at each change; an unknown name is SERVICE_UNKNOWN until it is set."""
        last = None
        while True:
            changed = self._changed  # Taken before the look: a change in between is not missed.
            response = self._response(request.service)
            if response != last:
                yield response
                last = response
            elif self._draining:
                return
            else:
                await changed.wait()

    def _response(self, name: str) -> health_pb2.HealthCheckResponse:
        serving = self._serving.get(name)
        status = _UNKNOWN if serving is None else SERVING if serving else NOT_SERVING
        return health_pb2.HealthCheckResponse(status=status)

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
