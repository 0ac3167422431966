"""A real gateway on a loopback port, between a client and peers that a test scripts."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
from caravan.coordinator.v1 import coordinator_service_pb2 as coordinator_pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as coordinator_grpc
from caravan.core.v1 import generation_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from caravan.engine.v1 import engine_service_pb2_grpc as engine_grpc
from caravan.inference.v1 import inference_service_pb2_grpc as inference_grpc
from caravan.openai.v1 import openai_service_pb2 as openai_pb
from caravan.openai.v1 import openai_service_pb2_grpc as openai_grpc
from google.api.httpbody_pb2 import HttpBody
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from services.gateway.__main__ import Gateway
from services.gateway.settings import GatewaySettings
from services.runtime.channel import open_channel
from services.runtime.clock import CountingIds, SystemClock
from services.runtime.errors import CaravanError
from services.runtime.server import ServiceServer
from services.runtime.telemetry import NoTracing, Tracing
from tests.support.coordinator import until

Event = engine_pb.GenerateResponse
Step = Event | CaravanError | Callable[[], Awaitable[None]]


def started(prompt_tokens: int = 3, cached_tokens: int = 1) -> Event:
    """The first event."""
    return Event(
        started=engine_pb.Started(prompt_tokens=prompt_tokens, cached_tokens=cached_tokens)
    )


def delta(text: str, **fields: Any) -> Event:
    """Some tokens; as many ids as the text has words."""
    ids = fields.pop("token_ids", range(len(text.split()) or 1))
    return Event(delta=engine_pb.Delta(text=text, token_ids=ids, **fields))


def finished(
    reason: generation_pb2.FinishReason.ValueType = generation_pb2.FINISH_REASON_STOP,
) -> Event:
    """The last event."""
    usage = generation_pb2.Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
    return Event(finished=engine_pb.Finished(reason=reason, usage=usage))


ANSWER: tuple[Step, ...] = (started(), delta("Hello"), delta(" you"), finished())


async def hang() -> None:
    """A step that never ends by itself."""
    await asyncio.Event().wait()


class FakeEngine(engine_grpc.EngineServiceServicer):
    """Plays a script for every request: events are sent, errors raised, and anything else is awaited."""

    def __init__(self, script: Sequence[Step] = ANSWER, address: str = "127.0.0.1:0") -> None:
        self.script = script
        self.requests: list[engine_pb.GenerateRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.cancelled: list[str] = []
        self.running = 0
        self.server = ServiceServer(address, [], 0.0)
        engine_grpc.add_EngineServiceServicer_to_server(self, self.server.grpc)
        self.address = ""

    async def start(self) -> None:
        """Listens on a free port."""
        self.address = f"127.0.0.1:{await self.server.start()}"

    async def kill(self) -> None:
        """Closes its connections at once, whatever runs."""
        await self.server.grpc.stop(0)

    async def Generate(
        self, request: engine_pb.GenerateRequest, context: Any
    ) -> AsyncIterator[Event]:
        """Plays the script."""
        self.requests.append(request)
        self.metadata.append({k: v for k, v in context.invocation_metadata() if isinstance(v, str)})
        self.running += 1
        try:
            for step in self.script:
                if isinstance(step, Event):
                    yield step
                elif isinstance(step, CaravanError):
                    raise step
                else:
                    await step()
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise
        finally:
            self.running -= 1

    async def Cancel(self, request: Any, context: Any) -> Any:
        """A gateway cancels by ending its call, never by this."""
        raise AssertionError("not called by gateways")

    async def GetStatus(self, request: Any, context: Any) -> Any:
        """Nor does it ask for the status."""
        raise AssertionError("not called by gateways")

    async def ListInflight(self, request: Any, context: Any) -> Any:
        """Nor for the list."""
        raise AssertionError("not called by gateways")


@dataclass
class FakeCoordinator(coordinator_grpc.CoordinatorServiceServicer):
    """Grants leases on its engines in turn. `refusals` are used up first: an error is raised, a callable awaited."""

    engines: list[FakeEngine] = field(default_factory=list)
    refusals: list[Step] = field(default_factory=list)
    grants: dict[str, str] = field(default_factory=dict)
    releases: list[tuple[str, coordinator_pb.Outcome.ValueType]] = field(default_factory=list)
    routes: list[coordinator_pb.RouteRequest] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)
    models: list[coordinator_pb.Model] = field(default_factory=list)
    hold_release: Callable[[], Awaitable[None]] | None = None
    known: set[str] = field(default_factory=set)
    beats: int = 0
    silent: bool = False
    interval_ms: int = 2_000

    def __post_init__(self) -> None:
        self._numbers = itertools.count(1)
        self.server = ServiceServer("127.0.0.1:0", [], 0.0)
        coordinator_grpc.add_CoordinatorServiceServicer_to_server(self, self.server.grpc)

    @property
    def held(self) -> set[str]:
        """Leases that were granted and not released."""
        return set(self.grants) - {lease_id for lease_id, _ in self.releases}

    @property
    def outcomes(self) -> list[str]:
        """Outcomes of the releases, by name."""
        return [
            coordinator_pb.Outcome.Name(outcome).removeprefix("OUTCOME_")
            for _, outcome in self.releases
        ]

    async def JoinGateway(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        """Welcomes, and answers every beat unless it is silent."""
        first = await anext(requests)
        self.joined.append(first.gateway_id)
        self.known.add(first.gateway_id)
        response = coordinator_pb.JoinGatewayResponse()
        response.heartbeat_interval.FromMilliseconds(self.interval_ms)
        try:
            yield response
            async for _ in requests:
                self.beats += 1
                if not self.silent:
                    yield response
        finally:
            self.known.discard(first.gateway_id)

    async def Route(self, request: Any, context: Any) -> Any:
        """Grants a lease."""
        self.routes.append(request)
        if self.refusals:
            step = self.refusals.pop(0)
            if isinstance(step, CaravanError):
                raise step
            assert callable(step)
            await step()
        if request.gateway_id not in self.known:
            raise CaravanError("SESSION_UNKNOWN", "?", session_id=request.gateway_id)
        number = next(self._numbers)
        engine = self.engines[(number - 1) % len(self.engines)]
        lease_id = f"lease-{number}"
        self.grants[lease_id] = request.request_id
        return coordinator_pb.RouteResponse(
            lease=coordinator_pb.Lease(
                lease_id=lease_id, engine_id=f"engine-{number}", address=engine.address
            )
        )

    async def Release(self, request: Any, context: Any) -> Any:
        """Notes the release."""
        if self.hold_release is not None:
            await self.hold_release()
        self.releases.append((request.lease_id, request.outcome))
        return coordinator_pb.ReleaseResponse(released=True)

    async def Cancel(self, request: Any, context: Any) -> Any:
        """Notes the cancel."""
        if request.request_id not in self.grants.values():
            raise CaravanError(
                "REQUEST_NOT_FOUND", "No such request.", request_id=request.request_id
            )
        self.cancels.append(request.request_id)
        return coordinator_pb.CancelResponse()

    async def ListModels(self, request: Any, context: Any) -> Any:
        """Lists the models that the test set."""
        return coordinator_pb.ListModelsResponse(models=self.models)

    async def JoinEngine(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Engines are given by the test."""
        raise AssertionError("not called by gateways")
        yield

    async def ListInflight(self, request: Any, context: Any) -> Any:
        """Asked by operators only."""
        raise AssertionError("not called by gateways")

    async def ListEngines(self, request: Any, context: Any) -> Any:
        """Asked by operators only."""
        raise AssertionError("not called by gateways")


