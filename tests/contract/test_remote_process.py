"""`python -m services.engine.remote` as its operator sees it, its session with a coordinator, and `caravan remote`."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import grpc
import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as coordinator_pb
from caravan.core.v1 import chat_pb2
from caravan.engine.v1 import engine_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2_grpc as pb_grpc
from caravan.engine.v1 import remote_service_pb2 as remote_pb
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from services.cli.__main__ import main
from services.dev.provider.script import Script
from services.dev.provider.server import ScriptedProvider
from services.engine.remote.redaction import REDACTED
from services.runtime.channel import open_channel
from services.runtime.errors import from_rpc_error
from services.runtime.generate_events import each
from tests.support.coordinator import Coordinator, running_coordinator, until
from tests.support.ports import free_port
from tests.support.processes import log_line, process
from tests.support.remote import KEY, running_remote

PORT = re.compile(rb"listening on port (\d+)")


def engine(
    provider: ScriptedProvider, **settings: str
) -> AbstractAsyncContextManager[asyncio.subprocess.Process]:
    """An engine in front of the provider, with its key in a variable."""
    options = {"baseUrl": provider.base_url, "credential": {"env": "PROVIDER_KEY"}}
    return process(
        "engine.remote",
        **{
            "CARAVAN_ENGINE_ADDRESS": "127.0.0.1:0",
            "CARAVAN_ENGINE_METRICS_ADDRESS": "127.0.0.1:0",
            "CARAVAN_ENGINE_MODEL": "chat=gpt-4o-mini",
            "CARAVAN_REMOTE_PROVIDER": "openai",
            "CARAVAN_REMOTE_OPTIONS": json.dumps(options),
            "PROVIDER_KEY": KEY,
            **settings,
        },
    )


def request(request_id: str) -> pb.GenerateRequest:
    """A chat."""
    asked = pb.GenerateRequest(request_id=request_id, tenant="ants")
    asked.chat.messages.add(role=chat_pb2.ROLE_USER, content="hello")
    return asked


async def test_a_process_serves_drains_and_ends_with_zero() -> None:
    """Health, metrics, SIGTERM: an answer that runs is finished within the grace, the exit code is 0."""
    metrics = free_port()
    url = f"http://127.0.0.1:{metrics}/metrics"
    async with (
        ScriptedProvider(Script(tokens=50, pace_s=0.01), accepted_keys={KEY}) as provider,
        engine(provider, CARAVAN_ENGINE_METRICS_ADDRESS=f"127.0.0.1:{metrics}") as running,
    ):
        port = int((await log_line(running, PORT))[1])
        async with open_channel(f"127.0.0.1:{port}") as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            for name in ("EngineService", "RemoteService"):
                check = health_pb2.HealthCheckRequest(service=f"caravan.engine.v1.{name}")
                status = (await health.Check(check)).status
                assert status == health_pb2.HealthCheckResponse.SERVING
            events = []
            async for event in each(pb_grpc.EngineServiceStub(channel).Generate(request("a"))):
                events.append(event)
                if len(events) == 3:
                    text = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read())
                    assert b'caravan_remote_breaker_state{state="closed"} 1.0' in text
                    running.send_signal(signal.SIGTERM)
            assert events[-1].finished.usage.completion_tokens == 50
        async with asyncio.timeout(20):
            assert await running.wait() == 0


async def test_an_answer_that_does_not_finish_in_time_ends_with_draining() -> None:
    """CARAVAN_ENGINE_DRAIN_FINISH_S after SIGTERM, long before the grace of the process is over."""
    told = {"CARAVAN_DRAIN_GRACE_S": "60", "CARAVAN_ENGINE_DRAIN_FINISH_S": "0.2"}
    async with (
        ScriptedProvider(Script(tokens=10_000, pace_s=0.05), accepted_keys={KEY}) as provider,
        engine(provider, **told) as running,
    ):
        port = int((await log_line(running, PORT))[1])
        async with open_channel(f"127.0.0.1:{port}") as channel:
            events = pb_grpc.EngineServiceStub(channel).Generate(request("a"))
            await anext(aiter(events))
            running.send_signal(signal.SIGTERM)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                async for _ in events:
                    pass
        assert from_rpc_error(raised.value, service="engine").reason == "DRAINING"
        async with asyncio.timeout(20):
            assert await running.wait() == 0


async def test_a_proxy_that_cannot_be_used_ends_the_start() -> None:
    """Requests that went past it would be against the operator's will."""
    proxy = {"ALL_PROXY": "socks5://user:hidden-word@127.0.0.1:9", "NO_PROXY": "", "no_proxy": ""}
    async with ScriptedProvider() as provider, engine(provider, **proxy) as running:
        told = await log_line(running, re.compile(rb"(.*proxy.*)"))
        assert b"hidden-word" not in told[1]
        async with asyncio.timeout(20):
            assert await running.wait() == 2


