"""Runs the coordinator: `python -m services.coordinator`."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc
from prometheus_client import CollectorRegistry

from services.coordinator.metrics import CoordinatorMetrics
from services.coordinator.servicer import CoordinatorServicer
from services.coordinator.settings import CoordinatorSettings
from services.coordinator.state import CoordinatorState, Limits
from services.runtime import logs
from services.runtime.clock import SystemClock, random_id
from services.runtime.server import (
    PortTakenError,
    ServiceServer,
    cancel_all,
    start_metrics,
    wait_for_stop,
)
from services.runtime.settings import SettingsError, load
from services.runtime.telemetry import open_tracing

_LOG = logging.getLogger(__name__)
_SERVICE = pb.DESCRIPTOR.services_by_name["CoordinatorService"].full_name


async def serve(settings: CoordinatorSettings) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code. Raises PortTakenError."""
    state = CoordinatorState(
        Limits(
            interval_s=settings.interval_s,
            model_memory_s=settings.model_memory_s,
            engines_max=settings.max_engines,
            gateways_max=settings.max_gateways,
            leases_max=settings.max_leases,
            leases_per_engine_max=settings.max_leases_per_engine,
        )
    )
    registry = CollectorRegistry()
    tracing = open_tracing("coordinator", settings.otlp_endpoint)
    servicer = CoordinatorServicer(
        state, CoordinatorMetrics(registry, state), tracing, SystemClock(), random_id
    )
    server = ServiceServer(settings.address, [_SERVICE], settings.drain_grace_s)
    pb_grpc.add_CoordinatorServiceServicer_to_server(servicer, server.grpc)
    stopping = asyncio.Event()
    sweeper = asyncio.create_task(_sweep(servicer, settings.interval_s / 2))
    # It never ends by itself; if a defect ends it, the process must not go on without it.
    sweeper.add_done_callback(lambda _: stopping.set())
    try:
        start_metrics(settings.metrics_address, registry)
        port = await server.start()
        await server.set_serving(True)
        _LOG.info("serving on port %d", port)
        await wait_for_stop(stopping)
        _LOG.info("stopping")
        await server.set_serving(False)
        servicer.drain()
        await server.drain_and_stop()
    finally:
        failed = sweeper.done()
        await cancel_all([sweeper])
        tracing.shutdown()
    if failed:
        _LOG.error("the sweeper failed", exc_info=sweeper.exception())
    return 1 if failed else 0


async def _sweep(servicer: CoordinatorServicer, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        servicer.expire()


def main() -> int:
    """Runs the process; returns its exit code: 0 stopped, 1 a defect, 2 bad settings or a taken port."""
    try:
        settings = load(CoordinatorSettings, os.environ)
        logs.configure("coordinator", settings.log_level)
        return asyncio.run(serve(settings))
    except (SettingsError, PortTakenError) as error:
        print(f"caravan coordinator: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
