"""caravan.engine.v1.RemoteService: how the engine stands with its provider, and what the person on call can do about it."""
# ruff: noqa: N802 - gRPC names the methods

from __future__ import annotations

import logging
from typing import Any, Final

import grpc
from caravan.engine.v1 import remote_service_pb2 as pb
from caravan.engine.v1 import remote_service_pb2_grpc as pb_grpc

from services.engine.remote.credentials import CredentialError
from services.engine.remote.engine import RemoteEngine
from services.runtime.errors import CaravanError

Context = grpc.aio.ServicerContext[Any, Any]
_LOG = logging.getLogger(__name__)
_FOR_S_MAX: Final = 86_400.0


class RemoteServicer(pb_grpc.RemoteServiceServicer):
    """The provider of one engine behind gRPC."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine = engine

    async def GetRemoteStatus(
        self, request: pb.GetRemoteStatusRequest, context: Context
    ) -> pb.GetRemoteStatusResponse:
        return self._engine.remote_status()

    async def RotateCredential(
        self, request: pb.RotateCredentialRequest, context: Context
    ) -> pb.RotateCredentialResponse:
        credentials = self._engine.endpoint.credentials
        try:
            match request.WhichOneof("source"):
                case "secret":
                    fresh = await credentials.rotate(request.secret)
                case "reread" if request.reread:
                    fresh = await credentials.reread()
                case _:
                    raise CaravanError(
                        "MISSING_FIELD", "Set `secret`, or `reread` to true.", param="source"
                    )
        except CredentialError as error:
            # Whoever may replace the credential may also know why it cannot be read; the detail holds none of it.
            raise CaravanError(
                "INVALID_VALUE", f"The credential stays: {error.detail}.", param="source"
            ) from None
        _LOG.warning("the credential was replaced by hand: number %d", fresh.generation)
        return pb.RotateCredentialResponse(generation=fresh.generation)

    async def SetBreaker(
        self, request: pb.SetBreakerRequest, context: Context
    ) -> pb.SetBreakerResponse:
        breaker = self._engine.endpoint.breaker
        now = self._engine.endpoint.clock.monotonic()
        for_s = _for_s(request)
        match request.mode:
            case pb.SetBreakerRequest.MODE_AUTOMATIC if for_s is None:
                breaker.automatic(now)
            case pb.SetBreakerRequest.MODE_AUTOMATIC:
                raise CaravanError(
                    "INVALID_VALUE", "A breaker that goes by failures has no end.", param="duration"
                )
            case pb.SetBreakerRequest.MODE_OPEN:
                breaker.force_open(now, for_s)
            case pb.SetBreakerRequest.MODE_CLOSED:
                breaker.force_closed(now, for_s)
            case _:
                raise CaravanError("INVALID_VALUE", "There is no such mode.", param="mode")
        mode = pb.SetBreakerRequest.Mode.Name(request.mode).removeprefix("MODE_").lower()
        span = "" if for_s is None else f", for {for_s:g} s"
        _LOG.warning("the breaker was set by hand: %s%s", mode, span)
        return pb.SetBreakerResponse(breaker=breaker.status(now))


def _for_s(request: pb.SetBreakerRequest) -> float | None:
    """For how many seconds; None: without an end."""
    if not request.HasField("duration"):
        return None
    seconds = request.duration.ToNanoseconds() / 1e9
    if not 0 < seconds <= _FOR_S_MAX:
        raise CaravanError(
            "INVALID_VALUE", f"Not above 0 s, to {_FOR_S_MAX:g} s.", param="duration"
        )
    return seconds
