"""Engines that go out of service, deployments with rules and fallbacks, requests that lost their engine; over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import deployment_pb2
from caravan.core.v1 import scheduling_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from google.protobuf.duration_pb2 import Duration

from services.coordinator.deployment import (
    CapacityPolicy,
    Deployment,
    Fallback,
    FallbackReason,
    Serving,
)
from services.coordinator.limits import Limits
from services.coordinator.tasks import Priority
from tests.support.coordinator import Coordinator, refused, running_coordinator, until


def give_rules(coordinator: Coordinator, rules: Deployment) -> None:
    """Applies one deployment's rules, as its owner does."""
    now = coordinator.clock.now
    coordinator.servicer.perform(coordinator.state.set_rules(rules.name, rules, now, now))


async def in_queue(coordinator: Coordinator, number: int) -> None:
    """Returns when so many requests wait."""
    await until(lambda: len(coordinator.state.waiting) == number)


# --- engines -------------------------------------------------------------------------------------------------------------


async def test_a_drained_engine_gets_no_more_requests_until_it_is_undrained() -> None:
    """The command reaches the engine with its grace; the coordinator needs no report to stop routing to it."""
    async with running_coordinator() as coordinator:
        engine, gateway = await coordinator.engine(), await coordinator.gateway()
        await gateway.route("req-1")
        request = pb.DrainEngineRequest(engine_id="engine-0", grace=Duration(seconds=7), stop=True)
        assert (await coordinator.stub.DrainEngine(request)).leases == 1
        command = (await engine.command()).drain
        assert (command.grace.ToSeconds(), command.stop) == (7, True)
        error = await gateway.refusal("req-2")
        assert (error.reason, "drained" in error.message) == ("NO_ENGINE", True)
        # What it says of itself does not put it back.
        await coordinator.pass_time(1, engine, gateway)
        assert (await gateway.refusal("req-2")).reason == "NO_ENGINE"
        resumed = gateway.ask("req-2", resumed=True)
        await in_queue(coordinator, 1)
        await coordinator.stub.UndrainEngine(pb.UndrainEngineRequest(engine_id="engine-0"))
        assert (await engine.command()).HasField("undrain")
        assert (await resumed).lease.engine_id == "engine-0"


async def test_a_new_life_of_a_drained_engine_is_in_service() -> None:
    """The same life stays drained when its stream breaks and is replaced; a restart is a new engine."""
    async with running_coordinator() as coordinator:
        engine, gateway = await coordinator.engine(), await coordinator.gateway()
        await coordinator.stub.DrainEngine(pb.DrainEngineRequest(engine_id="engine-0"))
        assert (await engine.command()).drain.grace.ToSeconds() == 30
        await coordinator.engine(incarnation=engine.incarnation)
        assert (await gateway.refusal("req-1")).reason == "NO_ENGINE"
        await coordinator.engine()
        assert (await gateway.route("req-1")).engine_id == "engine-0"


@pytest.mark.parametrize("grace_s", [-1, 3601])
async def test_what_is_drained_must_exist_and_have_a_sane_grace(grace_s: int) -> None:
    """ENGINE_NOT_FOUND, and INVALID_VALUE outside 0 to an hour."""
    async with running_coordinator() as coordinator:
        stub = coordinator.stub
        unknown: list[Awaitable[object]] = [
            stub.DrainEngine(pb.DrainEngineRequest(engine_id="nobody")),
            stub.UndrainEngine(pb.UndrainEngineRequest(engine_id="nobody")),
        ]
        for call in unknown:
            error = await refused(call)
            assert (error.reason, error.metadata) == ("ENGINE_NOT_FOUND", {"engine_id": "nobody"})
        engine = await coordinator.engine()
        grace = Duration(seconds=grace_s)
        error = await refused(
            stub.DrainEngine(pb.DrainEngineRequest(engine_id=engine.engine_id, grace=grace))
        )
        assert (error.reason, error.param) == ("INVALID_VALUE", "grace")


