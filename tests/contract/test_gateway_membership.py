"""The session of a gateway with its coordinator over real gRPC, and the process around it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

from services.runtime.errors import CaravanError, from_rpc_error
from tests.support.coordinator import until
from tests.support.gateway import error_of, running, until_serving
from tests.support.gateway_peers import FakeEngine, hang
from tests.support.ports import free_port


async def test_health_follows_the_session() -> None:
    """A gateway serves while the coordinator knows it, and for as long as new requests wait for one that is away."""
    async with running(coordinator_patience_s=0.2) as rig:
        assert await rig.serving()
        await rig.coordinator.server.grpc.stop(0)
        await until_serving(rig, serving=False)
        error = await error_of(rig.chat())
        known = from_rpc_error(error, service="gateway")
        assert (known.reason, known.metadata["service"]) == ("SERVICE_UNAVAILABLE", "coordinator")
        assert known.retry_after_s is not None


async def test_a_coordinator_that_hangs_is_noticed() -> None:
    """Three beats without an answer end the session; the next one is tried at once."""
    async with running(interval_ms=50) as rig:
        rig.coordinator.silent = True
        await until(lambda: len(rig.coordinator.joined) > 1)
        assert len(set(rig.coordinator.joined)) == len(rig.coordinator.joined)
        rig.coordinator.silent = False
        await until_serving(rig, serving=True)
        assert b"Hello you" in await rig.chat_bytes()


async def test_a_coordinator_that_forgot_the_gateway_is_joined_again() -> None:
    """SESSION_UNKNOWN costs the client nothing: the gateway joins again and asks once more."""
    async with running() as rig:
        rig.coordinator.known.clear()
        assert b"Hello you" in await rig.chat_bytes()
        assert len(rig.coordinator.joined) == 2
        assert [route.gateway_id for route in rig.coordinator.routes] == rig.coordinator.joined


async def test_a_coordinator_that_never_knows_the_gateway() -> None:
    """It is asked twice, not for ever."""
    async with running() as rig:
        unknown = CaravanError("SESSION_UNKNOWN", "?", session_id="x")
        rig.coordinator.refusals = [unknown, unknown, unknown]
        error = await error_of(rig.chat())
        assert from_rpc_error(error, service="gateway").reason == "SERVICE_UNAVAILABLE"
        assert len(rig.coordinator.routes) == 2


async def test_many_requests_of_a_forgotten_gateway_join_once() -> None:
    """Requests that find the session unknown at the same time share the new one."""
    async with running() as rig:
        rig.coordinator.known.clear()
        answers = await asyncio.gather(*(rig.chat_bytes() for _ in range(8)))
        assert all(b"Hello you" in answer for answer in answers)
        assert len(rig.coordinator.joined) == 2


async def test_idle_connections_to_engines_are_closed() -> None:
    """A connection that no request has used for the idle time is closed."""
    async with running(engine_idle_s=0.1) as rig:
        await rig.chat_bytes()
        await until(lambda: len(rig.gateway.engines) == 0)
        assert b"Hello you" in await rig.chat_bytes()


async def test_the_bound_of_connections_closes_the_oldest() -> None:
    """A new engine takes the place of an idle one; where all are in use the request is refused."""
    async with running(max_engine_channels=1) as rig:
        other = FakeEngine((hang,))
        await other.start()
        rig.coordinator.engines.append(other)
        await rig.chat_bytes()
        call = rig.chat()
        await until(lambda: other.running == 1)
        assert len(rig.gateway.engines) == 1
        error = await error_of(rig.chat())
        known = from_rpc_error(error, service="gateway")
        assert (known.reason, known.metadata["service"]) == ("SERVICE_UNAVAILABLE", "gateway")
        call.cancel()
        await until(lambda: not rig.coordinator.held)
        await other.kill()


def _environment(address: str) -> dict[str, str]:
    return {
        **os.environ,
        "CARAVAN_GATEWAY_ADDRESS": address,
        "CARAVAN_GATEWAY_METRICS_ADDRESS": f"127.0.0.1:{free_port()}",
        "CARAVAN_GATEWAY_COORDINATOR": f"127.0.0.1:{free_port()}",
    }


def _run(environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "services.gateway"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_process_stops_cleanly() -> None:
    """SIGTERM ends it with code 0, though no coordinator was ever there."""
    with _run(_environment(f"127.0.0.1:{free_port()}")) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "listening" in line:
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(20) == 0
    assert "Traceback" not in rest


async def test_a_taken_port_and_bad_settings_are_one_line() -> None:
    """What is wrong with the start is said in one line, with exit code 2."""
    async with running() as rig:
        taken = f"127.0.0.1:{rig.gateway.server.port}"
        for environment, said in (
            (_environment(taken), "cannot listen on"),
            (_environment("0.0.0.0:7001"), "beyond loopback"),
            ({**_environment("127.0.0.1:0"), "CARAVAN_GATEWAY_KEEPALIVE_S": "x"}, "KEEPALIVE_S"),
        ):
            process = await asyncio.to_thread(_run, environment)
            _, errors = await asyncio.to_thread(process.communicate, None, 20)
            assert process.returncode == 2
            (line,) = errors.strip().splitlines()
            assert said in line
