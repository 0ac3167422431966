"""A model of a provider behind the whole stack: streams, clients that leave, an engine that is killed, and a breaker that is held."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.dev.provider.script import Script
from services.dev.provider.server import ScriptedProvider
from tests.support.provider import KEY, provider_in_thread
from tests.support.stack import CHAT, Stack, chat_body, command, running
from tests.support.waiting import wait_for

pytestmark = pytest.mark.e2e

FILE = """
[[deployment]]
name = "chat"
model = "gpt-4o-mini"
fallback = [{{ deployment = "small", reasons = ["circuit_open"] }}]
remote = {{ base_url = "{url}", credential = {{ env = "SCRIPTED_KEY" }}, price = {{ input_usd = 1.0, output_usd = 2.0 }} }}

[[deployment]]
name = "small"
model = "scripted:?tokens=3"
"""
QUICK = Script(tokens=10)
SLOW = Script(tokens=1000, pace_s=0.02)


@pytest.fixture(scope="module")
def provider() -> Iterator[ScriptedProvider]:
    """A provider that takes one key only."""
    with provider_in_thread(QUICK) as provider:
        provider.accepted_keys.add(KEY)
        yield provider


@contextmanager
def _running(folder: Path, provider: ScriptedProvider) -> Iterator[Stack]:
    file = folder / "deployments.toml"
    file.write_text(FILE.format(url=provider.base_url))
    environment = {"SCRIPTED_KEY": KEY, "CARAVAN_COORDINATOR_INTERVAL_S": "3"}
    arguments = ("--deployments", str(file))
    with running(folder / "state", {}, *arguments, environment=environment) as stack:
        yield stack


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, provider: ScriptedProvider) -> Iterator[Stack]:
    """`caravan up` with a deployment of the provider and one that runs here."""
    with _running(tmp_path_factory.mktemp("provider"), provider) as stack:
        yield stack


def _caravan(stack: Stack, *arguments: str) -> str:
    done = subprocess.run(
        command(*arguments, "--state-dir", str(stack.state_dir)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _remote_engine(stack: Stack) -> str:
    (name,) = [n for n in stack.engine_names() if stack.engine_status(n).model.provider]
    return name


def test_a_stream_ends_with_what_it_cost(stack: Stack, provider: ScriptedProvider) -> None:
    """The OpenAI API through Envoy: text, usage, and the price on request."""
    provider.script = Script(text="one two three")
    body = chat_body("chat", stream=True, stream_options={"include_usage": True}, caravan={})
    text = ""
    usage: dict[str, Any] = {}
    cost = 0.0
    with httpx.stream("POST", stack.url + CHAT, json=body, timeout=30) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
            usage = chunk.get("usage") or usage
            cost = chunk.get("caravan", {}).get("cost_usd", cost)
    assert text == "one two three"
    assert usage["completion_tokens"] == 3
    assert cost == pytest.approx((usage["prompt_tokens"] * 1.0 + 3 * 2.0) / 1e6)
    name = _remote_engine(stack)
    # The engine settles a request a moment after its client has the end.
    wait_for(
        lambda: 'caravan_remote_requests_total{outcome="succeeded"} 1.0' in stack.metrics(name),
        "the request is counted",
    )


def test_a_client_that_leaves_closes_the_call_of_the_provider(
    stack: Stack, provider: ScriptedProvider
) -> None:
    """Through Envoy, gateway and engine: the provider stops as well, and nothing is held (I5, I6)."""
    provider.script = SLOW
    with httpx.stream("POST", stack.url + CHAT, json=chat_body("chat", stream=True)) as answer:
        next(answer.iter_lines())
    request = provider.requests[-1]
    wait_for(request.closed_by_client.is_set, "the provider sees the close")
    stack.wait_until_free(10)


def test_an_engine_that_is_killed_ends_its_answers_with_one_error(
    stack: Stack, provider: ScriptedProvider
) -> None:
    """Text of a provider cannot be continued by another engine; the next request finds a new engine."""
    provider.script = SLOW
    name = _remote_engine(stack)
    ends: list[str] = []
    body = chat_body("chat", stream=True)
    with httpx.stream("POST", stack.url + CHAT, json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: ") and "content" in line and not ends:
                ends.append("begun")
                os.kill(stack.pids()[name], signal.SIGKILL)
            if "error" in line:
                ends.append(line)
            assert "[DONE]" not in line
    assert ends[0] == "begun"
    assert len(ends) == 2
    assert "engine_lost" in ends[1]
    provider.script = QUICK

    def answers() -> bool:
        return httpx.post(stack.url + CHAT, json=chat_body("chat"), timeout=30).status_code == 200

    wait_for(answers, "the engine is back", 30)
    stack.wait_until_free(10)


def test_a_breaker_that_is_held_open_sends_requests_to_the_fallback(
    stack: Stack, provider: ScriptedProvider
) -> None:
    """`caravan remote` shows it, as `caravan status` does, and lets it go again."""
    provider.script = QUICK
    _caravan(stack, "remote", "breaker", "chat", "open")
    assert "held open" in _caravan(stack, "remote")
    assert "breaker of openai: held open" in _caravan(stack, "status", "--once")
    before = len(provider.requests)
    answer = httpx.post(stack.url + CHAT, json=chat_body("chat"), timeout=30)
    assert (answer.status_code, answer.headers["x-caravan-deployment"]) == (200, "small")
    assert len(provider.requests) == before
    _caravan(stack, "remote", "breaker", "chat", "auto")
    answer = httpx.post(stack.url + CHAT, json=chat_body("chat"), timeout=30)
    assert answer.headers["x-caravan-deployment"] == "chat"


def test_a_stack_that_stops_lets_answers_finish(tmp_path: Path, provider: ScriptedProvider) -> None:
    """Ctrl-C: an answer of the provider that takes a second more is whole."""
    provider.script = Script(tokens=60, pace_s=0.02)
    body = chat_body("chat", stream=True)
    lines: list[str] = []
    with _running(tmp_path, provider) as stack:
        with httpx.stream("POST", stack.url + CHAT, json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                if not lines:
                    stack.interrupt()
                lines.append(line)
        assert stack.process.wait(40) == 0
    assert "data: [DONE]" in lines
