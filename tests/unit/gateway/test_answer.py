"""One answer of several engines, as its client gets it."""

from __future__ import annotations

from caravan.core.v1 import generation_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.answer import Answer
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
