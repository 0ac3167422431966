"""`python -m services.coordinator` as its operator sees it: ports, health, sweeping, signals, exit codes."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
from typing import Any

import pytest
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.coordinator.__main__ import serve
from services.coordinator.servicer import CoordinatorServicer
from services.coordinator.settings import CoordinatorSettings
from services.runtime.channel import open_channel
from tests.support.coordinator import EnginePeer, GatewayPeer
from tests.support.processes import failure, log_line, process

READY = re.compile(rb"serving on port (\d+)")


async def test_a_life_from_ready_to_sigterm() -> None:
    """Health serves once ready; a silent engine is swept by itself; SIGTERM sends the peers away and exits with 0."""
    async with process("coordinator", CARAVAN_COORDINATOR_INTERVAL_S="0.3") as running:
        port = int((await log_line(running, READY)).group(1))
        async with open_channel(f"127.0.0.1:{port}") as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            for name in ("", "caravan.coordinator.v1.CoordinatorService"):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            stub = pb_grpc.CoordinatorServiceStub(channel)
            engine, gateway = EnginePeer(stub, "engine-0"), GatewayPeer(stub, "gateway-0")
            await engine.join()
            await gateway.join()
            await gateway.route("req-1")

            async def beat() -> None:
                while True:
                    await gateway.beat()
                    await asyncio.sleep(0.1)

            beating = asyncio.create_task(beat())
            assert (await engine.end()).reason == "SESSION_UNKNOWN"
            assert (await gateway.refusal("req-1")).reason == "NO_ENGINE"
            beating.cancel()
            await asyncio.wait([beating])

            again = EnginePeer(stub, "engine-0")
            await again.join()
            running.send_signal(signal.SIGTERM)
            assert (await again.end()).reason == "DRAINING"
        async with asyncio.timeout(5):  # Half the grace: joined peers do not hold the shutdown.
            assert await running.wait() == 0


async def test_a_taken_port_is_one_clear_line_and_code_2() -> None:
    """Neither of the two ports may be taken; the message names the address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for name in ("CARAVAN_COORDINATOR_ADDRESS", "CARAVAN_COORDINATOR_METRICS_ADDRESS"):
            code, errors = await failure("coordinator", **{name: address})
            assert code == 2
            (only,) = errors.splitlines()
            assert only == (
                f"caravan coordinator: cannot listen on {address}: Address already in use"
            )


async def test_bad_settings_are_listed_and_code_2() -> None:
    """All mistakes are named at once."""
    code, errors = await failure(
        "coordinator",
        CARAVAN_COORDINATOR_ADDRESS="0.0.0.0:7002",
        CARAVAN_COORDINATOR_MAX_ENGINES="many",
    )
    assert code == 2
    assert "CARAVAN_COORDINATOR_ADDRESS='0.0.0.0:7002'" in errors
    assert "CARAVAN_COORDINATOR_MAX_ENGINES='many'" in errors
    assert "Traceback" not in errors


async def test_a_coordinator_whose_sweeper_fails_does_not_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without its sweeper dead peers would stay: the process stops with code 1 and says why."""

    def fail(self: CoordinatorServicer) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(CoordinatorServicer, "expire", fail)
    settings = CoordinatorSettings(
        address="127.0.0.1:0", metrics_address="127.0.0.1:0", interval_s=0.02, drain_grace_s=0
    )
    async with asyncio.timeout(30):
        assert await serve(settings) == 1
    assert "a defect" in caplog.text


def test_both_listeners_are_closed_by_default() -> None:
    """The defaults of both listeners are on loopback (I9)."""
    settings = CoordinatorSettings()
    assert settings.address.startswith("127.0.0.1:")
    assert settings.metrics_address.startswith("127.0.0.1:")
