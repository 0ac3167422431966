"""Deployments under load: swapped, broken, scaled, removed, without a failed request."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as coordinator_pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as coordinator_grpc

from tests.support.stack import CHAT, DEMO, Stack, chat_body, command, running
from tests.support.waiting import wait_for

pytestmark = pytest.mark.e2e
STREAMS = 3


def _file(path: Path, *deployments: str) -> Path:
    path.write_text("\n".join(f"[[deployment]]\n{text}\n" for text in deployments))
    return path


def _deployment(name: str, model: str | Path, **more: int) -> str:
    fields = {"name": name, "model": str(model), **more}
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in fields.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state folder of the stack, and beside it the files that are deployed."""
    return tmp_path_factory.mktemp("deployments")


@pytest.fixture(scope="module")
def deployed(folder: Path) -> Iterator[Stack]:
    """`caravan up` with two deployments: the demo model, and a slow script."""
    if not DEMO.exists():
        pytest.skip("models/caravan-demo.gguf is absent")
    first = _file(
        folder / "first.toml",
        _deployment("chat", DEMO),
        _deployment("slow", "scripted:?step_ms=20"),
    )
    # On a machine that has too much to do, three intervals of a second are no proof of death.
    patient = {"CARAVAN_COORDINATOR_INTERVAL_S": "3"}
    arguments = ("--deployments", str(first))
    with running(folder / "state", {}, *arguments, environment=patient) as stack:
        yield stack


def _deploy(stack: Stack, *arguments: str | Path, code: int = 0) -> str:
    """`caravan deploy`, which must end with the code; what it says."""
    done = subprocess.run(
        command("deploy", *map(str, arguments), "--state-dir", str(stack.state_dir)),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def _engines(stack: Stack, model: str) -> list[coordinator_pb.Engine]:
    with stack.channel("coordinator") as channel:
        stub = coordinator_grpc.CoordinatorServiceStub(channel)
        answer = stub.ListEngines(
            coordinator_pb.ListEnginesRequest(), timeout=30, wait_for_ready=True
        )
    return [engine for engine in answer.engines if engine.model.name == model]


@dataclass
class Load:
    """What became of the streams."""

    finished: int = 0
    failures: list[str] = field(default_factory=list)


@contextmanager
def _streams(stack: Stack, model: str) -> Iterator[Load]:
    """Streams that are asked for one after the other all the time; each must end whole."""
    load, stop = Load(), threading.Event()

    def ask() -> None:
        body = chat_body(model, max_tokens=24, ignore_eos=True, stream=True)
        with httpx.Client(base_url=stack.url, timeout=60) as client:
            while not stop.is_set():
                with client.stream("POST", CHAT, json=body) as response:
                    lines = [line for line in response.iter_lines() if line]
                if response.status_code == 200 and lines[-1:] == ["data: [DONE]"]:
                    load.finished += 1
                else:
                    load.failures.append(f"{response.status_code}: {lines[-2:]}")

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(STREAMS)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: load.finished >= STREAMS, "streams run", 30)
        yield load
        before = load.finished
        wait_for(lambda: load.finished >= before + STREAMS, "streams run on", 60)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def test_a_hot_swap_fails_no_request(deployed: Stack, folder: Path) -> None:
    """Another file behind the same name, under load: new engines take over, the old one ends, every stream ends whole."""
    (before,) = _engines(deployed, "chat")
    copy = folder / "v2.gguf"
    shutil.copyfile(DEMO, copy)
    second = _file(folder / "v2.toml", _deployment("chat", copy))
    with _streams(deployed, "chat") as load:
        assert "started anew" in _deploy(deployed, second, "--dry-run")
        assert _engines(deployed, "chat")[0].revision == before.revision
        assert "All engines are ready." in _deploy(deployed, second, "--wait", "--timeout", "2min")
        wait_for(lambda: before.engine_id not in deployed.pids(), "the old engine has ended", 60)
    assert load.failures == []
    (after,) = _engines(deployed, "chat")
    assert after.revision != before.revision
    assert any(
        f"{before.engine_id} ended with code 0; it is needed no more" in line
        for line in deployed.lines
    )
    assert "slow" in _deploy(deployed, "--list")


