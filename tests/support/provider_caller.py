"""Calls through the client of providers, for its tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from services.engine.remote.failure import ProviderError
from services.engine.remote.http_client import ProviderClient
from services.engine.remote.phases import Timeouts
from services.engine.remote.provider import Provider
from services.engine.remote.wire import Outcome, Wire
from services.runtime.clock import SystemClock
from tests.support.wires import chat, wire_of

KEY = "sk-scripted-0123456789"


class Caller:
    """Makes calls, and keeps what came of the last one."""

    def __init__(self, wire: Wire, client: ProviderClient) -> None:
        self.wire = wire
        self.client = client
        self.text = ""
        self.batches = 0
        self.heard = asyncio.Event()

    async def call(self, **more: Any) -> Outcome:
        """Asks for an answer and reads it to its end; `more` goes into the request."""
        self.text, self.batches = "", 0
        reader = self.wire.reader()
        request = self.wire.request(chat(**more), "m")
        async with self.client.stream(request, self.wire.credential_headers(KEY)) as answer:
            async for events in answer.batches():
                assert events
                self.batches += 1
                self.heard.set()
                for event in events:
                    piece = reader.read(event.event, event.data)
                    self.text += piece.text if piece else ""
                    if reader.is_complete:
                        break
                if reader.is_complete:
                    break
        return reader.outcome()

    async def failure(self) -> ProviderError:
        """The error with which a call ends."""
        with pytest.raises(ProviderError) as caught:
            await self.call()
        return caught.value


@asynccontextmanager
async def caller(
    base_url: str, kind: Provider = Provider.OPENAI, timeouts: Timeouts | None = None
) -> AsyncIterator[Caller]:
    """A client for one provider."""
    wire = wire_of(kind)
    client = ProviderClient(kind, wire, base_url, timeouts or Timeouts(), SystemClock())
    try:
        yield Caller(wire, client)
    finally:
        await client.aclose()
