"""Answers of the Gemini API, from recorded responses."""

from __future__ import annotations

from typing import Any

import pytest
from caravan.core.v1 import chat_pb2, generation_pb2

from services.engine.remote.failure import Failure, ProviderError
from services.engine.remote.provider import Provider
from tests.support.wires import SECRET, read_all, wire_of

GEMINI = Provider.GEMINI
Call = chat_pb2.ToolCallDelta


def response(*parts: Any, reason: str | None = None, usage: Any = None, **more: Any) -> Any:
    """One response of a stream."""
    candidate = {"content": {"role": "model", "parts": list(parts)}, "index": 0, **more}
    if reason:
        candidate["finishReason"] = reason
    shown: dict[str, Any] = {"candidates": [candidate], "modelVersion": "g", "responseId": "r"}
    return {**shown, "usageMetadata": usage} if usage else shown


def text(words: str) -> Any:
    """A part of text."""
    return {"text": words}


def counts(prompt: int, candidates: int, **more: int) -> Any:
    """Sums up to a response."""
    return {"promptTokenCount": prompt, "candidatesTokenCount": candidates, **more}


def test_a_chat() -> None:
    """Usage is a sum, not a part: adding it up would charge several times (W13). Thoughts are generated too."""
    reader = wire_of(GEMINI).reader()
    events = [
        response(text("Hel"), usage=counts(10, 1)),
        response(text("lo"), usage=counts(10, 2)),
        response(
            reason="MAX_TOKENS",
            usage=counts(10, 3, thoughtsTokenCount=7, cachedContentTokenCount=4),
        ),
    ]
    assert read_all(reader, events[:2]).text == "Hello"
    assert not reader.is_complete
    assert reader.usage_so_far() == generation_pb2.Usage(prompt_tokens=10, completion_tokens=2)
    read_all(reader, events[2:])
    assert reader.is_complete
    outcome = reader.outcome()
    assert outcome.reason == generation_pb2.FINISH_REASON_LENGTH
    assert outcome.usage == generation_pb2.Usage(
        prompt_tokens=10, completion_tokens=10, cached_tokens=4
    )


def test_a_count_that_is_not_told_again_stays() -> None:
    """A response without text need not tell of the tokens before it."""
    reader = wire_of(GEMINI).reader()
    events = [
        response(text("Hello"), usage=counts(10, 2, thoughtsTokenCount=7)),
        response(reason="STOP", usage={"promptTokenCount": 10}),
    ]
    read_all(reader, events)
    assert reader.outcome().usage == generation_pb2.Usage(prompt_tokens=10, completion_tokens=9)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("STOP", generation_pb2.FINISH_REASON_STOP),
        ("MAX_TOKENS", generation_pb2.FINISH_REASON_LENGTH),
        ("SAFETY", generation_pb2.FINISH_REASON_CONTENT_FILTER),
        ("RECITATION", generation_pb2.FINISH_REASON_CONTENT_FILTER),
        ("PROHIBITED_CONTENT", generation_pb2.FINISH_REASON_CONTENT_FILTER),
        ("OTHER", generation_pb2.FINISH_REASON_STOP),
        ("SOMETHING_NEW", generation_pb2.FINISH_REASON_STOP),
    ],
)
def test_finish_reasons(said: str, meant: generation_pb2.FinishReason.ValueType) -> None:
    """The first one counts (W13)."""
    reader = wire_of(GEMINI).reader()
    read_all(reader, [response(text("Hi"), reason=said), response(reason="MAX_TOKENS")])
    assert reader.outcome().reason == meant


def test_tool_calls() -> None:
    """They come whole and mostly without ids; the answer then ends with STOP, which means that tools are called."""
    events = [
        response(text("I look."), {"functionCall": {"name": "look", "args": {"x": 1.0, "a": 2}}}),
        response({"functionCall": {"name": "now"}, "thoughtSignature": "c2ln"}),
        response({"functionCall": {"id": "g-7", "name": "look", "args": {}}}, reason="STOP"),
    ]
    reader = wire_of(GEMINI).reader()
    assert read_all(reader, events).calls == [
        Call(index=0, id="call-1", name="look", arguments_json='{"x": 1.0, "a": 2}'),
        Call(index=1, id="call-2", name="now", arguments_json="{}"),
        Call(index=2, id="g-7", name="look", arguments_json="{}"),
    ]
    assert reader.outcome().reason == generation_pb2.FINISH_REASON_TOOL_CALLS


def test_thoughts_are_no_part_of_the_answer() -> None:
    """Nor are parts of kinds that were not asked for."""
    found = read_all(
        wire_of(GEMINI).reader(),
        [response({"text": "Hm", "thought": True}, {"executableCode": {}}, text("So."))],
    )
    assert found.text == "So."


def test_log_probabilities() -> None:
    """Chosen ones and their alternatives stand side by side."""
    logprobs = {
        "chosenCandidates": [{"token": "a", "tokenId": 7, "logProbability": -0.5}],
        "topCandidates": [
            {
                "candidates": [
                    {"token": "a", "logProbability": -0.5},
                    {"token": "b", "logProbability": -1.5},
                ]
            }
        ],
    }
    found = read_all(wire_of(GEMINI).reader(), [response(text("a"), logprobsResult=logprobs)])
    (entry,) = found.logprobs
    assert (entry.token, entry.logprob, entry.token_id) == (b"a", -0.5, 0)
    assert [other.token for other in entry.top] == [b"a", b"b"]


def test_a_blocked_prompt() -> None:
    """The API says so with 200, and no candidate."""
    event = {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": counts(5, 0)}
    with pytest.raises(ProviderError) as caught:
        read_all(wire_of(GEMINI).reader(), [event])
    assert caught.value.failure is Failure.CONTENT_FILTERED
    assert caught.value.metadata == {"category": "SAFETY"}


def test_an_answer_without_an_ending_was_cut_off() -> None:
    """The API has no other word for its end than the finish reason."""
    reader = wire_of(GEMINI).reader()
    read_all(reader, [response(text("Hel"), usage=counts(1, 1))])
    with pytest.raises(ProviderError) as caught:
        reader.outcome()
    assert caught.value.failure is Failure.NETWORK


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        ({"code": 503, "status": "UNAVAILABLE"}, Failure.SERVER_ERROR),
        ({"code": 429, "status": "RESOURCE_EXHAUSTED"}, Failure.RATE_LIMITED),
        ({"code": 500, "status": "RESOURCE_EXHAUSTED"}, Failure.RATE_LIMITED),
        ({"code": 403, "status": "PERMISSION_DENIED"}, Failure.FORBIDDEN),
        ({}, Failure.SERVER_ERROR),
    ],
)
def test_errors_within_the_stream(error: Any, failure: Failure) -> None:
    """What HTTP would have said of them, without the credential that a message may quote."""
    event = {"error": {**error, "message": f"sorry {SECRET}"}}
    with pytest.raises(ProviderError) as caught:
        read_all(wire_of(GEMINI).reader(), [event])
    assert caught.value.failure is failure
    assert SECRET not in caught.value.message


def test_a_server_that_does_not_stream_events() -> None:
    """Without alt=sse the API sends all responses as one list."""
    reader = wire_of(GEMINI).reader()
    whole = [response(text("Hel")), response(text("lo"), reason="STOP", usage=counts(2, 3))]
    assert read_all(reader, [whole]).text == "Hello"
    assert reader.is_complete
    assert reader.outcome().usage == generation_pb2.Usage(prompt_tokens=2, completion_tokens=3)
