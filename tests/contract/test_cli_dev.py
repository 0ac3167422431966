"""`caravan dev provider` as its user starts it."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from services.cli.arguments import parser
from services.runtime.deployment_file import read_deployments

COMMAND = [sys.executable, "-m", "services.cli", "dev", "provider"]
ASK = {"model": "scripted", "messages": [{"role": "user", "content": "hello"}]}


@contextmanager
def started(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command on a free port, with what it prints until it is ready."""
    process = subprocess.Popen(
        [*COMMAND, "--port", "0", *options], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        said = ""
        while "See what came" not in said:
            line = process.stdout.readline()
            assert line, f"it ended: {said}"
            said += line
        yield process, said
    finally:
        process.kill()
        process.communicate()


def test_it_says_where_it_is_and_does_what_it_was_told() -> None:
    options = ("--key", "k1", "--text", "so be it", "--fault", "status=503", "--pace", "0s")
    with started(*options) as (process, said):
        found = re.search(r'base_url = "(http://127\.0\.0\.1:\d+/v1)"', said)
        assert found is not None
        assert "k1" not in said
        with httpx.Client(base_url=found[1], headers={"Authorization": "Bearer k1"}) as client:
            assert client.post("/chat/completions", json=ASK).status_code == 503
            answer = client.post("/chat/completions", json=ASK).json()
        assert answer["choices"][0]["message"]["content"] == "so be it"
        assert httpx.post(f"{found[1]}/chat/completions", json=ASK).status_code == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_the_deployment_that_it_prints_is_one(tmp_path: Path) -> None:
    """What a user copies is taken."""
    with started("--model", "m", "--key", "k") as (_, said):
        text = said.partition("  [[deployment]]")[1] + said.partition("  [[deployment]]")[2]
    found = read_deployments(textwrap.dedent(text.partition("\n\n")[0]), tmp_path)
    assert found.mistakes == []
    [deployment] = found.deployments
    assert deployment.model == "m"
    assert deployment.remote.credential.env == "SCRIPTED_KEY"


def test_a_taken_port_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = subprocess.run(
            [*COMMAND, "--port", port], capture_output=True, text=True, timeout=30, check=False
        )
    assert ended.returncode == 1
    assert port in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "options", [["--fault", "melt"], ["--port", "x"], ["--tokens", "0"], ["--echo", "--text", "x"]]
)
def test_wrong_use_is_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["dev", "provider", *options])
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err
