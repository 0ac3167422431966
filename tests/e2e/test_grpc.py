"""The typed API through Envoy's port."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.inference.v1 import inference_service_pb2 as pb
from caravan.inference.v1 import inference_service_pb2_grpc as stubs
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from tests.support.stack import Stack
from tests.support.waiting import wait_for

pytestmark = pytest.mark.e2e


@pytest.fixture
def channel(stack: Stack) -> Iterator[grpc.Channel]:
    """A channel to Envoy."""
    with grpc.insecure_channel(f"127.0.0.1:{stack.port}") as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> stubs.InferenceServiceStub:
    """The typed API."""
    return stubs.InferenceServiceStub(channel)


def _chat(model: str, tokens: int = 10) -> pb.ChatRequest:
    content = chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content="Hello")
    return pb.ChatRequest(
        model=model,
        prompt=chat_pb2.ChatPrompt(messages=[content]),
        stop=generation_pb2.StopConditions(max_tokens=tokens, ignore_eos=True),
    )


def test_chat_streams(stub: stubs.InferenceServiceStub) -> None:
    """Started, deltas, Finished; the tokens of the deltas are those of the usage."""
    events = list(stub.Chat(_chat("fast", 17)))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert set(kinds[1:-1]) == {"delta"}
    tokens = sum(len(event.delta.token_ids) for event in events)
    assert tokens == events[-1].finished.usage.completion_tokens == 17
    assert events[-1].finished.reason == generation_pb2.FINISH_REASON_LENGTH


def test_models_are_typed(stub: stubs.InferenceServiceStub) -> None:
    """The list is sorted and says what is ready."""
    models = stub.ListModels(pb.ListModelsRequest()).models
    names = [model.name for model in models]
    assert names == sorted(names)
    assert all(model.ready for model in models)


def test_errors_are_typed(stub: stubs.InferenceServiceStub) -> None:
    """An error carries ErrorInfo with the reason."""
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Chat(_chat("none")))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(caught.value).details[0].Unpack(info)
    assert (info.domain, info.reason) == ("caravan", "MODEL_NOT_FOUND")


def test_cancel_by_id_from_anywhere(stub: stubs.InferenceServiceStub) -> None:
    """CancelRequest ends a stream of another call; the stream says that it was cancelled."""
    events = stub.Chat(_chat("slow", 2000))
    request_id = next(events).started.request_id
    stub.CancelRequest(pb.CancelRequestRequest(request_id=request_id))
    *_, last = events
    assert last.finished.reason == generation_pb2.FINISH_REASON_CANCELLED


def test_a_deadline_is_kept(stack: Stack, stub: stubs.InferenceServiceStub) -> None:
    """A client's deadline ends the request everywhere."""
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Chat(_chat("slow", 2000), timeout=0.5))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_for(lambda: not stack.held(), "the request is gone", 2.0)


def test_reflection_describes_the_api(channel: grpc.Channel) -> None:
    """grpcurl and its like can list the services and read the method Chat."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    name = "caravan.inference.v1.InferenceService"
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=name),
    ]
    listed, described = stub.ServerReflectionInfo(iter(asked))
    assert name in {service.name for service in listed.list_services_response.service}
    files = [
        descriptor_pb2.FileDescriptorProto.FromString(raw)
        for raw in described.file_descriptor_response.file_descriptor_proto
    ]
    methods = {
        method.name for file in files for service in file.service for method in service.method
    }
    assert "Chat" in methods


def test_a_browser_reaches_the_typed_api(stack: Stack, http: httpx.Client) -> None:
    """gRPC-Web with CORS: a preflight, then a call whose stream arrives as frames."""
    path = "/caravan.inference.v1.InferenceService/Chat"
    origin = "http://localhost:5173"
    preflight = http.options(
        path,
        headers={
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-type,x-grpc-web",
        },
    )
    assert preflight.headers["access-control-allow-origin"] == origin
    message = _chat("fast", 5).SerializeToString()
    response = http.post(
        path,
        content=b"\0" + len(message).to_bytes(4, "big") + message,
        headers={"content-type": "application/grpc-web+proto", "origin": origin},
    )
    assert response.headers["access-control-allow-origin"] == origin
    frames, body = [], response.content
    while body:
        length = int.from_bytes(body[1:5], "big")
        frames.append((body[0], body[5 : 5 + length]))
        body = body[5 + length :]
    assert pb.ChatResponse.FromString(frames[0][1]).HasField("started")
    assert frames[-1][0] == 0x80
    assert b"grpc-status:0" in frames[-1][1]
