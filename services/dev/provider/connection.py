"""One HTTP/1.1 connection of the scripted provider. h11 parses; what is sent may break the rules, which is the point."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Protocol, cast
from urllib.parse import parse_qsl, urlsplit

import h11

from services.dev.provider.received import Received
from services.runtime.clock import Clock

BODY_MAX: Final = 64 << 20
_log = logging.getLogger(__name__)

Headers = Sequence[tuple[str, str]]


class Peers(Protocol):
    """What a connection needs of its server."""

    clock: Clock

    def opened(self, connection: Connection) -> int:
        """Counts it; returns its number."""
        ...

    def closed(self, connection: Connection) -> None:
        """It is gone."""
        ...

    def received(
        self, connection: int, target: str, method: str, headers: Mapping[str, str], body: bytes
    ) -> Received:
        """Remembers a request."""
        ...


Answering = Callable[[Received, "Connection"], Awaitable[None]]


class Connection(asyncio.Protocol):
    """Reads requests and has each of them answered by a task, which is cancelled when the client leaves."""

    def __init__(self, peers: Peers, answer: Answering) -> None:
        self._peers = peers
        self._answer = answer
        self._http = h11.Connection(h11.SERVER)
        self._transport: asyncio.Transport | None = None
        self._number = 0
        self._request: h11.Request | None = None
        self._body = bytearray()
        self._received: Received | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._number = self._peers.opened(self)

    def data_received(self, data: bytes) -> None:
        self._http.receive_data(data)
        self._advance()

    def connection_lost(self, exc: Exception | None) -> None:
        self._peers.closed(self)
        self._writable.set()
        if self._task is not None and self._received is not None:
            if not self._closing:
                self._received.closed_by_client.set()
            self._task.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def close(self) -> None:
        """Closes the connection when what was sent is out: an answer without an end is cut off by it."""
        self._closing = True
        if self._transport is not None:
            self._transport.close()

    async def start(self, status: int, headers: Headers) -> None:
        """Sends the head of an answer."""
        if self._received is not None:
            self._received.status = status
        await self._send(h11.Response(status_code=status, headers=list(headers)))

    async def write(self, data: bytes) -> None:
        """Sends a part of the body, and waits while the client is slow."""
        await self._send(h11.Data(data=data))

    async def end(self) -> None:
        """Ends the body."""
        await self._send(h11.EndOfMessage())

    async def _send(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if data and self._transport is not None:
            self._transport.write(data)
        if not self._writable.is_set():
            await self._writable.wait()

    def _advance(self) -> None:
        """Takes what h11 has understood until it needs more, or until the answer to a request is due."""
        try:
            while self._task is None:
                event = self._http.next_event()
                if isinstance(event, type | h11.ConnectionClosed):
                    return  # h11's NEED_DATA and PAUSED are types
                self._take(event)
        except h11.RemoteProtocolError as error:
            _log.info("no HTTP request: %s", error)
            self.close()

    def _take(self, event: object) -> None:
        if isinstance(event, h11.Request):
            self._request = event
            self._body = bytearray()
        elif isinstance(event, h11.Data):
            self._body += event.data
            if len(self._body) > BODY_MAX:
                self.close()
        elif isinstance(event, h11.EndOfMessage) and self._request is not None:
            request = self._request
            self._received = self._peers.received(
                self._number,
                request.target.decode("latin-1"),
                request.method.decode("latin-1"),
                {
                    name.decode("latin-1"): value.decode("latin-1")
                    for name, value in request.headers
                },
                bytes(self._body),
            )
            self._task = asyncio.get_running_loop().create_task(self._run(self._received))

    async def _run(self, received: Received) -> None:
        try:
            await self._answer(received, self)
        except Exception:
            _log.exception("request %d was not answered", received.number)
            self.close()
        finally:
            received.ended = self._peers.clock.monotonic()
            received.done.set()
            self._task = None
        if self._closing:
            return
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
            self._advance()
        else:
            self.close()


def target_parts(target: str) -> tuple[str, dict[str, str]]:
    """Path and query of a request's target."""
    parts = urlsplit(target)
    return parts.path, dict(parse_qsl(parts.query))
