"""Asks the processes how they are: engines and coordinator by gRPC, Envoy by HTTP."""

from __future__ import annotations

import asyncio
import http.client
from typing import Final

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as coordinator_pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as coordinator_grpc
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from caravan.engine.v1 import engine_service_pb2_grpc as engine_grpc

from services.cli.plan import Plan, ProcessPlan
from services.cli.progress import EngineView, Phase
from services.runtime.channel import open_channel

_TIMEOUT_S: Final = 2.0
_SERVING_PHASES: Final = frozenset(
    {
        engine_pb.ENGINE_PHASE_IDLE,
        engine_pb.ENGINE_PHASE_PREFILLING,
        engine_pb.ENGINE_PHASE_GENERATING,
    }
)


class Probes:
    """Channels to the coordinator of a plan and to engines."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        # By address: as many as there are ports for engines.
        self._channels: dict[str, grpc.aio.Channel] = {}

    def _channel(self, planned: ProcessPlan) -> grpc.aio.Channel:
        if planned.address not in self._channels:
            self._channels[planned.address] = open_channel(planned.address)
        return self._channels[planned.address]

    async def close(self) -> None:
        """Closes the channels; the next look opens them again. Open ones are kept alive by pings, which wake both ends."""
        channels = list(self._channels.values())
        self._channels.clear()
        await asyncio.gather(*(channel.close() for channel in channels))

    async def engine(self, planned: ProcessPlan) -> EngineView:
        """The state of an engine; STARTING where it does not answer."""
        stub = engine_grpc.EngineServiceStub(self._channel(planned))
        try:
            status = await stub.GetStatus(engine_pb.GetStatusRequest(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return EngineView()
        if status.load.phase == engine_pb.ENGINE_PHASE_FAILED:
            return EngineView(Phase.FAILED, failure=status.load.failure or "no reason given")
        if status.load.phase in _SERVING_PHASES:
            return EngineView(Phase.READY, 1.0)
        return EngineView(Phase.LOADING, status.load.load_progress)

    async def routable_models(self) -> frozenset[str]:
        """Models for which the coordinator has a ready engine; none where it does not answer."""
        (coordinator,) = self._plan.of_kind("coordinator")
        stub = coordinator_grpc.CoordinatorServiceStub(self._channel(coordinator))
        try:
            answer = await stub.ListModels(coordinator_pb.ListModelsRequest(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return frozenset()
        return frozenset(model.name for model in answer.models if model.ready_engines > 0)

    async def door_open(self) -> bool:
        """Whether Envoy answers its health check, which is that of the gateway."""
        status, _ = await asyncio.to_thread(_http, "GET", self._plan.ports.public, "/healthz")
        return status == 200


async def close_door(plan: Plan, grace_s: float) -> None:
    """Makes Envoy take no new requests, then waits until those that run have ended, up to the grace."""
    admin = plan.ports.admin
    await asyncio.to_thread(_http, "POST", admin, "/healthcheck/fail")
    await asyncio.to_thread(_http, "POST", admin, "/drain_listeners")
    try:
        async with asyncio.timeout(grace_s):
            while await _active_requests(admin):  # noqa: ASYNC110  another process: no event to wait for
                await asyncio.sleep(0.05)
    except TimeoutError:
        return


async def _active_requests(admin: int) -> int:
    status, body = await asyncio.to_thread(
        _http, "GET", admin, "/stats?filter=^http.public.downstream_rq_active$"
    )
    _, separator, count = body.decode("ascii", "replace").strip().rpartition(": ")
    return int(count) if status == 200 and separator and count.isdigit() else 0


def _http(method: str, port: int, path: str) -> tuple[int, bytes]:
    """Status and body; status 0 where nobody answers. http.client, since it knows nothing of proxies."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()
