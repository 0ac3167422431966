"""The commands of the person on call against a real coordinator: what they show, and what they end."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.cli.__main__ import main
from services.cli.coordinator_client import Where
from services.cli.status import Looker
from tests.support.cache import running_cache
from tests.support.coordinator import Coordinator, EnginePeer, GatewayPeer, running_coordinator

_PATIENCE_S = 20


@dataclass
class Rig:
    """A coordinator with an engine of two sequences, and a gateway with two requests that run and one that waits."""

    coordinator: Coordinator
    engine: EnginePeer
    gateway: GatewayPeer
    waiting: asyncio.Task[object]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """The rig; what it asked for is given back at the end."""
    async with running_coordinator() as coordinator:
        engine, gateway = await coordinator.engine(), await coordinator.gateway()
        for request_id in ("req-a", "req-b"):
            await gateway.ask(request_id, tenant="ants")
            coordinator.clock.advance(1)

        async def wait() -> object:
            return await gateway.ask("req-c", tenant="bees", wait_s=20)

        waiting = asyncio.create_task(wait())
        while not len(coordinator.state.waiting):  # noqa: ASYNC110 - the state has no events
            await asyncio.sleep(0.002)
        yield Rig(coordinator, engine, gateway, waiting)
        waiting.cancel()
        await asyncio.wait([waiting])
        engine.die()
        gateway.die()


class Shell:
    """Runs commands beside the event loop of the coordinator."""

    def __init__(self, address: str, capsys: pytest.CaptureFixture[str]) -> None:
        self._address = address
        self._capsys = capsys

    async def run(self, command: str, *arguments: str, code: int = 0) -> list[str]:
        """The lines that the command prints; those on stderr where it fails."""
        line = [command, "--address", self._address, *arguments]
        assert await asyncio.to_thread(main, line) == code
        printed = self._capsys.readouterr()
        return (printed.err if code else printed.out).splitlines()


@pytest.fixture
def shell(rig: Rig, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Commands that ask the coordinator of the rig."""
    return Shell(rig.coordinator.address, capsys)


async def test_requests(rig: Rig, shell: Shell) -> None:
    """Oldest first, with where each stands; as JSON too."""
    head, *lines = await shell.run("requests")
    assert head.split()[:4] == ["REQUEST", "MODEL", "ENGINE", "PHASE"]
    assert [line.split()[:4] for line in lines] == [
        ["req-a", "demo", "engine-0", "running"],
        ["req-b", "demo", "engine-0", "running"],
        ["req-c", "demo", "-", "queued"],
    ]
    told = [json.loads(line) for line in await shell.run("requests", "--json")]
    assert [one["tenant"] for one in told] == ["ants", "ants", "bees"]


async def test_engines(rig: Rig, shell: Shell) -> None:
    """A line for each; as JSON too."""
    head, line = await shell.run("engines")
    assert head.startswith("ENGINE")
    assert line.split()[:4] == ["engine-0", "demo", "idle", "2"]
    (told,) = [json.loads(line) for line in await shell.run("engines", "--json")]
    assert told["leases"] == 2


async def test_a_reader_that_has_seen_enough(rig: Rig) -> None:
    """`caravan requests | head -0`: the command ends in silence, as others do."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "services.cli", "requests"]
    process = await asyncio.create_subprocess_exec(
        *command, "--address", rig.coordinator.address, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    _, errors = await process.communicate()
    assert (process.returncode, errors) == (141, b"")


async def test_cancel_by_id(rig: Rig, shell: Shell) -> None:
    """Both those that run and those that wait; an id that is not in flight is said, and the others are ended all the same."""
    errors = await shell.run("cancel", "req-x", "req-a", "req-c", code=1)
    assert errors == ["caravan cancel: No request with the id 'req-x' is in flight."]
    assert await rig.engine.cancelled_request() == "req-a"
    await asyncio.wait([rig.waiting], timeout=_PATIENCE_S)
    assert rig.waiting.done()
    lines = await shell.run("requests")
    assert [line.split()[3] for line in lines[1:]] == ["cancelling", "running"]
    assert await shell.run("cancel", "req-b") == ["req-b is being ended"]
    assert await rig.engine.cancelled_request() == "req-b"


async def test_cancel_by_tenant(rig: Rig, shell: Shell) -> None:
    """All of one tenant, and nobody else's."""
    assert await shell.run("cancel", "--tenant", "ants") == ["2 requests of 'ants' are being ended"]
    assert {await rig.engine.cancelled_request() for _ in range(2)} == {"req-a", "req-b"}
    assert await shell.run("cancel", "--tenant", "bees") == ["1 request of 'bees' is being ended"]
    assert await shell.run("cancel", "--tenant", "") == ["0 requests of '' are being ended"]


async def test_status_prints_once_where_the_output_is_no_terminal(rig: Rig, shell: Shell) -> None:
    """Without colours or cursor movements; --json is one object."""
    lines = await shell.run("status")
    assert lines[0].startswith(f"caravan {rig.coordinator.address}   1 engine   2 running")
    assert not any("\x1b" in line for line in lines)
    (line,) = await shell.run("status", "--json")
    assert [one["request_id"] for one in json.loads(line)["requests"]] == [
        "req-a",
        "req-b",
        "req-c",
    ]