async def test_what_a_process_logs_is_redacted() -> None:
    """Also where nobody has thought of it: here the key is the name of the model too, which the first line tells."""
    async with (
        ScriptedProvider(accepted_keys={KEY}) as provider,
        engine(provider, CARAVAN_ENGINE_MODEL=f"chat={KEY}") as running,
    ):
        serving = await log_line(running, re.compile(rb"serving chat: (.*) at openai"))
        assert serving[1].decode() == REDACTED


async def test_it_does_without_llama_cpp() -> None:
    """The process imports neither llama_cpp nor numpy: it is installed without them."""
    code = "import services.engine.remote.__main__, sys; print({'llama_cpp', 'numpy'} & set(sys.modules))"
    told = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    out, _ = await told.communicate()
    assert out.decode().strip() == "set()"


@dataclass
class Stack:
    """A coordinator, an engine process that has joined it, and its provider."""

    coordinator: Coordinator
    provider: ScriptedProvider
    address: str


@asynccontextmanager
async def joined() -> AsyncIterator[Stack]:
    """A stack, until the engine has ended."""
    async with (
        ScriptedProvider(Script(tokens=5), accepted_keys={KEY}) as provider,
        running_coordinator() as coordinator,
        engine(provider, CARAVAN_ENGINE_COORDINATOR=coordinator.address) as running,
    ):
        async with asyncio.timeout(20):
            while not coordinator.state.engines:  # noqa: ASYNC110 - the state has no events
                await asyncio.sleep(0.01)
        listed = await coordinator.stub.ListEngines(coordinator_pb.ListEnginesRequest())
        yield Stack(coordinator, provider, listed.engines[0].address)
        running.terminate()
        await running.wait()


async def test_an_engine_joins_and_tells_what_it_spent() -> None:
    """The coordinator knows it, routes to it, and hears of its spending."""
    async with joined() as stack:
        (known,) = (
            await stack.coordinator.stub.ListEngines(coordinator_pb.ListEnginesRequest())
        ).engines
        assert known.model.provider == "openai"
        assert known.model.context_tokens == 0
        gateway = await stack.coordinator.gateway()
        lease = await gateway.route("req-1", model="chat")
        assert lease.address == stack.address
        async with open_channel(stack.address) as channel:
            async for _ in pb_grpc.EngineServiceStub(channel).Generate(request("req-1")):
                pass
        await gateway.release(lease.lease_id)

        async def spent() -> int:
            costs = await stack.coordinator.stub.GetCosts(coordinator_pb.GetCostsRequest())
            return sum(one.total.requests for one in costs.deployments)

        async with asyncio.timeout(10):
            while not await spent():  # noqa: ASYNC110 - the report of an interval has no event
                await asyncio.sleep(0.05)
        gateway.die()


async def caravan(
    capsys: pytest.CaptureFixture[str], stack: Stack, *arguments: str, code: int = 0
) -> list[str]:
    """The lines that `caravan remote` prints; those on stderr where it fails."""
    line = ["remote", "--address", stack.coordinator.address, *arguments]
    assert await asyncio.to_thread(main, line) == code
    printed = capsys.readouterr()
    return (printed.err or printed.out if code else printed.out).splitlines()


