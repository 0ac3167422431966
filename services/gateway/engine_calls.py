"""The call of an engine that serves a request, as a stream of events whatever its kind."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final, Protocol

import grpc
from caravan.core.v1 import generation_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from caravan.engine.v1 import engine_service_pb2_grpc as engine_grpc
from grpc_status import rpc_status

from services.gateway.requests import Api, InferenceRequest
from services.gateway.routes import Headers, Lease
from services.runtime.errors import CaravanError, from_rpc_error

_LAST_WAIT_S: Final = 1.0


class EngineCall(Protocol):
    """A call that was begun. Its end frees what the request holds at the engine."""

    async def read(self) -> Any:
        """The next engine_pb.GenerateResponse, or grpc.aio.EOF. Raises grpc.aio.AioRpcError."""
        ...

    async def code(self) -> grpc.StatusCode:
        """Waits for the end of the call: how it ended."""
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


async def wait_for_end(call: EngineCall) -> None:
    """Lets the engine end its call by itself, so that it does not count a finished request as cancelled."""
    # However it ends, even by stalling, the answer is complete.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LAST_WAIT_S):
            await call.code()


def call_error(error: grpc.aio.AioRpcError, lease: Lease, asked_for: str) -> CaravanError:
    """What an engine's call failed with; `asked_for` is the deployment that the client named."""
    known = from_rpc_error(error, service="engine")
    unreachable = known.reason in {"SERVICE_UNAVAILABLE", "CANCELLED"}
    if unreachable and rpc_status.from_call(error) is None:
        # No words of the engine itself: its process or its listener is gone.
        return engine_lost(lease.engine_id)
    if known.reason == "CONTEXT_LENGTH_EXCEEDED" and lease.model != asked_for:
        # The client knows the context of the model that it asked for, not that of the one which answers in its place.
        told = f"{known.message} It is served by '{lease.model}' in place of '{asked_for}'."
        return CaravanError(known.reason, told, retry_after_s=None, **known.metadata)
    return known


def engine_lost(engine_id: str) -> CaravanError:
    """The engine ended its call without a word, or cannot be reached."""
    return CaravanError(
        "ENGINE_LOST",
        "The engine that served the request went away.",
        retry_after_s=1.0,
        engine_id=engine_id,
    )


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

    async def code(self) -> grpc.StatusCode:
        code: grpc.StatusCode = await self._call.code()
        return code

    def cancel(self) -> bool:
        return bool(self._call.cancel())
