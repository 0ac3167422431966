"""A deployment at a provider and one on this machine, as one client sees them: real coordinator, gateway, engines and HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from caravan.coordinator.v1 import deployment_pb2, deployment_service_pb2
from caravan.inference.v1 import inference_service_pb2 as pb

from services.dev.provider.faults import Fault, Kind
from services.dev.provider.script import Script
from services.runtime.errors import from_rpc_error
from tests.support.coordinator import EnginePeer, running_coordinator, until
from tests.support.engine import running_engine
from tests.support.gateway import Rig, error_of, openai_error, running
from tests.support.remote import Rig as Remote
from tests.support.remote import running_remote

PROVIDERS = ("openai", "anthropic", "gemini")
REASONS = [deployment_pb2.FALLBACK_REASON_RATE_LIMITED, deployment_pb2.FALLBACK_REASON_CIRCUIT_OPEN]
ONCE = {"maxRetries": 0}
LOCAL = "here and now"


@asynccontextmanager
async def served(
    script: Script | None = None, provider: str = "openai", **options: Any
) -> AsyncIterator[tuple[Rig, Remote]]:
    """`demo` is at the provider; `spare`, on this machine, is its fallback for limits and open circuits."""
    async with AsyncExitStack() as stack:
        coordinator = await stack.enter_async_context(running_coordinator())
        remote = await stack.enter_async_context(
            running_remote(script, provider=provider, **options)
        )
        local = await stack.enter_async_context(
            running_engine("spare=scripted:?text=" + LOCAL.replace(" ", "+"))
        )
        fallback = [deployment_pb2.Fallback(deployment="spare", reasons=REASONS)]
        for name, falls_back in (("spare", []), ("demo", fallback)):
            deployment = deployment_pb2.Deployment(
                name=name, model=f"/{name}.gguf", replicas=0, fallback=falls_back
            )
            apply = deployment_service_pb2.ApplyDeploymentsRequest(deployments=[deployment])
            await coordinator.deployments.ApplyDeployments(apply, timeout=10)
        rig = await stack.enter_async_context(running(coordinator=coordinator.address))
        for name, address in (("demo", remote.address), ("spare", local.address)):
            peer = EnginePeer(coordinator.stub, f"engine-{name}", name, address)
            await peer.join()
            stack.push_async_callback(peer.leave)
        yield rig, remote
        await until(lambda: len(coordinator.state.leases) == 0)
        await remote.idle()


async def ask(rig: Rig, **fields: Any) -> dict[str, Any]:
    """A plain answer, its message, its reason and the rest."""
    answer: dict[str, Any] = json.loads(await rig.chat_bytes(caravan={}, **fields))
    (choice,) = answer.pop("choices")
    return {**answer, **choice["message"], "reason": choice["finish_reason"]}


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_an_answer_of_each_provider(provider: str) -> None:
    """Text, reason and tokens are the provider's, plain and streamed."""
    async with served(Script(text="all is well", cached_tokens=1), provider) as (rig, remote):
        answer = await ask(rig)
        assert (answer["content"], answer["refusal"], answer["reason"]) == (
            "all is well",
            None,
            "stop",
        )
        usage = answer["usage"]
        assert usage["prompt_tokens"] > 0
        assert usage["completion_tokens"] == 3
        body = await rig.chat_bytes(stream=True, stream_options={"include_usage": True})
        *events, done, _ = body.decode().split("\n\n")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        assert "".join(delta.get("content", "") for delta in deltas) == "all is well"
        assert (chunks[-1]["usage"], done) == (usage, "data: [DONE]")
        assert len(remote.provider.requests) == 2


async def test_the_price_is_told() -> None:
    """As the operator has set it: dollars for a million tokens."""
    price = {"inputUsd": 1_000, "outputUsd": 2_000}
    async with served(Script(text="all is well"), price=price) as (rig, _):
        answer = await ask(rig)
        tokens = answer["usage"]
        expected = tokens["prompt_tokens"] * 0.001 + tokens["completion_tokens"] * 0.002
        assert answer["caravan"]["cost_usd"] == pytest.approx(expected)


