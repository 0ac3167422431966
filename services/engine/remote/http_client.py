"""Calls to a provider over HTTP/1.1 (S3.17, W28): kept connections, and no failure but ProviderError.

Not over HTTP/2: httpcore does not reset the stream of a call that is given up. The provider would go on computing what nobody reads and
somebody pays, its bytes would fill the window that all streams of the connection share, and after as many as the provider allows at a
time no call could be made at all. Over HTTP/1.1 the connection is closed, and the provider sees it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Final
from urllib.parse import urlsplit

import httpcore

from services.engine.remote.answer_stream import AnswerStream
from services.engine.remote.connections import open_pool
from services.engine.remote.failure import Failure, ProviderError
from services.engine.remote.phases import Phase, PhaseTimer, Timeouts
from services.engine.remote.provider import Provider
from services.engine.remote.response_bytes import ResponseBytes
from services.engine.remote.wire import Wire, WireRequest
from services.runtime.clock import Clock

ERROR_BYTES_MAX: Final = 64 * 1024
_HEADERS: Final = {
    "content-type": "application/json",
    "accept": "text/event-stream, application/json",
    # Compressed events would wait for each other in the compressor.
    "accept-encoding": "identity",
    "user-agent": "caravan",
}
_SENDING: Final = "send_request_headers.started"
_BROKEN: Final = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    OSError,
)
"""How exchanges fail that had a connection."""


class ProviderClient:
    """Makes the calls of one engine, any number at a time. Proxies and certificates of the environment are respected.

    `base_url` includes the API's version; `kept` is how many idle connections stay open. The caller closes it.
    """

    def __init__(
        self,
        provider: Provider,
        wire: Wire,
        base_url: str,
        timeouts: Timeouts,
        clock: Clock,
        *,
        kept: int = 64,
    ) -> None:
        _quiet_library()
        self._provider = provider
        self._wire = wire
        self._timeouts = timeouts
        self._clock = clock
        parts = urlsplit(base_url)
        self._scheme = parts.scheme.encode()
        self._host = (parts.hostname or "").encode()
        self._port = parts.port
        self._path = parts.path.rstrip("/")
        self._headers = {**_HEADERS, "host": parts.netloc.rpartition("@")[2]}
        self._pool = open_pool(base_url, kept)

    async def aclose(self) -> None:
        """Closes all connections."""
        await self._pool.aclose()

    @asynccontextmanager
    async def stream(
        self, request: WireRequest, headers: Mapping[str, str]
    ) -> AsyncGenerator[AnswerStream, None]:
        """Makes a call; within the block its answer can be read.

        Raises ProviderError, also from within the answer. A block that is left by an error, or cancelled, closes the stream, which the
        provider sees. One that is left otherwise has read all that matters: the end of the body is waited for very shortly, so that
        the connection can be used again.
        """
        timer = PhaseTimer(self._timeouts, self._provider, self._clock)
        response = await self._send(request, {**request.headers, **headers}, timer)
        try:
            named = _readable(response.headers)
            content = ResponseBytes(response, named, timer, self._provider)
            if response.status != 200:
                raise await self._refused(response.status, named, content)
            yield AnswerStream(named, content, self._provider)
            await content.drain()
        finally:
            await response.aclose()

    async def _send(
        self, request: WireRequest, headers: Mapping[str, str], timer: PhaseTimer
    ) -> httpcore.Response:
        """Sends the request and waits for the headers of the answer."""
        if not all(value.isascii() and value.isprintable() for value in headers.values()):
            # Libraries would quote the value in their errors.
            raise ProviderError(
                Failure.UNAUTHORIZED, "The credential of the deployment fits into no header."
            )

        async def trace(name: str, _: Mapping[str, Any]) -> None:
            if name.endswith(_SENDING):
                timer.enter(Phase.FIRST_BYTE)

        # Errors of libraries may hold headers: they go no further, not even as the cause of ours.
        try:
            message = self._message(request, headers)
            message.extensions["trace"] = trace
            async with timer:
                return await self._pool.handle_async_request(message)
        except (httpcore.ConnectError, httpcore.ProxyError) as error:
            raise self._unreachable(f"cannot be reached: {error}.") from None
        except _BROKEN:
            raise self._unreachable("closed the connection without an answer.") from None

    def _message(self, request: WireRequest, headers: Mapping[str, str]) -> httpcore.Request:
        named = {**self._headers, **headers, "content-length": str(len(request.body))}
        target = f"{self._path}/{request.path}".encode()
        return httpcore.Request(
            "POST",
            httpcore.URL(scheme=self._scheme, host=self._host, port=self._port, target=target),
            headers=[(name.encode(), value.encode()) for name, value in named.items()],
            content=request.body,
        )

    def _unreachable(self, what: str) -> ProviderError:
        return ProviderError(Failure.NETWORK, f"{self._provider.title} {what}")

    async def _refused(
        self, status: int, headers: Mapping[str, str], content: ResponseBytes
    ) -> ProviderError:
        """What the provider says instead of an answer. The status counts even where its explanation does not come."""
        body = b""
        with suppress(ProviderError):
            body = await content.up_to(ERROR_BYTES_MAX)
        return self._wire.error(status, headers, body[:ERROR_BYTES_MAX])


def _readable(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Headers by name in lower case; of one that is repeated the last."""
    return {name.decode("ascii").lower(): value.decode("latin-1") for name, value in headers}


def _quiet_library() -> None:
    """It logs headers at the level of debugging."""
    logging.getLogger("httpcore").setLevel(logging.WARNING)
