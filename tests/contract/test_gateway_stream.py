"""Routes and releases of a gateway on its session with the coordinator, over real gRPC."""

from __future__ import annotations

import asyncio

import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.gateway import session_stream
from services.gateway.routes import Wanted
from services.gateway.session_stream import ROUTES_MAX
from services.runtime.errors import CaravanError, from_rpc_error
from services.runtime.telemetry import OtelTracing
from tests.support.coordinator import until
from tests.support.gateway import Rig, error_of, running
from tests.support.gateway_peers import FakeCoordinator, FakeEngine, hang

FAILED = "caravan_gateway_releases_failed_total"


def grant_to(request_id: str, lease_id: str) -> pb.JoinGatewayResponse:
    """A message of the coordinator that grants a lease."""
    granted = pb.RouteResponse(lease=pb.Lease(lease_id=lease_id, engine_id="engine-1"))
    return pb.JoinGatewayResponse(routes=[pb.RouteAnswer(request_id=request_id, granted=granted)])


def released(rig: Rig) -> list[str]:
    """Leases that came back, in their order."""
    return [lease_id for lease_id, _ in rig.coordinator.releases]


async def test_routes_that_come_together_travel_together() -> None:
    """Three requests that a coordinator has been waited for with are one message to it."""
    async with running(interval_ms=50) as rig:
        address = f"127.0.0.1:{rig.coordinator.server.port}"
        await rig.coordinator.server.grpc.stop(0)
        await until(lambda: rig.sample("caravan_gateway_joined") == 0)
        asking = asyncio.gather(*(rig.chat_bytes() for _ in range(3)))
        await until(lambda: len(rig.gateway.sessions) == 3)
        again = FakeCoordinator(rig.coordinator.engines, interval_ms=50, address=address)
        await again.server.start()
        assert all(b"Hello you" in answer for answer in await asking)
        assert [len(m.routes) for m in again.messages if m.routes] == [3]
        await until(lambda: not again.held)
        await again.server.grpc.stop(0)


async def test_a_lease_is_given_back_in_front_of_the_next_route() -> None:
    """A request that moves needs no answer to its release: the coordinator takes it first."""
    full = CaravanError(
        "CAPACITY_EXHAUSTED", "Full.", retry_after_s=0.0, model="demo", active="1", capacity="1"
    )
    engines = [FakeEngine((full,)), FakeEngine()]
    async with running(engines=engines) as rig:
        assert b"Hello you" in await rig.chat_bytes()
        await rig.idle()
        told = [message for message in rig.coordinator.messages if message.routes]
        assert len(told) == 2
        earlier = [m for m in rig.coordinator.messages if m.releases]
        (release,) = earlier[0].releases
        first, second = (rig.coordinator.messages.index(m) for m in (earlier[0], told[1]))
        assert (release.lease_id, first <= second) == ("lease-1", True)


async def test_many_routes_at_once_are_some_messages() -> None:
    """The coordinator can turn to others between them."""
    async with running() as rig:
        session = rig.gateway._membership._current
        asked = [session.ask(Wanted(f"req-{i}", "demo").request()) for i in range(ROUTES_MAX + 9)]
        assert all(isinstance(answer, pb.RouteResponse) for answer in await asyncio.gather(*asked))
        assert [len(m.routes) for m in rig.coordinator.messages] == [ROUTES_MAX, 9]


async def test_a_heartbeat_goes_before_routes() -> None:
    """A gateway that always has some to ask for beats all the same."""
    async with running() as rig:
        session = rig.gateway._membership._current
        answer = session.ask(Wanted("req-x", "demo").request())
        session.beat()
        await answer
        assert [len(m.routes) for m in rig.coordinator.messages] == [0, 1]


async def test_a_release_and_a_route_of_one_turn_travel_together() -> None:
    """In one message, of which the coordinator takes releases first."""
    async with running() as rig:
        membership = rig.gateway._membership
        answer = membership._current.ask(Wanted("req-x", "demo").request())
        membership.release(pb.ReleaseRequest(lease_id="lease-9"))
        assert isinstance(await answer, pb.RouteResponse)
        (message,) = rig.coordinator.messages
        assert [release.lease_id for release in message.releases] == ["lease-9"]
        assert [route.request_id for route in message.routes] == ["req-x"]


