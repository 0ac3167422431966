"""Events that travel together come apart in their order."""

from __future__ import annotations

from collections.abc import AsyncIterator

from caravan.engine.v1 import engine_service_pb2 as pb

from services.runtime.generate_events import each, in_order, together


def _delta(text: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(text=text))


def test_events_keep_their_order() -> None:
    """One message holds them all, and gives each back as it was."""
    events = [
        pb.GenerateResponse(started=pb.Started(prompt_tokens=3)),
        _delta("a"),
        pb.GenerateResponse(finished=pb.Finished(stop_text="b")),
    ]
    message = together([pb.GenerateResponse.FromString(e.SerializeToString()) for e in events])
    found = list(in_order(pb.GenerateResponse.FromString(message.SerializeToString())))
    assert [event.WhichOneof("event") for event in found] == ["started", "delta", "finished"]
    assert [found[1], found[2]] == events[1:]
    assert found[0].started == events[0].started


def test_one_event_is_its_own_message() -> None:
    """Nothing is added to it."""
    assert together([_delta("a")]) == _delta("a")


async def test_a_call_is_read_event_by_event() -> None:
    """However they came."""

    async def messages() -> AsyncIterator[pb.GenerateResponse]:
        yield together([_delta("a"), _delta("b")])
        yield _delta("c")

    assert [event.delta.text async for event in each(messages())] == ["a", "b", "c"]
