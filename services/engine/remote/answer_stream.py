"""An answer as events: those of one read together, so that what came together can be sent on together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Self

from services.engine.remote.answer_values import no_answer
from services.engine.remote.provider import Provider
from services.engine.remote.response_bytes import ResponseBytes
from services.engine.remote.sse import Event, EventError, EventReader

WHOLE_BYTES_MAX: Final = 8 * 1024 * 1024
"""Of an answer that is no stream."""
_EVENT_STREAM: Final = "text/event-stream"


class AnswerStream:
    """The events of one answer, in one pass."""

    def __init__(
        self, headers: Mapping[str, str], content: ResponseBytes, provider: Provider
    ) -> None:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        self._is_stream = kind == _EVENT_STREAM
        self._content = content
        self._provider = provider
        self._reader = EventReader()
        self._has_ended = False

    def gather(self, seconds: float) -> None:
        """From now on lists of events come not earlier than so long after each other, and hold what has come meanwhile."""
        self._content.gather(seconds)

    def batches(self) -> Self:
        """Iterates over lists of events, none of them empty. Raises ProviderError.

        A body of another type comes as the data of one event: it may be a whole answer.
        """
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Event]:
        try:
            while not self._has_ended:
                events = await self._next() if self._is_stream else await self._whole()
                if events:
                    return events
        except EventError:
            raise no_answer(self._provider) from None
        raise StopAsyncIteration

    async def _next(self) -> list[Event]:
        chunk = await self._content.read()
        if chunk:
            return self._reader.feed(chunk)
        self._has_ended = True
        return self._reader.finish()

    async def _whole(self) -> list[Event]:
        self._has_ended = True
        body = await self._content.up_to(WHOLE_BYTES_MAX)
        try:
            text = body.decode()
        except UnicodeDecodeError:
            raise no_answer(self._provider) from None
        if len(body) > WHOLE_BYTES_MAX or not text.strip():
            raise no_answer(self._provider)
        return [Event("", text)]
