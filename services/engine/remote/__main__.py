"""The process of an engine in front of a provider: `python -m services.engine.remote`."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from caravan.coordinator.v1 import coordinator_service_pb2_grpc
from caravan.coordinator.v1.coordinator_service_pb2 import EngineRegistration
from caravan.engine.v1 import (
    engine_service_pb2,
    engine_service_pb2_grpc,
    remote_service_pb2,
    remote_service_pb2_grpc,
)

from services.engine.membership import Membership
from services.engine.remote.accounts import Accounts
from services.engine.remote.breaker import Breaker, Transition
from services.engine.remote.credentials import Credential, CredentialError, CredentialSession
from services.engine.remote.endpoint import Endpoint
from services.engine.remote.engine import Identity, RemoteEngine
from services.engine.remote.failure_log import FailureLog
from services.engine.remote.http_client import ProviderClient
from services.engine.remote.metrics import RemoteMetrics
from services.engine.remote.options import EngineOptions, OptionsError, read_options
from services.engine.remote.prices import PriceTable, tariff
from services.engine.remote.rate_gate import RateGate, open_rate_gate
from services.engine.remote.redaction import Redactor, redact_logs
from services.engine.remote.remote_servicer import RemoteServicer
from services.engine.remote.retry import Retry, RetryBudget
from services.engine.remote.servicer import RemoteEngineServicer
from services.engine.remote.settings import RemoteSettings
from services.engine.remote.spend import SpendCounters
from services.engine.remote.wire import Wire
from services.engine.remote.wires import wire_for
from services.runtime.channel import open_channel
from services.runtime.clock import Clock, SystemClock, random_fraction, random_id
from services.runtime.process import run_process
from services.runtime.server import ServiceServer, cancel_all, start_metrics, wait_for_stop
from services.runtime.settings import SettingsError
from services.runtime.telemetry import Tracing, open_tracing

_LOG = logging.getLogger("engine")
_SERVICES = [
    engine_service_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name,
    remote_service_pb2.DESCRIPTOR.services_by_name["RemoteService"].full_name,
]
# Calls that are no requests get this long to end.
_LAST_CALLS_S = 1.0
# The coordinator gets a last report within this time.
_LAST_REPORT_S = 1.0
# What was used is settled with the coordinator when an engine stops.
_SETTLE_PATIENCE_S = 2.0


@dataclass(frozen=True)
class Process:
    """What the parts of one process share."""

    settings: RemoteSettings
    options: EngineOptions
    incarnation: str
    environ: Mapping[str, str] = field(repr=False)
    clock: Clock
    tracing: Tracing
    metrics: RemoteMetrics
    redactor: Redactor


def options_of(settings: RemoteSettings) -> EngineOptions:
    """The options that the settings hold. Raises SettingsError."""
    try:
        return read_options(settings.options, settings.provider, settings.model.path)
    except OptionsError as error:
        told = str(error).split("\n")
        raise SettingsError("\n".join(f"CARAVAN_REMOTE_OPTIONS: {line}" for line in told)) from None


def build_engine(
    process: Process, wire: Wire, client: ProviderClient, gate: RateGate
) -> RemoteEngine:
    """Composes an engine, not yet started; its credential is not yet read."""
    settings, options, metrics = process.settings, process.options, process.metrics

    def changed(credential: Credential) -> None:
        process.redactor.add(credential.secret)
        engine.heal()

    def breaker_changed(transition: Transition) -> None:
        metrics.breaker_changed(transition.after.value)
        _LOG.warning(
            "the breaker is %s, and was %s: %s",
            transition.after.name.lower().replace("_", " "),
            transition.before.name.lower().replace("_", " "),
            transition.why.replace("_", " "),
        )

    price = tariff(PriceTable.load(), options.told, settings.provider, options.model)
    if price.price is None:
        _LOG.warning("no price of %s is known: its requests count as free", options.model)
    endpoint = Endpoint(
        provider=settings.provider,
        model=options.model,
        wire=wire,
        client=client,
        gate=gate,
        breaker=Breaker(options.breaker, breaker_changed),
        retry=Retry(options.retry, RetryBudget(options.retry_budget)),
        credentials=CredentialSession(options.source, process.clock, process.environ, changed),
        redactor=process.redactor,
        accounts=Accounts(price, SpendCounters(), metrics),
        metrics=metrics,
        failures=FailureLog(),
        tracing=process.tracing,
        clock=process.clock,
        fraction=random_fraction,
        patience=options.patience,
        total_s=options.total_s,
    )
    identity = Identity(
        settings.engine_id, process.incarnation, settings.model.name, settings.revision
    )
    engine = RemoteEngine(identity, endpoint, options, progress_s=settings.progress_s)
    return engine


def _open_client(process: Process) -> tuple[Wire, ProviderClient]:
    """Raises SettingsError for a proxy that cannot be used."""
    options = process.options
    wire = wire_for(
        options.provider,
        redact=process.redactor.clean,
        clock=process.clock,
        ids=random_id,
        default_max_tokens=options.default_max_tokens,
    )
    try:
        client = ProviderClient(
            options.provider,
            wire,
            options.base_url,
            options.timeouts,
            process.clock,
            kept=options.workers,
        )
    except ValueError as error:
        raise SettingsError(str(error)) from None
    return wire, client


@asynccontextmanager
async def running(
    process: Process, stub: coordinator_service_pb2_grpc.CoordinatorServiceAsyncStub | None
) -> AsyncIterator[RemoteEngine]:
    """An engine that runs; at the end its calls are closed."""
    options, clock = process.options, process.clock
    gate = open_rate_gate(options.limits, options.limit_key, process.incarnation, clock, stub)
    wire, client = _open_client(process)
    engine = build_engine(process, wire, client, gate)
    credentials = engine.endpoint.credentials
    try:
        await credentials.open()
    except CredentialError as error:
        # It may be there later: a file that is mounted, or one that is rotated by hand.
        engine.fail(f"the credential cannot be read: {error.detail}")
    engine.start()
    watching = asyncio.create_task(credentials.watch())
    try:
        yield engine
    finally:
        await engine.stop()
        await cancel_all([watching])
        credentials.close()
        await client.aclose()
        try:
            async with asyncio.timeout(_SETTLE_PATIENCE_S):
                await gate.close()
        except TimeoutError:
            _LOG.warning("the coordinator could not be told what was used")


async def _serve_engine(
    process: Process,
    stub: coordinator_service_pb2_grpc.CoordinatorServiceAsyncStub | None,
    stopping: asyncio.Event,
) -> None:
    settings = process.settings
    server = ServiceServer(settings.address, _SERVICES, _LAST_CALLS_S)
    serving: set[asyncio.Task[None]] = set()
    background: list[asyncio.Task[None]] = []
    membership: Membership | None = None

    def tell_health(takes_requests: bool) -> None:
        telling = asyncio.ensure_future(server.set_serving(takes_requests))
        serving.add(telling)
        telling.add_done_callback(serving.discard)

    async with running(process, stub) as engine:
        services = server.services
        engine_service_pb2_grpc.add_EngineServiceServicer_to_server(
            RemoteEngineServicer(engine, process.tracing), services
        )
        remote_service_pb2_grpc.add_RemoteServiceServicer_to_server(
            RemoteServicer(engine), services
        )
        port = await server.start()
        start_metrics(settings.metrics_address, process.metrics.registry)
        engine.on_serving = tell_health
        engine.on_stopped = stopping.set
        engine.tell_health()
        if stub is not None:
            address = f"{settings.address.rpartition(':')[0]}:{port}"
            membership = _membership(stub, engine, address)
            background.append(asyncio.create_task(membership.run()))
        model = engine.model()
        _LOG.info("listening on port %d, serving %s: %s", port, model.name, model.description)
        try:
            await wait_for_stop(stopping)
            _LOG.info("draining for at most %g s", settings.drain_grace_s)
            server.drain()
            engine.drain(settings.finish_s, for_good=True)
            if not await engine.emptied(settings.drain_grace_s):
                _LOG.warning("%d requests did not end in time", engine.inflight.depth)
            await server.drain_and_stop()
            if membership is not None:
                # What was spent since its last report is told.
                membership.leave()
                await asyncio.wait(background, timeout=_LAST_REPORT_S)
        finally:
            await cancel_all([*background, *serving])


def _membership(
    stub: coordinator_service_pb2_grpc.CoordinatorServiceAsyncStub,
    engine: RemoteEngine,
    address: str,
) -> Membership:
    """What keeps the engine known to the coordinator while it runs."""
    registration = EngineRegistration(
        engine_id=engine.identity.engine_id,
        address=address,
        incarnation=engine.identity.incarnation,
        revision=engine.identity.revision,
    )
    membership = Membership(stub, engine, registration, random_fraction, engine)
    engine.on_change = membership.changed
    return membership


async def serve(settings: RemoteSettings, stopping: asyncio.Event | None = None) -> int:
    """Runs the engine until SIGTERM, SIGINT or `stopping`; returns the exit code. Raises SettingsError."""
    options = options_of(settings)
    if settings.finish_s > settings.drain_grace_s:
        raise SettingsError("CARAVAN_ENGINE_DRAIN_FINISH_S must be at most CARAVAN_DRAIN_GRACE_S")
    redactor = Redactor()
    redact_logs(redactor, logging.getLogger())
    process = Process(
        settings=settings,
        options=options,
        incarnation=random_id("life"),
        environ=os.environ,
        clock=SystemClock(),
        tracing=open_tracing("engine", settings.otlp_endpoint),
        metrics=RemoteMetrics(),
        redactor=redactor,
    )
    stopping = stopping or asyncio.Event()
    try:
        if not settings.coordinator:
            await _serve_engine(process, None, stopping)
        else:
            async with open_channel(settings.coordinator) as channel:
                stub = coordinator_service_pb2_grpc.CoordinatorServiceStub(channel)
                await _serve_engine(process, stub, stopping)
    finally:
        process.tracing.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(run_process("engine", RemoteSettings, serve, os.environ))
