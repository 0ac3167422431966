"""Calls to the coordinator."""

from __future__ import annotations

import asyncio
from typing import Final

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc
from grpc_status import rpc_status

from services.gateway.membership import Session, coordinator_down
from services.gateway.metrics import Outcome
from services.gateway.routes import Lease, Wanted
from services.runtime.errors import CaravanError, from_rpc_error

Headers = tuple[tuple[str, str], ...]


_OUTCOMES: Final = {
    Outcome.FINISHED: pb.OUTCOME_FINISHED,
    Outcome.CANCELLED: pb.OUTCOME_CANCELLED,
    Outcome.REFUSED: pb.OUTCOME_REFUSED,
    Outcome.FAILED: pb.OUTCOME_FAILED,
}


def model_not_found(name: str) -> CaravanError:
    """No engine has registered such a model."""
    shown = name[:100]
    return CaravanError(
        "MODEL_NOT_FOUND", f"The model '{shown}' does not exist.", param="model", model=shown
    )


class CoordinatorClient:
    """The coordinator, with errors of the table. `timeout_s` is for one call, but routes wait as long as they are queued."""

    def __init__(self, stub: pb_grpc.CoordinatorServiceAsyncStub, timeout_s: float) -> None:
        self._stub = stub
        self.timeout_s = timeout_s

    async def route(self, wanted: Wanted, session: Session, headers: Headers) -> Lease:
        """A lease, when it is the turn of the request. Raises SERVICE_UNAVAILABLE where the session ends before."""
        call = self._stub.Route(wanted.request(session.gateway_id), metadata=headers)
        try:
            with session.holding(call):
                answer = await call
        except grpc.aio.AioRpcError as error:
            raise _route_error(error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if session.ended and task is not None and not task.cancelling():
                raise coordinator_down() from None
            call.cancel()
            raise
        lease = answer.lease
        return Lease(
            lease.lease_id,
            lease.engine_id,
            lease.address,
            lease.incarnation,
            answer.model,
            answer.idempotent,
            answer.priority,
        )

    async def release(self, lease: Lease, outcome: Outcome, finish_key: bytes) -> None:
        """Ends a lease. `finish_key` names the KV state that the request left; empty: none. Raises CaravanError."""
        request = pb.ReleaseRequest(
            lease_id=lease.lease_id, outcome=_OUTCOMES[outcome], finish_key=finish_key
        )
        try:
            await self._stub.Release(request, timeout=self.timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, service="coordinator") from None

    async def cancel(self, request_id: str) -> None:
        """Ends a request in flight. Raises REQUEST_NOT_FOUND."""
        try:
            await self._stub.Cancel(pb.CancelRequest(request_id=request_id), timeout=self.timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, service="coordinator") from None

    async def list_inflight(self) -> list[pb.InflightRequest]:
        """The requests that wait or run, oldest first."""
        try:
            answer = await self._stub.ListInflight(pb.ListInflightRequest(), timeout=self.timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, service="coordinator") from None
        return list(answer.requests)

    async def list_models(self) -> list[pb.Model]:
        """The models, sorted by name."""
        try:
            answer = await self._stub.ListModels(pb.ListModelsRequest(), timeout=self.timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, service="coordinator") from None
        return list(answer.models)

    async def list_engines(self) -> list[pb.Engine]:
        """The engines, sorted by id."""
        try:
            answer = await self._stub.ListEngines(pb.ListEnginesRequest(), timeout=self.timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, service="coordinator") from None
        return list(answer.engines)


def _route_error(error: grpc.aio.AioRpcError) -> CaravanError:
    known = from_rpc_error(error, service="coordinator")
    wordless = known.reason == "CANCELLED" and rpc_status.from_call(error) is None
    # Without words of its own, or with those that it is going: the coordinator died or stops, and the next one can be asked.
    return coordinator_down() if wordless or known.reason == "DRAINING" else known
