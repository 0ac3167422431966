"""Runs the coordinator: `python -m services.coordinator`."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path

from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc
from caravan.coordinator.v1 import deployment_service_pb2 as deployment_pb
from caravan.coordinator.v1 import deployment_service_pb2_grpc as deployment_grpc
from prometheus_client import CollectorRegistry

from services.coordinator.cache_watch import CacheWatch
from services.coordinator.deployment_store import load_kept
from services.coordinator.deployments_servicer import DeploymentServicer
from services.coordinator.limits import Limits
from services.coordinator.metrics import CoordinatorMetrics
from services.coordinator.policies import policy_factory
from services.coordinator.published import PublishedBlocks
from services.coordinator.servicer import CoordinatorServicer
from services.coordinator.settings import CoordinatorSettings
from services.coordinator.state import CoordinatorState
from services.runtime.clock import SystemClock, random_fraction, random_id
from services.runtime.process import run_process
from services.runtime.server import ServiceServer, cancel_all, start_metrics, wait_for_stop
from services.runtime.telemetry import open_tracing

_LOG = logging.getLogger(__name__)
_SERVICES = (
    pb.DESCRIPTOR.services_by_name["CoordinatorService"].full_name,
    deployment_pb.DESCRIPTOR.services_by_name["DeploymentService"].full_name,
)


async def serve(settings: CoordinatorSettings) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code. Raises PortTakenError, SettingsError."""
    published = PublishedBlocks()
    new_policy = policy_factory(settings.routing, random_fraction, settings.load_factor, published)
    clock, limits = SystemClock(), _limits(settings)
    # Engines that another coordinator knew need as long to join.
    learning_until = clock.monotonic() + limits.rejoin_s
    state = CoordinatorState(limits, new_policy, learning_until)
    kept = load_kept(settings.deployments_state, settings.deployments, clock.wall())
    for deployment, created_at in kept:
        # Nobody has joined yet: there are no effects to carry out.
        state.deployments.restore(deployment, created_at, clock.monotonic())
    registry = CollectorRegistry()
    tracing = open_tracing("coordinator", settings.otlp_endpoint)
    servicer = CoordinatorServicer(
        state, CoordinatorMetrics(registry, state), tracing, clock, random_id
    )
    server = ServiceServer(settings.address, _SERVICES, settings.drain_grace_s)
    pb_grpc.add_CoordinatorServiceServicer_to_server(servicer, server.services)
    deployments = DeploymentServicer(
        state.deployments,
        servicer.perform,
        clock,
        Path(settings.deployments_state) if settings.deployments_state else None,
    )
    deployment_grpc.add_DeploymentServiceServicer_to_server(deployments, server.services)
    stopping = asyncio.Event()
    watching = asyncio.create_task(CacheWatch(settings.cache, published).run())
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
        deployments.drain()
        await server.drain_and_stop()
    finally:
        failed = sweeper.done()
        await cancel_all([sweeper, watching])
        tracing.shutdown()
    if failed:
        _LOG.error("the sweeper failed", exc_info=sweeper.exception())
    return 1 if failed else 0


def _limits(settings: CoordinatorSettings) -> Limits:
    return Limits(
        interval_s=settings.interval_s,
        model_memory_s=settings.model_memory_s,
        engines_max=settings.max_engines,
        gateways_max=settings.max_gateways,
        leases_max=settings.max_leases,
        leases_per_engine_max=settings.max_leases_per_engine,
        queued_max=settings.max_queued,
        queue_s=settings.queue_s,
        cancel_budget_s=settings.cancel_budget_s,
        rollout_grace_s=settings.rollout_grace_s,
        tenant_weights=settings.tenant_weights,
    )


async def _sweep(servicer: CoordinatorServicer, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        servicer.expire()


if __name__ == "__main__":
    sys.exit(run_process("coordinator", CoordinatorSettings, serve, os.environ))
