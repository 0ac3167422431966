"""The server that every service shares: health, drain, error mapping, ports, reflection, cancellation."""

from __future__ import annotations

import asyncio
import logging
import socket
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc
import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import CollectorRegistry, Counter

from services.runtime.channel import open_channel
from services.runtime.errors import CaravanError, from_rpc_error
from services.runtime.server import PortTakenError, ServiceServer, cancel_all, start_metrics

NAME = "caravan.coordinator.v1.CoordinatorService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Slow(pb_grpc.CoordinatorServiceServicer):
    """Calls that last until they are let go; tells how each handler ended."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.go = asyncio.Event()
        self.ended: asyncio.Queue[str] = asyncio.Queue()

    async def _wait(self) -> None:
        self.started.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.ended.put_nowait("cancelled")
            raise
        self.ended.put_nowait("returned")

    async def Cancel(self, request: Any, context: Any) -> pb.CancelResponse:
        await self._wait()
        return pb.CancelResponse()

    async def JoinGateway(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        yield pb.JoinGatewayResponse()
        await self._wait()


@asynccontextmanager
async def serving(
    grace_s: float = 0,
) -> AsyncIterator[tuple[Slow, ServiceServer, grpc.aio.Channel]]:
    """A server on a free port and a channel to it."""
    servicer = Slow()  # type: ignore[abstract]
    server = ServiceServer("127.0.0.1:0", [NAME], grace_s)
    pb_grpc.add_CoordinatorServiceServicer_to_server(servicer, server.services)
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        try:
            yield servicer, server, channel
        finally:
            await server.drain_and_stop()


async def status_of(channel: grpc.aio.Channel, name: str) -> int:
    """What the health check says of a service."""
    request = health_pb2.HealthCheckRequest(service=name)
    health: Any = health_pb2_grpc.HealthStub(channel)
    return int((await health.Check(request)).status)


async def test_health_of_unknown_names() -> None:
    """Check refuses a name that nobody set with NOT_FOUND; Watch says so and tells when it is set."""
    async with serving() as (_, server, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await status_of(channel, "nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="late"))
        unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        assert (await watch.read()).status == unknown
        server._health.set("late", serving=True)
        assert (await watch.read()).status == SERVING


async def test_nothing_serves_after_the_drain_began() -> None:
    """A late set_serving(True), such as that of a model that has just loaded, does not undo the drain."""
    async with serving() as (_, server, channel):
        await server.set_serving(True)
        server._health.drain()
        await server.set_serving(True)
        assert await status_of(channel, NAME) == NOT_SERVING


@pytest.mark.parametrize("name", ["", NAME])
async def test_health_says_not_serving_until_told(name: str) -> None:
    """A process that has a port but no model yet is not sent requests."""
    async with serving() as (_, server, channel):
        assert await status_of(channel, name) == NOT_SERVING
        await server.set_serving(True)
        assert await status_of(channel, name) == SERVING
        await server.set_serving(False)
        assert await status_of(channel, name) == NOT_SERVING


async def test_draining_turns_health_first_and_lets_calls_end() -> None:
    """At the drain health flips while a running call goes on to its end; new calls are refused."""
    async with serving(grace_s=20) as (servicer, server, channel):
        await server.set_serving(True)
        stub = pb_grpc.CoordinatorServiceStub(channel)
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=NAME))
        assert (await watch.read()).status == SERVING
        running = asyncio.ensure_future(stub.Cancel(pb.CancelRequest()))
        await servicer.started.wait()
        draining = asyncio.ensure_future(server.drain_and_stop())
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.read() is grpc.aio.EOF  # A watcher does not hold the drain.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Cancel(pb.CancelRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not running.done()
        servicer.go.set()
        assert await running == pb.CancelResponse()
        async with asyncio.timeout(10):
            await draining


async def test_the_grace_is_bounded() -> None:
    """A call that does not end within the grace is cancelled."""
    async with serving(grace_s=0.05) as (servicer, server, channel):
        running = asyncio.ensure_future(
            pb_grpc.CoordinatorServiceStub(channel).Cancel(pb.CancelRequest())
        )
        await servicer.started.wait()
        await server.drain_and_stop()
        assert await servicer.ended.get() == "cancelled"
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await running


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_client_that_leaves_cancels_its_handler(
    streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """CancelledError passes through the guard untouched: no error is logged, none is made of it."""
    async with serving() as (servicer, _, channel):
        stub = pb_grpc.CoordinatorServiceStub(channel)
        call: Any
        if streaming:
            call = stub.JoinGateway()
            await call.read()
        else:
            call = stub.Cancel(pb.CancelRequest())
            waiting = asyncio.ensure_future(call.code())
        await servicer.started.wait()
        call.cancel()
        async with asyncio.timeout(10):
            assert await servicer.ended.get() == "cancelled"
        assert await call.code() is grpc.StatusCode.CANCELLED
        if not streaming:
            await waiting
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


async def test_a_taken_port_is_an_error() -> None:
    """Two servers on one port would hide a mistake; the error names the address."""
    async with serving() as (_, first, _channel):
        address = f"127.0.0.1:{first.port}"
        second = ServiceServer(address, [NAME], 0)
        with pytest.raises(PortTakenError, match=address):
            await second.start()
        await second.grpc.stop(0)


async def test_reflection_lists_the_services() -> None:
    """Tools such as grpcurl find the service, health and reflection without the protos."""
    async with serving() as (_, _server, channel):
        stub: Any = cast(Any, reflection_pb2_grpc).ServerReflectionStub(channel)
        request = cast(Any, reflection_pb2).ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([request]))
        names = {s.name async for reply in call for s in reply.list_services_response.service}
        assert names == {
            NAME,
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }


async def test_every_shape_of_method_is_guarded() -> None:
    """A method with a stream of requests and one response maps its errors like the others."""

    async def sum_up(requests: AsyncIterator[bytes], context: Any) -> bytes:
        async for _ in requests:
            raise CaravanError("MISSING_FIELD", "No.", param="x")
        return b""

    server = ServiceServer("127.0.0.1:0", [], 0)
    handlers: Any = {"Sum": grpc.stream_unary_rpc_method_handler(cast(Any, sum_up))}
    generic = grpc.method_handlers_generic_handler("caravan.sample.v1.Sample", handlers)
    server.services.add_generic_rpc_handlers((generic,))
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.stream_unary("/caravan.sample.v1.Sample/Sum")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(iter([b"1"]))
        assert from_rpc_error(caught.value, service="sample").param == "x"
    await server.drain_and_stop()


async def test_methods_that_nobody_wrote_are_unimplemented() -> None:
    """The guard does not stumble over a method of the contract that is not served, nor over an unknown one."""
    async with serving() as (_, _server, channel):
        missing: Any = channel.unary_unary("/caravan.nothing.v1.Nothing/Do")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await missing(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_metrics_are_served(host: str) -> None:
    """/metrics shows the registry of this process, at addresses of both families."""
    registry = CollectorRegistry()
    Counter("sample", "A series.", registry=registry).inc(3)
    port = start_metrics(f"{host}:0", registry)
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as reply:
        assert b"sample_total 3.0" in reply.read()


def test_the_port_of_metrics_is_checked() -> None:
    """A taken port is PortTakenError."""
    registry = CollectorRegistry()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(PortTakenError, match=address):
            start_metrics(address, registry)


async def test_background_tasks_end_before_the_process() -> None:
    """cancel_all waits for the cleaning up of each task, whatever it raises."""
    cleaned = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(1)
            raise RuntimeError("while cleaning up")

    tasks = [asyncio.create_task(work()) for _ in range(2)]
    await asyncio.sleep(0)
    await cancel_all(tasks)
    assert cleaned == [1, 1]
    assert all(task.done() for task in tasks)
