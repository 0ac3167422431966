"""Calls to the coordinator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc
from caravan.core.v1.scheduling_pb2 import Scheduling

from services.gateway.membership import Membership, coordinator_down
from services.gateway.metrics import Outcome
from services.runtime.errors import CaravanError, from_rpc_error

Headers = tuple[tuple[str, str], ...]


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


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a lease is wanted for. `session_id` names a conversation, whose requests go to one engine; empty: none.

    `affinity` are hashes of the prompt at its boundaries, the longest prefix last; requests go to where a prefix was computed.
    """

    request_id: str
    model: str
    session_id: str = ""
    affinity: tuple[bytes, ...] = ()
    scheduling: Scheduling = field(default_factory=Scheduling)


def model_not_found(name: str) -> CaravanError:
    """No engine has registered such a model."""
    shown = name[:100]
    return CaravanError(
        "MODEL_NOT_FOUND", f"The model '{shown}' does not exist.", param="model", model=shown
    )


class CoordinatorClient:
    """The coordinator, with errors of the table. `timeout_s` is for one call, but routes wait as long as they are queued."""

    def __init__(
        self,
        stub: pb_grpc.CoordinatorServiceAsyncStub,
        membership: Membership,
        timeout_s: float,
    ) -> None:
        self._stub = stub
        self._membership = membership
        self.timeout_s = timeout_s

    @property
    def is_joined(self) -> bool:
        """Whether the coordinator was heard lately."""
        return self._membership.is_joined

    async def route(self, wanted: Wanted, headers: Headers) -> Lease:
        """A lease, when it is the turn of the request. Joins again where the coordinator has forgotten this gateway, once."""
        gateway_id = await self._membership.gateway_id()
        try:
            return await self._route(wanted, gateway_id, headers)
        except CaravanError as error:
            if error.reason != "SESSION_UNKNOWN":
                raise
        gateway_id = await self._membership.renew(gateway_id)
        try:
            return await self._route(wanted, gateway_id, headers)
        except CaravanError as error:
            if error.reason == "SESSION_UNKNOWN":
                raise coordinator_down() from None
            raise

    async def _route(self, wanted: Wanted, gateway_id: str, headers: Headers) -> Lease:
        request = pb.RouteRequest(
            request_id=wanted.request_id,
            gateway_id=gateway_id,
            model=wanted.model,
            priority=wanted.scheduling.priority,
            affinity=wanted.affinity,
            session_id=wanted.session_id,
        )
        if wanted.scheduling.HasField("max_wait"):
            request.max_wait.CopyFrom(wanted.scheduling.max_wait)
        try:
            answer = await self._stub.Route(request, metadata=headers)
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
