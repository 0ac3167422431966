# ruff: noqa: ASYNC109 - the names are httpcore's
"""The network under httpcore's connections, on asyncio's own transports, and bytes that are gathered on the way (S3.17).

httpcore's own way there asks the kernel twice per read to wait for a socket and to stop waiting; here a connection is listened to as long as
it lives, and what comes is kept until it is asked for. So a reader that is not in a hurry can be handed what has come in some time at once,
and every process behind it has that much less to do.
"""

from __future__ import annotations

import asyncio
import select
import ssl
from collections.abc import Iterable
from typing import Any, Final

import httpcore

HELD_BYTES_MAX: Final = 64 * 1024
"""What is held of one connection; then nothing more is taken from the kernel, and its sender comes to a halt."""
_LAST_CHUNK: Final = b"0\r\n\r\n"
"""What ends a body of HTTP/1.1 that has no length. Bytes of an answer that look like it are handed over early, which harms nothing."""
_OTHER_ADDRESS_S: Final = 0.25
"""After this time another address of the same name is tried too (RFC 8305)."""


class Stream(asyncio.Protocol, httpcore.AsyncNetworkStream):
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

    def gather(self, seconds: float) -> None:
        """From now on a read ends not earlier than so long after this call or the read before it; 0: as soon as there is something.

        The end of the connection or of a body, and HELD_BYTES_MAX bytes, are not waited for to grow older. What is written next
        begins another exchange, and ends the gathering.
        """
        self._gather_s = seconds
        self._due = self._loop.time() + seconds if seconds else 0.0

    # --- for httpcore --------------------------------------------------------------------------------------------

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """The next bytes, at most `max_bytes`; b"" at the end. Raises ReadError and ReadTimeout."""
        if not self._is_ready():
            try:
                async with asyncio.timeout(timeout):
                    await self._something()
            except TimeoutError:
                if not self._held:
                    raise httpcore.ReadTimeout from None
        return self._take(max_bytes)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Sends bytes, and waits while too many have not left. Raises WriteError and WriteTimeout."""
        if not buffer:
            return
        self.gather(0)
        if self._has_ended:
            raise httpcore.WriteError("the connection is closed")
        self._open().write(buffer)
        try:
            async with asyncio.timeout(timeout):
                await self._writable.wait()
        except TimeoutError:
            raise httpcore.WriteTimeout from None
        if self._error is not None:
            raise httpcore.WriteError(self._error)

    async def aclose(self) -> None:
        """Closes at once: the other side sees it, and nothing is waited for."""
        if self._transport is not None:
            self._transport.abort()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> Stream:
        """Secures the connection, which stays the same object. Raises ConnectError and ConnectTimeout; then it is closed."""
        try:
            async with asyncio.timeout(timeout):
                secured = await self._loop.start_tls(
                    self._open(), self, ssl_context, server_hostname=server_hostname
                )
        except TimeoutError:
            await self.aclose()
            raise httpcore.ConnectTimeout from None
        except OSError as error:  # Errors of TLS are of this kind too.
            await self.aclose()
            raise httpcore.ConnectError(error) from error
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if secured is None:
            raise httpcore.ConnectError("the connection was closed")
        self._transport = secured
        return self

    def get_extra_info(self, info: str) -> Any:
        """What httpcore asks: whether a connection that nobody uses has something to read, such as its end, and what asyncio knows."""
        if info == "is_readable":
            return self._has_ended or bool(self._held) or _is_readable(self._open())
        names = {"client_addr": "sockname", "server_addr": "peername"}
        return self._open().get_extra_info(names.get(info, info))

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

    def _take(self, max_bytes: int) -> bytes:
        if not self._held and self._error is not None:
            raise httpcore.ReadError(self._error)
        taken = bytes(self._held[:max_bytes])
        del self._held[:max_bytes]
        if self._is_stopped and len(self._held) < HELD_BYTES_MAX and not self._has_ended:
            self._is_stopped = False
            self._open().resume_reading()
        if self._gather_s:
            self._due = self._loop.time() + self._gather_s
        return taken


class Network(httpcore.AsyncNetworkBackend):
    """Opens connections for httpcore. Only TCP: no provider is a socket of this machine."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> Stream:
        """Raises ConnectError and ConnectTimeout."""
        try:
            async with asyncio.timeout(timeout):
                _, stream = await asyncio.get_running_loop().create_connection(
                    Stream,
                    host,
                    port,
                    local_addr=(local_address, 0) if local_address else None,
                    happy_eyeballs_delay=_OTHER_ADDRESS_S,
                )
        except TimeoutError:
            raise httpcore.ConnectTimeout from None
        except OSError as error:
            raise httpcore.ConnectError(error) from error
        for option in socket_options or ():
            stream.get_extra_info("socket").setsockopt(*option)
        return stream

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        await asyncio.sleep(seconds)


def _is_readable(transport: asyncio.Transport) -> bool:
    """Whether the kernel has something that the loop has not yet seen."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
    return bool(poll.poll(0))
