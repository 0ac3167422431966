"""Runs the cache service: `python -m services.cache`."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from typing import Final

from prometheus_client import CollectorRegistry

from services.cache.core import Limits
from services.cache.edge import Edge
from services.cache.metrics import CacheMetrics
from services.cache.servicer import NAME, CacheServicer, register
from services.cache.settings import CacheSettings
from services.cache.state import CacheState
from services.runtime.clock import Clock, IdSource, SystemClock, random_id
from services.runtime.process import run_process
from services.runtime.server import ServiceServer, cancel_all, start_metrics, wait_for_stop

_FREEZE_GROWTH: Final = 1.25
_FREEZE_ROWS: Final = 10_000
_LOG = logging.getLogger(__name__)


def compose(
    settings: CacheSettings, registry: CollectorRegistry, clock: Clock, ids: IdSource
) -> CacheServicer:
    """The parts of the service, put together."""
    state = CacheState(
        Limits(
            heartbeat_s=settings.heartbeat_s,
            reservation_ttl_s=settings.reservation_ttl_s,
            claim_ttl_s=settings.claim_ttl_s,
            sessions_max=settings.max_sessions,
            rows_max=settings.max_rows,
            claims_per_session_max=settings.max_claims,
            waiters_max=settings.max_waiters,
            keys_max=settings.max_keys,
            pressure_high=settings.pressure_high,
            pressure_low=settings.pressure_low,
        )
    )
    metrics = CacheMetrics(registry, state.core)
    edge = Edge(
        state,
        metrics,
        clock,
        watchers_max=settings.max_watchers,
        changes_max=settings.max_changes,
    )
    return CacheServicer(state, edge, metrics, clock, ids, room_wait_s=settings.room_wait_s)


async def serve(settings: CacheSettings) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code. Raises PortTakenError."""
    registry = CollectorRegistry()
    servicer = compose(settings, registry, SystemClock(), random_id)
    server = ServiceServer(settings.address, [NAME], settings.drain_grace_s)
    register(servicer, server.services)
    stopping = asyncio.Event()
    sweeper = asyncio.create_task(sweep(servicer, min(1.0, settings.heartbeat_s / 2)))
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
    if failed:
        _LOG.error("the sweeper failed", exc_info=sweeper.exception())
    return 1 if failed else 0


async def sweep(servicer: CacheServicer, every_s: float) -> None:
    """Ends what is silent or too old, every so many seconds, for ever."""
    frozen = 0
    while True:
        await asyncio.sleep(every_s)
        servicer.expire()
        rows = len(servicer.state.core.index)
        if rows > _FREEZE_GROWTH * frozen + _FREEZE_ROWS:
            # Rows and copies form no cycles once they are removed, but a full collection looks at all of them: with a
            # million, that is half a second in which nobody is answered. Frozen objects are not looked at.
            gc.freeze()
            frozen = rows


if __name__ == "__main__":
    sys.exit(run_process("cache", CacheSettings, serve, os.environ))
