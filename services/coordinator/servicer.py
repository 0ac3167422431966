"""CoordinatorService over gRPC: translates, performs the effects of the state, maps errors."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import asyncio
import logging

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.coordinator import checks, messages
from services.coordinator.effects import Grant
from services.coordinator.leases import Ended
from services.coordinator.limits_servicer import CoordinatorLimits
from services.coordinator.metrics import CoordinatorMetrics
from services.coordinator.state import CoordinatorState
from services.coordinator.waiting import Want
from services.runtime.clock import Clock, IdSource
from services.runtime.errors import CaravanError
from services.runtime.telemetry import Tracing

_LOG = logging.getLogger(__name__)


class CoordinatorServicer(CoordinatorLimits):
    """The coordinator at the edge. All its methods run on one event loop, so the state needs no lock."""

    def __init__(
        self,
        state: CoordinatorState,
        metrics: CoordinatorMetrics,
        tracing: Tracing,
        clock: Clock,
        ids: IdSource,
    ) -> None:
        super().__init__(state, metrics, clock, ids)
        self._tracing = tracing

    async def Route(
        self,
        request: pb.RouteRequest,
        context: grpc.aio.ServicerContext[pb.RouteRequest, pb.RouteResponse],
    ) -> pb.RouteResponse:
        span = self._tracing.start(
            "route",
            context.invocation_metadata(),
            gen_ai__request__model=request.model,
            caravan__request_id=request.request_id,
        )
        failure: str | None = "CANCELLED"
        try:
            grant = await self._route(
                checks.checked_want(
                    request,
                    lease_id=self._ids("lease"),
                    wait_s=self._state.default_wait_s(request.model),
                    priority=self._state.default_priority(request.model),
                    now=self._clock.monotonic(),
                )
            )
            failure = None
            span.set(
                caravan__engine_id=grant.lease.engine_id, caravan__lease_id=grant.lease.lease_id
            )
        except CaravanError as error:
            failure = error.reason
            self._metrics.count_refusal(failure)
            raise
        finally:
            span.end(failure)
        lease = grant.lease
        self._metrics.count_grant(
            lease.granted_at - lease.arrived_at, fell_back=lease.model != request.model
        )
        return messages.to_route(grant)

    async def _route(self, want: Want) -> Grant:
        """A lease, at once or when its turn comes. Raises CaravanError."""
        granted = self._state.route(want)
        if granted is not None:
            return granted
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Grant | CaravanError] = loop.create_future()
        self._routes[want.request_id] = future
        waiting = self._state.waiting.of_request(want.request_id)
        assert waiting is not None  # It waits, with the time that it got.
        timer = loop.call_later(waiting.wait_s, self._expire_waiting)
        try:
            answer = await future
        except asyncio.CancelledError:
            # The call is gone, perhaps in the moment of its grant, which is given back then (W61).
            if self._routes.get(want.request_id) is future:
                del self._routes[want.request_id]
            self.perform(self._state.leave(want, self._clock.monotonic()))
            raise
        finally:
            timer.cancel()
        if isinstance(answer, CaravanError):
            raise answer
        return answer

    def _expire_waiting(self) -> None:
        self.perform(self._state.expire_waiting(self._clock.monotonic()))

    async def Release(
        self,
        request: pb.ReleaseRequest,
        context: grpc.aio.ServicerContext[pb.ReleaseRequest, pb.ReleaseResponse],
    ) -> pb.ReleaseResponse:
        lease_id = checks.checked_id("lease_id", request.lease_id)
        finish_key = checks.checked_key("finish_key", request.finish_key)
        ended = checks.ENDED.get(request.outcome, Ended.UNTOLD)
        # One that was swept, and is put aside until its engine or gateway comes back, has been counted as that.
        was_held = self._state.leases.find(lease_id) is not None
        effects = self._state.release(lease_id, self._clock.monotonic(), ended, finish_key)
        if effects is None:
            return pb.ReleaseResponse(released=False)
        if was_held:
            self._metrics.count_release(request.outcome)
        self.perform(effects)
        return pb.ReleaseResponse(released=True)

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