async def test_a_release_waits_for_a_route_that_takes_it_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But not where a route waits for a place, which may be the one that is given back."""
    monkeypatch.setattr(session_stream, "RELEASE_GATHER_S", 60.0)
    async with running() as rig:
        membership = rig.gateway._membership
        session = membership._current
        membership.release(pb.ReleaseRequest(lease_id="lease-8"))
        await session.ask(Wanted("req-x", "demo").request())
        (message,) = rig.coordinator.messages
        assert [release.lease_id for release in message.releases] == ["lease-8"]
        rig.coordinator.refusals.append(hang)
        waiting = session.ask(Wanted("req-y", "demo").request())
        membership.release(pb.ReleaseRequest(lease_id="lease-9"))
        await until(lambda: released(rig) == ["lease-8", "lease-9"])
        assert not waiting.done()


async def test_the_trace_of_a_request_is_told() -> None:
    """With the route, so that the coordinator's span is a child of the gateway's."""
    exporter = InMemorySpanExporter()
    tracing = OtelTracing("gateway", SimpleSpanProcessor(exporter))
    async with running(tracing=tracing) as rig:
        await rig.chat_bytes()
        await rig.idle()
        (span,) = exporter.get_finished_spans()
        assert span.context is not None
        trace = rig.coordinator.routes[0].trace["traceparent"]
        assert trace.split("-")[1:3] == [
            f"{span.context.trace_id:032x}",
            f"{span.context.span_id:016x}",
        ]
    tracing.shutdown()


@pytest.mark.parametrize("reason", ["CAPACITY_EXHAUSTED", "BUDGET_EXCEEDED"])
async def test_a_refusal_has_the_words_of_the_coordinator(reason: str) -> None:
    """With its metadata and the time after which to try again."""
    refused = CaravanError(reason, "Not now.", retry_after_s=3.0, model="demo")
    async with running() as rig:
        rig.coordinator.refusals = [refused]
        error = from_rpc_error(await error_of(rig.chat()), service="gateway")
        assert (error.reason, error.message, error.retry_after_s) == (reason, "Not now.", 3.0)
        assert error.metadata == {"model": "demo"}


async def test_a_grant_after_its_client_has_left_is_given_back() -> None:
    """The cancel does not find the request any more, or not yet: the answer still comes, and is a lease (I6)."""
    gate = asyncio.Event()

    async def wait() -> None:
        await gate.wait()

    async with running() as rig:
        rig.coordinator.refusals = [wait]
        call = rig.chat()
        await until(lambda: len(rig.coordinator.routes) == 1)
        call.cancel()
        await until(lambda: len(rig.gateway.sessions) == 0)
        assert len(rig.gateway.background) == 1
        gate.set()
        await until(lambda: rig.coordinator.outcomes == ["CANCELLED"])
        await rig.idle()
        assert rig.engine.requests == []


async def test_a_grant_in_the_moment_in_which_its_client_leaves() -> None:
    """It has come, and who asked for it is cancelled before it could take it (W61)."""
    async with running() as rig:
        rig.coordinator.refusals = [hang]
        membership = rig.gateway._membership
        parts = rig.gateway.sessions._parts
        assert parts is not None
        asking = asyncio.create_task(parts.leases.take(Wanted("req-x", "demo"), ()))
        await until(lambda: len(rig.coordinator.routes) == 1)
        # No await in between.
        membership._current.take(grant_to("req-x", "lease-x"))
        asking.cancel()
        await until(lambda: released(rig) == ["lease-x"])
        assert asking.cancelled()
        assert len(membership._held) == 0
        asking = asyncio.create_task(parts.leases.take(Wanted("req-y", "demo"), ()))
        rig.coordinator.refusals = [hang]
        await until(lambda: len(rig.coordinator.routes) == 2)
        asking.cancel()
        membership._current.take(grant_to("req-y", "lease-y"))
        await until(lambda: released(rig) == ["lease-x", "lease-y"])
        assert rig.coordinator.outcomes == ["CANCELLED", "CANCELLED"]


async def test_a_grant_that_nobody_asked_for_is_given_back() -> None:
    """Whatever the coordinator thinks of whom it is for (I6)."""
    async with running() as rig:
        rig.gateway._membership._current.take(grant_to("nobody", "lease-n"))
        await until(lambda: released(rig) == ["lease-n"])
        assert rig.coordinator.outcomes == ["CANCELLED"]


async def test_a_release_that_was_not_confirmed_is_told_again() -> None:
    """A coordinator hangs on it: its session ends, and the next one begins with the release."""

    async def lose() -> None:
        rig.coordinator.hold_release = None
        await hang()

    async with running(interval_ms=50) as rig:
        rig.coordinator.hold_release = lose
        await rig.chat_bytes()
        await until(lambda: released(rig) == ["lease-1"])
        assert len(rig.coordinator.joined) == 2
        assert rig.sample(FAILED) == 1
        assert rig.coordinator.outcomes == ["FINISHED"]


async def test_releases_are_confirmed_by_heartbeats() -> None:
    """Nothing is told twice while the session lives, and nothing is kept."""
    async with running(interval_ms=30) as rig:
        for _ in range(3):
            await rig.chat_bytes()
        await until(lambda: len(rig.gateway._membership._releases) == 0)
        assert sorted(released(rig)) == ["lease-1", "lease-2", "lease-3"]
        assert rig.sample(FAILED) == 0


async def test_a_gateway_that_stops_gives_back_what_it_holds() -> None:
    """Before it leaves: its last releases are taken."""

    async def until_it_stops() -> None:
        await until(lambda: rig.gateway._draining)

    async with running() as rig:
        rig.coordinator.hold_release = until_it_stops
        await rig.chat_bytes()
    assert released(rig) == ["lease-1"]