class Rig:
    """The gateway, its peers and a client."""

    def __init__(
        self,
        gateway: Gateway,
        coordinator: FakeCoordinator,
        engine: FakeEngine,
        channel: grpc.aio.Channel,
        registry: CollectorRegistry,
    ) -> None:
        self.gateway = gateway
        self.coordinator = coordinator
        self.engine = engine
        self.registry = registry
        self.openai = openai_grpc.OpenAIServiceStub(channel)
        self.inference = inference_grpc.InferenceServiceStub(channel)
        self.health: Any = health_pb2_grpc.HealthStub(channel)

    def chat(self, body: bytes | None = None, timeout: float | None = 20, **fields: Any) -> Any:
        """A call of CreateChatCompletion."""
        request = openai_pb.CreateChatCompletionRequest(body=HttpBody(data=body or chat(**fields)))
        return self.openai.CreateChatCompletion(request, timeout=timeout)

    async def chat_bytes(self, body: bytes | None = None, **fields: Any) -> bytes:
        """The whole answer of CreateChatCompletion."""
        return b"".join([part.body.data async for part in self.chat(body, **fields)])

    def count(self, outcome: str, api: str = "chat") -> float:
        """Requests that ended so."""
        labels = {"api": api, "outcome": outcome}
        return self.registry.get_sample_value("caravan_requests_total", labels) or 0.0

    async def serving(self) -> bool:
        """What the health check says."""
        answer = await self.health.Check(health_pb2.HealthCheckRequest(service=""))
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def idle(self) -> None:
        """Waits until nothing is left of any request."""
        await until(
            lambda: (
                not (
                    len(self.gateway.sessions)
                    or len(self.gateway.background)
                    or self.coordinator.held
                    or self.engine.running
                )
            )
        )


