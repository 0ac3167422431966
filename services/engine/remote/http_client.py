"""Calls to a provider over HTTP/1.1 (S3.17, W28): kept connections, and no failure but ProviderError.

On our own connections and h11, not with a client library: only so are bytes gathered where they come in, and a library's pool, locks and
layers were half of what a call cost. Not over HTTP/2: a call that is given up must end at the provider too, or it goes on computing what
nobody reads and somebody pays; over HTTP/1.1 its connection is closed, which no server can miss.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Final
from urllib.parse import urlsplit

import h11

from services.engine.remote.answer_stream import AnswerStream
from services.engine.remote.connections import Connections
from services.engine.remote.explanation import provider_request_id
from services.engine.remote.failure import Failure, ProviderError
from services.engine.remote.http1 import Connection, Head
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
        self._provider = provider
        self._wire = wire
        self._timeouts = timeouts
        self._clock = clock
        parts = urlsplit(base_url)
        self._connections = Connections(base_url, kept, clock)
        self._prefix = self._connections.prefix + parts.path.rstrip("/")
        self._headers = {**_HEADERS, **self._connections.headers, "host": parts.netloc}

    async def aclose(self) -> None:
        """Closes the connections that no call uses."""
        self._connections.close()

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
        named = self._named(request, headers)
        connection = await self._connected(timer)
        try:
            head = await self._asked(connection, request, named, timer)
            try:
                content = ResponseBytes(connection, head.headers, timer, self._provider)
                if head.status != 200:
                    raise await self._refused(head, content)
                yield AnswerStream(head.headers, content, self._provider)
            except ProviderError as error:
                error.provider_request_id = provider_request_id(head.headers)
                raise
            await content.drain()
        finally:
            self._connections.give_back(connection)

    def _named(self, request: WireRequest, headers: Mapping[str, str]) -> dict[str, str]:
        """All headers of a call."""
        if not all(value.isascii() and value.isprintable() for value in headers.values()):
            # Libraries would quote the value in their errors.
            raise ProviderError(
                Failure.UNAUTHORIZED, "The credential of the deployment fits into no header."
            )
        length = str(len(request.body))
        return {**self._headers, **request.headers, **headers, "content-length": length}

    async def _connected(self, timer: PhaseTimer) -> Connection:
        try:
            async with timer:
                return await self._connections.take()
        except (OSError, h11.ProtocolError) as error:
            raise self._unreachable("cannot be reached.", str(error)) from None

    async def _asked(
        self,
        connection: Connection,
        request: WireRequest,
        headers: Mapping[str, str],
        timer: PhaseTimer,
    ) -> Head:
        """Sends the request and waits for the head of the answer."""
        timer.enter(Phase.FIRST_BYTE)
        # Errors of libraries may hold headers: they go no further, not even as the cause of ours.
        try:
            async with timer:
                return await connection.send(
                    "POST", f"{self._prefix}/{request.path}", headers, request.body
                )
        except (OSError, h11.ProtocolError):
            raise self._unreachable("closed the connection without an answer.") from None

    def _unreachable(self, what: str, detail: str = "") -> ProviderError:
        error = ProviderError(Failure.NETWORK, f"{self._provider.title} {what}")
        error.detail = detail
        return error

    async def _refused(self, head: Head, content: ResponseBytes) -> ProviderError:
        """What the provider says instead of an answer. The status counts even where its explanation does not come."""
        body = b""
        with suppress(ProviderError):
            body = await content.up_to(ERROR_BYTES_MAX)
        return self._wire.error(head.status, head.headers, body[:ERROR_BYTES_MAX])