async def test_caravan_remote(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table, a breaker that is held and let go, and a credential that is replaced from the standard input."""
    async with joined() as stack:
        head, line = await caravan(capsys, stack)
        assert head.split()[:5] == ["ENGINE", "DEPLOYMENT", "PROVIDER", "MODEL", "BREAKER"]
        assert line.split()[:6] == [*("engine-0", "chat", "openai", "gpt-4o-mini", "closed", "0/8")]
        assert line.endswith("env PROVIDER_KEY #1")
        assert KEY not in line
        held = await caravan(capsys, stack, "breaker", "chat", "open", "--for", "1min")
        assert held == ["engine-0 holds its breaker open"]
        _, line = await caravan(capsys, stack)
        assert "held open for" in line
        assert await caravan(capsys, stack, "breaker", "chat", "auto") == [
            "engine-0 goes by failures"
        ]
        assert await caravan(capsys, stack, "rotate", "chat") == ["engine-0 has credential #2"]
        monkeypatch.setattr("sys.stdin", StringIO("sk-rotated-by-hand\n"))
        rotated = await caravan(capsys, stack, "rotate", "chat", "--secret-from-stdin")
        assert rotated == ["engine-0 has credential #3"]
        (told,) = [json.loads(one) for one in await caravan(capsys, stack, "--json")]
        assert told["breaker"]["state"] == "BREAKER_STATE_CLOSED"
        assert told["credential"]["source"] == "rotated by hand"
        (failed,) = await caravan(capsys, stack, "rotate", "nobody", code=1)
        assert "no engine in front of a provider serves 'nobody'" in failed
        assert await caravan(capsys, stack, "breaker", "chat", "auto", "--for", "1s", code=2)
        names = await asyncio.to_thread(_services, stack.address)
        assert "caravan.engine.v1.RemoteService" in names


def _services(address: str) -> list[str]:
    with grpc.insecure_channel(address) as channel:
        return list(ProtoReflectionDescriptorDatabase(channel).get_services())


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (remote_pb.SetBreakerRequest(), "mode"),
        (remote_pb.SetBreakerRequest(mode=remote_pb.SetBreakerRequest.MODE_OPEN), ""),
    ],
)
async def test_breakers_that_are_set(asked: remote_pb.SetBreakerRequest, param: str) -> None:
    """A mode must be told; a breaker that is held open refuses requests until it is let go."""
    async with running_remote() as rig:
        if param:
            with pytest.raises(Exception, match="no such mode"):
                await rig.remote.SetBreaker(asked)
            return
        told = await rig.remote.SetBreaker(asked)
        assert told.breaker.forced
        assert (await rig.refusal()).reason == "CIRCUIT_OPEN"
        assert not rig.provider.requests
        auto = remote_pb.SetBreakerRequest(mode=remote_pb.SetBreakerRequest.MODE_AUTOMATIC)
        assert (await rig.remote.SetBreaker(auto)).breaker.state == remote_pb.BREAKER_STATE_CLOSED
        assert (await rig.run()).reason == "STOP"


async def test_credentials_that_are_replaced() -> None:
    """A secret that no header can carry leaves the old one in place; nothing of it is told."""
    async with running_remote() as rig:
        for asked in (
            remote_pb.RotateCredentialRequest(),
            remote_pb.RotateCredentialRequest(reread=False),
            remote_pb.RotateCredentialRequest(secret="two words"),
            remote_pb.RotateCredentialRequest(secret=""),
        ):
            with pytest.raises(Exception, match=r"credential stays|Set `secret`") as raised:
                await rig.remote.RotateCredential(asked)
            assert "two words" not in str(raised.value)
        assert (await rig.run()).reason == "STOP"
        await until(lambda: not rig.engine.inflight.depth)


async def test_a_credential_is_read_again_where_it_comes_from() -> None:
    """After a rotation that was wrong, or was meant for a while."""
    async with running_remote() as rig:
        await rig.remote.RotateCredential(remote_pb.RotateCredentialRequest(secret="sk-another"))
        assert (await rig.refusal()).reason == "PROVIDER_UNAUTHORIZED"
        await rig.remote.RotateCredential(remote_pb.RotateCredentialRequest(reread=True))
        assert (await rig.run()).reason == "STOP"
