"""The one error table, row by row, and its round trip over a real call (I10)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from caravan.coordinator.v1 import coordinator_service_pb2 as pb
from caravan.coordinator.v1 import coordinator_service_pb2_grpc as pb_grpc
from caravan.openai.v1 import openai_service_pb2 as openai_pb
from caravan.openai.v1 import openai_service_pb2_grpc as openai_grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from services.runtime.channel import open_channel
from services.runtime.errors import (
    DOMAIN,
    MESSAGE_BYTES_MAX,
    OPENAI_ERROR_KEY,
    TABLE,
    CaravanError,
    from_rpc_error,
    from_status,
    reason_names,
)
from services.runtime.server import ServiceServer

ENVOY_HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
"""The fixed map of Envoy's transcoder; no configuration changes it."""


class Failure:
    """The error with which all calls fail."""

    error: Exception = RuntimeError()


class FailingCoordinator(pb_grpc.CoordinatorServiceServicer):
    """Fails a unary call and a stream."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure

    async def Cancel(self, request: Any, context: Any) -> pb.CancelResponse:
        raise self.failure.error

    async def JoinGateway(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        raise self.failure.error
        yield


class FailingOpenAI(openai_grpc.OpenAIServiceServicer):
    """Fails a unary call and a stream of the service whose errors Envoy shows."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure

    async def GetModel(self, request: Any, context: Any) -> openai_pb.GetModelResponse:
        raise self.failure.error

    async def CreateCompletion(self, request: Any, context: Any) -> AsyncIterator[Any]:
        raise self.failure.error
        yield


