"""What a coordinator that starts anew learns, and what sessions hand over, over real gRPC on loopback."""

from __future__ import annotations

import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.core.v1 import scheduling_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator.limits import Limits
from services.runtime.clock import random_id
from tests.support.coordinator import (
    Coordinator,
    EnginePeer,
    GatewayPeer,
    refused,
    running_coordinator,
    until,
)


def held(lease: pb.Lease, request_id: str, **fields: object) -> pb.HeldLease:
    """A lease as its gateway tells it, by default ten seconds old."""
    told = pb.HeldLease(
        lease_id=lease.lease_id,
        request_id=request_id,
        model="demo",
        engine_id=lease.engine_id,
        incarnation=lease.incarnation,
        priority=scheduling_pb2.PRIORITY_HIGH,
        tenant="t",
    )
    told.age.FromSeconds(10)
    for name, value in fields.items():
        setattr(told, name, value)
    return told


async def inflight(coordinator: Coordinator) -> dict[str, pb.InflightRequest]:
    """The requests in flight by id."""
    listed = await coordinator.stub.ListInflight(pb.ListInflightRequest())
    return {request.request_id: request for request in listed.requests}


async def test_a_coordinator_that_starts_anew_learns_its_leases() -> None:
    """On the same port: an engine and a gateway come back, in this order, and the request goes on under the same lease."""
    async with running_coordinator() as first:
        engine = await first.engine(max_sequences=1)
        gateway = await first.gateway()
        lease = await gateway.route("req-1")
        assert lease.incarnation == engine.incarnation
        address = f"127.0.0.1:{first.server.port}"
        first.servicer.drain()
    async with running_coordinator(address=address, ids=random_id) as second:
        life = engine.incarnation
        engine = await second.engine(max_sequences=1, incarnation=life)
        gateway = GatewayPeer(second.stub, "gateway-0-anew")
        joined = await gateway.join([held(lease, "req-1")])
        assert list(joined.taken_lease_ids) == [lease.lease_id]
        assert second.metric("caravan_leases_adopted_total") == 1
        shown = (await inflight(second))["req-1"]
        assert (shown.lease_id, shown.engine_id) == (lease.lease_id, "engine-0")
        assert (shown.tenant, shown.priority) == ("t", scheduling_pb2.PRIORITY_HIGH)
        assert shown.age.ToSeconds() == 10
        # It counts: the only sequence is in use.
        assert (await gateway.refusal("req-2")).reason == "CAPACITY_EXHAUSTED"
        assert (await gateway.refusal("req-1")).reason == "DUPLICATE_REQUEST"
        await second.stub.Cancel(pb.CancelRequest(request_id="req-1"))
        assert await engine.cancelled_request() == "req-1"
        assert await gateway.release(lease.lease_id)
        assert not await gateway.release(lease.lease_id)
        await gateway.route("req-2")


async def test_a_lease_waits_for_its_engine_to_come_back() -> None:
    """The gateway comes first: its lease is taken when the engine joins in the same life, also beyond its capacity."""
    lease = pb.Lease(lease_id="lease-x", engine_id="engine-0", incarnation="life-1")
    async with running_coordinator() as coordinator:
        claims = [held(lease, "req-1"), held(lease, "req-2", lease_id="lease-y")]
        gateway = await coordinator.gateway(held=claims)
        assert await inflight(coordinator) == {}
        await coordinator.engine(max_sequences=1, incarnation="life-1")
        assert set(await inflight(coordinator)) == {"req-1", "req-2"}
        (shown,) = (await coordinator.stub.ListModels(pb.ListModelsRequest())).models
        assert (shown.in_flight, shown.capacity) == (2, 2)
        assert await gateway.release("lease-x")
        assert (await gateway.refusal("req-3")).reason == "CAPACITY_EXHAUSTED"
        assert await gateway.release("lease-y")
        await gateway.route("req-3")


@pytest.mark.parametrize("why", ["another life", "too late", "released", "gateway gone"])
async def test_a_lease_that_is_over_is_not_taken(why: str) -> None:
    """Its engine began another life or comes too late, or its gateway ended it or died meanwhile."""
    lease = pb.Lease(lease_id="lease-x", engine_id="engine-0", incarnation="life-1")
    async with running_coordinator() as coordinator:
        other = await coordinator.gateway("other")
        gateway = await coordinator.gateway(held=[held(lease, "req-1")])
        if why == "too late":
            await coordinator.pass_time(8, gateway, other)
        elif why == "released":
            assert await gateway.release("lease-x")
            # It was never held here, so it does not count among those that were.
            assert coordinator.metric("caravan_releases_total", outcome="finished") == 0
        elif why == "gateway gone":
            gateway.die()
            await until(lambda: len(coordinator.state.gateways) == 1)
        life = "life-2" if why == "another life" else "life-1"
        await coordinator.engine(incarnation=life)
        assert await inflight(coordinator) == {}
        assert coordinator.metric("caravan_leases_adopted_total") == 0


