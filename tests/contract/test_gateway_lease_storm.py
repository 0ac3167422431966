"""Leases of a gateway at a real coordinator, while askers leave and sessions break in random turns: nothing is left (I6)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import Random

import pytest
from prometheus_client import CollectorRegistry

from services.coordinator.effects import Effects, Ending, EndSession
from services.coordinator.gateways import GatewayRecord
from services.gateway.__main__ import Gateway
from services.gateway.leases import Leases
from services.gateway.metrics import Outcome
from services.gateway.routes import Wanted
from services.gateway.settings import GatewaySettings
from services.runtime.clock import CountingIds, SystemClock
from services.runtime.errors import CaravanError
from services.runtime.telemetry import NoTracing
from tests.support.coordinator import Coordinator, EnginePeer, running_coordinator, until

REQUESTS = 300


@asynccontextmanager
async def gateway_at(coordinator: Coordinator) -> AsyncIterator[Gateway]:
    """A gateway that has joined."""
    settings = GatewaySettings(
        address="127.0.0.1:0", coordinator=coordinator.address, drain_grace_s=0.0
    )
    registry, ids = CollectorRegistry(), CountingIds()
    gateway = Gateway(settings, registry, SystemClock(), ids, NoTracing())
    await gateway.start()
    try:
        await until(lambda: len(coordinator.state.gateways) == 1)
        yield gateway
    finally:
        await gateway.stop()


async def turns(number: int) -> None:
    """Lets the event loop turn so many times."""
    for _ in range(number):
        await asyncio.sleep(0)


async def one_request(leases: Leases, number: int, random: Random) -> str:
    """Asks for a lease, runs for some turns and gives it back; says what became of it."""
    try:
        lease = await leases.take(Wanted(f"req-{number}", "demo"), ())
    except CaravanError as error:
        return error.reason
    try:
        await turns(random.randrange(30))
    finally:
        leases.release(lease, random.choice(list(Outcome)), b"")
    return "released"


async def end_session(coordinator: Coordinator) -> None:
    """The coordinator ends the session of the gateway, and it joins again."""
    (record,) = await _joined(coordinator)
    ending = EndSession(record.session, record.gateway_id, Ending.SILENT)
    coordinator.servicer.perform(Effects(endings=(ending,)))
    await until(lambda: coordinator.state.gateways.of_session(record.session) is None)


async def _joined(coordinator: Coordinator) -> list[GatewayRecord]:
    await until(lambda: len(coordinator.state.gateways) == 1)
    return list(coordinator.state.gateways)


@pytest.mark.parametrize("breaks", [0, 5])
@pytest.mark.parametrize("seed", range(3))
async def test_nothing_is_left(seed: int, breaks: int) -> None:
    """Whoever leaves when, and whatever session breaks when. Where none does, nothing is swept, and each grant is released."""
    random = Random(seed)
    async with running_coordinator() as coordinator:
        peer = EnginePeer(coordinator.stub, "engine-0")
        peer.model.max_sequences = 4
        await peer.join()
        async with gateway_at(coordinator) as gateway:
            parts = gateway.sessions._parts
            assert parts is not None
            tasks: list[asyncio.Task[str]] = []
            broken = set(random.sample(range(REQUESTS), breaks))
            for number in range(REQUESTS):
                tasks.append(asyncio.create_task(one_request(parts.leases, number, random)))
                await turns(random.randrange(6))
                if random.random() < 0.5:
                    random.choice(tasks[-12:]).cancel()
                if number in broken:
                    await end_session(coordinator)
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    assert await task == "released"
            assert any(task.cancelled() for task in tasks)
            assert not all(task.cancelled() for task in tasks)
            state, membership = coordinator.state, gateway._membership
            await until(lambda: len(gateway.background) + len(membership._releases) == 0)
            assert len(state.leases) + len(state.waiting) + len(coordinator.servicer._routes) == 0
            assert len(membership._held) + len(membership._current._asked) == 0
            granted = coordinator.metric("caravan_route_total", result="granted")
            released = sum(
                coordinator.metric("caravan_releases_total", outcome=outcome.value)
                for outcome in Outcome
            )
            swept = coordinator.metric("caravan_leases_swept_total")
            adopted = coordinator.metric("caravan_leases_adopted_total")
            assert granted + adopted == released + swept
            assert breaks or not swept
