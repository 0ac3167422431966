"""The call of an engine that serves a request, as a stream of events whatever its kind."""

from __future__ import annotations

from typing import Any, Protocol

import grpc
from caravan.core.v1 import generation_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from caravan.engine.v1 import engine_service_pb2_grpc as engine_grpc

from services.gateway.coordinator import Headers
from services.gateway.requests import Api, InferenceRequest


class EngineCall(Protocol):
    """A call that was begun. Its end frees what the request holds at the engine."""

    async def read(self) -> Any:
        """The next engine_pb.GenerateResponse, or grpc.aio.EOF. Raises grpc.aio.AioRpcError."""
        ...

    def cancel(self) -> bool:
        """Ends the call."""
        ...


def begin(
    engine: engine_grpc.EngineServiceAsyncStub,
    request: InferenceRequest,
    timeout_s: float | None,
    headers: Headers,
) -> EngineCall:
    """Asks an engine to serve a request, within `timeout_s` seconds."""
    if request.api is Api.PREFILL:
        call = engine.PrefillOnly(
            _prefill_only(request.generate), timeout=timeout_s, metadata=headers
        )
        return _OneEvent(call)
    return engine.Generate(request.generate, timeout=timeout_s, metadata=headers)


def _prefill_only(generate: engine_pb.GenerateRequest) -> engine_pb.PrefillOnlyRequest:
    kind = generate.WhichOneof("prompt")
    assert kind is not None, "a request without a prompt is refused before"
    prompt: dict[str, Any] = {kind: getattr(generate, kind)}
    return engine_pb.PrefillOnlyRequest(
        request_id=generate.request_id, cache=generate.cache, **prompt
    )


class _OneEvent:
    """PrefillOnly as a request that finishes without an answer."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._read = False

    async def read(self) -> Any:
        if self._read:
            return grpc.aio.EOF
        done: engine_pb.PrefillOnlyResponse = await self._call
        self._read = True
        finished = engine_pb.Finished(
            usage=generation_pb2.Usage(
                prompt_tokens=done.prompt_tokens, cached_tokens=done.cached_tokens
            ),
            finish_key=done.finish_key,
            cache_hit=done.cache_hit,
        )
        return engine_pb.GenerateResponse(finished=finished)

    def cancel(self) -> bool:
        return bool(self._call.cancel())
