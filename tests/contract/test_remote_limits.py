"""Two real engines that share the limit of a scripted provider, through a real coordinator."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import grpc
import pytest
from caravan.core.v1 import chat_pb2
from caravan.engine.v1 import engine_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2_grpc as pb_grpc
from caravan.engine.v1 import remote_options_pb2, remote_service_pb2, remote_service_pb2_grpc
from google.protobuf import json_format

from services.coordinator.limits import Limits
from services.dev.provider.faults import Fault, Kind
from services.dev.provider.script import Script
from services.dev.provider.server import ScriptedProvider
from services.engine.remote.__main__ import serve
from services.engine.remote.settings import RemoteSettings
from services.runtime.channel import open_channel
from services.runtime.errors import CaravanError, from_rpc_error
from services.runtime.settings import load
from tests.support.coordinator import Coordinator, running_coordinator, until

INTERVAL_S = 0.05
CALL_S = 0.02
"""Shortest time of a call where calls must not overlap."""


@dataclass
class Engine:
    """One engine of two."""

    stub: pb_grpc.EngineServiceAsyncStub
    remote: remote_service_pb2_grpc.RemoteServiceAsyncStub
    stopping: asyncio.Event
    count: int = 0

    async def limits(self) -> remote_service_pb2.LimitStatus:
        """How it stands with its limits."""
        request = remote_service_pb2.GetRemoteStatusRequest()
        return (await self.remote.GetRemoteStatus(request, timeout=10)).limits

    async def run(self, timeout_s: float = 10.0) -> None:
        """One request, to its end. Raises the CaravanError that the engine meant."""
        self.count += 1
        request = pb.GenerateRequest(request_id=f"req-{id(self)}-{self.count}")
        request.chat.messages.add(role=chat_pb2.ROLE_USER, content="hello there")
        try:
            async for _ in self.stub.Generate(request, timeout=timeout_s):
                pass
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, service="engine") from error


@asynccontextmanager
async def one_engine(
    coordinator: Coordinator, provider: ScriptedProvider, limits: remote_options_pb2.RateLimits
) -> AsyncIterator[Engine]:
    """An engine that has joined; it has ended when this returns."""
    options = remote_options_pb2.RemoteOptions(base_url=provider.base_url, limits=limits)
    options.retry.max_retries = 0
    number = len(coordinator.state.engines)
    settings = load(
        RemoteSettings,
        {
            "CARAVAN_ENGINE_ADDRESS": "127.0.0.1:0",
            "CARAVAN_ENGINE_METRICS_ADDRESS": "127.0.0.1:0",
            "CARAVAN_ENGINE_COORDINATOR": coordinator.address,
            "CARAVAN_ENGINE_ID": f"engine-{number}",
            "CARAVAN_ENGINE_MODEL": "chat=gpt-4o-mini",
            "CARAVAN_REMOTE_OPTIONS": json_format.MessageToJson(options),
        },
    )
    stopping = asyncio.Event()
    running = asyncio.create_task(serve(settings, stopping))
    await until(lambda: len(coordinator.state.engines) == number + 1 or running.done())
    record = coordinator.state.engines.find(f"engine-{number}")
    assert record is not None
    async with open_channel(record.address) as channel:
        yield Engine(
            pb_grpc.EngineServiceStub(channel),
            remote_service_pb2_grpc.RemoteServiceStub(channel),
            stopping,
        )
    stopping.set()
    assert await running == 0


@asynccontextmanager
async def two_engines(
    script: Script, **limits: int
) -> AsyncIterator[tuple[Coordinator, ScriptedProvider, list[Engine]]]:
    """A coordinator, a provider, and two engines in front of it that report every INTERVAL_S."""
    told = remote_options_pb2.RateLimits(**limits)  # type: ignore[arg-type]
    async with (
        running_coordinator(Limits(interval_s=INTERVAL_S)) as coordinator,
        ScriptedProvider(script) as provider,
        AsyncExitStack() as stack,
    ):
        engines = [
            await stack.enter_async_context(one_engine(coordinator, provider, told))
            for _ in range(2)
        ]
        yield coordinator, provider, engines


async def eventually(
    coordinator: Coordinator,
    engine: Engine,
    condition: Callable[[remote_service_pb2.LimitStatus], bool],
) -> None:
    """Waits until an engine tells so of its limits, while the coordinator's seconds pass quickly."""
    async with asyncio.timeout(10):
        while not condition(await engine.limits()):
            coordinator.clock.advance(1)


async def asked_too_much(engine: Engine) -> None:
    """Requests that ask until this is cancelled; most of them are refused."""
    while True:
        await asyncio.gather(*(engine.run(0.05) for _ in range(20)), return_exceptions=True)


async def test_two_engines_share_a_limit_by_demand() -> None:
    """Each has a half while nobody asks; who asks has most of it; and who is left has all."""
    script = Script(tokens=1)
    async with two_engines(script, requests_per_minute=600) as (coordinator, _, engines):
        one, other = engines
        for engine in engines:
            await eventually(coordinator, engine, lambda s: s.requests_per_minute == 300)
        demand = asyncio.create_task(asked_too_much(one))
        await eventually(coordinator, other, lambda s: s.requests_per_minute < 30)
        await eventually(coordinator, one, lambda s: s.requests_per_minute > 570)
        demand.cancel()
        other.stopping.set()
        await until(lambda: len(coordinator.state.engines) == 1)
        coordinator.clock.advance(20)
        coordinator.servicer.expire()
        await eventually(coordinator, one, lambda s: s.requests_per_minute == 600)


async def test_a_429_at_one_engine_slows_the_other() -> None:
    """The provider means the account, not the engine."""
    script = Script(tokens=1)
    async with two_engines(script, requests_per_minute=600) as (coordinator, provider, engines):
        one, other = engines
        await eventually(coordinator, other, lambda s: s.requests_per_minute == 300)
        provider.faults.add(Fault(Kind.STATUS, status=429, retry_after="30"))
        with pytest.raises(CaravanError) as caught:
            await one.run()
        assert caught.value.reason == "RATE_LIMITED"
        await eventually(coordinator, other, lambda s: 0 < s.requests_per_minute < 0.75 * 300)
        assert (await one.limits()).retry_after.seconds >= 25
        await other.run()


async def test_strict_engines_never_call_more_at_a_time_than_the_limit() -> None:
    """The provider sees one call at a time, whichever engine it comes from, and all are served."""
    script = Script(tokens=1, delay_s=CALL_S)
    async with two_engines(script, concurrent_requests=1, strict=True) as (
        coordinator,
        provider,
        engines,
    ):
        async with asyncio.timeout(30):
            await asyncio.gather(*(engine.run(20.0) for engine in engines for _ in range(4)))
        assert len(provider.requests) == 8
        started = sorted(request.started for request in provider.requests)
        assert min(after - before for before, after in itertools.pairwise(started)) >= CALL_S
        await until(lambda: len(coordinator.state.rates.strict) == 0)
