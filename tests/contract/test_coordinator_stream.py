"""Routes and releases on the session of a gateway, over real gRPC on loopback."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.coordinator.checks import ROUTES_MAX
from services.coordinator.gateway_outbox import GATEWAY_ANSWERS_MAX, GatewayOutbox
from services.coordinator.waiting import Want
from services.runtime.errors import CaravanError, from_status
from services.runtime.telemetry import OtelTracing
from tests.support.coordinator import Coordinator, GatewayPeer, running_coordinator, until


def wants(*request_ids: str, wait_s: float | None = None) -> list[pb.RouteRequest]:
    """Routes for the model `demo`."""
    requests = [pb.RouteRequest(request_id=i, model="demo") for i in request_ids]
    for request in requests:
        if wait_s is not None:
            request.max_wait.FromMilliseconds(round(wait_s * 1000))
    return requests


def release_of(lease_id: str, finish_key: bytes = b"") -> pb.ReleaseRequest:
    """The end of a lease whose request finished."""
    return pb.ReleaseRequest(lease_id=lease_id, outcome=pb.OUTCOME_FINISHED, finish_key=finish_key)


def refusal(answer: pb.RouteAnswer) -> CaravanError:
    """Why a route was refused."""
    assert answer.WhichOneof("answer") == "refused"
    return from_status(answer.refused, service="coordinator")


async def granted(gateway: GatewayPeer, request_id: str) -> pb.Lease:
    """Asks for a lease on the session, which must be granted at once."""
    await gateway.send(routes=wants(request_id))
    (answer,) = await gateway.answers()
    assert answer.request_id == request_id
    return answer.granted.lease


def waiting(coordinator: Coordinator) -> Sequence[str]:
    """Ids of the requests that wait."""
    return [want.request_id for want in coordinator.state.waiting]


async def test_a_route_is_granted_at_once_and_released() -> None:
    """Both travel on the session and count like the calls; the lease belongs to the gateway of the session."""
    async with running_coordinator() as coordinator:
        await coordinator.engine()
        gateway = await coordinator.gateway()
        await gateway.send(
            routes=[pb.RouteRequest(request_id="req-1", gateway_id="another", model="demo")]
        )
        (answer,) = await gateway.answers()
        lease = answer.granted.lease
        assert (answer.request_id, lease.engine_id) == ("req-1", "engine-0")
        assert (lease.address, answer.granted.model) == ("127.0.0.1:7010", "demo")
        assert coordinator.state.leases.of_gateway("gateway-0") == 1
        await gateway.send(releases=[release_of(lease.lease_id)])
        await gateway.beat()  # Answered behind the release, which has no answer of its own.
        assert len(coordinator.state.leases) == 0
        assert coordinator.metric("caravan_route_total", result="granted") == 1
        assert coordinator.metric("caravan_releases_total", outcome="finished") == 1
        assert not await gateway.release(lease.lease_id)


async def test_a_route_waits_for_its_turn() -> None:
    """It is answered when a lease ends, with the time that it waited."""
    async with running_coordinator() as coordinator:
        await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        lease = await granted(gateway, "req-1")
        await gateway.send(routes=wants("req-2"))
        await until(lambda: waiting(coordinator) == ["req-2"])
        coordinator.clock.advance(1.5)
        await gateway.send(releases=[release_of(lease.lease_id)])
        (answer,) = await gateway.answers()
        assert answer.request_id == "req-2"
        assert answer.granted.queued.ToMilliseconds() == 1500
        assert coordinator.metric("caravan_route_queue_seconds_sum") == 1.5


async def test_a_wait_has_an_end() -> None:
    """By its own timer; the answer is that of the call."""
    async with running_coordinator() as coordinator:
        await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        await granted(gateway, "req-1")
        await gateway.send(routes=wants("req-2", wait_s=0.05))
        await until(lambda: waiting(coordinator) == ["req-2"])
        coordinator.clock.advance(0.05)
        (answer,) = await gateway.answers()
        assert refusal(answer).reason == "QUEUE_TIMEOUT"


async def test_what_is_refused_is_told_with_its_details() -> None:
    """The same error as that of a call, and the session goes on."""
    async with running_coordinator() as coordinator:
        await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        await granted(gateway, "req-1")
        await gateway.send(routes=wants("req-2", wait_s=0))
        (answer,) = await gateway.answers()
        told, called = refusal(answer), await gateway.refusal("req-3")
        assert told.reason == called.reason == "CAPACITY_EXHAUSTED"
        assert (told.message, told.metadata) == (called.message, called.metadata)
        assert told.retry_after_s == called.retry_after_s is not None
        assert coordinator.metric("caravan_route_total", result="capacity_exhausted") == 2
        await gateway.send(routes=wants("req-1"))
        assert refusal((await gateway.answers())[0]).reason == "DUPLICATE_REQUEST"


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        (pb.RouteRequest(request_id="bad"), "model"),
        (pb.RouteRequest(model="demo"), "request_id"),
        (
            pb.RouteRequest(request_id="bad", model="demo", trace={str(i): "x" for i in range(9)}),
            "trace",
        ),
    ],
)
async def test_a_bad_route_is_answered_and_the_session_lives(
    bad: pb.RouteRequest, param: str
) -> None:
    """It is refused by name; those of the same message are served."""
    async with running_coordinator() as coordinator:
        await coordinator.engine()
        gateway = await coordinator.gateway()
        await gateway.send(routes=[bad, *wants("req-1")])
        first, second = await gateway.answers()
        assert (first.request_id, refusal(first).param) == (bad.request_id, param)
        assert second.granted.lease.engine_id == "engine-0"


async def test_a_defect_that_a_route_meets_is_that_routes_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is answered as an internal error; the session and its leases live on."""

    def broken(want: Want) -> None:
        raise ZeroDivisionError(want.request_id)

    def broken_once(coordinator: Coordinator) -> Callable[[str], Want | None]:
        find, calls = coordinator.state.waiting.of_request, itertools.count(1)

        def found(request_id: str) -> Want | None:
            # The first look is for requests of the same id.
            if next(calls) == 2:
                raise ZeroDivisionError(request_id)
            return find(request_id)

        return found

    async with running_coordinator() as coordinator:
        await coordinator.engine()
        gateway = await coordinator.gateway()
        await granted(gateway, "req-1")
        with monkeypatch.context() as patch:
            patch.setattr(coordinator.state, "route", broken)
            await gateway.send(routes=wants("req-2"))
            assert refusal((await gateway.answers())[0]).reason == "INTERNAL"
        await granted(gateway, "req-2")
        assert len(coordinator.state.leases) == 2
        with monkeypatch.context() as patch:
            # Behind the decision: the request waits by then.
            patch.setattr(coordinator.state.waiting, "of_request", broken_once(coordinator))
            await gateway.send(routes=wants("req-3"))
            assert refusal((await gateway.answers())[0]).reason == "INTERNAL"
        assert waiting(coordinator) == []


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (pb.JoinGatewayRequest(releases=[pb.ReleaseRequest()]), "lease_id"),
        (
            pb.JoinGatewayRequest(
                releases=[pb.ReleaseRequest(lease_id="lease-1", finish_key=b"short")]
            ),
            "finish_key",
        ),
        (pb.JoinGatewayRequest(held=[pb.HeldLease()]), "held"),
        (pb.JoinGatewayRequest(routes=wants(*map(str, range(ROUTES_MAX + 1)))), "routes"),
    ],
)
async def test_a_bad_message_ends_the_session(message: pb.JoinGatewayRequest, param: str) -> None:
    """A release that cannot be checked has no answer that could refuse it; too many routes would hold up everybody."""
    async with running_coordinator() as coordinator:
        gateway = await coordinator.gateway()
        await gateway.send(routes=message.routes, releases=message.releases, held=message.held)
        assert (await gateway.end()).param == param
        assert len(coordinator.state.gateways) == 0


