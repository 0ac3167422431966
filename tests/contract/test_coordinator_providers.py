"""Deployments of providers over gRPC: applied, told, kept across a start, and without a secret at any of these places."""

from __future__ import annotations

from pathlib import Path

import pytest
from caravan.coordinator.v1 import deployment_pb2 as pb
from caravan.coordinator.v1 import deployment_service_pb2 as service_pb
from caravan.engine.v1 import remote_options_pb2 as remote_pb
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration

from services.cli.deployment_watch import watch_deployments
from services.coordinator.deployment import Runtime
from services.coordinator.deployment_store import load_kept
from tests.support.coordinator import Coordinator, running_coordinator

NEGATIVE = remote_pb.Timeouts(first_byte=Duration(seconds=-1))
CANARY = "sk-canary-0123456789"


def _chat(**fields: object) -> pb.Deployment:
    """A deployment whose runtime is inferred, with a limit and a budget."""
    remote = remote_pb.RemoteOptions(
        credential=remote_pb.Credential(env="OPENAI_API_KEY"),
        limits=remote_pb.RateLimits(requests_per_minute=500),
    )
    chat = pb.Deployment(
        name="chat", model="gpt-4o-mini", remote=remote, budget=pb.Budget(usd_per_hour=2.5)
    )
    chat.MergeFrom(pb.Deployment(**fields))  # type: ignore[arg-type]
    return chat


async def _apply(
    coordinator: Coordinator, *deployments: pb.Deployment
) -> service_pb.ApplyDeploymentsResponse:
    request = service_pb.ApplyDeploymentsRequest(deployments=deployments)
    return await coordinator.deployments.ApplyDeployments(request, timeout=10)


async def _record(coordinator: Coordinator) -> pb.DeploymentRecord:
    request = service_pb.ListDeploymentsRequest()
    found = await coordinator.deployments.ListDeployments(request, timeout=10)
    (record,) = found.deployments
    return record


async def test_what_is_told_is_what_was_applied() -> None:
    """The runtime is filled in, the options are told as they are; a change names its fields and starts engines anew."""
    async with running_coordinator() as coordinator:
        await _apply(coordinator, _chat())
        record = await _record(coordinator)
        assert record.deployment.runtime == pb.RUNTIME_OPENAI
        assert record.deployment.remote == _chat().remote
        assert record.deployment.budget.usd_per_hour == 2.5
        assert record.deployment.budget.on_exceeded == pb.ON_EXCEEDED_REJECT
        dearer = _chat(budget=pb.Budget(usd_per_day=9, on_exceeded=pb.ON_EXCEEDED_WARN))
        (change,) = (await _apply(coordinator, dearer)).changes
        assert list(change.fields) == ["budget.usd_per_day", "budget.on_exceeded"]
        assert not change.restarts_engines
        assert (await _record(coordinator)).revision == record.revision
        dearer.remote.limits.requests_per_minute = 100
        (change,) = (await _apply(coordinator, dearer)).changes
        assert list(change.fields) == ["remote.limits.requests_per_minute"]
        assert change.restarts_engines
        assert (await _record(coordinator)).revision != record.revision


async def test_what_starts_engines_is_told_how() -> None:
    """`caravan up` gets the provider and the options as the JSON that the engine reads; other deployments have neither."""
    async with running_coordinator() as coordinator:
        await _apply(coordinator, _chat(), pb.Deployment(name="local", model="/m.gguf"))
        chat, local = await anext(watch_deployments(coordinator.address))
    assert (chat.provider, chat.model, chat.is_scripted) == ("openai", "gpt-4o-mini", False)
    read = json_format.Parse(chat.remote_options, remote_pb.RemoteOptions())
    assert read == _chat().remote
    assert (local.provider, local.remote_options) == ("", "")


async def test_a_secret_is_refused_and_kept_nowhere(tmp_path: Path) -> None:
    """Not in the answer, the list or the file of the next start."""
    state = tmp_path / "deployments.json"
    async with running_coordinator(deployments_state=state) as coordinator:
        await _apply(coordinator, _chat())
        for wrong in (
            remote_pb.RemoteOptions(credential=remote_pb.Credential(inline=CANARY)),
            remote_pb.RemoteOptions(credential=remote_pb.Credential(env=CANARY)),
            remote_pb.RemoteOptions(base_url=f"https://me:{CANARY}@api.example.com"),
            remote_pb.RemoteOptions(base_url=f"https://api.example.com/v1?key={CANARY}"),
        ):
            told = await _apply(coordinator, _chat(remote=wrong))
            assert len(told.mistakes) == 1
            assert CANARY not in str(told)
        assert CANARY not in str(await _record(coordinator))
    assert CANARY not in state.read_text()


async def test_options_survive_a_start(tmp_path: Path) -> None:
    """The same value, and so the same revision: a coordinator that restarts does not replace engines."""
    state = tmp_path / "deployments.json"
    async with running_coordinator(deployments_state=state) as coordinator:
        chat = _chat()
        chat.remote.timeouts.first_byte.FromMilliseconds(1_500)
        chat.remote.retry.budget = 0.0
        await _apply(coordinator, chat)
        revision = (await _record(coordinator)).revision
    ((loaded, _),) = load_kept(str(state), "", wall=99)
    assert loaded.runtime is Runtime.OPENAI
    assert loaded.budget.usd_per_hour == 2.5
    async with running_coordinator() as coordinator:
        assert loaded.remote is not None
        again = _chat()
        again.remote.CopyFrom(loaded.remote.to_message())
        await _apply(coordinator, again)
        assert (await _record(coordinator)).revision == revision


async def test_a_request_that_must_not_run_twice_is_not_tried_twice() -> None:
    """Whoever says the one says the other (S3.8)."""
    once = remote_pb.RemoteOptions(retry=remote_pb.RetryPolicy(max_retries=0))
    async with running_coordinator() as coordinator:
        told = await _apply(coordinator, _chat(idempotent=False, remote=once))
        assert not told.mistakes


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"engine": pb.EngineOptions(threads=2)}, "engine.threads"),
        ({"budget": pb.Budget(usd_per_hour=float("nan"))}, "budget.usd_per_hour"),
        ({"budget": pb.Budget(on_exceeded=7)}, "budget.on_exceeded"),  # type: ignore[arg-type]
        ({"remote": remote_pb.RemoteOptions(workers=0)}, "remote.workers"),
        ({"remote": remote_pb.RemoteOptions(timeouts=NEGATIVE)}, "remote.timeouts.first_byte"),
        ({"idempotent": False}, "remote.retry.max_retries"),
        ({"runtime": pb.RUNTIME_LLAMA_CPP}, "remote"),
    ],
)
async def test_what_clients_of_the_api_may_get_wrong(fields: dict[str, object], field: str) -> None:
    """What no file can say is judged too."""
    async with running_coordinator() as coordinator:
        told = await _apply(coordinator, _chat(**fields))
        assert f"deployments[0].{field}" in [mistake.field for mistake in told.mistakes]
