"""The calls of CoordinatorService for limits that are shared strictly."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.coordinator import checks, messages
from services.coordinator.metrics import CoordinatorMetrics
from services.coordinator.sessions import CoordinatorSessions
from services.coordinator.state import CoordinatorState
from services.runtime.clock import Clock, IdSource
from services.runtime.rate_limiter import Quota
from services.runtime.telemetry import Tracing


class CoordinatorLimits(CoordinatorSessions):
    """Grants and ends permits. Neither call suspends, so a permit is granted in full or not at all."""

    def __init__(
        self,
        state: CoordinatorState,
        metrics: CoordinatorMetrics,
        tracing: Tracing,
        clock: Clock,
        ids: IdSource,
    ) -> None:
        super().__init__(state, metrics, tracing, clock, ids)
        self._ids = ids

    async def AcquireLimit(
        self,
        request: pb.AcquireLimitRequest,
        context: grpc.aio.ServicerContext[pb.AcquireLimitRequest, pb.AcquireLimitResponse],
    ) -> pb.AcquireLimitResponse:
        told = request.limits
        permit_id = self._ids("permit")
        retry_s = self._state.rates.strict.acquire(
            permit_id,
            checks.checked_limit_key("key", request.key),
            checks.checked_id("incarnation", request.incarnation),
            quota=Quota(told.requests_per_minute, told.tokens_per_minute, told.concurrent_requests),
            tokens=request.tokens,
            now=self._clock.monotonic(),
        )
        self._metrics.count_permit(is_granted=not retry_s)
        if retry_s:
            return pb.AcquireLimitResponse(retry_after=messages.to_duration(retry_s))
        return pb.AcquireLimitResponse(permit_id=permit_id)

    async def SettleLimit(
        self,
        request: pb.SettleLimitRequest,
        context: grpc.aio.ServicerContext[pb.SettleLimitRequest, pb.SettleLimitResponse],
    ) -> pb.SettleLimitResponse:
        settled = self._state.rates.strict.settle(
            checks.checked_id("permit_id", request.permit_id),
            request.tokens if request.HasField("tokens") else None,
            self._clock.monotonic(),
            throttled_s=checks.checked_throttled(request),
        )
        return pb.SettleLimitResponse(settled=settled)
