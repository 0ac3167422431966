"""Whatever a request holds is given back, wherever it is when it is cancelled (I5, I6)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.dev.provider.faults import Fault, Kind
from services.dev.provider.script import Script
from services.engine.remote.breaker import Breaker, State
from services.engine.remote.engine import RemoteEngine
from services.engine.remote.request import Request
from services.runtime.clock import SystemClock
from services.runtime.telemetry import NoTracing
from tests.support.remote import FAST, Rig, running_remote

MOST_STEPS = 2_000
OPTIONS: dict[str, Any] = {
    **FAST,
    "retry": {"initialBackoff": "0.001s", "maxBackoff": "0.001s", "budget": 1},
    "workers": 1,
    "limits": {"concurrentRequests": 1, "requestsPerMinute": "1000000"},
    "breaker": {"failureThreshold": 1, "openDuration": "0.001s"},
}


async def reopened(rig: Rig) -> Breaker:
    """The breaker, half open: the next call is a probe, and one that kept its permit would be the last."""
    breaker, clock = rig.engine.endpoint.breaker, SystemClock()
    breaker.automatic(clock.monotonic())
    breaker.acquire(clock.monotonic()).fail(clock.monotonic())
    await rig.until(lambda: breaker.state(clock.monotonic()) is State.HALF_OPEN)
    return breaker


def submit(rig: Rig) -> Request:
    """A request whose first attempt has a worker, and has made no step."""
    generate = rig.request()
    request = rig.engine.register(generate.request_id)
    rig.engine.submit(request, generate, None, NoTracing().start("generate", None))
    return request


async def cancelled_after(rig: Rig, steps: int) -> bool:
    """Cancels a request after so many turns of the loop; whether it had not ended by then."""
    breaker = await reopened(rig)
    request = submit(rig)
    for _ in range(steps):
        await asyncio.sleep(0)
    early = not request.outbox.ended
    rig.engine.release(request, "tenant", "cancelled")
    assert request.outbox.ended or request.task is not None
    await rig.idle()
    assert request.outbox.ended
    assert not breaker._probes
    assert nothing_is_known_of(rig.engine, request)
    return early


def nothing_is_known_of(engine: RemoteEngine, request: Request) -> bool:
    waits = request.task is not None or request.timer is not None
    return request not in engine.dispatcher._jobs and not waits


@pytest.mark.parametrize(
    "fault",
    [
        None,
        Fault(Kind.STATUS, status=503, times=None),
        Fault(Kind.STATUS, status=401, times=None),
        Fault(Kind.CUT, after=1, times=None),
    ],
    ids=["answer", "503", "401", "cut"],
)
async def test_a_request_can_be_cancelled_at_every_step(fault: Fault | None) -> None:
    """One, two, three turns of the loop, until it ends by itself: worker, permits, probe and connection are free each time."""
    async with running_remote(Script(tokens=2), **OPTIONS) as rig:
        if fault is not None:
            rig.provider.faults.add(fault)
        steps = 0
        while await cancelled_after(rig, steps):
            steps += 1
            assert steps < MOST_STEPS
        assert steps > 10
