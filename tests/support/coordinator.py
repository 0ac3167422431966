"""A coordinator on a loopback port, with engines and gateways that a test moves by hand."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc
from caravan.coordinator.v1 import deployment_service_pb2_grpc as deployment_grpc
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from prometheus_client import CollectorRegistry

from services.coordinator.deployments_servicer import DeploymentServicer
from services.coordinator.limits import Limits
from services.coordinator.metrics import CoordinatorMetrics
from services.coordinator.routing import LeastLoaded, Policy
from services.coordinator.servicer import CoordinatorServicer
from services.coordinator.state import CoordinatorState
from services.runtime.channel import open_channel
from services.runtime.clock import CountingIds, IdSource, ManualClock
from services.runtime.errors import CaravanError, from_rpc_error
from services.runtime.server import ServiceServer
from services.runtime.telemetry import NoTracing, Tracing

IDLE = engine_pb.ENGINE_PHASE_IDLE
CALL_TIMEOUT_S = 10.0


async def until(condition: Callable[[], bool], deadline_s: float = 10.0) -> None:
    """Returns when the condition holds; fails the test after the deadline."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110 - the states of the coordinator have no events
            await asyncio.sleep(0.002)


async def refused(call: Awaitable[object]) -> CaravanError:
    """The error of the table with which a call ends."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error, service="coordinator")
    raise AssertionError("the call was not refused")


_LIVES = itertools.count(1)


class EnginePeer:
    """The engine's side of JoinEngine. Each is another life of its engine, unless it is told which one."""

    def __init__(
        self,
        stub: pb_grpc.CoordinatorServiceAsyncStub,
        engine_id: str,
        model: str = "demo",
        address: str = "127.0.0.1:7010",
        incarnation: str = "",
    ) -> None:
        self._call = stub.JoinEngine()
        self.address = address
        self.engine_id = engine_id
        self.revision = ""
        self.incarnation = incarnation or f"{engine_id}-life-{next(_LIVES)}"
        self.model = engine_pb.ModelInfo(name=model, max_sequences=2, context_tokens=512)

    async def join(self, phase: engine_pb.EnginePhase.ValueType = IDLE) -> pb.EngineWelcome:
        """Registers; returns when the coordinator has taken it."""
        registration = pb.EngineRegistration(
            engine_id=self.engine_id,
            address=self.address,
            model=self.model,
            load=engine_pb.EngineLoad(phase=phase),
            incarnation=self.incarnation,
            revision=self.revision,
        )
        await self._call.write(pb.JoinEngineRequest(register=registration))
        response = await self.receive()
        assert response.WhichOneof("message") == "welcome"
        return response.welcome

    async def report(self, load: engine_pb.EngineLoad) -> None:
        """Sends a report; the coordinator takes it some time later."""
        await self._call.write(pb.JoinEngineRequest(report=pb.EngineReport(load=load)))

    async def send(self, request: pb.JoinEngineRequest) -> None:
        """Sends any message."""
        await self._call.write(request)

    async def receive(self) -> pb.JoinEngineResponse:
        """The next message of the coordinator."""
        async with asyncio.timeout(CALL_TIMEOUT_S):
            response = await self._call.read()
        assert isinstance(response, pb.JoinEngineResponse), "the stream ended"
        return response

    async def command(self) -> pb.JoinEngineResponse:
        """The next message that is no cancel."""
        while (response := await self.receive()).WhichOneof("message") == "cancel":
            pass
        return response

    async def cancelled_request(self) -> str:
        """The id in the next message, which must be a cancel."""
        response = await self.receive()
        assert response.WhichOneof("message") == "cancel"
        return response.cancel.request_id

    async def end(self) -> CaravanError:
        """Waits until the coordinator ends the stream; returns the error. No message may come before."""
        error, received = await _end(self._call)
        assert not received
        return error

    async def leave(self) -> None:
        """Ends the stream in good order."""
        await self._call.done_writing()
        async with asyncio.timeout(CALL_TIMEOUT_S):
            assert await self._call.code() is grpc.StatusCode.OK

    def die(self) -> None:
        """Breaks the stream."""
        self._call.cancel()