def chat(**fields: Any) -> bytes:
    """A body for /v1/chat/completions."""
    messages = [{"role": "user", "content": "hi"}]
    return json.dumps({"model": "demo", "messages": messages, **fields}).encode()


async def until_serving(rig: Rig, serving: bool) -> None:
    """Returns when the health check says so; fails the test after 10 s."""
    async with asyncio.timeout(10):
        async for answer in rig.health.Watch(health_pb2.HealthCheckRequest(service="")):
            if (answer.status == health_pb2.HealthCheckResponse.SERVING) is serving:
                return


@asynccontextmanager
async def running(
    *script: Step, tracing: Tracing | None = None, interval_ms: int = 2_000, **settings: Any
) -> AsyncIterator[Rig]:
    """A gateway with one engine that plays `script`."""
    async with AsyncExitStack() as stack:
        engine = FakeEngine(script or ANSWER)
        await engine.start()
        stack.push_async_callback(engine.kill)
        coordinator = FakeCoordinator([engine], interval_ms=interval_ms)
        port = await coordinator.server.start()
        stack.push_async_callback(coordinator.server.grpc.stop, 0)
        registry = CollectorRegistry()
        gateway = Gateway(
            GatewaySettings(
                address="127.0.0.1:0",
                coordinator=f"127.0.0.1:{port}",
                **{"drain_grace_s": 0.0, "coordinator_timeout_s": 10.0, **settings},
            ),
            registry,
            SystemClock(),
            CountingIds(),
            tracing or NoTracing(),
        )
        gateway_port = await gateway.start()
        stack.push_async_callback(gateway.stop)
        channel = open_channel(f"127.0.0.1:{gateway_port}")
        stack.push_async_callback(channel.close)
        rig = Rig(gateway, coordinator, engine, channel, registry)
        await until_serving(rig, serving=True)
        yield rig


async def error_of(call: Any) -> grpc.aio.AioRpcError:
    """The error with which a call ends."""
    with suppress(TypeError):
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            return error
        raise AssertionError("the call did not fail")
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call did not fail")


def openai_error(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """The OpenAI error that Envoy would show."""
    found = dict(error.trailing_metadata() or ())["x-openai-error"]
    shown: dict[str, Any] = json.loads(found)["error"]
    return shown
