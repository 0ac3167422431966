"""Routing, releasing, cancelling and listing requests, over real gRPC on loopback."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.coordinator.limits import Limits
from services.coordinator.outbox import OUTBOX_MESSAGES_MAX
from services.coordinator.waiting import Want
from services.runtime.telemetry import OtelTracing
from tests.support.coordinator import EnginePeer, refused, running_coordinator, until


async def test_a_lease_names_its_engine_and_ends_once() -> None:
    """Route grants, Release ends; a second Release and one of an unknown lease say that nothing was held."""
    async with running_coordinator() as coordinator:
        await coordinator.engine()
        gateway = await coordinator.gateway()
        lease = await gateway.route("req-1")
        assert (lease.engine_id, lease.address) == ("engine-0", "127.0.0.1:7010")
        assert coordinator.metric("caravan_leases") == 1
        assert await gateway.release(lease.lease_id)
        assert not await gateway.release(lease.lease_id)
        assert not await gateway.release("lease-of-a-coordinator-before")
        assert coordinator.metric("caravan_leases") == 0
        assert coordinator.metric("caravan_releases_total", outcome="finished") == 1
        assert coordinator.metric("caravan_route_total", result="granted") == 1


async def test_requests_spread_over_the_engines_until_all_are_full() -> None:
    """The less loaded engine is chosen; past the last sequence the refusal carries the figures and a retry time."""
    async with running_coordinator() as coordinator:
        await coordinator.engine("small", max_sequences=1)
        await coordinator.engine("large", max_sequences=3)
        gateway = await coordinator.gateway()
        engines = [(await gateway.route(f"req-{i}")).engine_id for i in range(4)]
        assert sorted(engines[:2]) == ["large", "small"]
        assert engines[2:] == ["large", "large"]
        error = await gateway.refusal("req-9")
        assert error.reason == "CAPACITY_EXHAUSTED"
        assert error.metadata["active"] == error.metadata["capacity"] == "4"
        assert error.retry_after_s == 1.0
        assert coordinator.metric("caravan_route_total", result="capacity_exhausted") == 1


async def test_refusals_name_their_reason() -> None:
    """Unknown models, engines that load, fail or drain, and unknown gateways are told apart."""
    async with running_coordinator() as coordinator:
        gateway = await coordinator.gateway()
        assert (await gateway.refusal("req-1", "gpt-9")).reason == "MODEL_NOT_FOUND"
        engine = EnginePeer(coordinator.stub, "engine-0")
        await engine.join(engine_pb.ENGINE_PHASE_LOADING)
        loading = await gateway.refusal("req-1")
        assert (loading.reason, loading.retry_after_s) == ("MODEL_LOADING", 1.0)
        record = coordinator.state.engines.find("engine-0")
        assert record is not None
        for phase, failure in (
            (engine_pb.ENGINE_PHASE_FAILED, "the file is corrupt"),
            (engine_pb.ENGINE_PHASE_DRAINING, ""),
        ):
            await engine.report(engine_pb.EngineLoad(phase=phase, failure=failure))
            await until(lambda phase=phase: record.load.phase == phase)  # type: ignore[misc]
            error = await gateway.refusal("req-1")
            assert (error.reason, error.metadata) == ("NO_ENGINE", {"model": "demo"})
            assert failure in error.message
        stranger = await coordinator.gateway("stranger")
        stranger.gateway_id = "nobody"
        assert (await stranger.refusal("req-1")).metadata == {"session_id": "nobody"}


async def test_a_request_id_in_flight_is_refused() -> None:
    """A request id is unique among those in flight, whichever gateway holds it; once released it may come again."""
    async with running_coordinator() as coordinator:
        await coordinator.engine()
        one, two = await coordinator.gateway("one"), await coordinator.gateway("two")
        lease = await one.route("req-1")
        error = await two.refusal("req-1")
        assert (error.reason, error.metadata) == ("DUPLICATE_REQUEST", {"request_id": "req-1"})
        await one.release(lease.lease_id)
        await two.route("req-1")


async def test_cancel_reaches_the_stream_of_the_engine() -> None:
    """Cancel finds the engine; it is repeated at each report while the lease is held, as it may outrun the request."""
    async with running_coordinator() as coordinator:
        engine, other = await coordinator.engine("engine-0"), EnginePeer(coordinator.stub, "idle")
        await other.join(engine_pb.ENGINE_PHASE_DRAINING)
        gateway = await coordinator.gateway()
        lease = await gateway.route("req-1")
        await coordinator.stub.Cancel(pb.CancelRequest(request_id="req-1"))
        assert await engine.cancelled_request() == "req-1"
        await engine.report(engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_PREFILLING))
        assert await engine.cancelled_request() == "req-1"
        await gateway.release(lease.lease_id)
        error = await refused(coordinator.stub.Cancel(pb.CancelRequest(request_id="req-1")))
        assert (error.reason, error.metadata) == ("REQUEST_NOT_FOUND", {"request_id": "req-1"})


async def test_requests_in_flight_are_listed_oldest_first() -> None:
    """ListInflight shows each request with its engine, gateway, lease and age."""
    async with running_coordinator() as coordinator:
        await coordinator.engine()
        gateway = await coordinator.gateway()
        lease = await gateway.route("req-z")
        coordinator.clock.advance(2)
        await gateway.route("req-a")
        listed = (await coordinator.stub.ListInflight(pb.ListInflightRequest())).requests
        assert [r.request_id for r in listed] == ["req-z", "req-a"]
        assert [r.age.ToMilliseconds() for r in listed] == [2000, 0]
        assert (listed[0].lease_id, listed[0].engine_id) == (lease.lease_id, "engine-0")
        assert (listed[0].gateway_id, listed[0].model) == ("gateway-0", "demo")


@pytest.mark.parametrize(
    ("request_id", "model", "reason", "param"),
    [
        ("", "demo", "MISSING_FIELD", "request_id"),
        ("r" * 129, "demo", "INVALID_VALUE", "request_id"),
        ("req-1", "", "MISSING_FIELD", "model"),
        ("req-1", "ä" * 65, "INVALID_VALUE", "model"),
    ],
)
async def test_bad_ids_are_refused_by_name(
    request_id: str, model: str, reason: str, param: str
) -> None:
    """Ids and names hold 1 to 128 bytes."""
    async with running_coordinator() as coordinator:
        gateway = await coordinator.gateway()
        error = await gateway.refusal(request_id, model)
        assert (error.reason, error.param) == (reason, param)


@pytest.mark.parametrize(
    ("registration", "param"),
    [
        (pb.EngineRegistration(address="127.0.0.1:1"), "register.engine_id"),
        (pb.EngineRegistration(engine_id="e"), "register.address"),
        (pb.EngineRegistration(engine_id="e", address="127.0.0.1:1"), "register.model.name"),
        (
            pb.EngineRegistration(
                engine_id="e", address="127.0.0.1:1", model=engine_pb.ModelInfo(name="demo")
            ),
            "register.incarnation",
        ),
        (
            pb.EngineRegistration(
                engine_id="e",
                address="127.0.0.1:1",
                model=engine_pb.ModelInfo(name="demo"),
                incarnation="life",
                revision="r" * 129,
            ),
            "register.revision",
        ),
        (
            pb.EngineRegistration(
                engine_id="e",
                address="nowhere",
                model=engine_pb.ModelInfo(name="demo"),
                incarnation="life",
            ),
            "register.address",
        ),
    ],
)
async def test_bad_registrations_are_refused_by_name(
    registration: pb.EngineRegistration, param: str
) -> None:
    """A registration names its engine, a host:port and a model; a refused one leaves nothing behind."""
    async with running_coordinator() as coordinator:
        engine = EnginePeer(coordinator.stub, "unused")
        await engine.send(pb.JoinEngineRequest(register=registration))
        assert (await engine.end()).param == param
        assert len(coordinator.state.engines) == 0


async def test_engines_that_break_the_protocol_lose_their_session() -> None:
    """A report before the registration, a second registration, an empty message, another model: each is refused."""
    report = pb.JoinEngineRequest(report=pb.EngineReport())
    renamed = pb.EngineReport(model=engine_pb.ModelInfo(name="other"))
    async with running_coordinator() as coordinator:
        early = EnginePeer(coordinator.stub, "early")
        await early.send(report)
        assert (await early.end()).param == "register"
        for wrong, param in (
            (pb.JoinEngineRequest(register=pb.EngineRegistration()), "register"),
            (pb.JoinEngineRequest(), "report"),
            (pb.JoinEngineRequest(report=renamed), "report.model.name"),
        ):
            engine = await coordinator.engine()
            await engine.send(wrong)
            assert (await engine.end()).param == param
            await until(lambda: len(coordinator.state.engines) == 0)


async def test_a_peer_that_says_nothing_is_not_waited_for() -> None:
    """A stream without a first message ends after three intervals."""
    async with running_coordinator(Limits(interval_s=0.02)) as coordinator:
        assert (await EnginePeer(coordinator.stub, "mute").end()).reason == "DEADLINE_EXCEEDED"


async def test_every_table_is_bounded() -> None:
    """One engine, gateway or request too many is refused with a reason, a figure and a retry time (I4)."""
    limits = Limits(engines_max=1, gateways_max=1, leases_max=1, leases_per_engine_max=8)
    async with running_coordinator(limits) as coordinator:
        await coordinator.engine()
        gateway = await coordinator.gateway()
        await gateway.route("req-1")
        errors = [
            await gateway.refusal("req-2"),
            await refused(EnginePeer(coordinator.stub, "engine-1").join()),
            await refused(coordinator.gateway("gateway-1")),
        ]
        for error in errors:
            assert (error.reason, error.retry_after_s) == ("CAPACITY_EXHAUSTED", 1.0)
            assert error.metadata["capacity"] == "1"
        await coordinator.engine()  # The same id again is not one more.


async def test_an_engine_that_does_not_read_loses_its_session() -> None:
    """Commands wait in a bounded outbox; one too many ends the session instead of growing memory (I4)."""
    async with running_coordinator(Limits(leases_per_engine_max=4096)) as coordinator:
        engine = await coordinator.engine(max_sequences=4096)
        gateway = await coordinator.gateway()
        session = coordinator.state.engines.find("engine-0")
        assert session is not None
        outbox: Any = coordinator.servicer._outboxes[session.session]
        for i in range(OUTBOX_MESSAGES_MAX):  # No await in between: the stream cannot take any.
            assert outbox.put(f"old-{i}")
        coordinator.state.route(Want("req-1", gateway.gateway_id, "demo", "lease-x", 1000))
        coordinator.servicer.perform(coordinator.state.cancel("req-1", 1000))
        assert len(coordinator.state.engines) == 0
        assert len(coordinator.state.leases) == 0
        assert (await engine.end()).reason == "SESSION_UNKNOWN"


async def test_many_requests_at_once_leave_nothing_behind() -> None:
    """Routes and releases that overlap keep the counts true."""
    async with running_coordinator() as coordinator:
        await coordinator.engine(max_sequences=16)
        gateway = await coordinator.gateway()

        async def one(number: int) -> None:
            lease = await gateway.route(f"req-{number}")
            assert await gateway.release(lease.lease_id)

        for start in range(0, 160, 16):
            await asyncio.gather(*(one(start + i) for i in range(16)))
        assert len(coordinator.state.leases) == 0
        assert coordinator.metric("caravan_route_total", result="granted") == 160


async def test_route_is_a_span_of_the_trace_of_its_caller() -> None:
    """Route opens a span under the W3C context of its metadata, with the model and the engine."""
    exporter = InMemorySpanExporter()
    tracing = OtelTracing("coordinator", SimpleSpanProcessor(exporter))
    async with running_coordinator(tracing=tracing) as coordinator:
        await coordinator.engine()
        await coordinator.gateway()
        trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        request = pb.RouteRequest(request_id="req-1", gateway_id="gateway-0", model="demo")
        metadata = (("traceparent", f"00-{trace_id}-{parent_id}-01"),)
        await coordinator.stub.Route(request, metadata=metadata)
        (span,) = exporter.get_finished_spans()
        assert span.name == "route"
        assert span.parent is not None
        assert f"{span.parent.trace_id:032x}" == trace_id
        assert f"{span.parent.span_id:016x}" == parent_id
        assert span.attributes is not None
        assert span.attributes["gen_ai.request.model"] == "demo"
        assert span.attributes["caravan.engine_id"] == "engine-0"
    tracing.shutdown()
