"""`caravan deploy` against a real coordinator: what it shows, what it waits for, how it ends."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.cli.__main__ import main
from services.coordinator.deployment import Deployment
from services.coordinator.deployment_changes import revision
from services.runtime.channel import open_channel
from tests.support.coordinator import Coordinator, EnginePeer, running_coordinator, until
from tests.support.ports import free_port
from tests.support.processes import log_line, process

SERVING = re.compile(rb"serving on port")
CHAT = '[[deployment]]\nname = "chat"\nmodel = "/v1.gguf"\nreplicas = {replicas}\n'


async def _caravan(coordinator: Coordinator | None, *arguments: str | Path) -> int:
    """The exit code of `caravan deploy`."""
    address = coordinator.address if coordinator else "127.0.0.1:9"
    return await asyncio.to_thread(main, ["deploy", *map(str, arguments), "--address", address])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """One deployment."""
    path = tmp_path / "d.toml"
    path.write_text(CHAT.format(replicas=1))
    return path


def _write(file: Path, text: str) -> None:
    file.write_text(text)


def _lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [re.sub(" {2,}", " | ", line) for line in capsys.readouterr().out.splitlines()]


async def test_a_file_is_applied_and_listed(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rehearsal, the change, the same again, another one: each told in a table."""
    async with running_coordinator() as coordinator:
        assert await _caravan(coordinator, "--list") == 0
        assert _lines(capsys) == ["no deployments"]
        assert await _caravan(coordinator, file, "--dry-run") == 0
        head = "DEPLOYMENT | CHANGE | ENGINES | FIELDS"
        rehearsed = "Nothing was changed: this was a rehearsal."
        assert _lines(capsys) == [head, "chat | added | - | -", rehearsed]
        assert len(coordinator.state.deployments) == 0
        for told in ("added", "unchanged"):
            assert await _caravan(coordinator, file) == 0
            assert _lines(capsys) == [head, f"chat | {told} | - | -"]
        _write(file, CHAT.format(replicas=2).replace("v1", "v2"))
        assert await _caravan(coordinator, file) == 0
        assert _lines(capsys)[1] == "chat | changed | started anew | model, replicas"
        assert await _caravan(coordinator, "--list") == 0
        assert _lines(capsys)[1].startswith("chat | pending | 0/2 | 0 | ")
        _write(file, CHAT.format(replicas=1).replace("chat", "other"))
        assert await _caravan(coordinator, file, "--prune") == 0
        assert _lines(capsys)[1:] == ["chat | removed | - | -", "other | added | - | -"]


