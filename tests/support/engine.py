"""An engine for tests: in this process, on a free port, with a scripted or a real model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.engine.v1 import engine_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2_grpc as pb_grpc

from services.engine.__main__ import build_cache, build_engine
from services.engine.engine import Engine
from services.engine.metrics import EngineMetrics
from services.engine.servicer import EngineServicer
from services.engine.settings import EngineSettings
from services.runtime.channel import open_channel
from services.runtime.errors import CaravanError, from_rpc_error
from services.runtime.generate_events import each
from services.runtime.server import ServiceServer
from services.runtime.settings import load
from services.runtime.telemetry import NoTracing

DEMO_MODEL = "demo=models/caravan-demo.gguf"


@dataclass
class Answer:
    """All events of one request, put together."""

    started: list[pb.Started] = field(default_factory=list)
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    calls: list[chat_pb2.ToolCallDelta] = field(default_factory=list)
    logprobs: list[generation_pb2.TokenLogprob] = field(default_factory=list)
    finished: list[pb.Finished] = field(default_factory=list)
    progress: list[pb.Progress] = field(default_factory=list)
    deltas: int = 0

    def add(self, event: pb.GenerateResponse) -> None:
        """Takes the next event."""
        kind = event.WhichOneof("event")
        if kind == "started":
            assert not self.deltas
            assert not self.finished
            self.started.append(event.started)
        elif kind == "delta":
            assert self.started
            assert not self.finished
            self.deltas += 1
            self.text += event.delta.text
            self.tokens += event.delta.token_ids
            self.calls += event.delta.tool_calls
            self.logprobs += event.delta.logprobs
        elif kind == "progress":
            self.progress.append(event.progress)
        else:
            self.finished.append(event.finished)

    @property
    def reason(self) -> int:
        """Why it ended; there is one ending (I1)."""
        assert len(self.started) == len(self.finished) == 1
        return self.finished[0].reason

    @property
    def cached(self) -> int:
        """Prompt tokens that were reused; both ends of the answer say the same."""
        tokens = self.finished[0].usage.cached_tokens
        assert self.started[0].cached_tokens == tokens
        return tokens

    @property
    def hit(self) -> str:
        """Where they came from, such as "EXACT"."""
        assert self.started[0].cache_hit == self.finished[0].cache_hit
        name: str = generation_pb2.CacheHit.Name(self.finished[0].cache_hit)
        return name.removeprefix("CACHE_HIT_")


class EngineClient:
    """Calls one engine."""

    def __init__(
        self,
        stub: pb_grpc.EngineServiceAsyncStub,
        engine: Engine,
        metrics: EngineMetrics,
        address: str,
    ) -> None:
        self.stub = stub
        self.address = address
        self.engine = engine
        self.metrics = metrics
        self._count = 0

    def request(self, prompt: str | list[int], **fields: object) -> pb.GenerateRequest:
        """A greedy chat with one user message, or a prompt of tokens; `fields` are those of sampling, stop and cache."""
        self._count += 1
        request = pb.GenerateRequest(request_id=f"test-{self._count}")
        if isinstance(prompt, str):
            request.chat.messages.add(role=chat_pb2.ROLE_USER, content=prompt)
        else:
            request.tokens.ids.extend(prompt)
        request.sampling.temperature = 0
        for name, value in fields.items():
            part: Any = request.sampling
            if name in {"max_tokens", "stop", "ignore_eos"}:
                part = request.stop
            elif name in {"parent_key", "session_id", "salt", "bypass"}:
                part = request.cache
            if isinstance(value, list):
                getattr(part, name).extend(value)
            else:
                setattr(part, name, value)
        return request

    async def run(self, request: pb.GenerateRequest) -> Answer:
        """The answer. Raises the CaravanError that the engine meant."""
        answer = Answer()
        try:
            async for event in each(self.stub.Generate(request)):
                answer.add(event)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, service="engine") from error
        return answer

    async def steps(self, request: pb.GenerateRequest) -> list[Answer]:
        """What a gateway has of an answer after each of its deltas, and at last the whole answer."""
        seen: list[Answer] = []
        answer = Answer()
        async for event in each(self.stub.Generate(request)):
            answer.add(event)
            if event.HasField("delta"):
                seen.append(replace(answer, tokens=list(answer.tokens), calls=list(answer.calls)))
        return [*seen, answer]

    async def ask(self, prompt: str | list[int], **fields: object) -> Answer:
        """`run` of `request`."""
        return await self.run(self.request(prompt, **fields))

    async def refusal(self, request: pb.GenerateRequest) -> CaravanError:
        """The error of a request that must fail."""
        try:
            await self.run(request)
        except CaravanError as error:
            return error
        raise AssertionError("the request was not refused")

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text in which control texts are control tokens."""
        assert self.engine._backend is not None
        return self.engine._backend.vocabulary.tokenize(text, parse_special=True)

    def tokenize_chat(self, chat: chat_pb2.ChatPrompt) -> list[int]:
        """Tokens of a chat, as the engine prepares it."""
        assert self.engine._preparation is not None
        return self.engine._preparation._tokenizer.chat(chat)

    def metric(self, name: str, **labels: str) -> float:
        """The value of a series."""
        value = self.metrics.registry.get_sample_value(name, labels)
        assert value is not None, name
        return value

    async def until_saved(self) -> None:
        """Waits until everything that was computed is packed, and written where there are roots."""
        await self.until_idle()
        memory, store = self.engine._decoder._memory, self.engine.store
        assert store is not None
        async with asyncio.timeout(20):
            while memory.saves_pending or store.queued_bytes:  # noqa: ASYNC110 - of other threads
                await asyncio.sleep(0.005)

    async def until_joined(self) -> None:
        """Waits for the session with the cache service."""
        async with asyncio.timeout(20):
            while not (self.engine.store and self.engine.store.joined):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.005)

    async def status(self) -> pb.GetStatusResponse:
        """What the engine says of itself."""
        return await self.stub.GetStatus(pb.GetStatusRequest())

    async def inflight(self) -> list[pb.InflightRequest]:
        """The requests in flight."""
        return list((await self.stub.ListInflight(pb.ListInflightRequest())).requests)

    async def until_idle(self) -> pb.EngineLoad:
        """Waits until no request is left; returns the load."""
        async with asyncio.timeout(20):
            while True:
                load = (await self.status()).load
                if not load.active_sequences and not load.queued_requests:
                    return load
                await asyncio.sleep(0.005)

    async def until(self, holds: Callable[[pb.EngineLoad], bool]) -> None:
        """Waits until the load is as told."""
        async with asyncio.timeout(20):
            while not holds((await self.status()).load):  # noqa: ASYNC110 - asked over gRPC
                await asyncio.sleep(0.005)


