"""Calls to the coordinator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc

from services.gateway.membership import Membership, coordinator_down
from services.gateway.metrics import Outcome
from services.runtime.errors import CaravanError, from_rpc_error

Headers = tuple[tuple[str, str], ...]

ROUTE_ABANDONED_S: Final = 30.0
"""A route that nobody waits for any more may still be granted; until then it is waited for, to give the lease back."""

_OUTCOMES: Final = {
    Outcome.FINISHED: pb.OUTCOME_FINISHED,
    Outcome.CANCELLED: pb.OUTCOME_CANCELLED,
    Outcome.REFUSED: pb.OUTCOME_REFUSED,
    Outcome.FAILED: pb.OUTCOME_FAILED,
}


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run one request on one engine; `address` is host:port."""

    lease_id: str
    engine_id: str
    address: str


class CoordinatorClient:
    """The coordinator, with errors of the table. `timeout_s` is for one call."""

    def __init__(
        self,
        stub: pb_grpc.CoordinatorServiceAsyncStub,
        membership: Membership,
        timeout_s: float,
    ) -> None:
        self._stub = stub
        self._membership = membership
        self.timeout_s = timeout_s

    async def route(self, request_id: str, model: str, headers: Headers) -> Lease:
        """A lease. Joins again where the coordinator has forgotten this gateway, once."""
        gateway_id = await self._membership.gateway_id()
        try:
            return await self._route(request_id, gateway_id, model, headers)
        except CaravanError as error:
            if error.reason != "SESSION_UNKNOWN":
                raise
        gateway_id = await self._membership.renew(gateway_id)
        try:
            return await self._route(request_id, gateway_id, model, headers)
        except CaravanError as error:
            if error.reason == "SESSION_UNKNOWN":
                raise coordinator_down() from None
            raise

    async def _route(self, request_id: str, gateway_id: str, model: str, headers: Headers) -> Lease:
        request = pb.RouteRequest(request_id=request_id, gateway_id=gateway_id, model=model)
        try:
            answer = await self._stub.Route(request, timeout=ROUTE_ABANDONED_S, metadata=headers)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, service="coordinator") from None
        lease = answer.lease
        return Lease(lease.lease_id, lease.engine_id, lease.address)

    async def release(self, lease: Lease, outcome: Outcome) -> None:
        """Ends a lease. Raises CaravanError."""
        request = pb.ReleaseRequest(lease_id=lease.lease_id, outcome=_OUTCOMES[outcome])
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

    async def list_models(self) -> list[pb.Model]:
        """The models, sorted by name."""
        try:
            answer = await self._stub.ListModels(pb.ListModelsRequest(), timeout=self.timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, service="coordinator") from None
        return list(answer.models)