async def test_lists_show_what_engines_are_and_report() -> None:
    """ListEngines tells life and revision; ListInflight what the last report said of each request."""
    async with running_coordinator() as coordinator:
        engine, gateway = await coordinator.engine(), await coordinator.gateway()
        await gateway.route("req-1")
        told = engine_pb.InflightRequest(
            request_id="req-1",
            phase=engine_pb.REQUEST_PHASE_GENERATING,
            prompt_tokens=7,
            completion_tokens=3,
        )
        stale = engine_pb.InflightRequest(request_id="req-0")
        load = engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_GENERATING, active_sequences=1)
        report = pb.EngineReport(load=load, requests=[stale, told])
        await engine.send(pb.JoinEngineRequest(report=report))
        record = coordinator.state.engines.find("engine-0")
        assert record is not None
        await until(lambda: len(record.requests) == 2)
        # A report at a change of phase says nothing of requests, and takes nothing back.
        await engine.report(engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_PREFILLING))
        await until(lambda: record.load.phase == engine_pb.ENGINE_PHASE_PREFILLING)
        (shown,) = (await coordinator.stub.ListInflight(pb.ListInflightRequest())).requests
        assert (shown.engine_phase, shown.prompt_tokens, shown.completion_tokens) == (3, 7, 3)
        assert shown.phase == pb.INFLIGHT_PHASE_RUNNING
        (listed,) = (await coordinator.stub.ListEngines(pb.ListEnginesRequest())).engines
        assert (listed.incarnation, listed.revision) == (engine.incarnation, "")
        too_many = pb.EngineReport(requests=[told] * 1025)
        await engine.send(pb.JoinEngineRequest(report=too_many))
        assert (await engine.end()).param == "report.requests"


async def test_the_list_tells_why_an_engine_is_not_chosen() -> None:
    """Drained, held back by its deployment, suspect since a request failed on it: each by itself, and gone again."""
    async with running_coordinator() as coordinator:
        await coordinator.engine()
        gateway = await coordinator.gateway()
        record = coordinator.state.engines.find("engine-0")
        assert record is not None

        async def told() -> tuple[bool, bool, bool]:
            (shown,) = (await coordinator.stub.ListEngines(pb.ListEnginesRequest())).engines
            return shown.drained, shown.held_back, shown.suspect

        for outcome, suspect in ((pb.OUTCOME_FAILED, True), (pb.OUTCOME_FINISHED, False)):
            lease = await gateway.route("req-1")
            request = pb.ReleaseRequest(lease_id=lease.lease_id, outcome=outcome)
            await coordinator.stub.Release(request)
            assert await told() == (False, False, suspect)
        await coordinator.stub.DrainEngine(pb.DrainEngineRequest(engine_id="engine-0"))
        assert await told() == (True, False, False)
        await coordinator.stub.UndrainEngine(pb.UndrainEngineRequest(engine_id="engine-0"))
        coordinator.state.hold_back(record, True, coordinator.clock.now)  # noqa: FBT003
        assert await told() == (False, True, False)


# --- requests that lost their engine -------------------------------------------------------------------------------------


async def test_a_resumed_request_waits_for_its_only_engine_to_come_back() -> None:
    """Also where the coordinator knows nothing of the model: both may have died. It goes before all others."""
    async with running_coordinator() as coordinator:
        gateway = await coordinator.gateway()
        resumed = gateway.ask("resumed", resumed=True, avoid_incarnations=["a life that is over"])
        await in_queue(coordinator, 1)
        engine = await coordinator.engine(max_sequences=1)
        lease = (await resumed).lease
        assert lease.incarnation == engine.incarnation
        calls = [gateway.ask("waits"), gateway.ask("resumed too", resumed=True)]
        await in_queue(coordinator, 2)
        await gateway.release(lease.lease_id)
        assert (await calls[1]).lease.engine_id == "engine-0"
        calls[0].cancel()
        await in_queue(coordinator, 0)


async def test_a_resumed_request_does_not_wait_for_ever() -> None:
    """Its time is over like that of others, and it is told what was missing."""
    async with running_coordinator() as coordinator:
        gateway = await coordinator.gateway()
        call = gateway.ask("req-1", wait_s=2, resumed=True)
        await in_queue(coordinator, 1)
        await coordinator.pass_time(2, gateway)
        assert (await refused(call)).reason == "NO_ENGINE"


async def test_a_sole_engine_gets_back_what_it_lost() -> None:
    """After five seconds, in which it has reported: an engine that stood still for a while is better than none."""
    async with running_coordinator() as coordinator:
        gateway, sole = await coordinator.gateway(), await coordinator.engine()
        lost = gateway.ask("req-1", resumed=True, avoid_incarnations=[sole.incarnation])
        await in_queue(coordinator, 1)
        await coordinator.pass_time(4, gateway, sole)
        await in_queue(coordinator, 1)
        await coordinator.pass_time(1, gateway, sole)
        assert (await lost).lease.incarnation == sole.incarnation


async def test_an_avoided_engine_is_not_granted_and_holds_up_nobody() -> None:
    """It has room, and the request waits all the same; others take the room meanwhile."""
    async with running_coordinator() as coordinator:
        gateway, lost = await coordinator.gateway(), await coordinator.engine("lost")
        avoiding = gateway.ask("req-1", resumed=True, avoid_incarnations=[lost.incarnation])
        await in_queue(coordinator, 1)
        for number in (2, 3):
            assert (await gateway.route(f"req-{number}")).engine_id == "lost"
        full = await coordinator.engine("other", max_sequences=1)
        lease = (await avoiding).lease
        assert lease.incarnation == full.incarnation
        again = gateway.ask("req-4", avoid_incarnations=[lost.incarnation])
        last = gateway.ask("req-5")
        await in_queue(coordinator, 2)
        await gateway.release(lease.lease_id)
        assert (await again).lease.engine_id == "other"
        last.cancel()


