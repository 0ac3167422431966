"""A gRPC server with health, reflection, metrics, error mapping and drain, the same for every service."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, cast
from wsgiref.simple_server import WSGIRequestHandler, make_server

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from services.runtime.channel import SERVER_OPTIONS
from services.runtime.errors import CaravanError
from services.runtime.health import Health

_LOG = logging.getLogger(__name__)
_SHUTDOWN_POLL_S: Final = 3600.0


class PortTakenError(Exception):
    """The address of a listener is in use or may not be used."""


class _Guarded(grpc.GenericRpcHandler):
    """Maps exceptions of servicers to statuses of the error table; what is unknown is logged and shown as INTERNAL.

    Each method is wrapped once; an interceptor would look it up and wrap it anew in every call.
    """

    def __init__(self, handlers: grpc.GenericRpcHandler) -> None:
        self._handlers = handlers
        self._methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method
        guarded = self._methods.get(method)
        if guarded is None:
            handler = self._handlers.service(handler_call_details)
            if handler is None:
                return None
            guarded = _guard(handler, openai=method.startswith("/caravan.openai."))
            self._methods[method] = guarded
        return guarded


class _Registrar:
    """What services are added to in place of the server."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self._server.add_generic_rpc_handlers([_Guarded(handler) for handler in handlers])

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """Generated code offers every method here as well; grpc.aio takes them from the generic handlers."""


def _guard(
    handler: grpc.RpcMethodHandler[Any, Any], *, openai: bool
) -> grpc.RpcMethodHandler[Any, Any]:
    if handler.response_streaming:
        stream = handler.stream_stream if handler.request_streaming else handler.unary_stream
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
        return make(
            _guard_stream(cast(Any, stream), openai),
            handler.request_deserializer,
            handler.response_serializer,
        )
    unary = handler.stream_unary if handler.request_streaming else handler.unary_unary
    make = (
        grpc.stream_unary_rpc_method_handler
        if handler.request_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    return make(
        _guard_unary(cast(Any, unary), openai),
        handler.request_deserializer,
        handler.response_serializer,
    )


def _guard_unary(call: Callable[[Any, Any], Awaitable[Any]], openai: bool) -> Any:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await call(request, context)
        except Exception as error:
            await _abort(error, context, openai)

    return guarded


def _guard_stream(call: Callable[[Any, Any], AsyncIterator[Any]], openai: bool) -> Any:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            async with contextlib.aclosing(cast(Any, call(request, context))) as responses:
                async for response in responses:
                    yield response
        except Exception as error:
            await _abort(error, context, openai)

    return guarded


async def _abort(
    error: Exception, context: grpc.aio.ServicerContext[Any, Any], openai: bool
) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, CaravanError):
        _LOG.error("unexpected error", exc_info=error)
        error = CaravanError("INTERNAL", "An internal error occurred; the log has the details.")
    await error.abort(context, openai=openai)


class ServiceServer:
    """The listener of one service. Not serving until `set_serving(True)`."""

    def __init__(self, address: str, service_names: Sequence[str], drain_grace_s: float) -> None:
        self._address = address
        self._names = tuple(service_names)
        self._drain_grace_s = drain_grace_s
        self.grpc = grpc.aio.server(options=SERVER_OPTIONS)
        self.services = cast(grpc.aio.Server, _Registrar(self.grpc))
        """Where services are added; what they raise becomes a status of the error table."""
        self._health = Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        shown = (*self._names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*shown, reflection.SERVICE_NAME), self.grpc)
        self.port = 0

    async def start(self) -> int:
        """Listens; returns the port. Raises PortTakenError."""
        await self.set_serving(False)
        _check_free(self._address)
        try:
            self.port = self.grpc.add_insecure_port(self._address)
        except RuntimeError as error:
            raise PortTakenError(f"cannot listen on {self._address}: is the port taken?") from error
        await self.grpc.start()
        return self.port

    async def set_serving(self, serving: bool) -> None:
        """Tells health checks whether to send requests here; "" and each service share one state."""
        for name in ("", *self._names):
            self._health.set(name, serving)

    def drain(self) -> None:
        """Tells health checks that nothing serves here any more; calls are still taken."""
        self._health.drain()

    async def drain_and_stop(self) -> None:
        """Turns health first, then waits for running calls up to the grace, then cancels them."""
        self.drain()
        await self.grpc.stop(self._drain_grace_s)


def _check_free(address: str) -> None:
    # gRPC reports a taken port by lines of its own on stderr; asked first, the operator sees one clear line.
    try:
        family, kind, protocol, _, place = _resolved(address)
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise PortTakenError(f"cannot listen on {address}: {error.strerror}") from error


def _resolved(address: str) -> tuple[Any, ...]:
    host, _, port = address.rpartition(":")
    return socket.getaddrinfo(
        host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]


class _MetricsHandler(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the base class names it
        """A scrape is no news."""


def start_metrics(address: str, registry: CollectorRegistry) -> int:
    """Serves /metrics on host:port, until the process ends; returns the port. Raises PortTakenError."""

    class Server(ThreadingWSGIServer):
        """Of the family of the address, which the base class takes from the class."""

    try:
        Server.address_family, _, _, _, place = _resolved(address)
        server = make_server(
            place[0], place[1], make_wsgi_app(registry), Server, handler_class=_MetricsHandler
        )
    except OSError as error:
        raise PortTakenError(f"cannot listen on {address}: {error.strerror}") from error
    # prometheus_client's own start wakes twice a second to look whether it is to stop, and that in each process.
    threading.Thread(
        target=server.serve_forever, args=(_SHUTDOWN_POLL_S,), name="metrics", daemon=True
    ).start()
    return int(server.server_port)


async def wait_for_stop(stopping: asyncio.Event | None = None) -> None:
    """Returns at SIGTERM or SIGINT, or when `stopping` is set."""
    event = stopping or asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    await event.wait()


async def cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels background tasks and waits for their end."""
    pending = [task for task in tasks if not task.done()]
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
