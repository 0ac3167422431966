"""CoordinatorService over gRPC: the calls for requests and engines. Its sessions, lists and limits are in other files."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import asyncio
import logging

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.coordinator import checks
from services.coordinator.limits_servicer import CoordinatorLimits
from services.coordinator.routes import Answer
from services.runtime.errors import CaravanError

_LOG = logging.getLogger(__name__)


class CoordinatorServicer(CoordinatorLimits):
    """The coordinator at the edge. All its methods run on one event loop, so the state needs no lock."""

    async def Route(
        self,
        request: pb.RouteRequest,
        context: grpc.aio.ServicerContext[pb.RouteRequest, pb.RouteResponse],
    ) -> pb.RouteResponse:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def tell(answer: Answer) -> None:
            # A call that was cancelled in this moment is about to say so, and gives back what it was granted.
            if not future.done():
                future.set_result(answer)

        asked = self._routes.ask(request, request.gateway_id, context.invocation_metadata(), tell)
        try:
            answer = await future
        except asyncio.CancelledError:
            self._routes.leave(asked)
            raise
        if isinstance(answer, CaravanError):
            raise answer
        return answer

    async def Release(
        self,
        request: pb.ReleaseRequest,
        context: grpc.aio.ServicerContext[pb.ReleaseRequest, pb.ReleaseResponse],
    ) -> pb.ReleaseResponse:
        return pb.ReleaseResponse(released=self._routes.release(request))

    async def Cancel(
        self,
        request: pb.CancelRequest,
        context: grpc.aio.ServicerContext[pb.CancelRequest, pb.CancelResponse],
    ) -> pb.CancelResponse:
        request_id = checks.checked_id("request_id", request.request_id)
        self.perform(self._state.cancel(request_id, self._clock.monotonic()))
        return pb.CancelResponse()

    async def CancelTenant(
        self,
        request: pb.CancelTenantRequest,
        context: grpc.aio.ServicerContext[pb.CancelTenantRequest, pb.CancelTenantResponse],
    ) -> pb.CancelTenantResponse:
        tenant = checks.checked_optional_id("tenant", request.tenant)
        requests, effects = self._state.cancel_tenant(tenant, self._clock.monotonic())
        self.perform(effects)
        return pb.CancelTenantResponse(requests=requests)

    # --- engines -------------------------------------------------------------------------------------------------

    async def DrainEngine(
        self,
        request: pb.DrainEngineRequest,
        context: grpc.aio.ServicerContext[pb.DrainEngineRequest, pb.DrainEngineResponse],
    ) -> pb.DrainEngineResponse:
        engine_id = checks.checked_id("engine_id", request.engine_id)
        grace_s = checks.checked_grace(request)
        now = self._clock.monotonic()
        self.perform(self._state.drain_engine(engine_id, grace_s, request.stop, now))
        leases = self._state.leases.on_engine(engine_id)
        _LOG.info("engine %s is drained; leases on it: %d", engine_id, leases)
        return pb.DrainEngineResponse(leases=leases)

    async def UndrainEngine(
        self,
        request: pb.UndrainEngineRequest,
        context: grpc.aio.ServicerContext[pb.UndrainEngineRequest, pb.UndrainEngineResponse],
    ) -> pb.UndrainEngineResponse:
        engine_id = checks.checked_id("engine_id", request.engine_id)
        self.perform(self._state.undrain_engine(engine_id, self._clock.monotonic()))
        _LOG.info("engine %s is in service again", engine_id)
        return pb.UndrainEngineResponse()
