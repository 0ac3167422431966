"""One OpenTelemetry trace per request across processes: W3C context in gRPC metadata, OTLP when an endpoint is set.

Spans are passed by hand, never through context variables: a request's span lives across async generators, whose context
is not theirs. Without an endpoint nothing is created and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

Attribute = str | int | float | bool
Metadata = Iterable[tuple[str, str | bytes]]


class RequestSpan(Protocol):
    """A part of a trace."""

    def headers(self) -> tuple[tuple[str, str], ...]:
        """Metadata that makes the next service's span a child of this one."""
        ...

    def set(self, **attributes: Attribute) -> None:
        """Sets attributes; `__` in a name stands for a dot."""
        ...

    def event(self, name: str) -> None:
        """Marks a moment."""
        ...

    def end(self, error: str | None = None) -> None:
        """Ends the span, as failed if `error` says why."""
        ...


class Tracing(Protocol):
    """Starts spans."""

    def start(self, name: str, metadata: Metadata | None, **attributes: Attribute) -> RequestSpan:
        """Starts a span, as a child of the W3C context in `metadata` if there is one."""
        ...

    def shutdown(self) -> None:
        """Sends what is left."""
        ...


class _NoSpan:
    def headers(self) -> tuple[tuple[str, str], ...]:
        return ()

    def set(self, **attributes: Attribute) -> None:
        pass

    def event(self, name: str) -> None:
        pass

    def end(self, error: str | None = None) -> None:
        pass


_NO_SPAN = _NoSpan()


class NoTracing:
    """Tracing that is off, and free."""

    def start(self, name: str, metadata: Metadata | None, **attributes: Attribute) -> RequestSpan:
        return _NO_SPAN

    def shutdown(self) -> None:
        pass


_PROPAGATOR = TraceContextTextMapPropagator()


class _OtelSpan:
    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def headers(self) -> tuple[tuple[str, str], ...]:
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(self._span))
        return tuple(carrier.items())

    def set(self, **attributes: Attribute) -> None:
        for name, value in attributes.items():
            self._span.set_attribute(name.replace("__", "."), value)

    def event(self, name: str) -> None:
        self._span.add_event(name)

    def end(self, error: str | None = None) -> None:
        if error is not None:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()


class OtelTracing:
    """Tracing by the OpenTelemetry SDK."""

    def __init__(self, service: str, processor: SpanProcessor) -> None:
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": f"caravan-{service}"})
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("caravan")

    def start(self, name: str, metadata: Metadata | None, **attributes: Attribute) -> RequestSpan:
        parent = _PROPAGATOR.extract(_text_items(metadata))
        span = _OtelSpan(self._tracer.start_span(name, context=parent, kind=SpanKind.SERVER))
        span.set(**attributes)
        return span

    def shutdown(self) -> None:
        self._provider.shutdown()


def _text_items(metadata: Metadata | None) -> Mapping[str, str]:
    return {key: value for key, value in metadata or () if isinstance(value, str)}


def open_tracing(service: str, otlp_endpoint: str) -> Tracing:
    """Tracing to an OTLP endpoint (gRPC, such as http://127.0.0.1:4317), or none where it is empty."""
    if not otlp_endpoint:
        return NoTracing()
    # Imported late: it costs 60 ms and 10 MB that a process without tracing need not pay.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    exporter = OTLPSpanExporter(endpoint=otlp_endpoint, insecure=otlp_endpoint.startswith("http:"))
    return OtelTracing(service, BatchSpanProcessor(exporter))
