"""What `caravan up` refuses, and how it says so."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.support.ports import free_port
from tests.support.stack import command, running

pytestmark = pytest.mark.e2e


def _run(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout, check=False
    )


def test_a_taken_port(tmp_path: Path) -> None:
    """One line names the port and who has it; code 2; nothing was started."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = _run(
            "up", "--port", str(port), "--state-dir", str(tmp_path), "--model", "a=scripted:?"
        )
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    assert f"port {port}" in lines[0]
    assert f"is taken by {psutil.Process().name()} (process {os.getpid()})" in lines[0]
    assert not (tmp_path / "endpoints.json").exists()


def test_a_missing_model(tmp_path: Path) -> None:
    """A file that is not there is told at once; code 2."""
    done = _run(
        "up", "--port", str(free_port()), "--state-dir", str(tmp_path), "--model", "a=/none.gguf"
    )
    assert done.returncode == 2
    assert "/none.gguf" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_a_corrupt_model(tmp_path: Path) -> None:
    """A GGUF header with rubbish behind it: the engine's reason is shown; code 1; nothing is left."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 4096)
    state = tmp_path / "state"
    done = _run(
        "up", "--port", str(free_port()), "--state-dir", str(state), "--model", f"bad={path}"
    )
    assert done.returncode == 1, done.stdout
    assert "no model can be served" in done.stdout
    assert "bad: " in done.stdout
    assert not (state / "endpoints.json").exists()


def test_a_broken_model_beside_a_good_one(tmp_path: Path) -> None:
    """The good one is served, the broken one is told."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 4096)
    with running(tmp_path / "state", {"good": "scripted:?", "bad": str(path)}) as stack:
        assert any(line.startswith("Model bad cannot be served") for line in stack.lines)


def test_a_state_directory_in_use(tmp_path: Path) -> None:
    """A second run on the same directory is refused with code 2, and the first goes on."""
    with running(tmp_path, {"fast": "scripted:?"}) as stack:
        pids = stack.pids()
        done = _run(
            "up",
            "--port",
            str(free_port()),
            "--state-dir",
            str(tmp_path),
            "--model",
            "a=scripted:?",
        )
        assert done.returncode == 2
        assert f"process {stack.process.pid}" in done.stdout
        assert stack.pids() == pids


@pytest.mark.parametrize(
    "arguments",
    [
        ("--port", "0"),
        ("--port", "x"),
        ("--engines", "0"),
        ("--model", "nameless"),
        ("--model", "a=scripted:?", "--model", "a=scripted:?"),
    ],
)
def test_wrong_options(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """A wrong option is told; code 2."""
    done = _run("up", "--state-dir", str(tmp_path), *arguments)
    assert done.returncode == 2
    assert done.stdout or done.stderr
