"""A wall clock that jumps: sessions, leases, queues and ages follow the monotonic clock only."""

from __future__ import annotations

import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb

from services.coordinator.limits import Limits
from tests.support.coordinator import running_coordinator, until

YEARS_S = 10 * 365 * 86_400.0


@pytest.mark.parametrize("jump_s", [YEARS_S, -YEARS_S], ids=["forward", "back"])
async def test_a_jump_of_years_is_not_noticed(
    monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    """Nobody is taken for dead, who waits goes on waiting, and ages are what they were."""
    async with running_coordinator(Limits(interval_s=1.0, queue_s=30.0)) as coordinator:
        engine = await coordinator.engine(max_sequences=1)
        gateway = await coordinator.gateway()
        lease = await gateway.route("runs")
        waiting = gateway.ask("waits")
        await until(lambda: len(coordinator.state.waiting) == 1)
        coordinator.clock.advance(0.5)

        jumped = coordinator.clock.wall() + jump_s
        monkeypatch.setattr(coordinator.clock, "wall", lambda: jumped)
        for _ in range(3):
            coordinator.servicer.expire()

        inflight = await coordinator.stub.ListInflight(pb.ListInflightRequest())
        assert {r.request_id: r.age.ToSeconds() for r in inflight.requests} == {
            "runs": 0,
            "waits": 0,
        }
        assert len(coordinator.state.engines) == len(coordinator.state.gateways) == 1
        assert await gateway.release(lease.lease_id)
        granted = (await waiting).lease
        assert granted.engine_id == engine.engine_id
        assert await gateway.release(granted.lease_id)
