"""caravan.engine.v1.EngineService of an engine in front of a provider: translates between the wire and the engine."""
# ruff: noqa: N802 - gRPC names the methods

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc
from caravan.core.v1 import generation_pb2
from caravan.engine.v1 import engine_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2_grpc as pb_grpc

from services.engine.remote import messages
from services.engine.remote.engine import RemoteEngine
from services.engine.remote.metrics import CANCELLED, SUCCEEDED
from services.engine.remote.outbox import Ending
from services.engine.remote.request import Request
from services.runtime.errors import CaravanError
from services.runtime.generate_events import together
from services.runtime.telemetry import RequestSpan, Tracing

Context = grpc.aio.ServicerContext[Any, Any]
_ID_BYTES_MAX = 128
_OUTCOMES = {
    generation_pb2.FINISH_REASON_CANCELLED: CANCELLED,
    # As the refusal of a whole answer is counted.
    generation_pb2.FINISH_REASON_CONTENT_FILTER: "content_filtered",
}


class RemoteEngineServicer(pb_grpc.EngineServiceServicer):
    """One engine behind gRPC."""

    def __init__(self, engine: RemoteEngine, tracing: Tracing) -> None:
        self._engine = engine
        self._tracing = tracing

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        _check(request)
        with self._running(request, context) as (row, span):
            self._engine.submit(row, request, _remaining_s(context), span)
            async for response in _events(row, span):
                yield response

    @contextmanager
    def _running(
        self, generate: pb.GenerateRequest, context: Context
    ) -> Iterator[tuple[Request, RequestSpan]]:
        """A request from its admission to its end, whatever ends it."""
        endpoint = self._engine.endpoint
        try:
            request = self._engine.register(generate.request_id)
        except CaravanError as error:
            endpoint.metrics.requests.labels(error.reason.lower()).inc()
            raise
        span = self._tracing.start(
            "generate",
            context.invocation_metadata(),
            gen_ai__operation__name="chat" if generate.HasField("chat") else "text_completion",
            gen_ai__provider__name=endpoint.provider,
            gen_ai__request__model=endpoint.model,
            caravan__request_id=generate.request_id,
        )
        outcome, failure = CANCELLED, "the call ended early"
        try:
            yield request, span
            outcome, failure = _OUTCOMES.get(request.reason, SUCCEEDED), ""
        except CaravanError as error:
            outcome, failure = error.reason.lower(), error.reason
            raise
        except Exception:
            outcome, failure = "internal", "INTERNAL"
            raise
        finally:
            self._engine.release(request, generate.tenant, outcome)
            span.end(failure or None)

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        return pb.CancelResponse(found=self._engine.cancel(request.request_id))

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

    async def PrefillOnly(
        self, request: pb.PrefillOnlyRequest, context: Context
    ) -> pb.PrefillOnlyResponse:
        self._refuse("PrefillOnly", "keeps no prompts that were computed ahead")

    async def EndSession(
        self, request: pb.EndSessionRequest, context: Context
    ) -> pb.EndSessionResponse:
        return pb.EndSessionResponse(found=False)

    async def FetchBlocks(
        self, request: pb.FetchBlocksRequest, context: Context
    ) -> AsyncIterator[pb.FetchBlocksResponse]:
        for key in request.keys:
            yield pb.FetchBlocksResponse(key=key, missing=True)

    def _refuse(self, method: str, why: str) -> NoReturn:
        provider = self._engine.endpoint.provider
        raise CaravanError(
            "UNSUPPORTED_METHOD",
            f"The model is run by {provider}, which {why}.",
            method=method,
            provider=provider,
        )


async def _events(request: Request, span: RequestSpan) -> AsyncIterator[pb.GenerateResponse]:
    take = request.outbox.take
    is_started = False
    while True:
        update = await take()
        events: list[pb.GenerateResponse] = []
        # A request that is cancelled while it waits is told as started too: one form for every answer.
        if not is_started and (update.started or update.ending is not None):
            is_started = True
            events.append(pb.GenerateResponse(started=messages.started()))
        if update.pieces:
            events.append(pb.GenerateResponse(delta=messages.delta(update)))
        elif update.alive:
            events.append(pb.GenerateResponse(progress=pb.Progress()))
        if update.ending is not None:
            _describe(span, update.ending)
            events.append(pb.GenerateResponse(finished=messages.finished(update.ending)))
        if events:
            yield together(events)
        if update.error is not None:
            # After the pieces that came before it.
            raise update.error
        if update.ending is not None:
            return


def _check(request: pb.GenerateRequest) -> None:
    if not request.request_id:
        raise CaravanError("INVALID_VALUE", "The request has no id.", param="request_id")
    for param in ("request_id", "tenant"):
        if len(getattr(request, param).encode()) > _ID_BYTES_MAX:
            raise CaravanError(
                "INVALID_VALUE", f"{param} is longer than {_ID_BYTES_MAX} bytes.", param=param
            )


def _remaining_s(context: Context) -> float | None:
    remaining: float | None = context.time_remaining()
    return remaining


def _describe(span: RequestSpan, ending: Ending) -> None:
    usage = ending.usage
    span.set(
        gen_ai__usage__input_tokens=usage.prompt_tokens,
        gen_ai__usage__output_tokens=usage.completion_tokens,
        caravan__cached_tokens=usage.cached_tokens,
        caravan__cost_nanousd=ending.cost_nanousd,
        gen_ai__response__finish_reasons=generation_pb2.FinishReason.Name(ending.reason),
    )
