"""The REST API at the level of curl."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import httpx
import pytest

from tests.support.stack import CHAT, Stack, chat_body, endless
from tests.support.waiting import wait_for

pytestmark = pytest.mark.e2e


def _events(response: httpx.Response) -> list[Any]:
    data = [
        line.removeprefix("data: ") for line in response.text.split("\n\n") if line[:5] == "data:"
    ]
    assert data[-1] == "[DONE]"
    return [json.loads(text) for text in data[:-1]]


def test_models_are_listed(http: httpx.Client) -> None:
    """Every model is listed, and each can be asked for by its name."""
    listed = http.get("/v1/models").json()
    names = {model["id"] for model in listed["data"]}
    assert {"fast", "slow", "prefill"} <= names
    for name in names:
        assert http.get(f"/v1/models/{name}").json()["id"] == name


def test_plain_and_streamed_answers_agree(http: httpx.Client) -> None:
    """The same request gives the same text and usage, whole or in events; the stream has its fixed frame."""
    body = chat_body("fast", "Tell me.", max_tokens=24, temperature=0, ignore_eos=True)
    plain = http.post(CHAT, json=body).json()
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    streamed = http.post(CHAT, json=body)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = _events(streamed)
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    *chunks, usage = events
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == plain["choices"][0]["message"]["content"]
    assert text
    assert chunks[-1]["choices"][0]["finish_reason"] == plain["choices"][0]["finish_reason"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"] == 24


def test_answers_carry_the_request_id(http: httpx.Client) -> None:
    """The x-request-id of the answer is the id that CancelRequest takes; gRPC's headers stay inside."""
    response = http.post(CHAT, json=chat_body("fast", max_tokens=2))
    assert response.headers["x-request-id"].startswith("req-")
    assert not [name for name in response.headers if name.startswith(("grpc-", "x-envoy"))]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/v1/requests", 405, "method_not_allowed"),
        ("GET", "/v1/requests/req-1/cancel", 405, "method_not_allowed"),
        ("POST", "/v1/requests/req-1/cancel", 404, "request_not_found"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
        ("POST", CHAT, 400, "invalid_json"),
    ],
)
def test_errors_have_one_shape(
    http: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    """Whoever answers, Envoy or the gateway, the error is OpenAI's."""
    response = http.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


def test_a_long_prompt_is_refused_with_both_numbers(http: httpx.Client) -> None:
    """A prompt beyond the context is 400 context_length_exceeded and says how long and how much."""
    response = http.post(CHAT, json=chat_body("fast", "word " * 100_000))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert sum(part.strip(".,").isdigit() for part in error["message"].split()) >= 2
    assert error["param"] == "messages"


def test_ten_megabytes_are_answered_in_order(http: httpx.Client) -> None:
    """A body of 10 MB reaches the gateway and is refused for what it says, not cut off."""
    response = http.post(
        CHAT, content=b'{"model": "fast", "messages": "' + b"x" * 10_000_000 + b'"}'
    )
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "invalid_type")
    assert error["param"] == "messages"
    assert http.post(CHAT, content=b"x" * 34_000_000).status_code == 413


def test_comments_keep_silent_streams_alive(http: httpx.Client) -> None:
    """While the prompt is computed, the stream carries comments that clients ignore."""
    cold = {"cache": False}
    body = chat_body("prefill", "word " * 40, max_tokens=3, stream=True, caravan=cold)
    response = http.post(CHAT, json=body)
    head = response.text.split("data:")[0]
    assert head.startswith(":")
    assert response.text.rstrip().endswith("[DONE]")


def test_beyond_the_capacity_is_429(stack: Stack, http: httpx.Client) -> None:
    """When all sequences are taken, who may not wait is refused at once, with a time to come back; then there is room."""
    with (
        httpx.Client(base_url=stack.url, timeout=30) as filler,
        _Streams(filler, endless("slow", stream=True), 8),
    ):
        refused = http.post(CHAT, json=chat_body("slow", caravan={"max_wait": 0}))
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "capacity_exhausted"
        assert int(refused.headers["retry-after"]) >= 1
        assert http.post(CHAT, json=chat_body("fast", max_tokens=1)).status_code == 200
    stack.wait_until_free()
    assert http.post(CHAT, json=chat_body("slow", max_tokens=1)).status_code == 200


def test_beyond_the_capacity_requests_wait(stack: Stack, http: httpx.Client) -> None:
    """They are listed as queued; one that is cancelled over REST ends as 499, the others are answered when there is room."""
    waiting = [chat_body("slow", max_tokens=1, caravan={"priority": p}) for p in ("high", "normal")]
    with futures.ThreadPoolExecutor(2) as pool:
        with (
            httpx.Client(base_url=stack.url, timeout=30) as filler,
            _Streams(filler, endless("slow", stream=True), 8),
        ):
            answers = [pool.submit(http.post, CHAT, json=body) for body in waiting]
            wait_for(lambda: len(_queued(http)) == 2, "both wait")
            cancelled = next(r["id"] for r in _queued(http) if r["priority"] == "normal")
            done = http.post(f"/v1/requests/{cancelled}/cancel")
            assert (done.status_code, done.json()["status"]) == (200, "cancelling")
            assert answers[1].result(10).status_code == 499
            assert http.post(f"/v1/requests/{cancelled}/cancel").status_code == 404
        assert answers[0].result(10).status_code == 200
    stack.wait_until_free()


def _queued(http: httpx.Client) -> list[Any]:
    requests = http.get("/v1/requests").json()["data"]
    return [request for request in requests if request["status"] == "queued"]


def test_a_connection_is_kept(stack: Stack) -> None:
    """One connection carries streams, plain answers and refusals in turn; the server never drops it."""
    connection = http.client.HTTPConnection("127.0.0.1", stack.port, timeout=20)
    connection.connect()
    connection.auto_open = (
        0  # a connection that was closed would otherwise be opened again in silence
    )
    bodies = [
        (200, chat_body("fast", max_tokens=4, stream=True)),
        (200, chat_body("fast", max_tokens=4)),
        (400, chat_body("fast", temperature=9)),
        (404, chat_body("none")),
    ]
    with contextlib.closing(connection):
        for status, body in bodies * 30:
            connection.request("POST", CHAT, json.dumps(body))
            response = connection.getresponse()
            response.read()
            assert response.status == status


class _Streams:
    """So many open streams, each past its first byte."""

    def __init__(self, client: httpx.Client, body: dict[str, Any], count: int) -> None:
        self._open = [client.stream("POST", CHAT, json=body) for _ in range(count)]
        self._reading: list[Iterator[bytes]] = []

    def __enter__(self) -> None:
        for stream in self._open:
            response = stream.__enter__()
            assert response.status_code == 200
            chunks = response.iter_raw()
            next(chunks)
            self._reading.append(chunks)  # an iterator that is dropped closes its stream

    def __exit__(self, *_: object) -> None:
        for stream in self._open:
            stream.__exit__(None, None, None)