@asynccontextmanager
async def running_engine(
    model: str, *, ready: bool = True, **env: str
) -> AsyncIterator[EngineClient]:
    """An engine in this process; `env` are settings without their CARAVAN_ENGINE_ prefix."""
    environ = {f"CARAVAN_ENGINE_{name}": value for name, value in env.items()}
    environ.setdefault("CARAVAN_ENGINE_THREADS", "1")
    settings = load(EngineSettings, {**environ, "CARAVAN_ENGINE_MODEL": model})
    metrics = EngineMetrics()
    engine = build_engine(settings, metrics)
    server = ServiceServer("127.0.0.1:0", [], 0)
    pb_grpc.add_EngineServiceServicer_to_server(
        EngineServicer(engine, NoTracing()), server.services
    )
    port = await server.start()
    loaded = asyncio.Event()
    engine.on_ready = loaded.set
    engine.start()
    cache = build_cache(settings, engine, f"127.0.0.1:{port}", metrics)
    cache.start()
    try:
        if ready:
            async with asyncio.timeout(30):
                await loaded.wait()
                await cache.opened.wait()
        address = f"127.0.0.1:{port}"
        async with open_channel(address) as channel:
            yield EngineClient(pb_grpc.EngineServiceStub(channel), engine, metrics, address)
    finally:
        engine.drain(0)
        await server.drain_and_stop()
        assert await engine.stop(20), "the decode thread ends"
        await cache.close(20)
