"""Several events of a request in one message of EngineService.Generate. Pure.

Each message costs both processes more than what is in it, so events that are there together travel together.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence

from caravan.engine.v1 import engine_service_pb2 as pb


def together(events: Sequence[pb.GenerateResponse]) -> pb.GenerateResponse:
    """One message for events, at least one, in their order."""
    first = events[0]
    first.then.extend(events[1:])
    return first


def in_order(message: pb.GenerateResponse) -> Iterator[pb.GenerateResponse]:
    """The events of a message."""
    yield message
    yield from message.then


async def each(messages: AsyncIterable[pb.GenerateResponse]) -> AsyncIterator[pb.GenerateResponse]:
    """The events of a call."""
    async for message in messages:
        for event in in_order(message):
            yield event
