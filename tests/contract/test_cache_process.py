"""`python -m services.cache` as its operator sees it: ports, health, sweeping, signals, exit codes."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
from typing import Any

import pytest
from caravan.cache.v1 import cache_service_pb2 as pb
from caravan.cache.v1 import cache_service_pb2_grpc as pb_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.cache.__main__ import serve
from services.cache.servicer import CacheServicer
from services.cache.settings import CacheSettings
from services.runtime.channel import open_channel
from tests.support.cache import EnginePeer, block, refused, root
from tests.support.processes import failure, log_line, process

READY = re.compile(rb"serving on port (\d+)")


async def test_a_life_from_ready_to_sigterm() -> None:
    """Health serves once ready; a silent engine is swept by itself; SIGTERM ends sessions and watches and exits with 0."""
    async with process("cache", CARAVAN_CACHE_HEARTBEAT_S="0.3") as running:
        port = int((await log_line(running, READY)).group(1))
        async with open_channel(f"127.0.0.1:{port}") as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            for name in ("", "caravan.cache.v1.CacheService"):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            stub = pb_grpc.CacheServiceStub(channel)
            engine = EnginePeer(stub, "engine-0", [root()])
            await engine.join()
            assert (await engine.end()).reason == "SESSION_UNKNOWN"
            assert (await refused(engine.reserve(block("a")))).reason == "SESSION_UNKNOWN"

            again = EnginePeer(stub, "engine-0", [root()])
            await again.join()
            watch = stub.Watch(pb.WatchRequest(with_present=True))
            assert await watch.read() == pb.WatchResponse(present_done=True)
            running.send_signal(signal.SIGTERM)
            assert (await again.end()).reason == "DRAINING"
            assert (await refused(watch.read())).reason == "DRAINING"
        async with asyncio.timeout(5):  # Half the grace: joined peers do not hold the shutdown.
            assert await running.wait() == 0


async def test_a_taken_port_is_one_clear_line_and_code_2() -> None:
    """Neither of the two ports may be taken; the message names the address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for name in ("CARAVAN_CACHE_ADDRESS", "CARAVAN_CACHE_METRICS_ADDRESS"):
            code, errors = await failure("cache", **{name: address})
            assert code == 2
            (only,) = errors.splitlines()
            assert only == f"caravan cache: cannot listen on {address}: Address already in use"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"CARAVAN_CACHE_ADDRESS": "0.0.0.0:7003"}, "CARAVAN_CACHE_ADDRESS='0.0.0.0:7003'"),
        ({"CARAVAN_CACHE_MAX_ROWS": "many"}, "CARAVAN_CACHE_MAX_ROWS='many'"),
        ({"CARAVAN_CACHE_PRESSURE_HIGH": "0.5"}, "CARAVAN_CACHE_PRESSURE_LOW=0.75"),
    ],
)
async def test_bad_settings_are_named_and_code_2(settings: dict[str, str], named: str) -> None:
    """A listener beyond loopback, a word for a number, and thresholds in the wrong order (S2.44) stop the start."""
    code, errors = await failure("cache", **settings)
    assert code == 2
    assert named in errors
    assert "Traceback" not in errors


async def test_a_service_whose_sweeper_fails_does_not_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without its sweeper dead engines would stay: the process stops with code 1 and says why."""

    def fail(self: CacheServicer) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(CacheServicer, "expire", fail)
    settings = CacheSettings(
        address="127.0.0.1:0", metrics_address="127.0.0.1:0", heartbeat_s=0.02, drain_grace_s=0
    )
    async with asyncio.timeout(30):
        assert await serve(settings) == 1
    assert "a defect" in caplog.text


def test_both_listeners_are_closed_by_default() -> None:
    """The defaults of both listeners are on loopback (I9)."""
    settings = CacheSettings()
    assert settings.address == "127.0.0.1:7003"
    assert settings.metrics_address == "127.0.0.1:9103"
