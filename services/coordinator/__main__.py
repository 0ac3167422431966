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
from services.coordinator.spend_keeper import SpendKeeper, open_ledger
from services.coordinator.spend_ledger import SpendLedger
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
    ledger = SpendLedger(clock.wall() - clock.monotonic())
    spend_state = Path(settings.spend_state) if settings.spend_state else None
    open_ledger(spend_state, ledger, clock.monotonic())
    state = CoordinatorState(limits, new_policy, learning_until, ledger)
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
    keeper = SpendKeeper(spend_state, ledger)
    keeping = asyncio.create_task(keeper.run(), name="keeper of costs")
    sweeper = asyncio.create_task(_sweep(servicer, settings.interval_s / 2), name="sweeper")
    # They never end by themselves; if a defect ends one, the process must not go on without it.
    for task in (sweeper, keeping):
        task.add_done_callback(lambda _: stopping.set())
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
        failed = [task for task in (sweeper, keeping) if task.done()]
        keeper.stop()
        await asyncio.gather(keeping, return_exceptions=True)
        await cancel_all([sweeper, watching])
        tracing.shutdown()
    for task in failed:
        _LOG.error("the %s failed", task.get_name(), exc_info=task.exception())
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