@pytest.mark.parametrize("fields", [{"routes": wants("r")}, {"releases": [release_of("l")]}])
async def test_the_first_message_only_joins(fields: dict[str, list[object]]) -> None:
    """Routes and releases come after it."""
    async with running_coordinator() as coordinator:
        gateway = GatewayPeer(coordinator.stub, "gateway-0")
        await gateway.send(gateway_id="gateway-0", **fields)
        error = await gateway.end()
        assert (error.reason, error.param) == ("INVALID_VALUE", next(iter(fields)))


async def test_a_release_comes_before_the_routes_of_its_message() -> None:
    """So a request that goes on elsewhere gives its lease back and asks for the next in one message."""
    async with running_coordinator() as coordinator:
        await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        lease = await granted(gateway, "req-1")
        await gateway.send(routes=wants("req-1"), releases=[release_of(lease.lease_id)])
        (answer,) = await gateway.answers()
        assert answer.granted.lease.lease_id != lease.lease_id
        assert len(coordinator.state.leases) == 1


async def test_what_is_decided_together_is_told_together() -> None:
    """One message answers all routes of one message, in the order in which they were decided."""
    async with running_coordinator() as coordinator:
        await coordinator.engine(max_sequences=3)
        gateway = await coordinator.gateway()
        await gateway.send(routes=wants("req-1", "req-2", "req-3", "req-4"))
        answers = await gateway.answers()
        assert [answer.request_id for answer in answers] == ["req-1", "req-2", "req-3"]
        releases = [release_of(answer.granted.lease.lease_id) for answer in answers]
        await gateway.send(releases=releases, routes=wants("req-5"))
        answers = await gateway.answers()
        assert [answer.request_id for answer in answers] == ["req-4", "req-5"]