@pytest.fixture
async def failing() -> AsyncIterator[tuple[Failure, grpc.aio.Channel]]:
    """A server whose calls fail, and a channel to it."""
    shown = Failure()
    server = ServiceServer("127.0.0.1:0", [], drain_grace_s=0)
    coordinator = FailingCoordinator(shown)  # type: ignore[abstract]
    pb_grpc.add_CoordinatorServiceServicer_to_server(coordinator, server.services)
    openai = FailingOpenAI(shown)  # type: ignore[abstract]
    openai_grpc.add_OpenAIServiceServicer_to_server(openai, server.services)
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        yield shown, channel
    await server.drain_and_stop()


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """The error of a unary call or of a stream's first read."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if hasattr(call, "read") else call)
    return caught.value


def test_every_reason_has_a_row_and_every_row_a_reason() -> None:
    """The proto enum and the table name the same reasons."""
    assert set(TABLE) == reason_names()


@pytest.mark.parametrize("reason", sorted(TABLE))
def test_the_http_status_is_the_one_envoy_derives(reason: str) -> None:
    """Envoy derives the HTTP status from the gRPC code alone, so the table may not say otherwise."""
    row = TABLE[reason]
    assert row.http_status == ENVOY_HTTP_STATUS[row.grpc_code]


@pytest.mark.parametrize("reason", sorted(TABLE))
def test_openai_types_agree_with_the_status(reason: str) -> None:
    """4xx is the client's fault and 5xx the server's; 429 is what SDKs take for a rate limit; codes are unique."""
    row = TABLE[reason]
    assert row.openai_code
    assert [r.openai_code for r in TABLE.values()].count(row.openai_code) == 1
    if row.http_status == 429:
        assert row.openai_type == "rate_limit_error"
    elif row.http_status >= 500:
        assert row.openai_type == "server_error"
    else:
        # The two that are 400 only because the gRPC code leaves no other are the server's.
        ours = reason in {"SESSION_UNKNOWN", "MODEL_INVALID"}
        assert row.openai_type == ("server_error" if ours else "invalid_request_error")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("reason", sorted(TABLE))
async def test_an_error_survives_a_real_call(
    failing: tuple[Failure, grpc.aio.Channel], reason: str, streaming: bool
) -> None:
    """Code, message, ErrorInfo, RetryInfo and retry-after arrive, and the peer rebuilds the same error."""
    shown, channel = failing
    shown.error = CaravanError(
        reason, "Füße & 50% \n off", param="model", retry_after_s=1.25, model="demo"
    )
    stub = pb_grpc.CoordinatorServiceStub(channel)
    call = stub.JoinGateway() if streaming else stub.Cancel(pb.CancelRequest())
    error = await failure(call)
    assert error.code() is TABLE[reason].grpc_code
    assert error.details() == "Füße & 50% \n off"
    trailers = dict(error.trailing_metadata())
    assert trailers["retry-after"] == "2"
    assert OPENAI_ERROR_KEY not in trailers
    status = rpc_status.from_call(error)
    assert status is not None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert (info.reason, info.domain) == (reason, DOMAIN)
    assert info.metadata == {"param": "model", "model": "demo"}
    assert retry.retry_delay.ToMilliseconds() == 1250

    rebuilt = from_rpc_error(error, service="coordinator")
    assert (rebuilt.reason, rebuilt.message) == (reason, "Füße & 50% \n off")
    assert rebuilt.metadata == {"param": "model", "model": "demo"}
    assert (rebuilt.param, rebuilt.retry_after_s) == ("model", 1.25)


@pytest.mark.parametrize("streaming", [False, True])
async def test_the_openai_api_carries_the_body_for_envoy(
    failing: tuple[Failure, grpc.aio.Channel], streaming: bool
) -> None:
    """Calls of the OpenAI service carry the JSON body in a trailer of plain ASCII; without a retry time no header."""
    shown, channel = failing
    shown.error = CaravanError("UNKNOWN_FIELD", "Unknown field 'größe'.", param="größe")
    stub = openai_grpc.OpenAIServiceStub(channel)
    error = await failure(
        stub.CreateCompletion(openai_pb.CreateCompletionRequest())
        if streaming
        else stub.GetModel(openai_pb.GetModelRequest())
    )
    trailers = dict(error.trailing_metadata())
    body = trailers[OPENAI_ERROR_KEY]
    assert isinstance(body, str)
    assert body.isascii()
    assert json.loads(body) == {
        "error": {
            "message": "Unknown field 'größe'.",
            "type": "invalid_request_error",
            "param": "größe",
            "code": "unknown_parameter",
        }
    }
    assert "retry-after" not in trailers


@pytest.mark.parametrize(
    "text",
    ["x" * 100_000, "é" * 100_000, "😀" * 100_000, "\ud800" * 100_000],
    ids=["ascii", "two bytes", "emoji", "no unicode"],
)
async def test_texts_of_clients_do_not_break_the_trailers(
    failing: tuple[Failure, grpc.aio.Channel], text: str
) -> None:
    """Names that a client sent may be huge or no Unicode; gRPC drops calls with trailers above 8 KiB, so they are cut."""
    shown, channel = failing
    shown.error = CaravanError("UNKNOWN_FIELD", text, param=text, model=text)
    stub = openai_grpc.OpenAIServiceStub(channel)
    error = await failure(stub.GetModel(openai_pb.GetModelRequest()))
    rebuilt = from_rpc_error(error, service="gateway")
    assert rebuilt.reason == "UNKNOWN_FIELD"
    assert 0 < len(rebuilt.message.encode()) <= MESSAGE_BYTES_MAX
    assert rebuilt.param


async def test_unknown_exceptions_show_nothing(
    failing: tuple[Failure, grpc.aio.Channel], caplog: pytest.LogCaptureFixture
) -> None:
    """A defect is INTERNAL for the client, without its text; the log has it."""
    shown, channel = failing
    shown.error = RuntimeError("the password is 1234")
    stub = pb_grpc.CoordinatorServiceStub(channel)
    for call in (stub.Cancel(pb.CancelRequest()), stub.JoinGateway()):
        error = await failure(call)
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "1234" not in str(error)
        assert from_rpc_error(error, service="coordinator").reason == "INTERNAL"
    assert caplog.text.count("the password is 1234") >= 2


def rpc_error(code: grpc.StatusCode, **trailers: bytes) -> grpc.aio.AioRpcError:
    """An error as a peer that is not of Caravan, or the library itself, makes it."""
    metadata = grpc.aio.Metadata(*((k.replace("_", "-"), v) for k, v in trailers.items()))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details="inner details")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, "SERVICE_UNAVAILABLE"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
        (grpc.StatusCode.CANCELLED, "CANCELLED"),
        (grpc.StatusCode.UNIMPLEMENTED, "INTERNAL"),
        (grpc.StatusCode.INVALID_ARGUMENT, "INTERNAL"),
    ],
)
def test_errors_without_details_are_mapped_by_code(code: grpc.StatusCode, reason: str) -> None:
    """What the library reports of a peer becomes a reason of the table; foreign texts do not reach the client."""
    error = from_rpc_error(rpc_error(code), service="engine")
    assert error.reason == reason
    assert "inner details" not in error.message


@pytest.mark.parametrize(
    "details",
    [
        b"\xff\xff\xff",
        CaravanError("NO_ENGINE", "another message").to_status().SerializeToString(),
        CaravanError("CANCELLED", "inner details").to_status().SerializeToString(),
    ],
)
def test_details_that_contradict_the_status_are_not_believed(details: bytes) -> None:
    """Corrupt or inconsistent details do not raise; the code decides."""
    error = rpc_error(grpc.StatusCode.UNAVAILABLE, grpc_status_details_bin=details)
    assert from_rpc_error(error, service="engine").reason == "SERVICE_UNAVAILABLE"


def test_a_status_within_a_message_is_read_like_that_of_a_call() -> None:
    """With its details the same error, without them what its code says."""
    error = CaravanError("NO_ENGINE", "None is there.", retry_after_s=1.5, model="demo")
    told = from_status(error.to_status(), service="coordinator")
    assert (told.reason, told.message, told.retry_after_s) == ("NO_ENGINE", "None is there.", 1.5)
    assert told.metadata == {"model": "demo"}
    bare = status_pb2.Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="Foreign words.")
    assert from_status(bare, service="coordinator").reason == "SERVICE_UNAVAILABLE"
    unknown = status_pb2.Status(code=99)
    assert from_status(unknown, service="coordinator").reason == "INTERNAL"
