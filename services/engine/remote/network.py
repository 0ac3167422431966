"""Connections to providers, and bytes that are gathered on the way. Its only errors are OSErrors.

Made of asyncio's own transports: a connection is listened to as long as it lives, and what comes is kept until it is asked for. So a
reader that is not in a hurry can be handed at once what has come in some time, and every process behind it has that much less to do.
"""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
from collections.abc import Iterable
from contextlib import suppress
from itertools import zip_longest
from typing import Any, Final

HELD_BYTES_MAX: Final = 64 * 1024
"""What is held of one connection; then nothing more is taken from the kernel, and its sender comes to a halt."""
_LAST_CHUNK: Final = b"0\r\n\r\n"
"""What ends a body of HTTP/1.1 that has no length. Bytes of an answer that look like it are handed over early, which harms nothing."""
_EARLY_S: Final = 0.001
_OTHER_ADDRESS_S: Final = 1.0
"""After this time the next address of the same name is tried: often one kind of them leads nowhere. asyncio's own way, two at once,
leaves sockets open when it is cancelled."""


class Stream(asyncio.Protocol):
    """One connection. Has one reader at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._held = bytearray()
        self._has_ended = False
        self._error: Exception | None = None
        self._is_stopped = False
        self._reader: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._gather_s = 0.0
        self._due = 0.0

    async def read(self) -> bytes:
        """The next bytes; b"" at the end."""
        if not self._is_ready():
            await self._something()
        if not self._held and self._error is not None:
            raise ConnectionError(str(self._error))
        taken = bytes(self._held)
        self._held.clear()
        if self._is_stopped:
            self._is_stopped = False
            self._open().resume_reading()
        self._due = self._next_beat()
        return taken

    def gather(self, seconds: float) -> None:
        """From now on reads end at beats so far apart, the same for all connections: everybody on the way wakes up once for all of
        them. 0: as soon as there is something.

        The end of the connection or of a body, and HELD_BYTES_MAX bytes, do not wait.
        """
        self._gather_s = seconds
        self._due = self._next_beat()

    async def write(self, data: bytes) -> None:
        """Sends bytes, and waits while too many have not left."""
        if self._has_ended:
            raise ConnectionError("the connection is closed")
        self._open().write(data)
        await self._writable.wait()
        if self._error is not None:
            raise ConnectionError(str(self._error))

    async def start_tls(self, context: ssl.SSLContext, name: str) -> None:
        """Secures the connection to a server of this name. Close it where this fails."""
        secured = await self._loop.start_tls(self._open(), self, context, server_hostname=name)
        if secured is None:
            raise ConnectionError("the connection was closed")
        self._transport = secured

    def close(self) -> None:
        """At once: the other side sees it, and nothing is waited for."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def is_quiet(self) -> bool:
        """Whether it is open, and nothing has come; on a connection that nobody uses that would be its end."""
        if self._has_ended or self._held or self._open().is_closing():
            return False
        # The kernel may have something that the loop has not yet seen.
        poll = select.poll()
        poll.register(self._open().get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    # --- for asyncio ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Some bytes have come."""
        self._held += data
        if len(self._held) >= HELD_BYTES_MAX and not self._is_stopped:
            self._is_stopped = True
            self._open().pause_reading()
        self._wake_if_ready()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._has_ended = True
        self._error = exc
        self._writable.set()
        self._wake_if_ready()

    def pause_writing(self) -> None:
        """Too much waits to be sent."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """There is room again."""
        self._writable.set()

    # -------------------------------------------------------------------------------------------------------------

    def _open(self) -> asyncio.Transport:
        assert self._transport is not None
        return self._transport

    def _next_beat(self) -> float:
        interval_s = self._gather_s
        if not interval_s:
            return 0.0
        # A timer may ring a little early: this beat is over then.
        return interval_s * (1 + (self._loop.time() + _EARLY_S) // interval_s)

    def _is_ready(self) -> bool:
        """Whether a read may end."""
        held = self._held
        if not held or self._has_ended:
            return self._has_ended
        return (
            not self._gather_s
            or len(held) >= HELD_BYTES_MAX
            or held.endswith(_LAST_CHUNK)
            or self._loop.time() >= self._due
        )

    async def _something(self) -> None:
        """Waits until a read may end."""
        self._reader = self._loop.create_future()
        timer = None
        if self._gather_s:
            timer = self._loop.call_at(self._due, self._wake_if_any)
        try:
            await self._reader
        finally:
            self._reader = None
            if timer is not None:
                timer.cancel()

    def _wake_if_ready(self) -> None:
        if self._reader is not None and not self._reader.done() and self._is_ready():
            self._reader.set_result(None)

    def _wake_if_any(self) -> None:
        # Not by the clock, which may be a little before the timer that it has called.
        if self._reader is not None and not self._reader.done() and self._held:
            self._reader.set_result(None)


async def connect(host: str, port: int) -> Stream:
    """A connection to the first address of a name that answers."""
    loop = asyncio.get_running_loop()
    *others, last = _in_turn(await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    for address in others:
        with suppress(OSError):  # A time out is one of them.
            async with asyncio.timeout(_OTHER_ADDRESS_S):
                return (await loop.create_connection(Stream, address, port))[1]
    return (await loop.create_connection(Stream, last, port))[1]


def _in_turn(found: Iterable[tuple[Any, ...]]) -> list[str]:
    """Addresses that getaddrinfo has found, best first, IPv6 and IPv4 in turn. There is at least one."""
    families: dict[int, list[str]] = {}
    for family, _, _, _, place in found:
        families.setdefault(family, []).append(place[0])
    return [name for names in zip_longest(*families.values()) for name in names if name]
