"""One answer of several engines, as its client gets it."""

from __future__ import annotations

from typing import Any

import pytest
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.answer import Answer, pieces_of
from tests.support.gateway_peers import Event, delta, finished, started


def _take(answer: Answer, event: Event) -> bool:
    return answer.take(event, event.WhichOneof("event"))


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=5), max_size=8))
def test_the_rest_is_asked_for_behind_all_tokens(deltas: list[list[int]]) -> None:
    """The tokens of all deltas, in order, and again where more have come since."""
    answer = Answer()
    request = engine_pb.GenerateRequest()
    given_so_far: list[int] = []
    for ids in deltas:
        assert _take(answer, delta("x", token_ids=ids))
        given_so_far += ids
        answer.resume(request)
        assert list(request.resume.token_ids) == given_so_far
    assert request.HasField("resume") == bool(given_so_far)


def test_an_answer_starts_once() -> None:
    """The start of a later engine is not shown; the start of the first is, however late it comes."""
    answer = Answer()
    assert not answer.any_events
    assert _take(answer, started())
    assert answer.any_events
    assert not _take(answer, started())
    assert not _take(answer, started())


def test_signs_of_life_are_not_shown() -> None:
    """Progress is for the gateway."""
    answer = Answer()
    assert not _take(answer, Event(progress=engine_pb.Progress(prompt_tokens_done=3)))
    assert not answer.any_events


def test_the_end_tells_of_the_first_start() -> None:
    """What the next engine found in its cache is its own tokens' work; of one engine's answer nothing is changed."""
    answer = Answer()
    _take(answer, started(cached_tokens=2))
    alone = finished(cache_hit=generation_pb2.CACHE_HIT_EXACT, finish_key=b"k")
    _take(answer, alone)
    assert alone.finished.usage.cached_tokens == 1
    assert alone.finished.cache_hit == generation_pb2.CACHE_HIT_EXACT
    assert answer.finish_key == b"k"

    moved = Answer()
    first = started(cached_tokens=2)
    first.started.cache_hit = generation_pb2.CACHE_HIT_PARTIAL
    for event in (first, delta("a"), started(cached_tokens=9)):
        _take(moved, event)
    end = finished(cache_hit=generation_pb2.CACHE_HIT_EXACT)
    assert _take(moved, end)
    assert end.finished.usage.cached_tokens == 2
    assert end.finished.cache_hit == generation_pb2.CACHE_HIT_PARTIAL
    assert end.finished.usage.completion_tokens == 2, "the engine counts what it has resumed"


def _end_after(*events: Event) -> tuple[int, int]:
    answer = Answer()
    for event in events:
        _take(answer, event)
    end = finished(cache_hit=generation_pb2.CACHE_HIT_EXACT)
    _take(answer, end)
    return end.finished.usage.cached_tokens, end.finished.cache_hit


def test_a_start_that_knew_nothing_tells_nothing() -> None:
    """A provider counts at the end: what it says then is what the client gets."""
    unknown = started(prompt_tokens=0, cached_tokens=0)
    assert _end_after(unknown, unknown) == (1, generation_pb2.CACHE_HIT_EXACT)
    assert _end_after(unknown, started(cached_tokens=2)) == (1, generation_pb2.CACHE_HIT_EXACT)


def test_a_start_that_knew_nothing_comes_late() -> None:
    """Until there is something of the answer another deployment may make it, and the client is not told of the first one."""
    answer = Answer()
    for _ in range(2):
        assert not _take(answer, started(prompt_tokens=0))
    assert not answer.any_events
    last = started(prompt_tokens=0, cached_tokens=7)
    _take(answer, last)
    assert _take(answer, delta("a"))
    assert answer.late_start() is last
    _take(answer, delta("b"))
    assert answer.late_start() is None
    _take(answer, started(prompt_tokens=0))
    _take(answer, delta("c"))
    assert answer.late_start() is None, "one start"


def test_the_start_of_a_deployment_that_failed_is_forgotten() -> None:
    """The client sees that of the one that answers."""
    answer = Answer()
    _take(answer, started(prompt_tokens=0))
    answer.fall_back()
    assert _take(answer, started())
    _take(answer, delta("a"))
    assert answer.late_start() is None


def test_the_start_of_a_deployment_that_failed_tells_nothing() -> None:
    """Another deployment has another prompt and another cache; the client still sees one start."""
    answer = Answer()
    assert _take(answer, started(cached_tokens=3))
    answer.fall_back()
    assert not _take(answer, started(cached_tokens=2))
    end = finished()
    _take(answer, end)
    assert end.finished.usage.cached_tokens == 1
    assert answer.any_events


@pytest.mark.parametrize(
    ("fields", "pieces", "resumable"),
    [
        ({"token_ids": [1, 2]}, 2, True),
        ({"text": "a", "token_ids": [1, 2], "pieces": 1}, 2, True),
        ({"text": "a"}, 1, False),
        ({"text": "a", "pieces": 3}, 3, False),
        ({"refusal": "no"}, 1, False),
        ({"tool_calls": [chat_pb2.ToolCallDelta(index=0, name="f")]}, 1, False),
        ({"pieces": 2}, 2, False),
        ({}, 0, True),
    ],
)
def test_pieces(fields: dict[str, Any], pieces: int, resumable: bool) -> None:
    """What a provider says comes without tokens: it is counted in pieces, and nobody can go on behind it."""
    event = Event(delta=engine_pb.Delta(**fields))
    assert pieces_of(event.delta) == pieces
    answer = Answer()
    assert answer.resumable
    _take(answer, delta("a", token_ids=[7]))
    _take(answer, event)
    assert answer.resumable == resumable
    assert answer.any_output


def test_a_start_is_no_output() -> None:
    """Until there is a part of the answer itself, another deployment may make it."""
    answer = Answer()
    _take(answer, started())
    assert (answer.any_events, answer.any_output) == (True, False)
