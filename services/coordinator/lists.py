"""The part of CoordinatorService that only looks."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc

from services.coordinator import checks, cost_messages, messages
from services.coordinator.refusals import unknown_model
from services.coordinator.state import CoordinatorState
from services.runtime.clock import Clock


class CoordinatorLists(pb_grpc.CoordinatorServiceServicer):
    """Shows requests, engines, models and queues."""

    def __init__(self, state: CoordinatorState, clock: Clock) -> None:
        self._state = state
        self._clock = clock

    async def ListInflight(
        self,
        request: pb.ListInflightRequest,
        context: grpc.aio.ServicerContext[pb.ListInflightRequest, pb.ListInflightResponse],
    ) -> pb.ListInflightResponse:
        now, state = self._clock.monotonic(), self._state
        told = {
            (engine.engine_id, request.request_id): request
            for engine in state.engines
            for request in engine.requests
        }
        requests = [
            messages.to_running(
                lease,
                now,
                told.get((lease.engine_id, lease.request_id)),
                is_cancelling=state.is_cancelling(lease),
            )
            for lease in state.leases
        ]
        requests += [messages.to_queued(want, now) for want in state.waiting]
        requests.sort(key=lambda told: told.age.ToMicroseconds(), reverse=True)
        return pb.ListInflightResponse(requests=requests)

    async def ListEngines(
        self,
        request: pb.ListEnginesRequest,
        context: grpc.aio.ServicerContext[pb.ListEnginesRequest, pb.ListEnginesResponse],
    ) -> pb.ListEnginesResponse:
        now = self._clock.monotonic()
        engines = sorted(self._state.engines, key=lambda engine: engine.engine_id)
        return pb.ListEnginesResponse(engines=[messages.to_engine(e, now) for e in engines])

    async def ListModels(
        self,
        request: pb.ListModelsRequest,
        context: grpc.aio.ServicerContext[pb.ListModelsRequest, pb.ListModelsResponse],
    ) -> pb.ListModelsResponse:
        models = [messages.to_model(model) for model in self._state.models]
        return pb.ListModelsResponse(models=models)

    async def GetCosts(
        self,
        request: pb.GetCostsRequest,
        context: grpc.aio.ServicerContext[pb.GetCostsRequest, pb.GetCostsResponse],
    ) -> pb.GetCostsResponse:
        costs, deployments = self._state.costs, self._state.deployments.current()
        now = self._clock.monotonic()
        return cost_messages.to_costs(costs.ledger, costs.budgets, deployments, now)

    async def DescribeQueue(
        self,
        request: pb.DescribeQueueRequest,
        context: grpc.aio.ServicerContext[pb.DescribeQueueRequest, pb.DescribeQueueResponse],
    ) -> pb.DescribeQueueResponse:
        name = checks.checked_id("model", request.model)
        model = self._state.models.find(name)
        if model is None:
            raise unknown_model(name)
        return pb.DescribeQueueResponse(signature=model.queue.signature())
