"""DeploymentService over gRPC, with a real coordinator, and its process with files."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import grpc
import pytest
from caravan.coordinator.v1 import deployment_pb2 as pb
from caravan.coordinator.v1 import deployment_service_pb2 as service_pb
from caravan.core.v1 import scheduling_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator.deployment_store import load_kept
from services.coordinator.deployments_servicer import WATCHERS_MAX
from services.runtime.settings import SettingsError
from tests.support.coordinator import Coordinator, refused, running_coordinator

DEMO = pb.Deployment(name="demo", model="/v1.gguf")


async def _apply(
    coordinator: Coordinator, *deployments: pb.Deployment, **fields: bool
) -> service_pb.ApplyDeploymentsResponse:
    request = service_pb.ApplyDeploymentsRequest(deployments=deployments, **fields)
    return await coordinator.deployments.ApplyDeployments(request, timeout=10)


async def _list(coordinator: Coordinator) -> list[pb.DeploymentRecord]:
    request = service_pb.ListDeploymentsRequest()
    return list((await coordinator.deployments.ListDeployments(request, timeout=10)).deployments)


async def _next(
    watch: grpc.aio.UnaryStreamCall[
        service_pb.WatchDeploymentsRequest, service_pb.WatchDeploymentsResponse
    ],
) -> list[pb.DeploymentRecord]:
    async with asyncio.timeout(10):
        response = await watch.read()
    assert isinstance(response, service_pb.WatchDeploymentsResponse)
    return list(response.deployments)


async def test_apply_tells_what_changes() -> None:
    """Added, then unchanged, then changed with its fields, then removed with the others; a rehearsal changes nothing."""
    async with running_coordinator() as coordinator:
        told = await _apply(coordinator, DEMO, validate_only=True)
        assert [change.kind for change in told.changes] == [service_pb.CHANGE_KIND_ADDED]
        assert await _list(coordinator) == []
        await _apply(coordinator, DEMO)
        (record,) = await _list(coordinator)
        assert record.deployment == pb.Deployment(
            name="demo",
            model="/v1.gguf",
            runtime=pb.RUNTIME_LLAMA_CPP,
            replicas=1,
            engine=pb.EngineOptions(),
            serving=pb.Serving(on_capacity_exhausted=pb.CAPACITY_POLICY_QUEUE),
            priority=scheduling_pb2.PRIORITY_NORMAL,
            idempotent=True,
        )
        assert (record.state, len(record.revision)) == (pb.DEPLOYMENT_STATE_PENDING, 16)
        assert record.created.ToMicroseconds() == round(coordinator.clock.wall() * 1e6)
        told = await _apply(coordinator, DEMO)
        assert [change.kind for change in told.changes] == [service_pb.CHANGE_KIND_UNCHANGED]
        other = pb.Deployment(name="demo", model="/v2.gguf", idempotent=False)
        (change,) = (await _apply(coordinator, other)).changes
        assert (list(change.fields), change.restarts_engines) == (["model", "idempotent"], True)
        told = await _apply(coordinator, pb.Deployment(name="b", model="/b"), remove_others=True)
        assert [(c.name, c.kind) for c in told.changes] == [
            ("b", service_pb.CHANGE_KIND_ADDED),
            ("demo", service_pb.CHANGE_KIND_REMOVED),
        ]
        assert [record.deployment.name for record in await _list(coordinator)] == ["b"]


async def test_all_mistakes_and_no_change() -> None:
    """One mistake in one of two: neither is applied, and each mistake is told, unknown enum values too."""
    bad = pb.Deployment(name="a b", model="gpt-4o", runtime=9, priority=77)  # type: ignore[arg-type]
    bad.fallback.add(deployment="nobody", reasons=[pb.FALLBACK_REASON_UNSPECIFIED])
    async with running_coordinator() as coordinator:
        told = await _apply(coordinator, DEMO, bad)
        assert (await _list(coordinator), len(told.changes)) == ([], 0)
        assert {mistake.field.removeprefix("deployments[1].") for mistake in told.mistakes} == {
            "name",
            "remote.credential",
            "runtime",
            "priority",
            "fallback[0].reasons[0]",
            "fallback[0].deployment",
        }


async def test_a_removal_is_refused_for_what_others_need() -> None:
    """An unknown name is told; so is who falls back to it."""
    big = pb.Deployment(name="big", model="/b", fallback=[pb.Fallback(deployment="demo")])
    async with running_coordinator() as coordinator:
        await _apply(coordinator, DEMO, big)
        remove = coordinator.deployments.RemoveDeployment
        error = await refused(remove(service_pb.RemoveDeploymentRequest(name="x"), timeout=10))
        assert (error.reason, error.metadata) == ("DEPLOYMENT_NOT_FOUND", {"name": "x"})
        error = await refused(remove(service_pb.RemoveDeploymentRequest(name="demo"), timeout=10))
        assert error.message == "'demo' is a fallback of big: change that first."
        for name in ("big", "demo"):
            await remove(service_pb.RemoveDeploymentRequest(name=name), timeout=10)
        assert await _list(coordinator) == []


async def test_a_watch_tells_each_change() -> None:
    """All at once, then again when something is applied, and when an engine changes where a deployment stands."""
    async with running_coordinator() as coordinator:
        watch = coordinator.deployments.WatchDeployments(service_pb.WatchDeploymentsRequest())
        assert await _next(watch) == []
        await _apply(coordinator, DEMO)
        assert [record.note for record in await _next(watch)] == ["0 of 1 engines ready"]
        engine = await coordinator.engine()
        (record,) = await _next(watch)
        assert (record.state, record.ready_engines) == (pb.DEPLOYMENT_STATE_SERVING, 1)
        await engine.report(engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_GENERATING))
        engine.die()
        (record,) = await _next(watch)
        assert record.state == pb.DEPLOYMENT_STATE_PENDING
        watch.cancel()


async def test_a_slow_watch_gets_the_newest_only() -> None:
    """Nothing piles up for who does not read: after the flood, few messages lead to the last state."""
    deployments = [pb.Deployment(name=f"d{n}", model="/" + "x" * 4000) for n in range(100)]
    async with running_coordinator() as coordinator:
        watch = coordinator.deployments.WatchDeployments(service_pb.WatchDeploymentsRequest())
        assert await _next(watch) == []
        for replicas in range(1, 40):
            for deployment in deployments:
                deployment.replicas = replicas
            await _apply(coordinator, *deployments)
        seen = 0
        while (await _next(watch))[0].deployment.replicas != 39:
            seen += 1
        assert seen < 30
        watch.cancel()


async def test_watches_are_bounded_and_end_with_the_coordinator() -> None:
    """One too many is refused; a coordinator that stops does not wait for them."""
    async with running_coordinator() as coordinator:
        watches = [
            coordinator.deployments.WatchDeployments(service_pb.WatchDeploymentsRequest())
            for _ in range(WATCHERS_MAX)
        ]
        for watch in watches:
            await _next(watch)
        one_more = coordinator.deployments.WatchDeployments(service_pb.WatchDeploymentsRequest())
        assert (await refused(one_more.read())).reason == "CAPACITY_EXHAUSTED"
        for watch in watches[1:]:
            watch.cancel()
    # The server has drained by now, with one watch open.
    assert (await refused(watches[0].read())).reason == "DRAINING"


async def test_what_was_applied_survives(tmp_path: Path) -> None:
    """The file of the next start holds what was applied, with its age, and wins over the file of deployments."""
    state = tmp_path / "kept" / "deployments.json"
    async with running_coordinator(deployments_state=state) as coordinator:
        await _apply(coordinator, DEMO, pb.Deployment(name="b", model="/b", replicas=0))
        created = coordinator.clock.wall()
        coordinator.clock.advance(5)
        await _apply(coordinator, pb.Deployment(name="c", model="/c"))
        await coordinator.deployments.RemoveDeployment(
            service_pb.RemoveDeploymentRequest(name="b"), timeout=10
        )
    loaded = load_kept(str(state), str(tmp_path / "none.toml"), wall=99)
    assert [(deployment.name, at) for deployment, at in loaded] == [
        ("demo", created),
        ("c", created + 5),
    ]
    state.write_text("{")
    with pytest.raises(SettingsError, match="DEPLOYMENTS_STATE"):
        load_kept(str(state), "", wall=99)


async def test_what_cannot_be_kept_is_not_applied(tmp_path: Path) -> None:
    """A full disk, here a file in the way of the folder: an error, and nothing has changed."""
    (tmp_path / "file").write_text("")
    async with running_coordinator(deployments_state=tmp_path / "file" / "d.json") as coordinator:
        error = await refused(_apply(coordinator, DEMO))
        assert error.reason == "INTERNAL"
        assert "cannot be kept" in error.message
        assert await _list(coordinator) == []


async def test_a_file_with_mistakes_ends_the_start(tmp_path: Path) -> None:
    """Exit code 2, and all mistakes on stderr."""
    file = tmp_path / "d.toml"
    file.write_text('[[deployment]]\nname = "a"\nreplica = 1\n')
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.coordinator",
        env={"CARAVAN_COORDINATOR_DEPLOYMENTS": str(file), "PATH": ""},
        stderr=asyncio.subprocess.PIPE,
    )
    _, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 2
    assert b"deployments[0].model: is missing" in stderr
    assert b"deployments[0].replica: is not known" in stderr
