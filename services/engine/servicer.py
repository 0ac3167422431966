"""caravan.engine.v1.EngineService: translates between the wire and the engine."""
# ruff: noqa: N802 - gRPC names the methods

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.engine.v1 import engine_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2_grpc as pb_grpc

from services.engine import messages
from services.engine.engine import Engine
from services.engine.inflight import Inflight
from services.engine.news import WHOLE_GATHER_S
from services.engine.outbox import Ending, Update
from services.engine.preparation import check_request_id, check_salt, check_session_id
from services.engine.sampling import TokenLogprobs
from services.runtime.errors import CaravanError
from services.runtime.generate_events import together
from services.runtime.telemetry import RequestSpan, Tracing

Context = grpc.aio.ServicerContext[Any, Any]


class EngineServicer(pb_grpc.EngineServiceServicer):
    """One engine behind gRPC."""

    def __init__(self, engine: Engine, tracing: Tracing) -> None:
        self._engine = engine
        self._tracing = tracing

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        kind = "chat" if request.HasField("chat") else "text_completion"
        with self._running(request.request_id, kind, context) as (row, span):
            async for response in self._events(request, row, span):
                yield response

    async def PrefillOnly(
        self, request: pb.PrefillOnlyRequest, context: Context
    ) -> pb.PrefillOnlyResponse:
        kind = request.WhichOneof("prompt")
        prompt = {} if kind is None else {kind: getattr(request, kind)}
        generate = pb.GenerateRequest(request_id=request.request_id, cache=request.cache, **prompt)
        with self._running(request.request_id, "prefill", context) as (row, span):
            ending = await self._prefill(generate, row)
            _describe(span, ending)
        return pb.PrefillOnlyResponse(
            prompt_tokens=ending.prompt_tokens,
            cached_tokens=ending.cached_tokens,
            cache_hit=ending.cache_hit,  # type: ignore[arg-type]
            finish_key=ending.finish_key,
        )

    async def _prefill(self, request: pb.GenerateRequest, row: Inflight) -> Ending:
        await self._submit(request, row, prefill_only=True)
        while True:
            update = await row.outbox.take()
            if update.error is not None:
                raise update.error
            if update.ending is not None:
                return update.ending

    @contextmanager
    def _running(
        self, request_id: str, kind: str, context: Context
    ) -> Iterator[tuple[Inflight, RequestSpan]]:
        """A request from its admission to its end, whatever ends it."""
        check_request_id(request_id)
        row = self._engine.register(request_id)
        span = self._tracing.start(
            "generate",
            context.invocation_metadata(),
            gen_ai__operation__name=kind,
            gen_ai__request__model=self._engine.identity.model_name,
            caravan__request_id=request_id,
        )
        failure: str | None = "the call ended early"
        try:
            yield row, span
            failure = None
        except CaravanError as error:
            failure = error.reason
            raise
        finally:
            self._engine.release(row)
            span.end(failure)

    async def _submit(
        self, request: pb.GenerateRequest, row: Inflight, *, prefill_only: bool
    ) -> None:
        work = await self._engine.prepare(request, prefill_only=prefill_only)
        found = await self._engine.find(row, work)
        self._engine.submit(row, work, found)

    async def _events(
        self, request: pb.GenerateRequest, row: Inflight, span: RequestSpan
    ) -> AsyncIterator[pb.GenerateResponse]:
        if request.whole:
            row.outbox.gather(WHOLE_GATHER_S)
        await self._submit(request, row, prefill_only=False)
        started = False
        while True:
            update = await row.outbox.take()
            events: list[pb.GenerateResponse] = []
            # A request that is cancelled while it waits is told as started too: one form for every answer.
            if not started and (update.started or update.ending is not None):
                started = True
                span.event("started")
                events.append(pb.GenerateResponse(started=messages.started(row, update)))
            if update.has_delta:
                events.append(pb.GenerateResponse(delta=self._delta(update)))
            elif update.prompt_tokens_done is not None:
                progress = pb.Progress(prompt_tokens_done=update.prompt_tokens_done)
                events.append(pb.GenerateResponse(progress=progress))
            if update.ending is not None:
                _describe(span, update.ending)
                events.append(pb.GenerateResponse(finished=messages.finished(update.ending)))
            if events:
                yield together(events)
            if update.ending is not None:
                return
            if update.error is not None:
                # After the tokens that came before it: another engine may go on behind them.
                raise update.error

    def _delta(self, update: Update) -> pb.Delta:
        delta = pb.Delta(text="".join(update.text), token_ids=update.token_ids)
        for call in update.calls:
            delta.tool_calls.append(
                chat_pb2.ToolCallDelta(
                    index=call.index,
                    id=call.call_id,
                    name=call.name,
                    arguments_json=call.arguments_json,
                )
            )
        for token_id, scores in zip(update.token_ids, update.logprobs, strict=False):
            delta.logprobs.append(self._logprob(token_id, scores))
        return delta

    def _logprob(self, token_id: int, scores: TokenLogprobs) -> generation_pb2.TokenLogprob:
        token_bytes = self._engine.token_bytes
        return generation_pb2.TokenLogprob(
            token_id=token_id,
            token=token_bytes(token_id),
            logprob=scores.chosen,
            top=[
                generation_pb2.TopLogprob(token_id=other, token=token_bytes(other), logprob=value)
                for other, value in scores.top
            ],
        )

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        return pb.CancelResponse(found=self._engine.cancel(request.request_id))

    async def EndSession(
        self, request: pb.EndSessionRequest, context: Context
    ) -> pb.EndSessionResponse:
        if not request.session_id:
            raise CaravanError("INVALID_VALUE", "The session has no id.", param="session_id")
        check_session_id(request.session_id, "session_id")
        check_salt(request.salt, "salt")
        found = await self._engine.end_session(request.salt.encode(), request.session_id)
        return pb.EndSessionResponse(found=found)

    async def FetchBlocks(
        self, request: pb.FetchBlocksRequest, context: Context
    ) -> AsyncIterator[pb.FetchBlocksResponse]:
        store = self._engine.store
        if store is None:
            for key in request.keys:
                yield pb.FetchBlocksResponse(key=key, missing=True)
            return
        async for piece in store.serve_blocks(request.keys):
            yield piece

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: Context
    ) -> pb.GetStatusResponse:
        return pb.GetStatusResponse(
            engine_id=self._engine.identity.engine_id,
            model=self._engine.model(),
            load=self._engine.load(),
        )

    async def ListInflight(
        self, request: pb.ListInflightRequest, context: Context
    ) -> pb.ListInflightResponse:
        return pb.ListInflightResponse(requests=self._engine.requests())


def _describe(span: RequestSpan, ending: Ending) -> None:
    span.set(
        gen_ai__usage__input_tokens=ending.prompt_tokens,
        gen_ai__usage__output_tokens=ending.completion_tokens,
        caravan__cached_tokens=ending.cached_tokens,
        gen_ai__response__finish_reasons=generation_pb2.FinishReason.Name(ending.reason),  # type: ignore[arg-type]
    )
