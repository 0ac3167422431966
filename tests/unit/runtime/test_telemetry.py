"""Traces across processes: the parent travels in metadata, over a real channel."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from services.runtime.channel import open_channel
from services.runtime.server import ServiceServer
from services.runtime.telemetry import NoTracing, OtelTracing, Tracing, open_tracing


class Traced(pb_grpc.CoordinatorServiceServicer):
    """Opens a span in each Cancel call and keeps the metadata that arrived."""

    def __init__(self, tracing: Tracing) -> None:
        self.tracing = tracing
        self.metadata: dict[str, Any] = {}

    async def Cancel(
        self, request: pb.CancelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.CancelResponse:
        self.metadata = dict(context.invocation_metadata() or ())
        span = self.tracing.start(
            "child", context.invocation_metadata(), gen_ai__request__model="m"
        )
        span.event("first token")
        span.end("it failed")
        return pb.CancelResponse()


@pytest.fixture
async def traced() -> AsyncIterator[tuple[Traced, pb_grpc.CoordinatorServiceAsyncStub]]:
    """A server that traces, and a stub on a real channel: contexts must travel on the wire."""
    servicer = Traced(NoTracing())  # type: ignore[abstract]
    server = ServiceServer("127.0.0.1:0", [], drain_grace_s=0)
    pb_grpc.add_CoordinatorServiceServicer_to_server(servicer, server.services)
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        yield servicer, pb_grpc.CoordinatorServiceStub(channel)
    await server.drain_and_stop()


async def test_a_span_is_the_parent_of_the_next_services_span(
    traced: tuple[Traced, pb_grpc.CoordinatorServiceAsyncStub],
) -> None:
    """The child has the trace of the caller's span and that very span as its parent."""
    servicer, stub = traced
    theirs, ours = InMemorySpanExporter(), InMemorySpanExporter()
    servicer.tracing = OtelTracing("engine", SimpleSpanProcessor(theirs))
    tracing = OtelTracing("gateway", SimpleSpanProcessor(ours))
    parent = tracing.start("parent", None)
    await stub.Cancel(pb.CancelRequest(), metadata=parent.headers())
    parent.end()
    (child,), (span,) = theirs.get_finished_spans(), ours.get_finished_spans()
    ours_context, theirs_context = span.get_span_context(), child.get_span_context()
    assert ours_context is not None
    assert theirs_context is not None
    assert child.parent is not None
    assert child.parent.span_id == ours_context.span_id
    assert theirs_context.trace_id == ours_context.trace_id
    assert span.parent is None
    assert child.attributes == {"gen_ai.request.model": "m"}
    assert [event.name for event in child.events] == ["first token"]
    assert (child.status.status_code, child.status.description) == (StatusCode.ERROR, "it failed")
    assert span.status.status_code is StatusCode.UNSET
    assert child.resource.attributes["service.name"] == "caravan-engine"
    for each in (tracing, servicer.tracing):
        each.shutdown()


async def test_tracing_that_is_off_adds_nothing_to_the_wire(
    traced: tuple[Traced, pb_grpc.CoordinatorServiceAsyncStub],
) -> None:
    """Without an endpoint no header is sent and every method is free to call."""
    servicer, stub = traced
    tracing = open_tracing("gateway", "")
    span = tracing.start("parent", None)
    span.set(gen_ai__request__model="m")
    await stub.Cancel(pb.CancelRequest(), metadata=span.headers())
    span.end()
    tracing.shutdown()
    assert "traceparent" not in servicer.metadata


@pytest.mark.parametrize(
    "metadata",
    [
        (("traceparent", "nonsense"),),
        (("traceparent", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"),),
        (("some-bin", b"\xff"),),
        (),
    ],
)
def test_what_is_no_context_starts_a_new_trace(metadata: Any) -> None:
    """A client's broken header neither fails the request nor joins traces."""
    exporter = InMemorySpanExporter()
    tracing = OtelTracing("gateway", SimpleSpanProcessor(exporter))
    tracing.start("root", metadata).end()
    (span,) = exporter.get_finished_spans()
    assert span.parent is None
    tracing.shutdown()
