"""The bytes of a provider's answer as they come: each wait limited, each failure a ProviderError."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import h11

from services.engine.remote.failure import Failure, ProviderError
from services.engine.remote.http1 import Connection
from services.engine.remote.phases import Phase, PhaseTimer
from services.engine.remote.provider import Provider

_DRAIN_S: Final = 0.05
_DRAIN_BYTES_MAX: Final = 64 * 1024
_BROKEN: Final = (OSError, h11.ProtocolError, zlib.error)
_PLAIN: Final = ("", "identity")
_PACKED: Final = ("gzip", "x-gzip", "deflate")
_ANY_FORMAT: Final = zlib.MAX_WBITS | 32
"""zlib tells gzip and its own format apart."""


class ResponseBytes:
    """Reads the body of one response. The first byte belongs to the phase that the call is in.

    Raises ProviderError for a coding that is not known. Compression was not asked for; where it comes all the same, it is undone.
    """

    def __init__(
        self,
        connection: Connection,
        headers: Mapping[str, str],
        timer: PhaseTimer,
        provider: Provider,
    ) -> None:
        self._connection = connection
        self._timer = timer
        self._provider = provider
        self._has_begun = False
        self._has_ended = False
        coding = headers.get("content-encoding", "").strip().lower()
        self._unpack = None if coding in _PLAIN else zlib.decompressobj(_ANY_FORMAT)
        if self._unpack is not None and coding not in _PACKED:
            raise self._cut_off()

    def gather(self, seconds: float) -> None:
        """From now on reads end not earlier than so long after each other; see Stream."""
        limit_s = self._timer.timeouts.between_bytes_s
        # What has come must not be waited for so long that it counts as missing.
        self._connection.stream.gather(seconds if limit_s is None else min(seconds, limit_s / 2))

    async def read(self) -> bytes:
        """The next bytes, b"" at the end. Raises ProviderError: TIMEOUT, or NETWORK where the body is cut off."""
        if self._has_begun:
            self._timer.enter(Phase.BETWEEN_BYTES)
        try:
            async with self._timer:
                chunk = await self._next()
        except _BROKEN:
            raise self._cut_off() from None
        self._has_begun = True
        self._has_ended = not chunk
        return chunk

    async def _next(self) -> bytes:
        while chunk := await self._connection.read():
            if self._unpack is not None:
                chunk = self._unpack.decompress(chunk)
            # Of what is packed, some bytes may hold nothing.
            if chunk:
                return chunk
        return b""

    async def up_to(self, size: int) -> bytes:
        """The whole body, or its first bytes where it has more than `size`. Raises like `read`."""
        body = bytearray()
        while len(body) <= size and (chunk := await self.read()):
            body += chunk
        return bytes(body)

    async def drain(self) -> None:
        """Reads the rest of a body whose end is due, so that its connection can be used again; what does not come at once is left."""
        if self._has_ended:
            return
        self._connection.stream.gather(0)
        left = _DRAIN_BYTES_MAX
        with suppress(TimeoutError, *_BROKEN):
            async with asyncio.timeout(_DRAIN_S):
                while left > 0 and (chunk := await self._connection.read()):
                    left -= len(chunk)

    def _cut_off(self) -> ProviderError:
        return ProviderError(Failure.NETWORK, f"{self._provider.title}'s answer was cut off.")
