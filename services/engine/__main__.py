"""The engine process: `python -m services.engine`."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from caravan.coordinator.v1 import coordinator_service_pb2_grpc
from caravan.coordinator.v1.coordinator_service_pb2 import EngineRegistration
from caravan.engine.v1 import engine_service_pb2, engine_service_pb2_grpc

from services.engine.block_cache import BlockCache, check_roots
from services.engine.decoder import Decoder
from services.engine.engine import Engine, Identity
from services.engine.inflight import InflightTable
from services.engine.loading import limits, loader
from services.engine.mailbox import Mailbox
from services.engine.membership import Membership
from services.engine.metrics import EngineMetrics
from services.engine.servicer import EngineServicer
from services.engine.settings import EngineSettings, prepare_threads
from services.runtime.channel import open_channel
from services.runtime.clock import SystemClock, random_id, random_seed
from services.runtime.process import run_process
from services.runtime.server import ServiceServer, cancel_all, start_metrics, wait_for_stop
from services.runtime.settings import SettingsError
from services.runtime.telemetry import open_tracing

_LOG = logging.getLogger("engine")
_SERVICE = engine_service_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name
_RETRY_AFTER_S = 1.0
_STEP_PATIENCE_S = 5.0
# Calls that are no requests, such as those of engines that fetch blocks, get this long to end.
_LAST_CALLS_S = 1.0
# What was saved last is still to be written when an engine stops.
_WRITE_PATIENCE_S = 5.0


def build_engine(settings: EngineSettings, metrics: EngineMetrics) -> Engine:
    """Composes an engine, not yet started. Call it on the event loop. Raises SettingsError."""
    clock = SystemClock()
    try:
        load_model = loader(settings)
    except ValueError as error:
        raise SettingsError(f"CARAVAN_ENGINE_MODEL: {error}") from error
    model = settings.model
    if settings.batch_tokens < settings.max_sequences + settings.chunk_tokens:
        raise SettingsError(
            "CARAVAN_ENGINE_BATCH_TOKENS must be at least CARAVAN_ENGINE_MAX_SEQUENCES and "
            "CARAVAN_ENGINE_CHUNK_TOKENS together"
        )
    if settings.finish_s > settings.drain_grace_s:
        raise SettingsError("CARAVAN_ENGINE_DRAIN_FINISH_S must be at most CARAVAN_DRAIN_GRACE_S")
    decoder = Decoder(
        load_model, limits(settings), Mailbox(asyncio.get_running_loop()), clock, metrics
    )
    metrics.watch(decoder)
    return Engine(
        Identity(settings.engine_id, random_id("life"), model.name, model.path, settings.revision),
        decoder,
        InflightTable(model.name, settings.max_sequences + settings.max_waiting, _RETRY_AFTER_S),
        clock=clock,
        new_seed=random_seed,
        template_seconds=settings.template_seconds,
        kv_min_tokens=settings.kv_min_tokens,
        progress_s=settings.progress_s,
    )


def build_cache(
    settings: EngineSettings, engine: Engine, address: str, metrics: EngineMetrics
) -> BlockCache:
    """The KV cache of an engine that serves at `address`, not yet started."""
    metrics.watch_store(lambda: engine.store)
    return BlockCache(
        settings, engine, address, clock=SystemClock(), new_id=random_id, jitter=_share
    )


def _share() -> float:
    return random_seed() / 2**32


async def _join(settings: EngineSettings, engine: Engine, address: str) -> None:
    """Keeps the engine known to the coordinator, until it is cancelled."""
    async with open_channel(settings.coordinator) as channel:
        membership = Membership(
            coordinator_service_pb2_grpc.CoordinatorServiceStub(channel),
            engine,
            EngineRegistration(
                engine_id=engine.identity.engine_id,
                address=address,
                incarnation=engine.identity.incarnation,
                revision=engine.identity.revision,
            ),
            _share,
        )
        engine.on_change = membership.changed
        await membership.run()


async def _empty(engine: Engine, settings: EngineSettings) -> None:
    """Lets requests finish, has others go on with those that take longer, and waits until all calls have ended."""
    engine.drain(settings.finish_s, for_good=True)
    if not await engine.emptied(settings.drain_grace_s):
        _LOG.warning("%d requests did not end in time", engine.inflight.depth)
        engine.abandon()
        await engine.emptied(_LAST_CALLS_S)


async def serve(settings: EngineSettings, stopping: asyncio.Event | None = None) -> int:
    """Runs the engine until SIGTERM, SIGINT or `stopping`; returns the exit code."""
    metrics = EngineMetrics()
    tracing = open_tracing("engine", settings.otlp_endpoint)
    engine = build_engine(settings, metrics)
    await check_roots(settings, random_id)
    server = ServiceServer(settings.address, [_SERVICE], _LAST_CALLS_S)
    servicer = EngineServicer(engine, tracing)
    engine_service_pb2_grpc.add_EngineServiceServicer_to_server(servicer, server.services)
    port = await server.start()
    start_metrics(settings.metrics_address, metrics.registry)
    address = f"{settings.address.rpartition(':')[0]}:{port}"
    cache = build_cache(settings, engine, address, metrics)
    background: list[asyncio.Task[None]] = []
    serving: set[asyncio.Task[None]] = set()

    def ready() -> None:
        _LOG.info("serving %s: %s", settings.model.name, engine.model().description)

    def tell_health(takes_requests: bool) -> None:
        telling = asyncio.ensure_future(server.set_serving(takes_requests))
        serving.add(telling)
        telling.add_done_callback(serving.discard)

    stopping = stopping or asyncio.Event()
    engine.on_ready = ready
    engine.on_serving = tell_health
    engine.on_stopped = stopping.set
    if settings.coordinator:
        background.append(asyncio.create_task(_join(settings, engine, address)))
    engine.start()
    cache.start()
    _LOG.info("listening on port %d, loading %s", port, settings.model.path)
    try:
        await wait_for_stop(stopping)
        _LOG.info("draining for at most %g s", settings.drain_grace_s)
        server.drain()
        await _empty(engine, settings)
        await server.drain_and_stop()
    finally:
        await cancel_all([*background, *serving])
        if not await engine.stop(_STEP_PATIENCE_S):
            _LOG.warning("the last decode did not end in %g s", _STEP_PATIENCE_S)
        await cache.close(_WRITE_PATIENCE_S)
        tracing.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(
        run_process(
            "engine",
            EngineSettings,
            serve,
            os.environ,
            before=lambda settings: prepare_threads(settings, os.environ),
        )
    )
