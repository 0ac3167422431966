"""Native gRPC, gRPC-Web, CORS and what stands between Envoy and a gateway that is not there."""

from __future__ import annotations

import base64
import re
import socket
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import pytest
from caravan.inference.v1 import inference_service_pb2 as pb
from caravan.inference.v1 import inference_service_pb2_grpc as stubs
from caravan.openai.v1 import openai_service_pb2 as openai_pb
from caravan.openai.v1 import openai_service_pb2_grpc as openai_stubs
from google.api.httpbody_pb2 import HttpBody
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from tests.config.conftest import Front
from tests.support.waiting import wait_for

CHAT = "/v1/chat/completions"
LOCAL = "http://localhost:5173"


@pytest.fixture
def channel(front: Front) -> Iterator[grpc.Channel]:
    """A channel to Envoy."""
    with grpc.insecure_channel(f"127.0.0.1:{front.port}") as channel:
        yield channel


def test_native_calls_pass(channel: grpc.Channel) -> None:
    """The typed API, health and reflection are on the public port."""
    assert stubs.InferenceServiceStub(channel).ListModels(pb.ListModelsRequest()).models
    health = health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined]
        health_pb2.HealthCheckRequest()
    )
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    answers = list(stub.ServerReflectionInfo(iter(asked)))
    names = {service.name for service in answers[0].list_services_response.service}
    assert "caravan.inference.v1.InferenceService" in names


def test_native_errors_keep_their_details(channel: grpc.Channel) -> None:
    """A gRPC client sees code, message, ErrorInfo and RetryInfo, untouched by what REST clients get."""
    stub = openai_stubs.OpenAIServiceStub(channel)
    body = HttpBody(
        data=b'{"do": "error", "reason": "CAPACITY_EXHAUSTED", "message": "full", "retry": 2}'
    )
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.CreateChatCompletion(openai_pb.CreateChatCompletionRequest(body=body)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(caught.value)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.reason == "CAPACITY_EXHAUSTED"


def test_other_services_are_not_reachable(channel: grpc.Channel) -> None:
    """What is not listed does not pass to the gateway: the coordinator's API is not public."""
    call: Any = channel.unary_unary("/caravan.coordinator.v1.CoordinatorService/ListEngines")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "{" not in str(caught.value.details())


def _frames(body: bytes) -> list[tuple[int, bytes]]:
    frames = []
    while body:
        length = int.from_bytes(body[1:5], "big")
        frames.append((body[0], body[5 : 5 + length]))
        body = body[5 + length :]
    return frames


@pytest.mark.parametrize("text", [False, True])
def test_grpc_web_passes(front: Front, text: bool) -> None:
    """A browser's gRPC-Web call, binary or base64, gets its message and its status, with CORS headers."""
    kind = "application/grpc-web-text" if text else "application/grpc-web+proto"
    frame = b"\0\0\0\0\0"
    response = front.http.post(
        "/caravan.inference.v1.InferenceService/ListModels",
        content=base64.b64encode(frame) if text else frame,
        headers={"content-type": kind, "accept": kind, "origin": LOCAL, "x-grpc-web": "1"},
    )
    assert response.headers["access-control-allow-origin"] == LOCAL
    # Text is base64 in pieces, each with its own padding.
    pieces = re.findall(rb"[^=]+=*", response.content)
    body = b"".join(map(base64.b64decode, pieces)) if text else response.content
    (flag, message), (trailer_flag, trailer) = _frames(body)
    assert pb.ListModelsResponse.FromString(message).models[0].name == "typed"
    assert (flag, trailer_flag) == (0, 0x80)
    assert b"grpc-status:0" in trailer


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (LOCAL, True),
        ("http://127.0.0.1", True),
        ("https://localhost:8443", True),
        ("http://localhost.evil.example", False),
        ("http://evil.example", False),
        ("null", False),
    ],
)
@pytest.mark.parametrize(
    "path", [CHAT, "/v1/models/a/b", "/caravan.inference.v1.InferenceService/Chat"]
)
def test_preflights(front: Front, path: str, origin: str, allowed: bool) -> None:
    """Pages of this machine may call every path, others none."""
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    response = front.http.options(path, headers=headers)
    assert response.status_code < 300
    assert response.headers.get("access-control-allow-origin") == (origin if allowed else None)
    if allowed:
        assert "POST" in response.headers["access-control-allow-methods"]
        assert "authorization" in response.headers["access-control-allow-headers"]


def test_errors_carry_cors_headers(front: Front) -> None:
    """A page may read an error too, Envoy's own among them."""
    script = {"do": "error", "reason": "CAPACITY_EXHAUSTED", "retry": 1}
    refused = front.http.post(CHAT, json=script, headers={"origin": LOCAL})
    unknown = front.http.get("/v1/nothing", headers={"origin": LOCAL})
    for response in (refused, unknown):
        assert response.headers["access-control-allow-origin"] == LOCAL
    assert "retry-after" in refused.headers["access-control-expose-headers"]


def test_readers_that_stall_do_not_stop_others(front: Front) -> None:
    """Forty clients that do not read neither block another one nor make the gateway send without bound (I4)."""
    body = b'{"do": "stream", "count": 4000, "padding": 1000}'
    request = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (
        CHAT.encode(),
        len(body),
        body,
    )
    before = front.gateway.sent
    stalled = []
    try:
        for _ in range(40):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            client.connect(("127.0.0.1", front.port))
            client.sendall(request)
            stalled.append(client)
        wait_for(lambda: front.gateway.sent - before >= 40 * 100, "all forty streams run")
        wait_for(_stands_still(front), "all forty streams stand still")
        script = {"do": "stream", "count": 100, "padding": 1000}
        assert front.http.post(CHAT, json=script, timeout=5).content.endswith(b"data: [DONE]\n\n")
    finally:
        for client in stalled:
            client.close()
    assert front.gateway.sent - before < 40 * 1000  # a quarter of what they asked for


def _stands_still(front: Front) -> Callable[[], bool]:
    seen: deque[int] = deque(maxlen=20)

    def look() -> bool:
        seen.append(front.gateway.sent)
        return len(seen) == 20 and seen[0] == seen[-1]

    return look


def test_draining_lets_streams_end(front: Front) -> None:
    """After the drain of `caravan up` no new connection is taken, and a running stream ends whole."""
    with httpx.Client(base_url=f"http://127.0.0.1:{front.admin}") as admin:
        front.gateway.release.clear()
        script = {"do": "stream", "count": 3, "hold": True}
        with front.http.stream("POST", CHAT, json=script) as response:
            chunks = response.iter_raw()
            assert next(chunks) == b"data: 0\n\n"
            assert admin.post("/healthcheck/fail").status_code == 200
            assert admin.post("/drain_listeners").status_code == 200
            wait_for(lambda: _refused(front.port), "new connections are refused")
            front.gateway.release.set()
            assert b"".join(chunks).endswith(b"data: [DONE]\n\n")


def _refused(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
