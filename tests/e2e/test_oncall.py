"""The commands of the person on call against a whole stack, as processes of their own."""

from __future__ import annotations

import json
import subprocess
import threading
from typing import Any

import httpx
import pytest

from tests.support.stack import CHAT, Stack, chat_body, command, endless
from tests.support.waiting import wait_for

pytestmark = pytest.mark.e2e


def run(stack: Stack, *arguments: str) -> str:
    """What a command prints; it must succeed."""
    argv = command(*arguments, "--state-dir", str(stack.state_dir))
    ended = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def listed(stack: Stack, what: str) -> list[dict[str, Any]]:
    """The JSON lines of a command."""
    return [json.loads(line) for line in run(stack, what, "--json").splitlines()]


def test_a_stream_is_seen_and_ended(stack: Stack, http: httpx.Client) -> None:
    """`requests` tells how far it is; `cancel` ends it with an error event; `status` shows it all."""
    lines: list[str] = []

    def read() -> None:
        with http.stream("POST", CHAT, json=endless("slow", stream=True)) as response:
            lines.extend(response.iter_lines())

    client = threading.Thread(target=read)
    client.start()
    generating = wait_for(
        lambda: [one for one in listed(stack, "requests") if one["completion_tokens"] > 0],
        "the coordinator knows how far the stream is",
    )
    (told,) = generating
    assert told["model"] == "slow"
    page = run(stack, "status")
    assert told["request_id"] in page
    assert all(model in page for model in ("fast", "slow", "prefill"))
    assert "\ncache: " in page
    assert json.loads(run(stack, "status", "--json"))["reused"] is not None
    ended = run(stack, "cancel", told["request_id"])
    assert ended == f"{told['request_id']} is being ended\n"
    client.join(30)
    assert not client.is_alive()
    assert "request_cancelled" in lines[-2]


def test_an_engine_goes_out_of_service_and_comes_back(stack: Stack, http: httpx.Client) -> None:
    """Drained, its model serves nobody; after undrain it does."""
    (engine,) = [one for one in listed(stack, "engines") if one["model"]["name"] == "fast"]
    name = engine["engine_id"]
    printed = run(stack, "drain", name, "--grace", "1s", "--wait").splitlines()
    assert printed[-1] == f"{name} is drained"
    refused = http.post(CHAT, json=chat_body("fast"))
    assert refused.status_code == 503, refused.text
    assert run(stack, "undrain", name) == f"{name} is back in service\n"
    wait_for(lambda: http.post(CHAT, json=chat_body("fast")).status_code == 200, "it serves again")
