"""A real gateway on a loopback port, between a client and peers that a test scripts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import grpc
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
from services.runtime.telemetry import NoTracing, Tracing
from tests.support.coordinator import until
from tests.support.gateway_peers import ANSWER, FakeCoordinator, FakeEngine, Step


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

    def sample(self, name: str, **labels: str) -> float:
        """The value of a series, which must exist."""
        value = self.registry.get_sample_value(name, labels)
        assert value is not None, name
        return value

    def migrations(self, reason: str, result: str) -> float:
        """Moves to another engine for this reason that went so."""
        labels = {"reason": reason, "result": result}
        value = self.registry.get_sample_value("caravan_migrations_total", labels)
        assert value is not None
        return value

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
                    or any(engine.running for engine in self.coordinator.engines)
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
    *script: Step,
    engines: Sequence[FakeEngine] = (),
    tracing: Tracing | None = None,
    interval_ms: int = 2_000,
    **settings: Any,
) -> AsyncIterator[Rig]:
    """A gateway with these engines, or with one that plays `script`."""
    async with AsyncExitStack() as stack:
        peers = list(engines) or [FakeEngine(script or ANSWER)]
        for engine in peers:
            await engine.start()
            stack.push_async_callback(engine.kill)
        coordinator = FakeCoordinator(peers, interval_ms=interval_ms)
        port = await coordinator.server.start()
        stack.push_async_callback(coordinator.server.grpc.stop, 0)
        registry = CollectorRegistry()
        gateway = Gateway(
            GatewaySettings(
                address="127.0.0.1:0",
                **{
                    "coordinator": f"127.0.0.1:{port}",
                    "drain_grace_s": 0.0,
                    "coordinator_timeout_s": 10.0,
                    **settings,
                },
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
        rig = Rig(gateway, coordinator, peers[0], channel, registry)
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