async def test_only_heartbeats_are_answered_as_such() -> None:
    """Each of them; a message with releases has no answer, one with routes has theirs."""
    async with running_coordinator() as coordinator:
        await coordinator.engine()
        gateway = await coordinator.gateway()
        await gateway.send(releases=[release_of("unknown")])
        await gateway.send()
        await gateway.send()
        await gateway.send(routes=wants("req-1"))
        messages = [await gateway.receive() for _ in range(3)]
        assert sorted(len(message.routes) for message in messages) == [0, 0, 1]
        for message in messages:
            assert message.HasField("heartbeat_interval") is not bool(message.routes)


async def test_heartbeats_are_answered_before_routes() -> None:
    """A coordinator that always has some to answer tells that it lives all the same."""
    async with running_coordinator() as coordinator:
        await coordinator.engine()
        gateway = await coordinator.gateway()
        (outbox,) = (
            box for box in coordinator.servicer._outboxes.values() if isinstance(box, GatewayOutbox)
        )
        # No await in between: both wait when the stream is written next.
        assert outbox.put(pb.RouteAnswer(request_id="req-1"))
        outbox.put_heartbeat()
        assert (await gateway.receive()).HasField("heartbeat_interval")
        assert [answer.request_id for answer in await gateway.answers()] == ["req-1"]


async def test_every_message_counts_as_heard() -> None:
    """A gateway that only asks is alive."""
    async with running_coordinator() as coordinator:
        await coordinator.engine(max_sequences=8)
        gateway = await coordinator.gateway()
        for number in range(5):
            coordinator.clock.advance(1)
            await granted(gateway, f"req-{number}")
        record = coordinator.state.gateways.find("gateway-0")
        assert record is not None
        assert record.heard_at == coordinator.clock.now


async def test_what_waits_when_the_session_ends_waits_no_more() -> None:
    """Its lease is swept, its place goes to the next, and neither timer nor entry stays (I6)."""
    async with running_coordinator() as coordinator:
        await coordinator.engine(max_sequences=1)
        doomed, other = await coordinator.gateway("doomed"), await coordinator.gateway("other")
        await granted(doomed, "req-1")
        await doomed.send(routes=wants("req-2"))
        await until(lambda: waiting(coordinator) == ["req-2"])
        (asked,) = coordinator.servicer._routes._waiting.values()
        await other.send(routes=wants("req-3"))
        await until(lambda: waiting(coordinator) == ["req-2", "req-3"])
        doomed.die()
        (answer,) = await other.answers()
        assert answer.request_id == "req-3"
        assert waiting(coordinator) == []
        assert len(coordinator.servicer._routes) == 0
        assert asked.timer is not None
        assert asked.timer.cancelled()
        assert coordinator.metric("caravan_leases_swept_total") == 1


