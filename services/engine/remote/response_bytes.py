"""The bytes of a provider's answer as they come: each wait limited, each failure a ProviderError."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

import httpx

from services.engine.remote.failure import Failure, ProviderError
from services.engine.remote.phases import Phase, PhaseTimer
from services.engine.remote.provider import Provider

_DRAIN_S: Final = 0.05
_DRAIN_BYTES_MAX: Final = 64 * 1024


class ResponseBytes:
    """Reads the body of one response. The first byte belongs to the phase that the call is in."""

    def __init__(self, response: httpx.Response, timer: PhaseTimer, provider: Provider) -> None:
        # Compression was not asked for; where it comes all the same, httpx undoes it.
        plain = response.headers.get("content-encoding", "identity") == "identity"
        self._chunks = response.aiter_raw() if plain else response.aiter_bytes()
        self._timer = timer
        self._provider = provider
        self._has_begun = False
        self._has_ended = False

    async def read(self) -> bytes:
        """The next bytes, b"" at the end. Raises ProviderError: TIMEOUT, or NETWORK where the body is cut off."""
        if self._has_begun:
            self._timer.enter(Phase.BETWEEN_BYTES)
        try:
            async with self._timer:
                chunk = await anext(self._chunks)
        except StopAsyncIteration:
            self._has_ended = True
            return b""
        except (httpx.HTTPError, OSError):
            raise ProviderError(
                Failure.NETWORK, f"The answer of {self._provider.title} was cut off."
            ) from None
        self._has_begun = True
        return chunk

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
        left = _DRAIN_BYTES_MAX
        with suppress(TimeoutError, httpx.HTTPError, OSError):
            async with asyncio.timeout(_DRAIN_S):
                async for chunk in self._chunks:
                    left -= len(chunk)
                    if left < 0:
                        return
