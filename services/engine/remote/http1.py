"""HTTP/1.1 on one connection: one exchange after the other (RFC 9112). Raises OSError, and h11.ProtocolError for what is no HTTP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Final, NamedTuple

import h11

from services.engine.remote.network import Stream

_HEAD_BYTES_MAX: Final = 64 * 1024
"""Of the headers of an answer."""


class Head(NamedTuple):
    """How an answer begins. Names of headers are in lower case; of one that is repeated the last counts."""

    status: int
    headers: Mapping[str, str]


class Connection:
    """Sends a request, reads its answer, and is ready for the next, unless one of the two sides wants it otherwise."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.idle_since = 0.0
        """Since when nobody uses it, in seconds of the monotonic clock."""
        self._state = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES_MAX)

    async def send(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes = b""
    ) -> Head:
        """Sends a request and waits for the head of its answer. `headers` have the host, and the length of the body if it has one."""
        state = self._state
        request = h11.Request(method=method, target=target, headers=list(headers.items()))
        parts = [
            state.send(request),
            state.send(h11.Data(data=body)),
            state.send(h11.EndOfMessage()),
        ]
        # A server may refuse without reading all: what it says counts.
        with suppress(ConnectionError):
            await self.stream.write(b"".join(part for part in parts if part))
        while True:
            event = state.next_event()
            if event is h11.NEED_DATA:
                state.receive_data(await self.stream.read())
            elif isinstance(event, h11.Response):
                return Head(event.status_code, _readable(event.headers))
            elif not isinstance(event, h11.InformationalResponse):
                raise ConnectionError("the connection was closed")

    async def read(self) -> bytes:
        """The next bytes of the answer's body, all that have come; b"" at its end."""
        state = self._state
        found: list[bytes] = []
        while True:
            event = state.next_event()
            if isinstance(event, h11.Data):
                found.append(bytes(event.data))
            elif event is not h11.NEED_DATA or found or state.their_state is not h11.SEND_BODY:
                # The end is told once by h11, and here as often as it is asked for.
                return found[0] if len(found) == 1 else b"".join(found)
            else:
                state.receive_data(await self.stream.read())

    def end(self) -> bool:
        """The exchange is over: whether there can be another. Else close the stream."""
        state = self._state
        if not (state.our_state is h11.DONE and state.their_state is h11.DONE):
            return False
        state.start_next_cycle()
        self.stream.gather(0)
        return True


def _readable(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("ascii"): value.decode("latin-1") for name, value in headers}