async def test_a_suspect_is_chosen_last() -> None:
    """An engine on which a request failed gets the next ones only where no other has room, until one finishes."""
    async with running_coordinator() as coordinator:
        gateway = await coordinator.gateway()
        for name in ("a", "b"):
            await coordinator.engine(name, max_sequences=2)
        lease = await gateway.route("req-0")
        failed = pb.ReleaseRequest(lease_id=lease.lease_id, outcome=pb.OUTCOME_FAILED)
        assert (await coordinator.stub.Release(failed)).released
        leases = [await gateway.route(f"req-{n}") for n in range(1, 4)]
        suspect = lease.engine_id
        assert [x.engine_id == suspect for x in leases] == [False, False, True]
        for lease in leases:
            await gateway.release(lease.lease_id)
        record = coordinator.state.engines.find(suspect)
        assert record is not None
        assert not record.is_suspect


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"avoid_incarnations": ["x"] * 17}, "avoid_incarnations"),
        ({"avoid_incarnations": [""]}, "avoid_incarnations"),
        ({"failed": [pb.FailedDeployment(name="a")]}, "failed.reason"),
        ({"failed": [pb.FailedDeployment(name="", reason=1)]}, "failed.name"),  # type: ignore[arg-type]
        ({"failed": [pb.FailedDeployment(name="a", reason=1)] * 17}, "failed"),  # type: ignore[arg-type]
    ],
)
async def test_what_a_route_says_is_checked(request_: dict[str, Any], param: str) -> None:
    """Bounds and known values, by name (I4)."""
    async with running_coordinator() as coordinator:
        await coordinator.engine()
        gateway = await coordinator.gateway()
        error = await refused(gateway.ask("req-1", **request_))
        assert (error.row.http_status, error.param) == (400, param)


async def test_a_finish_key_is_a_key() -> None:
    """32 bytes or none; a wrong one changes nothing."""
    async with running_coordinator() as coordinator:
        await coordinator.engine()
        gateway = await coordinator.gateway()
        lease = await gateway.route("req-1")
        bad = pb.ReleaseRequest(lease_id=lease.lease_id, finish_key=b"short")
        assert (await refused(coordinator.stub.Release(bad))).param == "finish_key"
        good = pb.ReleaseRequest(lease_id=lease.lease_id, finish_key=b"k" * 32)
        assert (await coordinator.stub.Release(good)).released


# --- rules ---------------------------------------------------------------------------------------------------------------


async def test_rules_come_before_engines_and_apply_at_once() -> None:
    """A deployment without engines answers NO_ENGINE; limits, priority and idempotence follow its rules as they change."""
    async with running_coordinator(Limits(queued_max=8)) as coordinator:
        gateway = await coordinator.gateway()
        assert (await gateway.refusal("req-0")).reason == "MODEL_NOT_FOUND"
        serving = Serving(max_concurrent=1, max_queued=1, max_wait_s=60)
        rules = Deployment("demo", "m", serving=serving, priority=Priority.HIGH, idempotent=False)
        give_rules(coordinator, rules)
        assert (await gateway.refusal("req-0")).reason == "NO_ENGINE"
        await coordinator.engine(max_sequences=2)
        first = await gateway.ask("req-0", wait_s=0)
        assert (first.model, first.idempotent) == ("demo", False)
        assert first.priority == scheduling_pb2.PRIORITY_HIGH
        waiting = gateway.ask("req-1")
        await in_queue(coordinator, 1)
        error = await refused(gateway.ask("req-2"))
        assert (error.metadata["capacity"], error.metadata["max_queued"]) == ("1", "1")
        (want,) = coordinator.state.waiting
        assert (want.wait_s, want.priority) == (60, Priority.HIGH)
        (shown,) = (await coordinator.stub.ListModels(pb.ListModelsRequest())).models
        assert shown.capacity == 1
        give_rules(coordinator, Deployment("demo", "m"))
        assert (await waiting).idempotent
        reject = Serving(on_capacity_exhausted=CapacityPolicy.REJECT)
        give_rules(coordinator, Deployment("demo", "m", serving=reject))
        assert (await refused(gateway.ask("req-3"))).reason == "CAPACITY_EXHAUSTED"


async def test_rules_that_go_take_a_model_without_engines_with_them() -> None:
    """MODEL_NOT_FOUND again: nobody promises that it comes back."""
    async with running_coordinator() as coordinator:
        gateway = await coordinator.gateway()
        give_rules(coordinator, Deployment("demo", "m"))
        now = coordinator.clock.now
        coordinator.servicer.perform(coordinator.state.set_rules("demo", None, now, now))
        assert (await gateway.refusal("req-0")).reason == "MODEL_NOT_FOUND"