async def test_all_mistakes_and_code_2(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mistakes of form and of meaning together; one path is told once; nothing is applied."""
    _write(file, '[[deployment]]\nname = 3\nmodel = "gpt-4"\n[[deployment]]\nreplicas = 70\n')
    async with running_coordinator() as coordinator:
        assert await _caravan(coordinator, file) == 2
        told = capsys.readouterr().err
        assert "nothing was changed" in told
        for place in ("[0].name: is not a text", "[0].remote.credential: is", "[1].replicas: 70"):
            assert f"deployments{place}" in told
        assert told.count("deployments[0].name") == 1
        assert len(coordinator.state.deployments) == 0


async def test_waiting_for_engines(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It returns when all engines are ready; a failure ends it with the reason; so does its time."""
    async with running_coordinator() as coordinator:
        waiting = asyncio.create_task(_caravan(coordinator, file, "--wait"))
        await until(lambda: len(coordinator.state.deployments) == 1)
        assert not waiting.done()
        engine = EnginePeer(coordinator.stub, "engine-0", "chat")
        await engine.join()
        assert await waiting == 0
        assert _lines(capsys)[-1] == "All engines are ready."
        _write(file, CHAT.format(replicas=1).replace("v1", "v2"))
        assert await _caravan(coordinator, file, "--wait", "--timeout", "100ms") == 0  # by hand
        failing = engine_pb.EngineLoad(phase=engine_pb.ENGINE_PHASE_FAILED, failure="bad tensor")
        await engine.report(failing)
        assert await _caravan(coordinator, file, "--wait", "--timeout", "10s") == 1
        assert "chat: no engine can serve the model: bad tensor" in capsys.readouterr().err
        engine.die()
        await until(lambda: not len(coordinator.state.engines))
        assert await _caravan(coordinator, file, "--wait", "--timeout", "100ms") == 1
        assert "not done after 0.1 s:\n  chat: 0 of 1 engines ready" in capsys.readouterr().err


async def test_waiting_outlives_the_coordinator(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is killed; the next one has kept the deployments and is waited for; one that has not means failure."""
    address = f"127.0.0.1:{free_port()}"
    settings = {"CARAVAN_COORDINATOR_ADDRESS": address}
    keeping = {"CARAVAN_COORDINATOR_DEPLOYMENTS_STATE": str(tmp_path / "kept.json"), **settings}

    async def wait_in_vain() -> asyncio.Task[int]:
        arguments = ["deploy", str(file), "--wait", "--address", address]
        waiting = asyncio.create_task(asyncio.to_thread(main, arguments))
        await until(lambda: "chat" in capsys.readouterr().out)
        return waiting

    async with process("coordinator", **keeping) as running:
        await log_line(running, SERVING)
        waiting = await wait_in_vain()
    async with process("coordinator", **keeping) as running, open_channel(address) as channel:
        await log_line(running, SERVING)
        assert not waiting.done()
        engine = EnginePeer(pb_grpc.CoordinatorServiceStub(channel), "engine-0", "chat")
        await engine.join()
        assert await waiting == 0
        _write(file, CHAT.format(replicas=2))
        waiting = await wait_in_vain()
    async with process("coordinator", **settings):
        assert await waiting == 1
    assert "chat: it is not deployed any more" in capsys.readouterr().err


async def test_removing(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may wait until the engines have ended; an unknown name is code 1."""
    async with running_coordinator() as coordinator:
        assert await _caravan(coordinator, file) == 0
        engine = EnginePeer(coordinator.stub, "engine-0", "chat")
        engine.revision = revision(Deployment("chat", "/v1.gguf"))
        await engine.join()
        waiting = asyncio.create_task(_caravan(coordinator, "--remove", "chat", "--wait"))
        told = await engine.receive()
        assert (told.drain.stop, told.drain.grace.seconds) == (True, 600)
        assert not waiting.done()
        engine.die()
        assert await waiting == 0
        assert _lines(capsys)[-1] == "chat is gone."
        assert await _caravan(coordinator, "--remove", "chat") == 1
        assert "No deployment 'chat' is kept." in capsys.readouterr().err


async def test_nobody_answers(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Code 1, and where it has looked."""
    assert await _caravan(None, file) == 1
    assert "no coordinator answers at 127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["f", "--list"],
        ["--list", "--prune"],
        ["--remove", "a", "--dry-run"],
        ["--list", "--wait"],
        ["f", "--dry-run", "--wait"],
        ["f", "--timeout", "3s"],
    ],
)
def test_no_option_is_ignored(arguments: list[str]) -> None:
    """What contradicts or would have no effect is refused, code 2."""
    with pytest.raises(SystemExit) as raised:
        main(["deploy", *arguments])
    assert raised.value.code == 2


def test_up_takes_models_or_deployments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not both; the number of engines belongs to the models; and a file that is not there is told before anything starts."""
    file = tmp_path / "d.toml"
    file.write_text("")
    for more in (["--model", "a=scripted:"], ["--engines", "2"]):
        with pytest.raises(SystemExit):
            main(["up", "--deployments", str(file), *more])
    assert "--engines goes with --model" in capsys.readouterr().err
    with pytest.raises(SystemExit) as raised:
        main(["up", "--deployments", str(tmp_path / "no.toml")])
    assert raised.value.code == 2
    assert "no.toml' is no file" in capsys.readouterr().err