async def test_status_finds_everything_in_the_state_directory(rig: Rig, tmp_path: Path) -> None:
    """Also when it changes between two looks; what is missing is told, or left out."""
    looker = Looker(Where(None, tmp_path))
    try:
        assert "is `caravan up` running?" in (await looker.look()).problem
        endpoints = tmp_path / "endpoints.json"
        known = {"name": "coordinator", "address": "127.0.0.1:1"}
        endpoints.write_text(json.dumps({"processes": [known]}))
        assert (await looker.look()).problem == "no coordinator answers at 127.0.0.1:1"
        known["address"] = rig.coordinator.address
        async with running_cache() as cache:
            gateway = {"name": "gateway", "metrics": "http://127.0.0.1:1/metrics"}
            processes = [known, {"name": "cache", "address": cache.address}, gateway]
            endpoints.write_text(json.dumps({"processes": processes}))
            seen = await looker.look()
            assert (seen.problem, len(seen.engines), len(seen.requests)) == ("", 1, 3)
            assert (seen.cache is not None, seen.reused) == (True, None)
        seen = await looker.look()
        assert (seen.problem, len(seen.models), seen.cache) == ("", 1, None)
    finally:
        await looker.close()


async def test_status_is_live_on_a_terminal(rig: Rig) -> None:
    """It redraws what has changed, keeps trying while nobody answers, and gives the screen back on SIGTERM with code 0."""
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (40, 80))
    command = [sys.executable, "-m", "services.cli", "status"]
    shown = io.BytesIO()

    def read_until(text: bytes) -> None:
        while text not in shown.getvalue():
            shown.write(os.read(terminal, 65_536))

    process = subprocess.Popen(  # noqa: ASYNC220 - it is started in a moment
        [*command, "--address", rig.coordinator.address], stdout=end, stderr=end
    )
    os.close(end)
    try:
        async with asyncio.timeout(_PATIENCE_S):
            await asyncio.to_thread(read_until, b"req-c")
            await rig.engine.report(
                engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_FAILED, failure="melted")
            )
            await asyncio.to_thread(read_until, b"melted")
            await rig.coordinator.server.drain_and_stop()
            await asyncio.to_thread(read_until, b"no coordinator answers")
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(read_until, b"\x1b[?25h\x1b[?1049l")
            assert await asyncio.to_thread(process.wait) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


async def test_drain_and_undrain(rig: Rig, shell: Shell) -> None:
    """The engine is told; requests are granted again once it is back."""
    (line,) = await shell.run("drain", "engine-0", "--grace", "1min")
    assert line == "engine-0 is being drained: 2 requests on it, 60 s to finish"
    told = (await rig.engine.receive()).drain
    assert (told.grace.ToSeconds(), told.stop) == (60, False)
    await rig.gateway.release((await _leases(rig))[0])
    assert not rig.waiting.done()
    assert await shell.run("undrain", "engine-0") == ["engine-0 is back in service"]
    assert (await rig.engine.receive()).WhichOneof("message") == "undrain"
    await asyncio.wait([rig.waiting], timeout=_PATIENCE_S)
    assert rig.waiting.done()


async def _leases(rig: Rig) -> list[str]:
    return [lease.lease_id for lease in rig.coordinator.state.leases]


async def test_drain_waits_until_nothing_runs(rig: Rig, shell: Shell) -> None:
    """With --wait the command returns when the last lease has ended, or the engine has left."""
    waiting = asyncio.create_task(shell.run("drain", "engine-0", "--wait"))
    assert (await rig.engine.receive()).drain.grace.ToSeconds() == 30
    await rig.engine.report(engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_DRAINING))
    for lease_id in await _leases(rig):
        assert not waiting.done()
        await rig.gateway.release(lease_id)
    async with asyncio.timeout(_PATIENCE_S):
        assert (await waiting)[1:] == ["engine-0 is drained"]


async def test_drain_and_stop_waits_for_the_end(rig: Rig, shell: Shell) -> None:
    """An engine without leases has not stopped yet; one that joins again in a new life has."""
    waiting = asyncio.create_task(shell.run("drain", "engine-0", "--stop", "--wait"))
    assert (await rig.engine.receive()).drain.stop
    await rig.engine.report(engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_DRAINING))
    for lease_id in await _leases(rig):
        await rig.gateway.release(lease_id)
    assert not waiting.done()
    rig.engine.die()
    async with asyncio.timeout(_PATIENCE_S):
        assert (await waiting)[1:] == ["engine-0 has stopped"]


@pytest.mark.parametrize("command", ["drain", "undrain"])
async def test_no_such_engine(rig: Rig, shell: Shell, command: str) -> None:
    """The sentence of the coordinator, and code 1."""
    (line,) = await shell.run(command, "engine-9", code=1)
    assert line.startswith(f"caravan {command}: ")
    assert "engine-9" in line


@pytest.mark.parametrize(
    "command",
    [["status", "--once"], ["requests"], ["engines"], ["cancel", "req-a"], ["undrain", "engine-0"]],
)
def test_nobody_answers(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names the address, and code 1."""
    assert main([*command, "--address", "127.0.0.1:1"]) == 1
    expected = f"caravan {command[0]}: no coordinator answers at 127.0.0.1:1\n"
    assert capsys.readouterr().err == expected


def test_nothing_was_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without endpoints.json the command says what is missing."""
    assert main(["requests", "--state-dir", str(tmp_path)]) == 1
    assert "is `caravan up` running?" in capsys.readouterr().err