def test_a_broken_model_leaves_the_former_serving(deployed: Stack, folder: Path) -> None:
    """A file that is no model: the deployment has failed and says why; the engine that serves goes on; the way back is clean."""
    (before,) = _engines(deployed, "chat")
    (folder / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    broken = _file(folder / "broken.toml", _deployment("chat", folder / "broken.gguf"))
    with _streams(deployed, "chat") as load:
        told = _deploy(deployed, broken, "--wait", code=1)
        assert "chat: no engine can serve the model" in told
        assert "the former revision serves" in _deploy(deployed, "--list")
        _deploy(
            deployed, _file(folder / "back.toml", _deployment("chat", folder / "v2.gguf")), "--wait"
        )
        wait_for(lambda: len(_engines(deployed, "chat")) == 1, "the broken engine has ended", 30)
    assert load.failures == []
    assert _engines(deployed, "chat")[0].incarnation == before.incarnation
    wait_for(lambda: len(deployed.engine_names()) == 2, "its process too", 30)
    deployed.wait_until_free()


def test_replicas_follow(deployed: Stack, folder: Path) -> None:
    """Two more engines are started beside the one that serves, and ended again; what was applied survives the coordinator."""
    more = _file(folder / "more.toml", _deployment("slow", "scripted:?step_ms=20", replicas=3))
    assert "replicas" in _deploy(deployed, more, "--wait")
    assert len(_engines(deployed, "slow")) == 3
    coordinator = deployed.pids()["coordinator"]
    with _streams(deployed, "slow") as load:
        less = _file(folder / "less.toml", _deployment("slow", "scripted:?step_ms=20"))
        _deploy(deployed, less)
        wait_for(lambda: len(_engines(deployed, "slow")) == 1, "two engines have ended", 30)
    assert load.failures == []
    os.kill(coordinator, signal.SIGKILL)
    wait_for(
        lambda: deployed.pids().get("coordinator") not in {None, coordinator}, "it is back", 30
    )
    for name in ("chat", "slow"):
        wait_for(lambda name=name: _engines(deployed, name), "its engines have joined again", 30)  # type: ignore[misc]
    listed = _deploy(deployed, "--list").splitlines()
    assert [line.split()[:3] for line in listed[1:]] == [
        ["chat", "serving", "1/1"],
        ["slow", "serving", "1/1"],
    ]


def test_the_coordinator_dies_in_the_middle_of_a_swap(deployed: Stack, folder: Path) -> None:
    """kill -9 while the new engine loads: the next coordinator goes on with the swap, and no request fails."""
    (before,) = _engines(deployed, "slow")
    slow_start = "scripted:?step_ms=20&load_ms=4000"
    with _streams(deployed, "slow") as load:
        _deploy(deployed, _file(folder / "later.toml", _deployment("slow", slow_start)))
        wait_for(lambda: len(_engines(deployed, "slow")) == 2, "the new engine loads", 60)
        os.kill(deployed.pids()["coordinator"], signal.SIGKILL)
        wait_for(lambda: before.engine_id not in deployed.pids(), "the old engine has ended", 60)
    assert load.failures == []
    (after,) = _engines(deployed, "slow")
    assert after.revision != before.revision


def test_mistakes_change_nothing(deployed: Stack, folder: Path) -> None:
    """All mistakes of form and meaning at once, code 2."""
    bad = _file(
        folder / "bad.toml", _deployment("chat", "gpt-4o", replica=2), _deployment("", DEMO)
    )
    told = _deploy(deployed, bad, code=2)
    for place in ("deployments[0].replica", "[0].remote.credential", "deployments[1].name"):
        assert place in told
    assert "deployments" in _deploy(deployed, folder / "none.toml", code=2)


def test_a_removal_drains(deployed: Stack) -> None:
    """The running stream ends whole; new requests are told that there is no such model; then engine and deployment are gone."""
    body = chat_body("slow", max_tokens=150, ignore_eos=True, stream=True)
    with (
        httpx.Client(base_url=deployed.url, timeout=60) as client,
        client.stream("POST", CHAT, json=body) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        (engine,) = _engines(deployed, "slow")
        _deploy(deployed, "--remove", "slow")
        refused = httpx.post(deployed.url + CHAT, json=chat_body("slow"), timeout=20)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert [line for line in lines if line][-1] == "data: [DONE]"
    wait_for(lambda: engine.engine_id not in deployed.pids(), "its engine has ended", 30)
    wait_for(lambda: "slow" not in _deploy(deployed, "--list"), "it is gone", 30)
    assert "slow" in _deploy(deployed, "--remove", "slow", code=1)
    deployed.wait_until_free()
