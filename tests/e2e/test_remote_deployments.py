"""Deployments of providers with `caravan up`: started, without a credential, swapped under load, and with no secret left behind."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from services.dev.provider.faults import Fault, Kind
from services.dev.provider.script import Script
from services.dev.provider.server import ScriptedProvider
from tests.support.provider import KEY, provider_in_thread
from tests.support.stack import CHAT, Stack, chat_body, command, running
from tests.support.waiting import wait_for

pytestmark = pytest.mark.e2e

FILE = """
[[deployment]]
name = "chat"
model = "scripted-chat"
runtime = "openai_compatible"
fallback = [{{ deployment = "small", reasons = ["unavailable"] }}]
[deployment.remote]
base_url = "{url}"
credential = {{ env = "SCRIPTED_KEY" }}
workers = {workers}
retry = {{ max_retries = 0 }}

[[deployment]]
name = "late"
model = "scripted-late"
runtime = "openai_compatible"
remote = {{ base_url = "{url}", credential = {{ file = "late.key" }} }}

[[deployment]]
name = "small"
model = "scripted:?tokens=3"
"""


@pytest.fixture(scope="module")
def provider() -> Iterator[ScriptedProvider]:
    """A provider that takes one key only."""
    with provider_in_thread(Script(tokens=12)) as provider:
        provider.accepted_keys.add(KEY)
        yield provider


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state folder of the stack, and beside it what is deployed."""
    return tmp_path_factory.mktemp("remote")


@pytest.fixture(scope="module")
def stack(folder: Path, provider: ScriptedProvider) -> Iterator[Stack]:
    """`caravan up` with the deployments; the credential of one of them is not there yet."""
    file = _write(folder, provider, workers=4)
    environment = {"SCRIPTED_KEY": KEY, "CARAVAN_COORDINATOR_INTERVAL_S": "3"}
    with running(
        folder / "state", {}, "--deployments", str(file), environment=environment
    ) as stack:
        yield stack


def _write(folder: Path, provider: ScriptedProvider, *, workers: int) -> Path:
    path = folder / "deployments.toml"
    path.write_text(FILE.format(url=provider.base_url, workers=workers))
    return path


def _caravan(stack: Stack, *arguments: str) -> str:
    done = subprocess.run(
        command(*arguments, "--state-dir", str(stack.state_dir)),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _ask(stack: Stack, model: str) -> httpx.Response:
    return httpx.post(stack.url + CHAT, json=chat_body(model), timeout=30)


def test_a_provider_answers(stack: Stack, provider: ScriptedProvider) -> None:
    """Through the whole stack, with the credential of the environment; the tables say who runs the model."""
    answer = _ask(stack, "chat")
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 12
    assert provider.requests[-1].headers["authorization"] == f"Bearer {KEY}"
    assert "chat (openai_compatible)" in _caravan(stack, "engines")
    assert "openai_compatible" in _caravan(stack, "deploy", "--list")


def test_a_credential_that_comes_later(stack: Stack, folder: Path) -> None:
    """The stack serves the rest meanwhile and says what is missing; the engine takes the file when it is there, and was not
    started again."""
    assert any("late.key" in line for line in stack.lines), stack.lines
    listed = _caravan(stack, "deploy", "--list")
    (line,) = [line for line in listed.splitlines() if line.startswith("late ")]
    assert line.split()[1] == "failed"
    assert "late.key" in line
    before = stack.pids()
    (folder / "late.key").write_text(KEY + "\n")
    wait_for(lambda: _ask(stack, "late").status_code == 200, "the deployment serves", 30)
    assert stack.pids() == before


def test_a_changed_option_is_a_hot_swap(
    stack: Stack, folder: Path, provider: ScriptedProvider
) -> None:
    """New engines take over from those with the former options, and requests notice nothing."""
    before = set(stack.engine_names())
    file = _write(folder, provider, workers=5)
    told = _caravan(stack, "deploy", str(file), "--wait")
    assert "remote.workers" in told
    statuses = set()

    def replaced() -> bool:
        statuses.add(_ask(stack, "chat").status_code)
        return len(set(stack.engine_names()) - before) == 1 and len(stack.engine_names()) == 3

    wait_for(replaced, "the former engine has ended", 60)
    assert statuses == {200}


def test_a_fallback_takes_what_the_provider_cannot(
    stack: Stack, provider: ScriptedProvider
) -> None:
    """A provider that fails before its first byte: the local model answers."""
    provider.faults.add(Fault(Kind.STATUS, status=503))
    answer = _ask(stack, "chat")
    assert (answer.status_code, answer.headers["x-caravan-deployment"]) == (200, "small")
    assert _ask(stack, "chat").headers["x-caravan-deployment"] == "chat"


def test_no_secret_is_left_behind(stack: Stack) -> None:
    """No file of the state folder has the credential, in no form: not the logs, the deployments or the list of processes."""
    forms = {KEY.encode(), base64.b64encode(KEY.encode()).rstrip(b"=")}
    files = [path for path in stack.state_dir.rglob("*") if path.is_file()]
    assert any(path.name == "deployments.json" for path in files)
    assert any(path.suffix == ".log" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not any(form in content for form in forms), path
