"""An engine in front of a scripted provider, in this process, behind real gRPC and in front of real HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.engine.v1 import engine_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2_grpc as pb_grpc
from caravan.engine.v1 import remote_options_pb2, remote_service_pb2_grpc
from google.protobuf import json_format

from services.dev.provider.script import Script
from services.dev.provider.server import ScriptedProvider
from services.engine.remote.__main__ import Process, options_of, running
from services.engine.remote.engine import RemoteEngine
from services.engine.remote.metrics import RemoteMetrics
from services.engine.remote.redaction import Redactor
from services.engine.remote.remote_servicer import RemoteServicer
from services.engine.remote.servicer import RemoteEngineServicer
from services.engine.remote.settings import RemoteSettings
from services.runtime.channel import open_channel
from services.runtime.clock import SystemClock
from services.runtime.errors import CaravanError, from_rpc_error
from services.runtime.generate_events import each
from services.runtime.server import ServiceServer
from services.runtime.settings import load
from services.runtime.telemetry import NoTracing, Tracing

KEY = "sk-test-canary-0123456789"
FAST: Mapping[str, object] = {
    "credential": {"env": "PROVIDER_KEY"},
    "retry": {"initialBackoff": "0.01s", "maxBackoff": "0.05s", "budget": 1},
}
"""Options that make no test wait."""


@dataclass
class Answer:
    """All events of one request, put together."""

    started: int = 0
    text: str = ""
    refusal: str = ""
    pieces: int = 0
    deltas: int = 0
    progress: int = 0
    calls: list[chat_pb2.ToolCallDelta] = field(default_factory=list)
    logprobs: list[generation_pb2.TokenLogprob] = field(default_factory=list)
    finished: list[pb.Finished] = field(default_factory=list)

    def add(self, event: pb.GenerateResponse) -> None:
        """Takes the next event."""
        assert not self.finished
        match event.WhichOneof("event"):
            case "started":
                assert not self.deltas
                self.started += 1
            case "delta":
                assert self.started
                self.deltas += 1
                self.text += event.delta.text
                self.refusal += event.delta.refusal
                self.pieces += event.delta.pieces
                self.calls += event.delta.tool_calls
                self.logprobs += event.delta.logprobs
            case "progress":
                self.progress += 1
            case _:
                self.finished.append(event.finished)

    @property
    def reason(self) -> str:
        """Why it ended; there is one start and one end (I1)."""
        assert self.started == len(self.finished) == 1
        name: str = generation_pb2.FinishReason.Name(self.finished[0].reason)
        return name.removeprefix("FINISH_REASON_")

    @property
    def usage(self) -> generation_pb2.Usage:
        """Tokens that were counted."""
        return self.finished[0].usage


@dataclass
class Rig:
    """One engine and its provider."""

    engine: RemoteEngine
    provider: ScriptedProvider
    process: Process
    stub: pb_grpc.EngineServiceAsyncStub
    remote: remote_service_pb2_grpc.RemoteServiceAsyncStub
    address: str
    count: int = 0

    def request(self, text: str = "hello there", **fields: Any) -> pb.GenerateRequest:
        """A chat with one user message."""
        self.count += 1
        request = pb.GenerateRequest(request_id=f"test-{self.count}", **fields)
        request.chat.messages.add(role=chat_pb2.ROLE_USER, content=text)
        return request

    async def run(
        self, request: pb.GenerateRequest | None = None, timeout_s: float | None = None
    ) -> Answer:
        """The answer. Raises the CaravanError that the engine meant."""
        answer = Answer()
        try:
            call = self.stub.Generate(request or self.request(), timeout=timeout_s)
            async for event in each(call):
                answer.add(event)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, service="engine") from error
        return answer

    async def refusal(self, request: pb.GenerateRequest | None = None) -> CaravanError:
        """The error that the request ends with."""
        try:
            await self.run(request)
        except CaravanError as error:
            return error
        raise AssertionError("the request succeeded")

    def sample(self, name: str, **labels: str) -> float:
        """The value of a series; 0 if it is not there."""
        value = self.process.metrics.registry.get_sample_value(name, labels)
        return value or 0.0

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until the condition holds, for ten seconds at most."""
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.002)

    async def idle(self) -> None:
        """Waits until nothing runs and nothing is held."""
        await self.until(lambda: self.engine.inflight.depth == 0)
        await self.until(lambda: self.engine.dispatcher.pool.busy == 0)
        assert self.engine.dispatcher.waiting == 0
        assert self.engine.endpoint.gate.status().concurrent_requests == 0


@asynccontextmanager
async def running_remote(
    script: Script | None = None,
    *,
    provider: str = "openai",
    tracing: Tracing | None = None,
    environ: dict[str, str] | None = None,
    **options: object,
) -> AsyncIterator[Rig]:
    """An engine with FAST and these options, in JSON names. The key is KEY unless `environ` says otherwise."""
    async with ScriptedProvider(script, accepted_keys={KEY}) as scripted:
        told = {**FAST, "baseUrl": scripted.base_url, **options}
        settings = load(
            RemoteSettings,
            {
                "CARAVAN_ENGINE_MODEL": "chat=gpt-4o-mini",
                "CARAVAN_REMOTE_PROVIDER": provider,
                "CARAVAN_REMOTE_OPTIONS": _json(told),
                "CARAVAN_ENGINE_PROGRESS_S": "0.05",
            },
        )
        process = Process(
            settings=settings,
            options=options_of(settings),
            incarnation="life-1",
            environ={"PROVIDER_KEY": KEY} if environ is None else environ,
            clock=SystemClock(),
            tracing=tracing or NoTracing(),
            metrics=RemoteMetrics(),
            redactor=Redactor(),
        )
        async with _served(process, scripted) as rig:
            yield rig


@asynccontextmanager
async def _served(process: Process, scripted: ScriptedProvider) -> AsyncIterator[Rig]:
    server = ServiceServer("127.0.0.1:0", [], 0)
    async with running(process, None) as engine:
        pb_grpc.add_EngineServiceServicer_to_server(
            RemoteEngineServicer(engine, process.tracing), server.services
        )
        remote_service_pb2_grpc.add_RemoteServiceServicer_to_server(
            RemoteServicer(engine), server.services
        )
        address = f"127.0.0.1:{await server.start()}"
        try:
            async with open_channel(address) as channel:
                yield Rig(
                    engine,
                    scripted,
                    process,
                    pb_grpc.EngineServiceStub(channel),
                    remote_service_pb2_grpc.RemoteServiceStub(channel),
                    address,
                )
        finally:
            await server.drain_and_stop()


def _json(told: Mapping[str, object]) -> str:
    options = json_format.ParseDict(dict(told), remote_options_pb2.RemoteOptions())
    return json_format.MessageToJson(options)