def chain(policy: CapacityPolicy, *reasons: FallbackReason) -> Deployment:
    """`demo`, whose requests go to `other` for these reasons."""
    return Deployment(
        "demo",
        "m",
        serving=Serving(on_capacity_exhausted=policy),
        fallback=(Fallback("nowhere"), Fallback("other", frozenset(reasons))),
    )


async def test_a_full_deployment_hands_over_to_its_fallback() -> None:
    """At once where the fallback has room, else the request waits where it asked. The answer names who serves it."""
    async with running_coordinator() as coordinator:
        gateway = await coordinator.gateway()
        await coordinator.engine("engine-0", max_sequences=1)
        await coordinator.engine("engine-1", model="other", max_sequences=1)
        give_rules(coordinator, chain(CapacityPolicy.FALLBACK, FallbackReason.CAPACITY))
        lease = await gateway.route("req-0")
        answer = await gateway.ask("req-1", may_fall_back=True)
        assert (answer.model, answer.lease.engine_id) == ("other", "engine-1")
        assert coordinator.metric("caravan_route_fallbacks_total") == 1
        stays = gateway.ask("req-2", may_fall_back=True)
        await in_queue(coordinator, 1)
        assert (await gateway.refusal("req-3")).metadata["model"] == "demo"
        await gateway.release(lease.lease_id)
        assert (await stays).model == "demo"


@pytest.mark.parametrize("reason", list(FallbackReason))
async def test_only_the_named_reasons_lead_to_a_fallback(reason: FallbackReason) -> None:
    """Here: what the gateway says of `demo`, which refused the request by itself; else its own refusal is told."""
    told = {
        FallbackReason.CAPACITY: deployment_pb2.FALLBACK_REASON_CAPACITY,
        FallbackReason.UNAVAILABLE: deployment_pb2.FALLBACK_REASON_UNAVAILABLE,
        FallbackReason.RATE_LIMITED: deployment_pb2.FALLBACK_REASON_RATE_LIMITED,
        FallbackReason.CIRCUIT_OPEN: deployment_pb2.FALLBACK_REASON_CIRCUIT_OPEN,
        FallbackReason.BUDGET: deployment_pb2.FALLBACK_REASON_BUDGET,
    }[reason]
    async with running_coordinator() as coordinator:
        gateway = await coordinator.gateway()
        for name in ("demo", "other"):
            await coordinator.engine(f"engine-{name}", model=name)
        failed = [pb.FailedDeployment(name="demo", reason=told)]
        give_rules(coordinator, chain(CapacityPolicy.QUEUE, reason))
        answer = await gateway.ask("req-0", may_fall_back=True, failed=failed)
        assert answer.model == "other"
        others = [r for r in FallbackReason if r is not reason]
        give_rules(coordinator, chain(CapacityPolicy.QUEUE, *others))
        error = await refused(gateway.ask("req-1", may_fall_back=True, failed=failed))
        is_busy = reason in {FallbackReason.CAPACITY, FallbackReason.RATE_LIMITED}
        assert error.reason == ("CAPACITY_EXHAUSTED" if is_busy else "NO_ENGINE")
        assert "demo" in error.message


async def test_a_chain_that_goes_in_circles_ends() -> None:
    """Each deployment is asked once; where none takes the request, the first one's refusal is told."""
    async with running_coordinator() as coordinator:
        gateway = await coordinator.gateway()
        for name, other in (("demo", "other"), ("other", "third"), ("third", "other")):
            give_rules(coordinator, Deployment(name, "m", fallback=(Fallback(other),)))
        error = await refused(gateway.ask("req-0", may_fall_back=True))
        assert (error.reason, error.metadata["model"]) == ("NO_ENGINE", "demo")
        await coordinator.engine(model="third")
        assert (await gateway.ask("req-0", may_fall_back=True)).model == "third"


async def test_priorities_of_routes_override_the_deployment() -> None:
    """A route that names one has it; the queue of a deployment is in its own order."""
    async with running_coordinator() as coordinator:
        await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        give_rules(coordinator, Deployment("demo", "m", priority=Priority.BACKGROUND))
        lease = await gateway.route("req-0")
        slow = gateway.ask("slow")
        await in_queue(coordinator, 1)
        fast = gateway.ask("fast", priority=scheduling_pb2.PRIORITY_NORMAL)
        await in_queue(coordinator, 2)
        await gateway.release(lease.lease_id)
        answer = await fast
        assert not slow.done()
        assert answer.priority == scheduling_pb2.PRIORITY_NORMAL
        await gateway.release(answer.lease.lease_id)
        await asyncio.wait_for(slow, 5)
