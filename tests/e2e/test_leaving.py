"""Clients that leave: what they held is free, through every hop (I5)."""

from __future__ import annotations

import json
import socket
import time

import httpx
import pytest

from tests.support.stack import CHAT, Stack, chat_body, endless
from tests.support.waiting import wait_for

pytestmark = pytest.mark.e2e
SLOW_ENGINE = "engine-1"
PREFILL_ENGINE = "engine-2"
STEP_S = 0.02
NOTICE_S = 0.5
"""Far above two steps, far below what an answer would take: the machine that runs the tests may be busy."""


def _send(stack: Stack, body: dict[str, object]) -> socket.socket:
    """Sends a request on a connection of its own and does not wait for the answer."""
    data = json.dumps(body).encode()
    client = socket.create_connection(("127.0.0.1", stack.port))
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    client.sendall(head.encode() + data)
    return client


def _freed_within(stack: Stack, engine: str) -> float:
    started = time.monotonic()
    wait_for(lambda: not stack.inflight(engine) and not stack.leases(), "the request is gone", 5)
    return time.monotonic() - started


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "plain"])
def test_while_it_answers(stack: Stack, stream: bool) -> None:
    """A client that leaves while tokens come, whether it can see them or not."""
    client = _send(stack, endless("slow", stream=stream))
    wait_for(lambda: stack.engine_status(SLOW_ENGINE).load.active_sequences, "it generates")
    client.close()
    assert _freed_within(stack, SLOW_ENGINE) < NOTICE_S


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "plain"])
def test_before_the_first_chunk(stack: Stack, stream: bool) -> None:
    """A client that leaves while its prompt is computed."""
    cold = {"cache": False}
    client = _send(stack, chat_body("prefill", "word " * 300, stream=stream, caravan=cold))
    wait_for(lambda: stack.inflight(PREFILL_ENGINE), "it is being computed")
    client.close()
    assert _freed_within(stack, PREFILL_ENGINE) < 2.0  # one chunk of the prompt, 5 ms a token


def test_while_others_stream(stack: Stack, http: httpx.Client) -> None:
    """The end of one client does not wait for, nor touch, the stream of another."""
    with http.stream("POST", CHAT, json=endless("slow", stream=True)) as other:
        lines = other.iter_lines()
        next(lines)
        client = _send(stack, endless("slow"))
        wait_for(lambda: len(stack.leases()) == 2, "both run")
        client.close()
        wait_for(lambda: len(stack.leases()) == 1, "one is gone", NOTICE_S * 2)
        seen = [next(lines) for _ in range(20)]
        assert any(line.startswith("data:") for line in seen)


def test_many_at_once(stack: Stack) -> None:
    """All clients of a full engine leave together, plain and streamed ones; all is free again."""
    for _ in range(3):
        clients = [_send(stack, endless("slow", stream=bool(i % 2))) for i in range(8)]
        wait_for(lambda: len(stack.inflight(SLOW_ENGINE)) == 8, "all run")
        for client in clients:
            client.close()
        assert _freed_within(stack, SLOW_ENGINE) < 2.0
