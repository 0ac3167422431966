"""The typed API for gRPC clients."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

import grpc
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from caravan.inference.v1 import inference_service_pb2 as pb
from caravan.inference.v1 import inference_service_pb2_grpc as pb_grpc

from services.gateway import rules
from services.gateway.cache_options import check_salt, check_session_id
from services.gateway.conversations import Conversations
from services.gateway.coordinator import CoordinatorClient
from services.gateway.engine_errors import in_typed_words
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
from services.gateway.typed_request import from_chat, from_complete, from_prefill_only
from services.runtime.clock import IdSource
from services.runtime.errors import CaravanError


class InferenceServicer(pb_grpc.InferenceServiceServicer):
    """Translates between typed messages and sessions."""

    def __init__(
        self,
        sessions: Sessions,
        coordinator: CoordinatorClient,
        conversations: Conversations,
        ids: IdSource,
    ) -> None:
        self._sessions = sessions
        self._coordinator = coordinator
        self._conversations = conversations
        self._ids = ids

    def Chat(
        self, request: pb.ChatRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.ChatResponse]:
        return self._answer(Api.CHAT, lambda: from_chat(request), context, pb.ChatResponse)

    def Complete(
        self, request: pb.CompleteRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.CompleteResponse]:
        return self._answer(
            Api.COMPLETION, lambda: from_complete(request), context, pb.CompleteResponse
        )

    async def PrefillOnly(
        self, request: pb.PrefillOnlyRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.PrefillOnlyResponse:
        request_id = self._ids("req")
        session: RequestSession | None = None
        try:
            session = self._open(
                Api.PREFILL, lambda: from_prefill_only(request), context, request_id
            )
            event = await session.next()
            assert event is not None, "silence was not asked for"
            await send_head(context, request_id, session.deployment)
            return _prefilled(event.finished, session.engine_id)
        except CaravanError as error:
            await _abort(context, error, Api.PREFILL, request_id, session)
        finally:
            if session is not None:
                session.close()

    async def EndSession(
        self, request: pb.EndSessionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.EndSessionResponse:
        rules.check_model_name(request.model)
        check_session_id(request.session_id, "session_id")
        check_salt(request.salt, "salt")
        found = await self._conversations.end(request.model, request.session_id, request.salt)
        return pb.EndSessionResponse(found=found)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(
            models=[
                pb.Model(
                    name=model.name,
                    created=model.created,
                    context_tokens=model.context_tokens,
                    ready=model.ready_engines > 0,
                )
                for model in await self._coordinator.list_models()
            ]
        )

    async def CancelRequest(
        self, request: pb.CancelRequestRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.CancelRequestResponse:
        if not request.request_id:
            raise CaravanError(
                "MISSING_FIELD", "Missing required parameter: 'request_id'.", param="request_id"
            )
        await self._coordinator.cancel(request.request_id)
        return pb.CancelRequestResponse()

    async def _answer(
        self,
        api: Api,
        build: Callable[[], InferenceRequest],
        context: Context,
        response: Callable[..., Any],
    ) -> AsyncIterator[Any]:
        request_id = self._ids("req")
        session: RequestSession | None = None
        sent = False
        try:
            session = self._open(api, build, context, request_id)
            ended = False
            while not ended:
                event = await session.next()
                assert event is not None, "silence was not asked for"
                if not sent:
                    sent = True
                    await send_head(context, request_id, session.deployment)
                kind = event.WhichOneof("event")
                if kind == "delta":
                    yield response(delta=_delta(event.delta))
                elif kind == "started":
                    yield response(started=_started(event.started, session))
                elif kind == "finished":
                    ended = True
                    yield response(finished=_finished(event.finished))
        except CaravanError as error:
            await _abort(context, error, api, request_id, session)
        finally:
            if session is not None:
                session.close()

    def _open(
        self, api: Api, build: Callable[[], InferenceRequest], context: Context, request_id: str
    ) -> RequestSession:
        try:
            session = self._sessions.open(
                build(), request_id, invocation_metadata(context), context.time_remaining()
            )
        except CaravanError as error:
            self._sessions.refuse(api, error)
            raise
        when_over(context, session.close)
        return session


async def _abort(
    context: Context,
    error: CaravanError,
    api: Api,
    request_id: str,
    session: RequestSession | None,
) -> NoReturn:
    if session is None:
        await abort(context, error, request_id, "", openai=False)
    shown = in_typed_words(error, api)
    await abort(context, shown, request_id, session.deployment, openai=False)


def _started(started: engine_pb.Started, session: RequestSession) -> pb.Started:
    return pb.Started(
        request_id=session.request_id,
        prompt_tokens=started.prompt_tokens,
        cached_tokens=started.cached_tokens,
        engine_id=session.engine_id,
        cache_hit=started.cache_hit,
    )


def _delta(delta: engine_pb.Delta) -> pb.Delta:
    return pb.Delta(
        text=delta.text,
        token_ids=delta.token_ids,
        tool_calls=delta.tool_calls,
        logprobs=delta.logprobs,
        refusal=delta.refusal,
        pieces=delta.pieces,
    )


def _finished(finished: engine_pb.Finished) -> pb.Finished:
    return pb.Finished(
        reason=finished.reason,
        usage=finished.usage,
        finish_key=finished.finish_key,
        cache_hit=finished.cache_hit,
        cost_nanousd=finished.cost_nanousd,
    )


def _prefilled(finished: engine_pb.Finished, engine_id: str) -> pb.PrefillOnlyResponse:
    return pb.PrefillOnlyResponse(
        prompt_tokens=finished.usage.prompt_tokens,
        cached_tokens=finished.usage.cached_tokens,
        cache_hit=finished.cache_hit,
        finish_key=finished.finish_key,
        engine_id=engine_id,
    )