async def test_a_grant_that_the_end_of_its_session_overtook() -> None:
    """It was never told: its place is free at once, and its engine is asked to end it when nobody comes back for it (W61)."""
    async with running_coordinator() as coordinator:
        engine = await coordinator.engine(max_sequences=1)
        doomed, other = await coordinator.gateway("doomed"), await coordinator.gateway("other")
        lease = await granted(other, "req-1")
        await doomed.send(routes=wants("req-2"))
        await until(lambda: waiting(coordinator) == ["req-2"])
        session = coordinator.state.gateways.find("doomed")
        assert session is not None
        # No await in between: the session of the gateway ends before the grant is written.
        coordinator.servicer._routes.release(release_of(lease.lease_id))
        assert [held.request_id for held in coordinator.state.leases] == ["req-2"]
        coordinator.servicer.perform(coordinator.state.end_session(session.session, 1000.0))
        assert len(coordinator.state.leases) == 0
        doomed.die()
        again = await granted(other, "req-3")
        await other.send(releases=[release_of(again.lease_id)])
        await coordinator.pass_time(8, engine, other)
        assert await engine.cancelled_request() == "req-2"


async def test_a_gateway_that_does_not_read_loses_its_session() -> None:
    """Answers wait within a bound; one too many ends the session instead of growing memory (I4)."""
    async with running_coordinator() as coordinator:
        gateway = await coordinator.gateway()
        record = coordinator.state.gateways.find("gateway-0")
        assert record is not None
        for number in range(GATEWAY_ANSWERS_MAX):  # No await in between: the stream takes none.
            coordinator.servicer._tell(
                record.session, f"req-{number}", CaravanError("NO_ENGINE", "None.", model="demo")
            )
        assert len(coordinator.state.gateways) == 1
        coordinator.servicer._tell(
            record.session, "req-last", CaravanError("NO_ENGINE", "None.", model="demo")
        )
        assert len(coordinator.state.gateways) == 0
        assert (await gateway.end()).reason == "SESSION_UNKNOWN"


async def test_who_waits_is_told_that_the_coordinator_stops() -> None:
    """Before its session ends."""
    async with running_coordinator() as coordinator:
        await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        await granted(gateway, "req-1")
        await gateway.send(routes=wants("req-2"))
        await until(lambda: waiting(coordinator) == ["req-2"])
        coordinator.servicer.drain()
        (answer,) = await gateway.answers()
        assert refusal(answer).reason == "DRAINING"
        assert (await gateway.end()).reason == "DRAINING"


async def test_a_cancel_answers_a_route_that_waits() -> None:
    """The call cancels what was asked for on the session."""
    async with running_coordinator() as coordinator:
        await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        await granted(gateway, "req-1")
        await gateway.send(routes=wants("req-2"))
        await until(lambda: waiting(coordinator) == ["req-2"])
        await coordinator.stub.Cancel(pb.CancelRequest(request_id="req-2"))
        assert refusal((await gateway.answers())[0]).reason == "CANCELLED"


async def test_a_route_is_a_span_of_the_trace_that_it_tells() -> None:
    """As for a call, which has metadata for it."""
    exporter = InMemorySpanExporter()
    tracing = OtelTracing("coordinator", SimpleSpanProcessor(exporter))
    async with running_coordinator(tracing=tracing) as coordinator:
        await coordinator.engine()
        gateway = await coordinator.gateway()
        trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        (route,) = wants("req-1")
        route.trace["traceparent"] = f"00-{trace_id}-{parent_id}-01"
        await gateway.send(routes=[route])
        await gateway.answers()
        (span,) = exporter.get_finished_spans()
        assert span.name == "route"
        assert span.parent is not None
        assert f"{span.parent.trace_id:032x}" == trace_id
        assert f"{span.parent.span_id:016x}" == parent_id
        assert span.attributes is not None
        assert span.attributes["caravan.engine_id"] == "engine-0"
    tracing.shutdown()
