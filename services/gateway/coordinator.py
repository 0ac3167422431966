"""Calls to the coordinator. Leases are asked for and released on the session instead: see session_stream.py."""

from __future__ import annotations

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc

from services.runtime.errors import CaravanError, from_rpc_error


def model_not_found(name: str) -> CaravanError:
    """No engine has registered such a model."""
    shown = name[:100]
    return CaravanError(
        "MODEL_NOT_FOUND", f"The model '{shown}' does not exist.", param="model", model=shown
    )


class CoordinatorClient:
    """The coordinator, with errors of the table. `timeout_s` is for one call, in seconds."""

    def __init__(self, stub: pb_grpc.CoordinatorServiceAsyncStub, timeout_s: float) -> None:
        self._stub = stub
        self.timeout_s = timeout_s

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
