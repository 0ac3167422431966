"""The OpenAI API over gRPC; Envoy makes it REST."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, TypeVar

import grpc
import msgspec
from caravan.coordinator.v1 import coordinator_service_pb2 as coordinator_pb
from caravan.openai.v1 import openai_service_pb2 as pb
from caravan.openai.v1 import openai_service_pb2_grpc as pb_grpc
from google.api.httpbody_pb2 import HttpBody

from services.gateway import openai_plain, openai_stream
from services.gateway.coordinator import CoordinatorClient, model_not_found
from services.gateway.engine_errors import in_openai_words
from services.gateway.openai_answer import AnswerHead, Served
from services.gateway.openai_inflight import listed
from services.gateway.openai_request import parse_chat, parse_completion
from services.gateway.requests import Api, InferenceRequest
from services.gateway.rpc_metadata import (
    Context,
    abort,
    invocation_metadata,
    send_head,
    when_over,
)
from services.gateway.session import RequestSession
from services.gateway.sessions import Sessions
from services.runtime.clock import Clock, IdSource
from services.runtime.errors import CaravanError

_LOG = logging.getLogger(__name__)
_JSON: Final = openai_plain.CONTENT_TYPE
Response = TypeVar("Response", pb.CreateChatCompletionResponse, pb.CreateCompletionResponse)
Parse = Callable[[bytes], InferenceRequest]


class OpenAIServicer(pb_grpc.OpenAIServiceServicer):
    """Translates between HTTP bodies and sessions. `keepalive_s` is the longest silence of a stream, in seconds."""

    def __init__(
        self,
        sessions: Sessions,
        coordinator: CoordinatorClient,
        clock: Clock,
        ids: IdSource,
        keepalive_s: float,
    ) -> None:
        self._sessions = sessions
        self._coordinator = coordinator
        self._clock = clock
        self._ids = ids
        self._keepalive_s = keepalive_s

    def CreateChatCompletion(
        self,
        request: pb.CreateChatCompletionRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.CreateChatCompletionResponse]:
        return self._answer(
            Api.CHAT, parse_chat, request.body.data, context, pb.CreateChatCompletionResponse
        )

    def CreateCompletion(
        self,
        request: pb.CreateCompletionRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.CreateCompletionResponse]:
        return self._answer(
            Api.COMPLETION,
            parse_completion,
            request.body.data,
            context,
            pb.CreateCompletionResponse,
        )

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListModelsResponse:
        models = [_model(model) for model in await self._coordinator.list_models()]
        return pb.ListModelsResponse(body=_json_body({"object": "list", "data": models}))

    async def GetModel(
        self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetModelResponse:
        for model in await self._coordinator.list_models():
            if model.name == request.model:
                return pb.GetModelResponse(body=_json_body(_model(model)))
        raise model_not_found(request.model)

    async def ListRequests(
        self, request: pb.ListRequestsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListRequestsResponse:
        requests = [listed(inflight) for inflight in await self._coordinator.list_inflight()]
        return pb.ListRequestsResponse(body=_json_body({"object": "list", "data": requests}))

    async def CancelRequest(
        self, request: pb.CancelRequestRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.CancelRequestResponse:
        await self._coordinator.cancel(request.request_id)
        cancelled = {"id": request.request_id, "object": "request", "status": "cancelling"}
        return pb.CancelRequestResponse(body=_json_body(cancelled))

    async def _answer(
        self, api: Api, parse: Parse, body: bytes, context: Context, response: type[Response]
    ) -> AsyncIterator[Response]:
        request_id = self._ids("req")
        sent, unsent = False, b""
        session: RequestSession | None = None
        try:
            request, session = self._open(api, parse, body, context, request_id)
            head = AnswerHead(request_id, request.model, int(self._clock.wall()))
            if not request.stream:
                data = await _collect(request, session, head)
                await send_head(context, request_id, session.deployment)
                yield response(body=HttpBody(content_type=_JSON, data=data))
                return
            stream = openai_stream.open_stream(request, head)
            ended = False
            while not ended:
                unsent, ended = _show(stream, await session.next(self._keepalive_s), session)
                # What is there together goes out in one message: fewer writes for the same chunks.
                while not ended and (more := session.next_ready()) is not None:
                    shown, ended = _show(stream, more, session)
                    unsent += shown
                if not unsent:
                    continue
                body_part = HttpBody(data=unsent)
                if not sent:
                    sent, body_part.content_type = True, openai_stream.CONTENT_TYPE
                    await send_head(context, request_id, session.deployment)
                unsent = b""
                yield response(body=body_part)
        except (CaravanError, MemoryError, ValueError) as caught:
            error = _as_shown(caught, api, of_engine=session is not None)
            if sent:
                # The status is gone; an event is all that a REST client can see.
                yield response(body=HttpBody(data=unsent + openai_stream.error_event(error)))
            deployment = "" if session is None else session.deployment
            await abort(context, error, request_id, deployment, openai=True)
        finally:
            if session is not None:
                session.close()

    def _open(
        self, api: Api, parse: Parse, body: bytes, context: Context, request_id: str
    ) -> tuple[InferenceRequest, RequestSession]:
        try:
            request = parse(body)
            session = self._sessions.open(
                request, request_id, invocation_metadata(context), context.time_remaining()
            )
        except CaravanError as error:
            self._sessions.refuse(api, error)
            raise
        when_over(context, session.close)
        return request, session


def _show(
    stream: openai_stream.AnswerStream, event: Any, session: RequestSession
) -> tuple[bytes, bool]:
    """Bytes for an event of an engine, and whether it is the last."""
    if event is None:
        return openai_stream.KEEPALIVE, False
    kind = event.WhichOneof("event")
    if kind == "delta":
        return stream.delta(event.delta), False
    if kind == "finished":
        return stream.finished(event.finished, _served(session)), True
    return b"", False


async def _collect(request: InferenceRequest, session: RequestSession, head: AnswerHead) -> bytes:
    answer = openai_plain.PlainAnswer(request, head)
    while True:
        event = await session.next()
        assert event is not None, "silence was not asked for"
        kind = event.WhichOneof("event")
        if kind == "delta":
            answer.delta(event.delta)
        elif kind == "finished":
            return answer.finished(event.finished, _served(session))


def _served(session: RequestSession) -> Served:
    return Served(session.engine_id, session.deployment)


def _as_shown(caught: Exception, api: Api, *, of_engine: bool) -> CaravanError:
    if isinstance(caught, CaravanError):
        return in_openai_words(caught, api) if of_engine else caught
    _LOG.error("unexpected error", exc_info=caught)
    return CaravanError("INTERNAL", "An internal error occurred; the log has the details.")


def _json_body(value: object) -> HttpBody:
    return HttpBody(content_type=_JSON, data=msgspec.json.encode(value))


def _model(model: coordinator_pb.Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created.seconds,
        "owned_by": "caravan",
        "caravan": {
            "context_tokens": model.context_tokens or None,
            "ready_engines": model.ready_engines,
        },
    }
