"""Requests that wait for a sequence, over real gRPC on loopback."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.core.v1 import scheduling_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator.limits import Limits
from services.runtime.errors import CaravanError
from tests.support.coordinator import Coordinator, refused, running_coordinator, until


class _NoMetadata:
    """The context of a call that a test makes without a connection, so that it can end between two steps of its own."""

    def invocation_metadata(self) -> None:
        """None."""


async def in_queue(coordinator: Coordinator, number: int) -> None:
    """Returns when so many requests wait."""
    await until(lambda: len(coordinator.state.waiting) == number)


async def test_a_request_waits_for_the_next_free_sequence() -> None:
    """A full engine: Route answers when a lease is released, at once and with the time that it waited."""
    async with running_coordinator() as coordinator:
        await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        first = await gateway.route("req-1")
        waiting = gateway.ask("req-2")
        await in_queue(coordinator, 1)
        assert coordinator.metric("caravan_route_queue_depth", model="demo") == 1
        coordinator.clock.advance(1.5)
        await gateway.release(first.lease_id)
        answer = await waiting
        assert answer.queued.ToMilliseconds() == 1500
        assert answer.lease.engine_id == "engine-0"
        assert coordinator.metric("caravan_route_queue_depth", model="demo") == 0
        assert coordinator.metric("caravan_route_queue_seconds_sum") == 1.5


async def test_priority_goes_first_and_tenants_take_turns() -> None:
    """A burst of one tenant does not delay the other tenant, and who is urgent passes both."""
    async with running_coordinator() as coordinator:
        await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        lease = await gateway.route("req-0")
        order: list[str] = []

        async def one(request_id: str, tenant: str, priority: int = 0) -> None:
            answer = await gateway.ask(request_id, tenant=tenant, priority=priority)
            order.append(request_id)
            await gateway.release(answer.lease.lease_id)

        asked = [("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b")]
        tasks = []
        for number, (request_id, tenant) in enumerate(asked, 1):
            tasks.append(asyncio.create_task(one(request_id, tenant)))
            await in_queue(coordinator, number)
        tasks.append(asyncio.create_task(one("urgent", "a", scheduling_pb2.PRIORITY_CRITICAL)))
        await in_queue(coordinator, 5)
        await gateway.release(lease.lease_id)
        await asyncio.gather(*tasks)
        assert order == ["urgent", "a1", "b1", "a2", "a3"]


async def test_a_full_queue_refuses_with_figures_and_a_retry_time() -> None:
    """The refusal says how many run and wait, and when to come back (I4)."""
    async with running_coordinator(Limits(queued_max=1)) as coordinator:
        await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        await gateway.route("req-1")
        waiting = gateway.ask("req-2")
        await in_queue(coordinator, 1)
        error = await refused(gateway.ask("req-3"))
        assert (error.reason, error.retry_after_s) == ("CAPACITY_EXHAUSTED", 1.0)
        assert error.metadata == {
            "model": "demo",
            "active": "1",
            "capacity": "1",
            "queued": "1",
            "max_queued": "1",
        }
        waiting.cancel()
        await in_queue(coordinator, 0)


async def test_a_wait_has_an_end() -> None:
    """By the clock of the coordinator, at what the request asked for, or at the setting, whichever is less."""
    async with running_coordinator(Limits(queue_s=30)) as coordinator:
        await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        await gateway.route("req-1")
        calls = [gateway.ask("short", wait_s=5), gateway.ask("long", wait_s=500)]
        await in_queue(coordinator, 2)
        for call, waited_s in zip(calls, (5, 25), strict=True):
            coordinator.clock.advance(waited_s)
            coordinator.servicer._routes.expire()
            error = await refused(call)
            assert (error.reason, error.row.http_status) == ("QUEUE_TIMEOUT", 504)
            assert error.retry_after_s is not None
        assert error.metadata["waited_s"] == "30.0"
        assert coordinator.metric("caravan_route_total", result="queue_timeout") == 2


async def test_a_wait_ends_without_the_sweeper() -> None:
    """A timer of its own ends it on time."""
    async with running_coordinator() as coordinator:
        await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        await gateway.route("req-1")
        call = gateway.ask("req-2", wait_s=0.05)
        await in_queue(coordinator, 1)
        coordinator.clock.advance(0.05)
        assert (await refused(call)).reason == "QUEUE_TIMEOUT"


async def test_who_leaves_the_queue_is_not_granted() -> None:
    """A call that is cancelled, or whose own deadline passes, leaves at once; the next one gets the sequence (I5)."""
    async with running_coordinator() as coordinator:
        await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        lease = await gateway.route("req-1")
        leaving = gateway.ask("req-2")
        await in_queue(coordinator, 1)
        staying = gateway.ask("req-3")
        await in_queue(coordinator, 2)
        leaving.cancel()
        await in_queue(coordinator, 1)
        request = pb.RouteRequest(request_id="req-4", gateway_id="gateway-0", model="demo")
        with pytest.raises(grpc.aio.AioRpcError):
            await coordinator.stub.Route(request, timeout=0.05)
        await in_queue(coordinator, 1)
        await gateway.release(lease.lease_id)
        assert (await staying).lease.engine_id == "engine-0"


@pytest.mark.parametrize("cancelled_first", [True, False])
async def test_a_grant_to_a_call_that_is_gone_goes_to_the_next(cancelled_first: bool) -> None:
    """The call ends in the very moment of its grant: the lease is given back and the next in the queue has it (W61)."""
    async with running_coordinator() as coordinator:
        await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        lease = await gateway.route("req-1")
        want = pb.RouteRequest(request_id="req-2", gateway_id=gateway.gateway_id, model="demo")
        context: Any = _NoMetadata()
        gone = asyncio.create_task(coordinator.servicer.Route(want, context))
        await in_queue(coordinator, 1)
        staying = gateway.ask("req-3")
        await in_queue(coordinator, 2)
        # The handler does not run between the two.
        if cancelled_first:
            gone.cancel()
        released = coordinator.state.release(lease.lease_id, 1000.0)
        assert released is not None
        coordinator.servicer.perform(released)
        gone.cancel()
        assert (await staying).lease.engine_id == "engine-0"
        assert gone.cancelled()
        assert [held.request_id for held in coordinator.state.leases] == ["req-3"]


async def test_cancel_reaches_the_queue() -> None:
    """Cancel ends a request that waits: its Route ends as cancelled."""
    async with running_coordinator() as coordinator:
        await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        await gateway.route("req-1")
        waiting = gateway.ask("req-2")
        await in_queue(coordinator, 1)
        await coordinator.stub.Cancel(pb.CancelRequest(request_id="req-2"))
        assert (await refused(waiting)).reason == "CANCELLED"
        assert coordinator.metric("caravan_route_total", result="cancelled") == 1


async def test_cancel_tenant_ends_what_waits_and_what_runs() -> None:
    """All requests of the tenant and no others; the list shows where each stands (S0)."""
    async with running_coordinator() as coordinator:
        engine = await coordinator.engine(max_sequences=2)
        gateway = await coordinator.gateway()
        await gateway.ask("mine", tenant="a")
        await gateway.ask("other", tenant="b")
        coordinator.clock.advance(1)
        waiting = gateway.ask("waits", tenant="a", priority=scheduling_pb2.PRIORITY_HIGH)
        await in_queue(coordinator, 1)
        answer = await coordinator.stub.CancelTenant(pb.CancelTenantRequest(tenant="a"))
        assert answer.requests == 2
        assert (await refused(waiting)).reason == "CANCELLED"
        assert await engine.cancelled_request() == "mine"
        later = gateway.ask("later", tenant="c", priority=scheduling_pb2.PRIORITY_BACKGROUND)
        await in_queue(coordinator, 1)
        listed = (await coordinator.stub.ListInflight(pb.ListInflightRequest())).requests
        assert [(r.request_id, r.tenant, r.phase) for r in listed] == [
            ("mine", "a", pb.INFLIGHT_PHASE_CANCELLING),
            ("other", "b", pb.INFLIGHT_PHASE_RUNNING),
            ("later", "c", pb.INFLIGHT_PHASE_QUEUED),
        ]
        assert listed[2].priority == scheduling_pb2.PRIORITY_BACKGROUND
        later.cancel()
        await in_queue(coordinator, 0)


async def test_what_is_not_ended_in_time_is_written_off() -> None:
    """A cancelled request holds its lease for the budget; then its place is given to the next, and the engine is marked."""
    async with running_coordinator(Limits(cancel_budget_s=5)) as coordinator:
        engine = await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        stuck = await gateway.route("stuck")
        waiting = gateway.ask("next")
        await in_queue(coordinator, 1)
        await coordinator.stub.Cancel(pb.CancelRequest(request_id="stuck"))
        assert await engine.cancelled_request() == "stuck"
        coordinator.clock.advance(5)
        coordinator.servicer._routes.expire()
        assert (await waiting).lease.engine_id == "engine-0"
        assert not await gateway.release(stuck.lease_id)
        (shown,) = (await coordinator.stub.ListEngines(pb.ListEnginesRequest())).engines
        assert (shown.written_off, shown.leases) == (1, 1)
        assert coordinator.metric("caravan_leases_written_off_total") == 1


async def test_engines_that_come_or_become_ready_start_who_waits() -> None:
    """Joining, and a report of a loaded model, are enough; nobody polls."""
    async with running_coordinator() as coordinator:
        engine = await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        await gateway.route("req-1")
        calls = [gateway.ask("req-2"), gateway.ask("req-3")]
        await in_queue(coordinator, 2)
        await coordinator.engine("engine-1", max_sequences=1)
        await in_queue(coordinator, 1)
        engine.model.max_sequences = 2
        report = pb.EngineReport(
            model=engine.model, load=engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_IDLE)
        )
        await engine.send(pb.JoinEngineRequest(report=report))
        leases = [(await call).lease.engine_id for call in calls]
        assert sorted(leases) == ["engine-0", "engine-1"]


async def test_an_engine_that_dies_leaves_the_queue_alone() -> None:
    """Its requests are lost, those that wait are not: the engine that comes back takes them."""
    async with running_coordinator() as coordinator:
        engine = await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        await gateway.route("req-1")
        waiting = gateway.ask("req-2")
        await in_queue(coordinator, 1)
        engine.die()
        await until(lambda: len(coordinator.state.engines) == 0)
        assert (await refused(gateway.ask("req-3"))).reason == "NO_ENGINE"
        await coordinator.engine(max_sequences=1)
        assert (await waiting).lease.engine_id == "engine-0"


async def test_gateways_that_die_and_coordinators_that_stop_empty_the_queue() -> None:
    """The requests of a dead gateway leave the queue; when the coordinator drains, the others are told so."""
    async with running_coordinator() as coordinator:
        await coordinator.engine(max_sequences=1)
        one, two = await coordinator.gateway("one"), await coordinator.gateway("two")
        await one.route("req-1")
        calls = [one.ask("req-2"), two.ask("req-3"), two.ask("req-4")]
        await in_queue(coordinator, 3)
        one.die()
        errors: list[CaravanError] = [await refused(calls[0])]
        # The lease of the dead gateway went to the first of the other one.
        await in_queue(coordinator, 1)
        coordinator.servicer.drain()
        outcomes = await asyncio.gather(*calls[1:], return_exceptions=True)
        assert sum(isinstance(outcome, pb.RouteResponse) for outcome in outcomes) == 1
        assert errors[0].reason == "SESSION_UNKNOWN"
        assert coordinator.metric("caravan_route_total", result="draining") == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tenant": "t" * 129}, "tenant"),
        ({"session_id": "s" * 129}, "session_id"),
        ({"affinity": [b"h"] * 65}, "affinity"),
        ({"affinity": [b"h" * 65]}, "affinity"),
        ({"priority": 77}, "priority"),
    ],
)
async def test_bad_wishes_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    """Every field of a route has its bounds."""
    async with running_coordinator() as coordinator:
        gateway = await coordinator.gateway()
        error = await refused(gateway.ask("req-1", **fields))
        assert (error.reason, error.param) == ("INVALID_VALUE", param)
        error = await refused(gateway.ask("req-1", wait_s=-1))
        assert error.param == "max_wait"


async def test_the_queue_can_be_looked_at() -> None:
    """The signature of the core, and the figures in the list of models."""
    async with running_coordinator() as coordinator:
        await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        await gateway.route("req-1")
        waiting = gateway.ask("req-2")
        await in_queue(coordinator, 1)
        request = pb.DescribeQueueRequest(model="demo")
        told = (await coordinator.stub.DescribeQueue(request)).signature
        assert told == (
            "mode=push_pull|f=1/1|q=1/256|c=10000|next=2|"
            "req-1:in_flight:0:normal:,req-2:queued:1:normal:"
        )
        (model,) = (await coordinator.stub.ListModels(pb.ListModelsRequest())).models
        assert (model.in_flight, model.capacity, model.queued) == (1, 1, 1)
        unknown = coordinator.stub.DescribeQueue(pb.DescribeQueueRequest(model="gpt-9"))
        assert (await refused(unknown)).reason == "MODEL_NOT_FOUND"
        waiting.cancel()
        await in_queue(coordinator, 0)
