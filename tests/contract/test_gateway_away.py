"""A coordinator that goes away and comes back, over real gRPC: streams go on, new requests wait, leases are told and given back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from services.runtime.errors import CaravanError, from_rpc_error
from tests.support.coordinator import until
from tests.support.gateway import Rig, error_of, running
from tests.support.gateway_peers import FakeCoordinator, delta, finished, started


class _Gate:
    """A step of an engine that waits for the test."""

    def __init__(self) -> None:
        self._open = asyncio.Event()

    async def __call__(self) -> None:
        await self._open.wait()

    def open(self) -> None:
        self._open.set()


@asynccontextmanager
async def talking(**settings: Any) -> AsyncIterator[tuple[Rig, _Gate]]:
    """A gateway whose engine stops in the middle of each answer until the gate is opened."""
    gate = _Gate()
    script = (started(), delta("a"), gate, delta("b"), finished())
    async with running(*script, interval_ms=50, **settings) as rig:
        yield rig, gate


async def _restart(rig: Rig, **fields: Any) -> FakeCoordinator:
    """Another coordinator at the same address, which knows nothing."""
    address = f"127.0.0.1:{rig.coordinator.server.port}"
    await rig.coordinator.server.grpc.stop(0)
    again = FakeCoordinator(rig.coordinator.engines, interval_ms=50, address=address, **fields)
    await again.server.start()
    return again


async def test_a_stream_goes_on_without_a_coordinator() -> None:
    """Its client notices nothing; the next coordinator is told of the lease, and gets it released under the same id."""
    async with talking() as (rig, gate):
        call = rig.chat(stream=True)
        await call.read()
        (lease_id,) = rig.coordinator.grants
        request_id = rig.coordinator.grants[lease_id]
        again = await _restart(rig)
        await until(lambda: len(again.joins) == 1)
        (held,) = again.joins[0].held
        assert (held.lease_id, held.request_id, held.model) == (lease_id, request_id, "demo")
        assert (held.engine_id, held.incarnation) == ("engine-1", rig.engine.incarnation)
        assert held.age.ToMilliseconds() > 0
        gate.open()
        body = b""
        while (part := await call.read()) and hasattr(part, "body"):
            body += part.body.data
        assert body.endswith(b"data: [DONE]\n\n")
        await until(lambda: again.releases == [(lease_id, 1)])
        await again.server.grpc.stop(0)


async def test_what_has_ended_is_not_told() -> None:
    """A coordinator learns of leases that are held when it comes, and of no others."""
    async with talking() as (rig, gate):
        gate.open()
        await rig.chat_bytes()
        await rig.idle()
        again = await _restart(rig)
        await until(lambda: len(again.joins) == 1)
        assert list(again.joins[0].held) == []
        await again.server.grpc.stop(0)


async def test_a_release_that_failed_is_repeated() -> None:
    """A request that ends while no coordinator is there: its lease is released when one has come."""
    async with talking() as (rig, gate):
        call = rig.chat(stream=True)
        await call.read()
        await rig.coordinator.server.grpc.stop(0)
        (lease_id,) = rig.coordinator.grants
        gate.open()
        failed = "caravan_gateway_releases_failed_total"
        await until(lambda: rig.registry.get_sample_value(failed) == 1)
        again = await _restart(rig)
        await until(lambda: [released for released, _ in again.releases] == [lease_id])
        assert list(again.joins[0].held) == [], "the request runs no more"
        assert again.outcomes == ["FINISHED"]
        await again.server.grpc.stop(0)


async def test_a_new_request_waits_for_the_coordinator() -> None:
    """Also one that comes while none is there; health stays, so that nobody is turned away at the door."""
    async with talking() as (rig, gate):
        gate.open()
        await rig.coordinator.server.grpc.stop(0)
        joined = "caravan_gateway_joined"
        await until(lambda: rig.registry.get_sample_value(joined) == 0)
        assert await rig.serving()
        asking = asyncio.create_task(rig.chat_bytes())
        await until(lambda: len(rig.gateway.sessions) == 1)
        again = await _restart(rig)
        assert b'"ab"' in await asking
        await again.server.grpc.stop(0)


async def test_a_route_that_the_coordinator_took_along_is_asked_for_again() -> None:
    """A request that waits for its turn when the coordinator dies waits at the next one."""

    async def wait() -> None:
        await asyncio.Event().wait()

    async with talking() as (rig, gate):
        gate.open()
        rig.coordinator.refusals = [wait]
        asking = asyncio.create_task(rig.chat_bytes())
        await until(lambda: len(rig.coordinator.routes) == 1)
        again = await _restart(rig)
        assert b'"ab"' in await asking
        assert again.routes[0].request_id == rig.coordinator.routes[0].request_id
        await until(lambda: not again.held)
        await again.server.grpc.stop(0)


async def test_a_coordinator_that_stops_is_waited_for() -> None:
    """One that says that it is shutting down has a successor to come; so does one whose answer was cut off."""
    async with talking() as (rig, gate):
        gate.open()
        rig.coordinator.refusals = [
            CaravanError("DRAINING", "The coordinator is shutting down.", retry_after_s=1.0),
            CaravanError("SERVICE_UNAVAILABLE", "Gone.", service="coordinator"),
        ]
        assert b'"ab"' in await rig.chat_bytes()
        assert len(rig.coordinator.routes) == 3


async def test_the_ghost_of_a_route_is_waited_out() -> None:
    """A coordinator that has not noticed yet that its session broke still holds the request: it is asked again."""
    gone = CaravanError("SERVICE_UNAVAILABLE", "Gone.", service="coordinator")
    ghost = CaravanError("DUPLICATE_REQUEST", "It is in flight.", request_id="r")
    async with talking() as (rig, gate):
        gate.open()
        rig.coordinator.refusals = [gone, ghost]
        assert b'"ab"' in await rig.chat_bytes()
        rig.coordinator.refusals = [ghost]
        error = from_rpc_error(await error_of(rig.chat()), service="gateway")
        assert error.reason == "DUPLICATE_REQUEST", "of another request"


async def test_a_coordinator_that_has_just_come_knows_no_engines() -> None:
    """That a model is unknown is believed of a coordinator that has had the time to hear of its engines."""
    unknown = CaravanError("MODEL_NOT_FOUND", "What model?", param="model", model="demo")
    async with talking() as (rig, gate):
        gate.open()
        rig.coordinator.refusals = [unknown]
        first = from_rpc_error(await error_of(rig.chat()), service="gateway")
        assert first.reason == "MODEL_NOT_FOUND", "the coordinator of a gateway's first session"
        again = await _restart(rig, refusals=[unknown, unknown])
        assert b'"ab"' in await rig.chat_bytes()
        assert len(again.routes) == 3
        await until(lambda: not again.held)
        await again.server.grpc.stop(0)


async def test_patience_with_it_ends() -> None:
    """What stays unknown is unknown in the end."""
    unknown = CaravanError("MODEL_NOT_FOUND", "What model?", param="model", model="demo")
    async with talking(coordinator_patience_s=0.5) as (rig, _):
        again = await _restart(rig, refusals=[unknown] * 100)
        error = from_rpc_error(await error_of(rig.chat()), service="gateway")
        assert error.reason == "MODEL_NOT_FOUND"
        assert len(again.routes) > 1
        await again.server.grpc.stop(0)


async def test_patience_is_bounded() -> None:
    """A coordinator that stays away is a clear error after the time that is set, once, and nothing is left."""
    async with talking(coordinator_patience_s=0.2) as (rig, _):
        await rig.coordinator.server.grpc.stop(0)
        error = from_rpc_error(await error_of(rig.chat()), service="gateway")
        assert (error.reason, error.metadata["service"]) == ("SERVICE_UNAVAILABLE", "coordinator")
        await until(lambda: len(rig.gateway.sessions) + len(rig.gateway.background) == 0)


async def test_a_client_that_leaves_meanwhile() -> None:
    """Its request is forgotten at once, and never asked for when a coordinator comes."""
    async with talking() as (rig, _):
        await rig.coordinator.server.grpc.stop(0)
        await until(lambda: rig.registry.get_sample_value("caravan_gateway_joined") == 0)
        call = rig.chat()
        await until(lambda: len(rig.gateway.sessions) == 1)
        call.cancel()
        await until(lambda: len(rig.gateway.sessions) + len(rig.gateway.background) == 0)
        again = await _restart(rig)
        await until(lambda: len(again.joins) == 1)
        assert again.routes == []
        await again.server.grpc.stop(0)
