"""Answers of the OpenAI API, from recorded events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from caravan.core.v1 import chat_pb2, generation_pb2

from services.engine.remote.failure import Failure, ProviderError
from services.engine.remote.provider import Provider
from tests.support.wires import SECRET, read_all, wire_of

OPENAI = Provider.OPENAI
DONE = "[DONE]"
Call = chat_pb2.ToolCallDelta


def chunk(delta: dict[str, Any] | None = None, reason: str | None = None, **more: Any) -> Any:
    """A chunk of a chat."""
    choice = {"index": 0, "delta": delta or {}, "finish_reason": reason, **more}
    return {"id": "x", "object": "chat.completion.chunk", "created": 1, "choices": [choice]}


def usage(prompt: int, completion: int, cached: int | None = None) -> Any:
    """The chunk that tells the usage."""
    details = None if cached is None else {"cached_tokens": cached, "audio_tokens": 0}
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": 0}
    return {"choices": [], "usage": {**counts, "prompt_tokens_details": details}}


def test_a_chat() -> None:
    """Text in pieces, one ending, and the usage behind it."""
    reader = wire_of(OPENAI).reader()
    events = [chunk({"role": "assistant", "content": ""}), chunk({"content": "Hel"})]
    events += [chunk({"content": "lo"}), chunk({}, "length"), usage(7, 3, 5)]
    assert read_all(reader, events).text == "Hello"
    assert not reader.is_complete
    assert reader.read("", DONE) is None
    assert reader.is_complete
    outcome = reader.outcome()
    assert outcome.reason == generation_pb2.FINISH_REASON_LENGTH
    assert outcome.usage == generation_pb2.Usage(
        prompt_tokens=7, completion_tokens=3, cached_tokens=5
    )


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("stop", generation_pb2.FINISH_REASON_STOP),
        ("end_turn", generation_pb2.FINISH_REASON_STOP),
        ("length", generation_pb2.FINISH_REASON_LENGTH),
        ("tool_calls", generation_pb2.FINISH_REASON_TOOL_CALLS),
        ("function_call", generation_pb2.FINISH_REASON_TOOL_CALLS),
        ("content_filter", generation_pb2.FINISH_REASON_CONTENT_FILTER),
        ("tired", generation_pb2.FINISH_REASON_STOP),
    ],
)
def test_finish_reasons(said: str, meant: generation_pb2.FinishReason.ValueType) -> None:
    """Those that nobody knows mean that it stopped; the first one counts (W13)."""
    reader = wire_of(OPENAI).reader()
    read_all(reader, [chunk({}, said), chunk({}, "length"), DONE])
    assert reader.outcome().reason == meant


def test_tool_calls() -> None:
    """Id and name once each, whatever is repeated, and places from 0 however the provider counts."""
    pieces = [
        {"index": 1, "id": "a", "function": {"name": "look", "arguments": ""}},
        {"index": 1, "function": {"arguments": '{"x"'}},
        {"index": 4, "id": "b", "type": "function", "function": {"name": "now"}},
        {"index": 1, "id": "a", "function": {"name": "look", "arguments": ": 1}"}},
        {"index": 4, "id": None, "function": {"name": None, "arguments": "{}"}},
    ]
    events = [chunk({"tool_calls": [piece]}) for piece in pieces]
    reader = wire_of(OPENAI).reader()
    found = read_all(reader, [*events, chunk({}, "stop"), DONE])
    assert found.calls == [
        Call(index=0, id="a", name="look"),
        Call(index=0, arguments_json='{"x"'),
        Call(index=1, id="b", name="now"),
        Call(index=0, arguments_json=": 1}"),
        Call(index=1, arguments_json="{}"),
    ]
    # A call that had to be made ends with "stop" at OpenAI.
    assert reader.outcome().reason == generation_pb2.FINISH_REASON_TOOL_CALLS


def test_tool_calls_of_servers_that_do_not_number_them() -> None:
    """An id begins a call, and what has none goes on with it; one without an id gets one."""
    first = {"id": "a", "function": {"name": "look", "arguments": "{"}}
    events = [
        chunk({"tool_calls": [first]}),
        chunk({"tool_calls": [{"function": {"arguments": "}"}}]}),
        chunk({"tool_calls": [{"id": "b", "function": {"name": "now", "arguments": "{}"}}]}),
    ]
    assert read_all(wire_of(OPENAI).reader(), events).calls == [
        Call(index=0, id="a", name="look", arguments_json="{"),
        Call(index=0, arguments_json="}"),
        Call(index=1, id="b", name="now", arguments_json="{}"),
    ]
    events = [chunk({"tool_calls": [{"index": 0, "function": {"name": "now"}}]})]
    assert read_all(wire_of(OPENAI).reader(), events).calls == [
        Call(index=0, id="call-1", name="now")
    ]


def test_a_refusal() -> None:
    """It is no text of the answer."""
    reader = wire_of(OPENAI).reader()
    found = read_all(reader, [chunk({"refusal": "No, "}), chunk({"refusal": "sorry."}), DONE])
    assert (found.text, found.refusal) == ("", "No, sorry.")
    assert reader.outcome().reason == generation_pb2.FINISH_REASON_STOP


def test_log_probabilities() -> None:
    """Bytes where they are told, because a token can be half of a character."""
    top = [{"token": "a", "logprob": -0.5, "bytes": [97]}, {"token": "b", "logprob": -1.5}]
    entries = [
        {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": top},
        {"token": "\\xe2", "logprob": -2, "bytes": [226], "top_logprobs": []},
    ]
    event = chunk({"content": "a"}, logprobs={"content": entries, "refusal": None})
    found = read_all(wire_of(OPENAI).reader(), [event])
    first, second = found.logprobs
    assert (first.token, first.logprob) == (b"a", -0.5)
    assert [(entry.token, entry.logprob) for entry in first.top] == [(b"a", -0.5), (b"b", -1.5)]
    assert (second.token, second.logprob) == (b"\xe2", -2)


def test_a_text() -> None:
    """The older API: lists side by side, best first."""
    logprobs = {
        "tokens": ["Up", "on"],
        "token_logprobs": [None, -0.25],
        "top_logprobs": [None, {"in": -3.0, "on": -0.25}],
        "text_offset": [0, 2],
    }
    event = {"choices": [{"index": 0, "text": "Upon", "logprobs": logprobs}]}
    last = {"choices": [{"index": 0, "text": "", "finish_reason": "stop", "stop_reason": "END"}]}
    reader = wire_of(OPENAI).reader()
    found = read_all(reader, [event, last, usage(1, 2), DONE])
    assert found.text == "Upon"
    assert [(entry.token, entry.logprob) for entry in found.logprobs] == [
        (b"Up", 0),
        (b"on", -0.25),
    ]
    assert [entry.token for entry in found.logprobs[1].top] == [b"on", b"in"]
    assert reader.outcome().stop_text == "END"


def test_a_server_that_does_not_stream() -> None:
    """The whole answer is one piece, and its end."""
    message = {
        "role": "assistant",
        "content": "Hello",
        "tool_calls": [{"id": "a", "function": {"name": "now", "arguments": "{}"}}],
    }
    whole = {"choices": [{"index": 0, "message": message}], "usage": usage(2, 3)["usage"]}
    reader = wire_of(OPENAI).reader()
    found = read_all(reader, [whole])
    assert reader.is_complete
    assert found.text == "Hello"
    assert found.calls == [Call(index=0, id="a", name="now", arguments_json="{}")]
    outcome = reader.outcome()
    assert outcome.usage == generation_pb2.Usage(prompt_tokens=2, completion_tokens=3)
    assert outcome.reason == generation_pb2.FINISH_REASON_TOOL_CALLS


def test_usage_comes_as_a_sum() -> None:
    """Servers that tell it with each chunk are not charged for all of them together, nor can it pass its type (W13)."""
    reader = wire_of(OPENAI).reader()
    assert reader.usage_so_far() is None
    events = [usage(7, count) for count in (1, 2, 3)]
    read_all(reader, events)
    assert reader.usage_so_far() == generation_pb2.Usage(prompt_tokens=7, completion_tokens=3)
    read_all(reader, [usage(1 << 70, -5, 1 << 32)])
    most = (1 << 32) - 1
    assert reader.usage_so_far() == generation_pb2.Usage(prompt_tokens=most, cached_tokens=most)


def test_an_answer_without_an_ending_was_cut_off() -> None:
    """However much of it came."""
    reader = wire_of(OPENAI).reader()
    read_all(reader, [chunk({"content": "Hel"})])
    with pytest.raises(ProviderError) as caught:
        reader.outcome()
    assert caught.value.failure is Failure.NETWORK


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        ({"message": "busy", "type": "server_error", "code": None}, Failure.SERVER_ERROR),
        ({"message": "slow down", "code": "rate_limit_exceeded"}, Failure.RATE_LIMITED),
        ({"message": "slow down", "code": 429}, Failure.RATE_LIMITED),
        ({"message": "long", "code": "context_length_exceeded"}, Failure.CONTEXT_LENGTH_EXCEEDED),
        ({"message": "bad", "code": "content_filter"}, Failure.CONTENT_FILTERED),
        ({"message": "?", "type": "invalid_request_error"}, Failure.REJECTED),
        ("broken", Failure.SERVER_ERROR),
    ],
)
def test_errors_within_the_stream(error: Any, failure: Failure) -> None:
    """What HTTP would have said of them."""
    with pytest.raises(ProviderError) as caught:
        read_all(wire_of(OPENAI).reader(), [{"error": error}])
    assert caught.value.failure is failure


def test_an_error_holds_no_credential() -> None:
    """What the provider quotes goes through the redactor."""
    with pytest.raises(ProviderError) as caught:
        read_all(wire_of(OPENAI).reader(), [{"error": {"message": f"key {SECRET}"}}])
    assert caught.value.message == "OpenAI says: key [redacted]"


@pytest.mark.parametrize(
    "event",
    [
        {"object": "ping"},
        {"choices": [], "prompt_filter_results": []},
        {"choices": None, "usage": None, "error": {}},
        chunk({"content": None, "tool_calls": None, "reasoning_content": "Hm"}, logprobs=[]),
        chunk({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]}]}),
        {"choices": [{"index": 1, "delta": {"content": "another choice"}}]},
    ],
)
def test_events_that_add_nothing(event: Any) -> None:
    """Signs of life, filters that found nothing, thoughts."""
    assert wire_of(OPENAI).reader().read("", json.dumps(event)) is None


def test_text_in_parts() -> None:
    """As models that think put it."""
    event = chunk({"content": [{"type": "text", "text": "So"}, {"type": "text", "text": "."}]})
    assert read_all(wire_of(OPENAI).reader(), [event]).text == "So."


def test_an_event_without_data_adds_nothing() -> None:
    """A sign of life."""
    assert wire_of(OPENAI).reader().read("", "") is None
