"""Runs the gateway: `python -m services.gateway`."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from contextlib import AsyncExitStack

from caravan.coordinator.v1 import coordinator_service_pb2_grpc as coordinator_grpc
from caravan.inference.v1 import inference_service_pb2 as inference_pb
from caravan.inference.v1 import inference_service_pb2_grpc as inference_grpc
from caravan.openai.v1 import openai_service_pb2 as openai_pb
from caravan.openai.v1 import openai_service_pb2_grpc as openai_grpc
from prometheus_client import CollectorRegistry

from services.gateway.background import Background
from services.gateway.conversations import Conversations
from services.gateway.coordinator import CoordinatorClient
from services.gateway.engines import EnginePool
from services.gateway.held import HeldLeases
from services.gateway.inference_servicer import InferenceServicer
from services.gateway.leases import Leases
from services.gateway.membership import Membership
from services.gateway.metrics import GatewayMetrics
from services.gateway.openai_servicer import OpenAIServicer
from services.gateway.releases import Releases
from services.gateway.session import SessionParts
from services.gateway.sessions import Sessions
from services.gateway.settings import GatewaySettings
from services.gateway.stalls import StallWatch
from services.runtime.channel import open_channel
from services.runtime.clock import (
    Clock,
    IdSource,
    SystemClock,
    random_fraction,
    random_id,
    random_seed,
)
from services.runtime.process import run_process
from services.runtime.server import ServiceServer, cancel_all, start_metrics, wait_for_stop
from services.runtime.telemetry import Tracing, open_tracing

_LOG = logging.getLogger(__name__)
_SERVICES = (
    openai_pb.DESCRIPTOR.services_by_name["OpenAIService"].full_name,
    inference_pb.DESCRIPTOR.services_by_name["InferenceService"].full_name,
)


class Gateway:
    """All parts of one gateway. Tests run several in one process."""

    def __init__(
        self,
        settings: GatewaySettings,
        registry: CollectorRegistry,
        clock: Clock,
        ids: IdSource,
        tracing: Tracing,
    ) -> None:
        self._settings = settings
        self._channel = open_channel(settings.coordinator)
        stub = coordinator_grpc.CoordinatorServiceStub(self._channel)
        self.sessions = Sessions(settings.max_requests, tracing)
        self._metrics = GatewayMetrics(registry, lambda: len(self.sessions))
        held = HeldLeases()
        releases = Releases(self._metrics.count_failed_releases)
        self._membership = Membership(
            stub,
            clock,
            ids,
            held,
            releases,
            timeout_s=settings.coordinator_timeout_s,
            on_change=self._on_membership,
        )
        coordinator = CoordinatorClient(stub, settings.coordinator_timeout_s)
        self.engines = EnginePool(
            open_channel, clock, settings.max_engine_channels, settings.engine_idle_s
        )
        conversations = Conversations(coordinator, self.engines)
        self.background = Background()
        leases = Leases(
            coordinator,
            self._membership,
            held,
            self.background,
            clock=clock,
            patience_s=settings.coordinator_patience_s,
        )
        self._stalls = StallWatch(settings.stall_s)
        self.sessions.equip(
            SessionParts(
                leases=leases,
                engines=self.engines,
                stalls=self._stalls,
                metrics=self._metrics,
                clock=clock,
                background=self.background,
                new_seed=random_seed,
                fraction=random_fraction,
                moves_max=settings.migrations_max,
            )
        )
        self.server = ServiceServer(settings.address, _SERVICES, settings.drain_grace_s)
        openai_grpc.add_OpenAIServiceServicer_to_server(
            OpenAIServicer(self.sessions, coordinator, clock, ids, settings.keepalive_s),
            self.server.services,
        )
        inference_grpc.add_InferenceServiceServicer_to_server(
            InferenceServicer(self.sessions, coordinator, conversations, ids), self.server.services
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._draining = False
        self._leaving: asyncio.Task[None] | None = None

    async def start(self, stopping: asyncio.Event | None = None) -> int:
        """Listens and joins the coordinator; returns the port. Sets `stopping` if a defect ends one of its tasks."""
        port = await self.server.start()
        self._tasks = [
            asyncio.create_task(self._membership.run()),
            asyncio.create_task(self._stalls.run()),
            asyncio.create_task(self._close_idle_engines()),
        ]
        for task in self._tasks:
            task.add_done_callback(lambda ended: self._task_ended(ended, stopping))
        return port

    async def stop(self) -> None:
        """Drains, then gives back what is held, then leaves the coordinator."""
        self._draining = True
        await self.server.drain_and_stop()
        await self.sessions.finish()
        await self.background.finish(self._settings.coordinator_timeout_s)
        await self._membership.settle(self._settings.coordinator_timeout_s)
        await cancel_all(self._tasks)
        if self._leaving is not None:
            await cancel_all([self._leaving])
        await self.engines.close()
        await self._channel.close()

    async def _on_membership(self, joined: bool) -> None:
        self._metrics.set_joined(joined)
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        if self._draining:
            return
        if joined:
            await self.server.set_serving(True)
        else:
            self._leaving = asyncio.create_task(self._leave_service())

    async def _leave_service(self) -> None:
        """For as long as new requests wait for the coordinator, they must not be sent elsewhere, where they would fail."""
        await asyncio.sleep(self._settings.coordinator_patience_s)
        await self.server.set_serving(False)

    async def _close_idle_engines(self) -> None:
        while True:
            await asyncio.sleep(self._settings.engine_idle_s / 2)
            await self.engines.close_idle()

    @staticmethod
    def _task_ended(task: asyncio.Task[None], stopping: asyncio.Event | None) -> None:
        if not task.cancelled():
            _LOG.error("a task that runs for ever has ended", exc_info=task.exception())
            if stopping is not None:
                stopping.set()

    @property
    def failed(self) -> bool:
        """Whether a defect ended one of its tasks."""
        return any(task.done() and not task.cancelled() for task in self._tasks)


async def serve(settings: GatewaySettings) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code. Raises PortTakenError."""
    registry = CollectorRegistry()
    stopping = asyncio.Event()
    async with AsyncExitStack() as stack:
        tracing = open_tracing("gateway", settings.otlp_endpoint)
        stack.callback(tracing.shutdown)
        gateway = Gateway(settings, registry, SystemClock(), random_id, tracing)
        stack.push_async_callback(gateway.stop)
        # Before anything listens: from then on a SIGTERM drains instead of killing.
        stop = asyncio.create_task(wait_for_stop(stopping))
        stack.push_async_callback(cancel_all, [stop])
        start_metrics(settings.metrics_address, registry)
        port = await gateway.start(stopping)
        _LOG.info("listening on port %d", port)
        await stop
        _LOG.info("stopping")
    return 1 if gateway.failed else 0


if __name__ == "__main__":
    sys.exit(run_process("gateway", GatewaySettings, serve, os.environ))