class GatewayPeer:
    """The gateway's side of JoinGateway."""

    def __init__(self, stub: pb_grpc.CoordinatorServiceAsyncStub, gateway_id: str) -> None:
        self._call = stub.JoinGateway()
        self._stub = stub
        self.gateway_id = gateway_id

    async def join(self, held: Sequence[pb.HeldLease] = ()) -> pb.JoinGatewayResponse:
        """Joins, with leases of before; returns when the coordinator has taken it."""
        return await self.beat(held)

    async def beat(self, held: Sequence[pb.HeldLease] = ()) -> pb.JoinGatewayResponse:
        """Sends a heartbeat and awaits the answer."""
        await self.send(gateway_id=self.gateway_id, held=held)
        return await self.receive()

    async def send(self, **fields: Any) -> None:
        """Sends any message."""
        await self._call.write(pb.JoinGatewayRequest(**fields))

    async def receive(self) -> pb.JoinGatewayResponse:
        """The next message of the coordinator."""
        async with asyncio.timeout(CALL_TIMEOUT_S):
            response = await self._call.read()
        assert isinstance(response, pb.JoinGatewayResponse), "the stream ended"
        return response

    async def answers(self) -> list[pb.RouteAnswer]:
        """The answers to routes in the next message, which must have some and nothing else."""
        response = await self.receive()
        assert response.routes
        assert not response.HasField("heartbeat_interval")
        return list(response.routes)

    def ask(
        self, request_id: str, model: str = "demo", wait_s: float | None = None, **fields: Any
    ) -> grpc.aio.UnaryUnaryCall[pb.RouteRequest, pb.RouteResponse]:
        """Asks for a lease, waiting up to `wait_s` for it; None: as long as the coordinator is set to."""
        request = pb.RouteRequest(
            request_id=request_id, gateway_id=self.gateway_id, model=model, **fields
        )
        if wait_s is not None:
            request.max_wait.FromMicroseconds(round(wait_s * 1e6))
        return self._stub.Route(request, timeout=CALL_TIMEOUT_S)

    async def route(self, request_id: str, model: str = "demo") -> pb.Lease:
        """Asks for a lease, without waiting for a sequence."""
        return (await self.ask(request_id, model, wait_s=0)).lease

    async def refusal(self, request_id: str, model: str = "demo") -> CaravanError:
        """Asks for a lease that must be refused; returns why."""
        return await refused(self.route(request_id, model))

    async def release(self, lease_id: str) -> bool:
        """Releases a lease."""
        request = pb.ReleaseRequest(lease_id=lease_id, outcome=pb.OUTCOME_FINISHED)
        return (await self._stub.Release(request, timeout=CALL_TIMEOUT_S)).released

    async def end(self) -> CaravanError:
        """Waits until the coordinator ends the stream; returns the error."""
        return (await _end(self._call))[0]

    def die(self) -> None:
        """Breaks the stream."""
        self._call.cancel()


async def _end(call: grpc.aio.StreamStreamCall[Any, Any]) -> tuple[CaravanError, list[object]]:
    received: list[object] = []
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            while (message := await call.read()) is not grpc.aio.EOF:
                received.append(message)
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error, service="coordinator"), received
    raise AssertionError("the stream ended without an error")


@dataclass
class Coordinator:
    """A running coordinator and what a test needs of it."""

    state: CoordinatorState
    servicer: CoordinatorServicer
    registry: CollectorRegistry
    clock: ManualClock
    server: ServiceServer
    stub: pb_grpc.CoordinatorServiceAsyncStub
    address: str
    deployments: deployment_grpc.DeploymentServiceAsyncStub

    def metric(self, name: str, **labels: str) -> float:
        """The value of a series at this moment."""
        value = self.registry.get_sample_value(name, labels)
        assert value is not None, name
        return value

    async def engine(
        self,
        engine_id: str = "engine-0",
        model: str = "demo",
        max_sequences: int = 2,
        incarnation: str = "",
    ) -> EnginePeer:
        """An engine that has joined."""
        peer = EnginePeer(self.stub, engine_id, model, incarnation=incarnation)
        peer.model.max_sequences = max_sequences
        await peer.join()
        return peer

    async def gateway(
        self, gateway_id: str = "gateway-0", held: Sequence[pb.HeldLease] = ()
    ) -> GatewayPeer:
        """A gateway that has joined, with leases of before."""
        peer = GatewayPeer(self.stub, gateway_id)
        await peer.join(held)
        return peer

    async def pass_time(self, seconds: int, *speaking: EnginePeer | GatewayPeer) -> None:
        """Second by second, in which these peers speak and the sweeper runs."""
        for _ in range(seconds):
            self.clock.advance(1)
            for peer in speaking:
                if isinstance(peer, GatewayPeer):
                    await peer.beat()
                    continue
                await peer.report(engine_pb.EngineLoad(phase=IDLE))
                record = self.state.engines.find(peer.engine_id)
                assert record is not None
                await until(lambda told=record: told.reported_at == self.clock.now)  # type: ignore[misc]
            self.servicer.expire()


@asynccontextmanager
async def running_coordinator(
    limits: Limits | None = None,
    tracing: Tracing | None = None,
    new_policy: Callable[[], Policy] = LeastLoaded,
    deployments_state: Path | None = None,
    address: str = "127.0.0.1:0",
    ids: IdSource | None = None,
) -> AsyncIterator[Coordinator]:
    """A coordinator whose clock stands still; the test moves it and calls `servicer.expire()`. Ids are counted by default."""
    clock = ManualClock()
    state = CoordinatorState(limits or Limits(), new_policy)
    registry = CollectorRegistry()
    servicer = CoordinatorServicer(
        state,
        CoordinatorMetrics(registry, state),
        tracing or NoTracing(),
        clock,
        ids or CountingIds(),
    )
    server = ServiceServer(address, [], drain_grace_s=0)
    pb_grpc.add_CoordinatorServiceServicer_to_server(servicer, server.services)
    deployments = DeploymentServicer(state.deployments, servicer.perform, clock, deployments_state)
    deployment_grpc.add_DeploymentServiceServicer_to_server(deployments, server.services)
    port = await server.start()
    address = f"127.0.0.1:{port}"
    async with open_channel(address) as channel:
        stub = pb_grpc.CoordinatorServiceStub(channel)
        deploying = deployment_grpc.DeploymentServiceStub(channel)
        try:
            yield Coordinator(state, servicer, registry, clock, server, stub, address, deploying)
            state.check_integrity()
        finally:
            deployments.drain()
            # Without a grace the server would cut off watches that are about to say why they end.
            await until(lambda: not deployments._watchers)
            await server.drain_and_stop()
    await until(lambda: not servicer._outboxes)
    assert len(state.leases) + len(state.engines) + len(state.gateways) == 0  # I6
    assert len(state.waiting) + len(servicer._routes) == 0