async def test_a_limit_of_the_provider() -> None:
    """The model on this machine answers in its place, and while it lasts the provider is not asked."""
    policy = "QUEUE_POLICY_FALLBACK"
    async with served(retry=ONCE, onCapacityExhausted=policy) as (rig, remote):
        remote.provider.faults.add(Fault(Kind.STATUS, status=429, retry_after="7"))
        answer = await ask(rig)
        assert answer["content"] == LOCAL
        assert answer["caravan"]["deployment"] == "spare"
        assert "cost_usd" not in answer["caravan"]
        assert (await ask(rig))["content"] == LOCAL
        assert len(remote.provider.requests) == 1


async def test_a_circuit_that_is_open() -> None:
    """What the chain is not for is told; once the breaker has opened, the fallback answers without asking the provider."""
    breaker = {"failureThreshold": 1, "openDuration": "60s"}
    async with served(retry=ONCE, breaker=breaker) as (rig, remote):
        remote.provider.faults.add(Fault(Kind.STATUS, status=503))
        error = openai_error(await error_of(rig.chat()))
        assert (error["code"], error["type"]) == ("provider_failed", "server_error")
        assert (await ask(rig))["content"] == LOCAL
        assert len(remote.provider.requests) == 1


async def test_an_image_for_the_model_on_this_machine() -> None:
    """It cannot see: the client is told of the limit, which passes, and not of a model that it does not know."""
    data = base64.b64encode(b"\x89PNG").decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What?"}, image]}]
    async with served(Script(text="A cat."), retry=ONCE) as (rig, remote):
        assert (await ask(rig, messages=messages))["content"] == "A cat."
        assert data.encode() in bytes(remote.provider.requests[0].body)
        remote.provider.faults.add(Fault(Kind.STATUS, status=429, retry_after="7"))
        error = await error_of(rig.chat(messages=messages))
        assert openai_error(error)["code"] == "rate_limit_exceeded"
        assert dict(error.trailing_metadata() or ())["retry-after"] == "7"
        spare = await error_of(rig.chat(messages=messages, model="spare"))
        assert openai_error(spare)["code"] == "unsupported_parameter"
        assert openai_error(spare)["param"] == "messages[0].content[1]"


async def test_an_answer_that_is_cut_off() -> None:
    """What came is shown, then one error: nothing is said twice, and nobody else goes on."""
    async with served() as (rig, remote):
        remote.provider.faults.add(Fault(Kind.CUT, after=3))
        error = from_rpc_error(await error_of(rig.chat(stream=True)), service="gateway")
        assert error.reason == "PROVIDER_UNREACHABLE"
        assert len(remote.provider.requests) == 1


async def test_what_the_provider_does_not_say() -> None:
    """A refusal, and an answer that a filter has cut short."""
    async with served(Script(refusal="I can't.")) as (rig, _):
        answer = await ask(rig)
        assert (answer["content"], answer["refusal"]) == (None, "I can't.")
    async with served() as (rig, remote):
        remote.provider.faults.add(Fault(Kind.FILTERED, after=3))
        assert (await ask(rig))["reason"] == "content_filter"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves(stream: bool) -> None:
    """The provider's connection is closed, through every hop (I5)."""
    async with served(Script(tokens=10_000, pace_s=0.01)) as (rig, remote):
        call = rig.chat(stream=stream)
        reading = asyncio.ensure_future(call.read())
        await until(lambda: bool(remote.provider.requests))
        call.cancel()
        await asyncio.wait({reading})
        async with asyncio.timeout(10):
            await remote.provider.requests[0].closed_by_client.wait()
        await until(lambda: len(rig.gateway.sessions) == 0)


async def test_a_prefill_at_the_provider() -> None:
    """There is none, and the client is told so."""
    async with served() as (rig, _):
        request = pb.PrefillOnlyRequest(model="demo", text="a prompt")
        error = from_rpc_error(
            await error_of(rig.inference.PrefillOnly(request)), service="gateway"
        )
        assert (error.reason, error.metadata["provider"]) == ("UNSUPPORTED_METHOD", "openai")
