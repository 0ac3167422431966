"""Costs from the provider's tokens to the coordinator's budget, with a real engine and a scripted provider."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as coordinator_pb
from caravan.coordinator.v1 import deployment_pb2
from caravan.coordinator.v1 import deployment_service_pb2 as service_pb
from caravan.core.v1 import chat_pb2
from caravan.engine.v1 import engine_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2_grpc as pb_grpc
from caravan.engine.v1 import remote_options_pb2
from google.protobuf import json_format

from services.coordinator.limits import Limits
from services.dev.provider.script import Script
from services.dev.provider.server import ScriptedProvider
from services.engine.remote.__main__ import serve
from services.engine.remote.settings import RemoteSettings
from services.runtime.channel import open_channel
from services.runtime.generate_events import each
from services.runtime.settings import load
from tests.support.coordinator import Coordinator, EnginePeer, running_coordinator, until
from tests.support.engine import running_engine
from tests.support.gateway import error_of, openai_error, running

KEY = "sk-test-canary-0123456789"
TOKENS = 10
OPTIONS = remote_options_pb2.RemoteOptions(
    credential=remote_options_pb2.Credential(env="COSTS_TEST_KEY"),
    price=remote_options_pb2.Price(input_usd=0, output_usd=50_000),
)
"""An answer of `TOKENS` costs half a dollar."""
CHAT = deployment_pb2.Deployment(
    name="chat",
    model="gpt-4o-mini",
    replicas=0,
    remote=OPTIONS,
    budget=deployment_pb2.Budget(usd_per_hour=1),
)


@asynccontextmanager
async def remote_engine(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[pb_grpc.EngineServiceAsyncStub]:
    """An engine that has joined; it has ended when this returns."""
    monkeypatch.setenv("COSTS_TEST_KEY", KEY)
    async with ScriptedProvider(Script(tokens=TOKENS), accepted_keys={KEY}) as provider:
        options = remote_options_pb2.RemoteOptions(base_url=provider.base_url)
        options.MergeFrom(OPTIONS)
        settings = load(
            RemoteSettings,
            {
                "CARAVAN_ENGINE_ADDRESS": "127.0.0.1:0",
                "CARAVAN_ENGINE_METRICS_ADDRESS": "127.0.0.1:0",
                "CARAVAN_ENGINE_COORDINATOR": coordinator.address,
                "CARAVAN_ENGINE_MODEL": "chat=gpt-4o-mini",
                "CARAVAN_REMOTE_OPTIONS": json_format.MessageToJson(options),
            },
        )
        stopping = asyncio.Event()
        running = asyncio.create_task(serve(settings, stopping))
        await until(lambda: len(coordinator.state.engines) == 1 or running.done())
        (engine,) = coordinator.state.engines
        async with open_channel(engine.address) as channel:
            yield pb_grpc.EngineServiceStub(channel)
        stopping.set()
        assert await running == 0


async def cost(engine: pb_grpc.EngineServiceAsyncStub, request_id: str, tenant: str) -> int:
    """What a request costs, as its end tells."""
    request = pb.GenerateRequest(request_id=request_id, tenant=tenant)
    request.chat.messages.add(role=chat_pb2.ROLE_USER, content="hello there")
    events = [event async for event in each(engine.Generate(request, timeout=10))]
    return events[-1].finished.cost_nanousd


def told(coordinator: Coordinator) -> dict[str, int]:
    """What each tenant has cost, as the coordinator knows."""
    spend = coordinator.state.costs.ledger.find("chat")
    accounts = {} if spend is None else spend.tenants
    return {name: account.total.nanousd for name, account in accounts.items()}


async def test_two_answers_spend_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ends of the requests say, the engine reports, and the coordinator adds and refuses by."""
    async with running_coordinator() as coordinator:
        request = service_pb.ApplyDeploymentsRequest(deployments=[CHAT])
        assert not (await coordinator.deployments.ApplyDeployments(request, timeout=10)).mistakes
        gateway = await coordinator.gateway()
        async with remote_engine(coordinator, monkeypatch) as engine:
            assert await gateway.route("req-1", "chat")
            assert await cost(engine, "req-1", "ants") == 500_000_000
            await until(lambda: told(coordinator) == {"ants": 500_000_000})
            assert await gateway.route("req-2", "chat")
            assert await cost(engine, "req-2", "bees") == 500_000_000
            await until(lambda: told(coordinator) == {"ants": 500_000_000, "bees": 500_000_000})
            error = await gateway.refusal("req-3", "chat")
            assert (error.reason, error.metadata["budget"]) == ("BUDGET_EXCEEDED", "usd_per_hour")
        gateway.die()


async def test_an_engine_that_leaves_tells_what_it_has_spent_since_its_last_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first report comes after a second, since the interval is not known then; the next one would take a minute."""
    async with running_coordinator(Limits(interval_s=60)) as coordinator:
        async with remote_engine(coordinator, monkeypatch) as engine:
            await cost(engine, "req-1", "ants")
            await until(lambda: told(coordinator) == {"ants": 500_000_000})
            await cost(engine, "req-2", "ants")
            assert told(coordinator) == {"ants": 500_000_000}
        await until(lambda: not len(coordinator.state.engines))
        assert told(coordinator) == {"ants": 1_000_000_000}


async def test_a_client_gets_the_fallback_or_the_time_to_come_back() -> None:
    """Through the gateway: 429 with Retry-After and its own code; or an answer of the model on this machine."""
    spare = deployment_pb2.Deployment(name="spare", model="/spare.gguf", replicas=0)
    cheap = deployment_pb2.Deployment(
        fallback=[
            deployment_pb2.Fallback(
                deployment="spare", reasons=[deployment_pb2.FALLBACK_REASON_BUDGET]
            )
        ]
    )
    cheap.MergeFrom(CHAT)
    cheap.name = "cheap"
    async with AsyncExitStack() as stack:
        coordinator = await stack.enter_async_context(running_coordinator())
        local = await stack.enter_async_context(running_engine("spare=scripted:?text=here"))
        apply = service_pb.ApplyDeploymentsRequest(deployments=[CHAT, cheap, spare])
        assert not (await coordinator.deployments.ApplyDeployments(apply, timeout=10)).mistakes
        rig = await stack.enter_async_context(running(coordinator=coordinator.address))
        for name in ("chat", "cheap", "spare"):
            peer = EnginePeer(coordinator.stub, f"engine-{name}", name, local.address)
            await peer.join()
            stack.push_async_callback(peer.leave)
            spent = coordinator_pb.SpendCounter(nanousd=1_000_000_000, requests=1)
            report = coordinator_pb.EngineReport(
                load=pb.EngineLoad(phase=pb.ENGINE_PHASE_IDLE), spend=[spent]
            )
            await peer.send(coordinator_pb.JoinEngineRequest(report=report))
        await until(lambda: len(coordinator.state.costs.ledger.deployments) == 3)
        error = await error_of(rig.chat(model="chat"))
        told = openai_error(error)
        assert (told["code"], told["type"]) == ("budget_exceeded", "rate_limit_error")
        retry_after_s = int(dict(error.trailing_metadata() or ())["retry-after"])
        assert 3_600 <= retry_after_s <= 3_661
        answer = json.loads(await rig.chat_bytes(model="cheap", caravan={}))
        assert answer["choices"][0]["message"]["content"] == "here"
        assert answer["caravan"]["deployment"] == "spare"
        await until(lambda: len(coordinator.state.leases) == 0)
