"""A thousand bad requests: each refused in shape, none leaves anything behind (I4, I6)."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.support.stack import CHAT, Stack, chat_body

pytestmark = pytest.mark.e2e
COUNT = 1000
SEED = 20_261
Draw = random.Random
Request = tuple[str, str, bytes]


def _wrong_type(draw: Draw) -> dict[str, Any]:
    wrong: dict[str, list[Any]] = {
        "messages": [True, {}, [[]], 2**70],
        "model": [None, 5, [], {"a": None}],
        "temperature": ["x", [], True, 1e308],
        "max_tokens": ["x", 1.5, 2**70, {}],
        "stop": [5, {}, [[]], [None]],
        "stream": ["x", -1, [], {}],
        "tools": ["x", [5], [{}], {}],
    }
    field = draw.choice(sorted(wrong))
    return chat_body("fast") | {field: draw.choice(wrong[field])}


def _bad_message(draw: Draw) -> dict[str, Any]:
    messages: list[Any] = [
        [],
        [{}],
        [{"role": "king", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "tool", "content": "x"}],
        "hello",
    ]
    return chat_body("fast") | {"messages": draw.choice(messages)}


def _out_of_range(draw: Draw) -> dict[str, Any]:
    values = [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("top_p", 0),
        ("max_tokens", 0),
        ("max_tokens", 2**40),
        ("n", 2),
        ("presence_penalty", 3),
        ("logit_bias", {"x": 1}),
        ("stop", ["a"] * 17),
        ("top_logprobs", 3),
        ("nonsense", 1),
    ]
    return chat_body("fast") | dict([draw.choice(values)])


def _not_json(draw: Draw) -> bytes:
    good = json.dumps(chat_body("fast")).encode()
    cut = draw.randrange(len(good))
    return draw.choice(
        [b"", good[:cut], good + b"x", b"\xff" + good, b"\xef\xbb\xbf" + good, b"[" * 5000, b"null"]
        + [good.replace(b"Hello", bad) for bad in (b"\xc3\x28", b"\\ud800", b"\x00")]
    )


_BODIES: list[Callable[[Draw], dict[str, Any]]] = [
    _wrong_type,
    _bad_message,
    _out_of_range,
    lambda draw: chat_body(f"none-{draw.randrange(9)}"),
    lambda _: chat_body("fast", "word " * 6_000, stream=False),
]


def _request(draw: Draw) -> Request:
    kind = draw.randrange(8)
    if kind == 0:
        return draw.choice(["GET", "PUT", "DELETE"]), CHAT, b""
    if kind == 1:
        return "POST", draw.choice(["/v1/x", "/v1/chat", "/", "/v1/chat/completions/"]), b"{}"
    if kind == 2:
        return "POST", draw.choice([CHAT, "/v1/completions"]), _not_json(draw)
    weights = [8, 8, 8, 4, 1]
    body = draw.choices(_BODIES, weights)[0](draw)
    if (
        draw.random() < 0.3
    ):  # no long prompt: its stream may begin with a comment, and then it is 200
        body.setdefault("stream", True)
    return "POST", CHAT, json.dumps(body).encode()


async def test_bad_requests_leave_nothing(stack: Stack) -> None:
    """Every refusal is a 4xx in OpenAI's shape; afterwards all counts are zero and the service answers."""
    draw = random.Random(SEED)
    requests = [_request(draw) for _ in range(COUNT)]
    pids = stack.pids()
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as client:
        gate = asyncio.Semaphore(8)

        async def send(request: Request) -> None:
            method, path, content = request
            async with gate:
                response = await client.request(method, path, content=content)
            case = (
                f"{method} {path} {content[:300]!r}: {response.status_code} {response.text[:300]}"
            )
            assert 400 <= response.status_code < 500, case
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}, case
            assert response.json()["error"]["message"], case

        async with asyncio.TaskGroup() as group:
            for request in requests:
                group.create_task(send(request))
        good = await client.post(CHAT, json=chat_body("fast", max_tokens=3))
        assert good.status_code == 200
    await asyncio.to_thread(stack.wait_until_free)
    assert stack.pids() == pids