async def test_a_request_is_never_leased_twice() -> None:
    """A claim whose request waits or runs already, or whose lease was released a moment ago, is not taken."""
    async with running_coordinator() as coordinator:
        engine = await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        lease = await gateway.route("runs")
        waiting = gateway.ask("waits")
        await until(lambda: len(coordinator.state.waiting) == 1)
        foreign = GatewayPeer(coordinator.stub, "foreign")
        claims = [
            held(lease, "runs", lease_id="another"),
            held(lease, "waits", lease_id="yet another"),
            held(lease, "not even the same request"),
        ]
        assert list((await foreign.join(claims)).taken_lease_ids) == []
        assert await gateway.release(lease.lease_id)
        late = GatewayPeer(coordinator.stub, "late")
        assert list((await late.join([held(lease, "runs")])).taken_lease_ids) == []
        assert (await waiting).lease.engine_id == engine.engine_id
        assert set(await inflight(coordinator)) == {"waits"}


@pytest.mark.parametrize("sweep_first", [True, False])
async def test_a_gateway_hands_its_leases_to_its_next_session(sweep_first: bool) -> None:
    """Whether the old session ends before or after the new one begins: one live lease, nothing is cancelled (I6)."""
    async with running_coordinator() as coordinator:
        engine = await coordinator.engine(max_sequences=1)
        old = await coordinator.gateway("old")
        lease = await old.route("req-1")
        new = GatewayPeer(coordinator.stub, "new")
        if sweep_first:
            old.die()
            await until(lambda: len(coordinator.state.gateways) == 0)
            assert len(coordinator.state.leases) == 0
        assert list((await new.join([held(lease, "req-1")])).taken_lease_ids) == [lease.lease_id]
        if not sweep_first:
            old.die()
            await until(lambda: len(coordinator.state.gateways) == 1)
        assert (await inflight(coordinator))["req-1"].gateway_id == "new"
        await coordinator.pass_time(9, engine, new)
        await coordinator.stub.Cancel(pb.CancelRequest(request_id="req-1"))
        assert await engine.cancelled_request() == "req-1"  # The first one: none came before.
        assert await new.release(lease.lease_id)


async def test_an_engine_whose_stream_broke_keeps_its_leases() -> None:
    """The same life joins again: what it runs is leased again. A cancel that came meanwhile reaches it."""
    async with running_coordinator() as coordinator:
        engine, gateway = await coordinator.engine(), await coordinator.gateway()
        lease = await gateway.route("req-1")
        engine.die()
        await until(lambda: len(coordinator.state.engines) == 0)
        await coordinator.stub.Cancel(pb.CancelRequest(request_id="req-1"))
        again = await coordinator.engine(incarnation=engine.incarnation)
        assert (await inflight(coordinator))["req-1"].lease_id == lease.lease_id
        await again.report(engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_GENERATING))
        assert await again.cancelled_request() == "req-1"
        assert await gateway.release(lease.lease_id)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"lease_id": ""}, "held.lease_id"),
        ({"incarnation": "x" * 129}, "held.incarnation"),
        ({"tenant": "x" * 129}, "held.tenant"),
        ({"priority": 99}, "held.priority"),
    ],
)
async def test_what_a_gateway_claims_is_checked(fields: dict[str, object], param: str) -> None:
    """A malformed claim is a defect of the gateway, and is said aloud."""
    lease = pb.Lease(lease_id="lease-x", engine_id="engine-0", incarnation="life-1")
    async with running_coordinator() as coordinator:
        gateway = GatewayPeer(coordinator.stub, "gateway-0")
        error = await refused(gateway.join([held(lease, "req-1", **fields)]))
        assert error.param == param


async def test_claims_are_bounded() -> None:
    """No more requests are known than twice `max_leases`; what is claimed beyond them is not taken (I4)."""
    lease = pb.Lease(lease_id="lease-x", engine_id="engine-0", incarnation="life-1")
    async with running_coordinator(Limits(leases_max=3)) as coordinator:
        await coordinator.engine(incarnation="life-1")
        claims = [held(lease, f"req-{n}", lease_id=f"lease-{n}x") for n in range(10)]
        gateway = GatewayPeer(coordinator.stub, "gateway-0")
        assert len((await gateway.join(claims)).taken_lease_ids) == 6
        absent = [held(lease, f"r{n}", lease_id=f"l{n}", engine_id="engine-1") for n in range(10)]
        await coordinator.gateway("gateway-1", held=absent)
        await coordinator.engine("engine-1", incarnation="life-1")
        assert len(await inflight(coordinator)) == 6


async def test_wall_clock_jumps_do_nothing() -> None:
    """Every time is monotonic: silence, waits and claims are not judged by the calendar."""
    async with running_coordinator() as coordinator:
        engine, gateway = await coordinator.engine(max_sequences=1), await coordinator.gateway()
        lease = await gateway.route("req-1")
        waiting = gateway.ask("req-2")
        await until(lambda: len(coordinator.state.waiting) == 1)
        for jump_s in (1e9, -2e9):
            coordinator.clock.jump(jump_s)
            await coordinator.pass_time(1, engine, gateway)
        assert len(coordinator.state.waiting) == len(coordinator.state.leases) == 1
        assert (await EnginePeer(coordinator.stub, "engine-1").join()).HasField("report_interval")
        await gateway.release(lease.lease_id)
        assert (await waiting).queued.ToSeconds() == 2
