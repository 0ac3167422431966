"""`caravan chat` against the running stack."""

from __future__ import annotations

import subprocess

import pytest

from tests.support.ports import free_port
from tests.support.stack import Stack, command

pytestmark = pytest.mark.e2e


def _chat(url: str, lines: str, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = command("chat", "--url", url, *options)
    return subprocess.run(
        arguments, input=lines, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_pipe_is_answered(stack: Stack) -> None:
    """`echo hi | caravan chat` prints the answer and nothing else."""
    done = _chat(stack.url, "hi\n", "--model", "fast")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_the_demo_model_remembers(stack: Stack, demo: str) -> None:
    """A name given in one turn is known in the next."""
    done = _chat(
        stack.url, "My name is Nora.\nWhat is my name?\n", "--model", demo, "--temperature", "0"
    )
    assert done.returncode == 0
    assert "Nora" in done.stdout.splitlines()[-1]


def test_an_unknown_model_is_told(stack: Stack) -> None:
    """The server's words reach the user; code 1."""
    done = _chat(stack.url, "hi\n", "--model", "none")
    assert done.returncode == 1
    assert "none" in done.stderr


def test_no_server_is_told() -> None:
    """Nothing there: code 1 and what to start."""
    done = _chat(f"http://127.0.0.1:{free_port()}", "hi\n")
    assert done.returncode == 1
    assert "caravan up" in done.stderr
