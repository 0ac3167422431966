"""Calls to a provider over HTTP/1.1 (S3.17, W28): kept connections, and no failure but ProviderError.

Not over HTTP/2: httpcore does not reset the stream of a call that is given up. The provider would go on computing what nobody reads and
somebody pays, its bytes would fill the window that all streams of the connection share, and after as many as the provider allows at a
time no call could be made at all. Over HTTP/1.1 the connection is closed, and the provider sees it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import httpx

from services.engine.remote.answer_stream import AnswerStream
from services.engine.remote.failure import Failure, ProviderError
from services.engine.remote.phases import Phase, PhaseTimer, Timeouts
from services.engine.remote.provider import Provider
from services.engine.remote.response_bytes import ResponseBytes
from services.engine.remote.wire import Wire, WireRequest
from services.runtime.clock import Clock

ERROR_BYTES_MAX: Final = 64 * 1024
IDLE_S: Final = 90.0
"""How long a connection is kept that nobody uses."""
_HEADERS: Final = {
    "content-type": "application/json",
    "accept": "text/event-stream, application/json",
    # Compressed events would wait for each other in the compressor.
    "accept-encoding": "identity",
    "user-agent": "caravan",
}
_SENDING: Final = "send_request_headers.started"


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
        _quiet_libraries()
        self._provider = provider
        self._wire = wire
        self._base_url = base_url.rstrip("/")
        self._timeouts = timeouts
        self._clock = clock
        self._http = httpx.AsyncClient(
            headers=_HEADERS,
            # Time is limited by phase, by one timer for each call.
            timeout=httpx.Timeout(None),
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=kept, keepalive_expiry=IDLE_S
            ),
        )

    async def aclose(self) -> None:
        """Closes all connections."""
        await self._http.aclose()

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
            content = ResponseBytes(response, timer, self._provider)
            if response.status_code != 200:
                raise await self._refused(response, content)
            yield AnswerStream(response.headers, content, self._provider)
            await content.drain()
        finally:
            await response.aclose()

    async def _send(
        self, request: WireRequest, headers: Mapping[str, str], timer: PhaseTimer
    ) -> httpx.Response:
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
            message = self._http.build_request(
                "POST",
                f"{self._base_url}/{request.path}",
                content=request.body,
                headers=headers,
                extensions={"trace": trace},
            )
            async with timer:
                return await self._http.send(message, stream=True)
        except httpx.ConnectError as error:
            raise self._unreachable(f"cannot be reached: {error}.") from None
        except (httpx.HTTPError, OSError):
            raise self._unreachable("closed the connection without an answer.") from None
        except httpx.InvalidURL:
            raise self._unreachable("has an address that is none.") from None

    def _unreachable(self, what: str) -> ProviderError:
        return ProviderError(Failure.NETWORK, f"{self._provider.title} {what}")

    async def _refused(self, response: httpx.Response, content: ResponseBytes) -> ProviderError:
        """What the provider says instead of an answer. The status counts even where its explanation does not come."""
        body = b""
        with suppress(ProviderError):
            body = await content.up_to(ERROR_BYTES_MAX)
        return self._wire.error(response.status_code, response.headers, body[:ERROR_BYTES_MAX])


def _quiet_libraries() -> None:
    """They log a line for each call at least, and headers at the level of debugging."""
    for name in ("httpcore", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
