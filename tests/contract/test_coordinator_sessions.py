"""Sessions of engines and gateways, over real gRPC on loopback."""

from __future__ import annotations

import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.coordinator.limits import Limits
from tests.support.coordinator import EnginePeer, GatewayPeer, refused, running_coordinator, until


async def test_joining_tells_the_intervals() -> None:
    """Engines and gateways learn from the coordinator how often to speak."""
    async with running_coordinator(Limits(interval_s=0.25)) as coordinator:
        welcome = await EnginePeer(coordinator.stub, "engine-0").join()
        response = await GatewayPeer(coordinator.stub, "gateway-0").join()
        assert welcome.report_interval.ToMilliseconds() == 250
        assert response.heartbeat_interval.ToMilliseconds() == 250


async def test_reports_change_what_the_lists_show() -> None:
    """ListEngines and ListModels show the last report and its age."""
    async with running_coordinator() as coordinator:
        engine = EnginePeer(coordinator.stub, "engine-0")
        await engine.join(engine_pb.ENGINE_PHASE_LOADING)
        models = (await coordinator.stub.ListModels(pb.ListModelsRequest())).models
        assert [(m.name, m.ready_engines) for m in models] == [("demo", 0)]
        assert models[0].created.ToSeconds() == 1000

        load = engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_GENERATING, active_sequences=2)
        coordinator.clock.advance(5)
        await engine.report(load)
        record = coordinator.state.engines.find("engine-0")
        assert record is not None
        await until(lambda: record.is_ready)
        coordinator.clock.advance(0.5)
        (shown,) = (await coordinator.stub.ListEngines(pb.ListEnginesRequest())).engines
        assert (shown.engine_id, shown.address, shown.load) == ("engine-0", "127.0.0.1:7010", load)
        assert shown.report_age.ToMilliseconds() == 500
        (model,) = (await coordinator.stub.ListModels(pb.ListModelsRequest())).models
        assert (model.ready_engines, model.context_tokens) == (1, 512)


async def test_the_death_of_a_gateway_frees_its_leases_and_cancels_them_at_the_engine() -> None:
    """A broken gateway stream sweeps its leases, and the engine is told to end their requests if it does not come back (I5, I6)."""
    async with running_coordinator() as coordinator:
        engine = await coordinator.engine()
        doomed, other = await coordinator.gateway("doomed"), await coordinator.gateway("other")
        await doomed.route("req-1")
        await other.route("req-2")
        doomed.die()
        await until(lambda: len(coordinator.state.gateways) == 1)
        assert [lease.request_id for lease in coordinator.state.leases] == ["req-2"]
        assert coordinator.metric("caravan_leases_swept_total") == 1
        assert (await doomed.refusal("req-3")).reason == "SESSION_UNKNOWN"
        await coordinator.pass_time(8, engine, other)
        assert await engine.cancelled_request() == "req-1"


@pytest.mark.parametrize("orderly", [True, False])
async def test_the_end_of_an_engine_frees_its_leases(orderly: bool) -> None:
    """The end of an engine's stream, in order or not, sweeps its leases; its model stays known (503, not 404)."""
    async with running_coordinator() as coordinator:
        engine, gateway = await coordinator.engine(), await coordinator.gateway()
        lease = await gateway.route("req-1")
        if orderly:
            await engine.leave()
        else:
            engine.die()
        await until(lambda: len(coordinator.state.engines) == 0)
        assert len(coordinator.state.leases) == 0
        assert await gateway.release(lease.lease_id)  # It would have come back with its engine.
        assert not await gateway.release(lease.lease_id)
        assert (await gateway.refusal("req-1")).reason == "NO_ENGINE"


async def test_an_engine_that_registers_again_replaces_its_session() -> None:
    """The newer registration wins, the older stream is told so, and its late end does not harm the newer session."""
    async with running_coordinator() as coordinator:
        first, gateway = await coordinator.engine(), await coordinator.gateway()
        await gateway.route("req-1")
        second = await coordinator.engine()
        error = await first.end()
        assert error.reason == "SESSION_UNKNOWN"
        assert "replaced" in error.message
        assert len(coordinator.state.leases) == 0
        assert coordinator.metric("caravan_sessions_ended_total", why="replaced") == 1
        await gateway.route("req-2")
        await coordinator.stub.Cancel(pb.CancelRequest(request_id="req-2"))
        assert await second.cancelled_request() == "req-2"


async def test_a_gateway_that_joins_again_replaces_its_session() -> None:
    """The newer session of a gateway starts without leases; those of the older one are cancelled."""
    async with running_coordinator() as coordinator:
        engine, first = await coordinator.engine(), await coordinator.gateway()
        await first.route("req-1")
        second = await coordinator.gateway()
        assert (await first.end()).reason == "SESSION_UNKNOWN"
        assert len(coordinator.state.leases) == 0
        await second.route("req-2")
        assert coordinator.state.leases.of_gateway("gateway-0") == 1
        await coordinator.pass_time(8, engine, second)
        assert await engine.cancelled_request() == "req-1"


async def test_silent_peers_are_taken_for_dead() -> None:
    """After three intervals of silence a session ends and its leases are swept; those who speak stay."""
    async with running_coordinator() as coordinator:
        silent, lively = await coordinator.engine("silent"), await coordinator.engine("lively")
        gateway = await coordinator.gateway()
        leases = [await gateway.route(f"req-{i}") for i in range(2)]
        assert {lease.engine_id for lease in leases} == {"silent", "lively"}
        record = coordinator.state.engines.find("lively")
        assert record is not None
        for _ in range(3):
            coordinator.clock.advance(1)
            await gateway.beat()
            await lively.report(engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_IDLE))
            await until(lambda: record.reported_at == coordinator.clock.now)
            coordinator.servicer.expire()
        error = await silent.end()
        assert error.reason == "SESSION_UNKNOWN"
        assert "silent" in error.message
        assert [lease.engine_id for lease in coordinator.state.leases] == ["lively"]
        assert len(coordinator.state.gateways) == 1


async def test_a_silent_gateway_is_taken_for_dead() -> None:
    """A gateway in silence loses its session, and its requests are cancelled at the engine."""
    async with running_coordinator() as coordinator:
        gateway = await coordinator.gateway()
        await until(lambda: len(coordinator.state.gateways) == 1)
        engine = await coordinator.engine()
        await gateway.route("req-1")
        await coordinator.pass_time(3, engine)
        assert (await gateway.end()).reason == "SESSION_UNKNOWN"
        assert len(coordinator.state.leases) == 0
        await coordinator.pass_time(8, engine)
        assert await engine.cancelled_request() == "req-1"


async def test_draining_ends_all_sessions_and_cancels_nothing() -> None:
    """A coordinator that shuts down sends its peers away; running requests go on without it."""
    async with running_coordinator() as coordinator:
        engine, gateway = await coordinator.engine(), await coordinator.gateway()
        await gateway.route("req-1")
        coordinator.servicer.drain()
        error = await engine.end()  # And no cancel before it.
        assert (error.reason, error.retry_after_s) == ("DRAINING", 1.0)
        assert (await gateway.end()).reason == "DRAINING"
        assert (await gateway.refusal("req-2")).reason == "DRAINING"
        late = EnginePeer(coordinator.stub, "engine-1")
        assert (await refused(late.join())).reason == "DRAINING"
