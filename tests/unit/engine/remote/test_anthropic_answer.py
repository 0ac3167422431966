"""Answers of the Anthropic API, from recorded events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from caravan.core.v1 import chat_pb2, generation_pb2

from services.engine.remote.failure import Failure, ProviderError
from services.engine.remote.provider import Provider
from tests.support.wires import SECRET, read_all, wire_of

ANTHROPIC = Provider.ANTHROPIC
STOPPED = {"type": "message_stop"}
Call = chat_pb2.ToolCallDelta


def start(**usage: int) -> Any:
    """The beginning, with the usage until then."""
    message = {"id": "m", "type": "message", "role": "assistant", "content": [], "usage": usage}
    return {"type": "message_start", "message": message}


def block(index: int, **content: Any) -> Any:
    """The beginning of a block."""
    return {"type": "content_block_start", "index": index, "content_block": content}


def delta(index: int, **content: Any) -> Any:
    """What is new of a block."""
    return {"type": "content_block_delta", "index": index, "delta": content}


def stop(index: int) -> Any:
    """The end of a block."""
    return {"type": "content_block_stop", "index": index}


def ending(reason: str | None, met: str | None = None, **usage: int) -> Any:
    """What changes of the message at its end."""
    change = {"stop_reason": reason, "stop_sequence": met}
    return {"type": "message_delta", "delta": change, "usage": usage}


def text(index: int, words: str) -> Any:
    """A piece of text."""
    return delta(index, type="text_delta", text=words)


def test_a_message() -> None:
    """What the provider read from its cache, or put there, is part of the prompt (W13)."""
    reader = wire_of(ANTHROPIC).reader()
    events = [
        start(
            input_tokens=10,
            cache_creation_input_tokens=20,
            cache_read_input_tokens=30,
            output_tokens=1,
        ),
        block(0, type="text", text=""),
        {"type": "ping"},
        {"type": "new_kind_of_event", "delta": None},
        text(0, "Hel"),
        text(0, "lo"),
        stop(0),
        ending("stop_sequence", "END", output_tokens=12),
        STOPPED,
    ]
    assert read_all(reader, events).text == "Hello"
    assert reader.is_complete
    outcome = reader.outcome()
    assert (outcome.reason, outcome.stop_text) == (generation_pb2.FINISH_REASON_STOP, "END")
    assert outcome.usage == generation_pb2.Usage(
        prompt_tokens=60, completion_tokens=12, cached_tokens=30
    )


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("end_turn", generation_pb2.FINISH_REASON_STOP),
        ("stop_sequence", generation_pb2.FINISH_REASON_STOP),
        ("max_tokens", generation_pb2.FINISH_REASON_LENGTH),
        ("model_context_window_exceeded", generation_pb2.FINISH_REASON_LENGTH),
        ("tool_use", generation_pb2.FINISH_REASON_TOOL_CALLS),
        ("refusal", generation_pb2.FINISH_REASON_CONTENT_FILTER),
        ("pause_turn", generation_pb2.FINISH_REASON_STOP),
    ],
)
def test_finish_reasons(said: str, meant: generation_pb2.FinishReason.ValueType) -> None:
    """The first one counts, and the end of the message is no reason (W13)."""
    reader = wire_of(ANTHROPIC).reader()
    read_all(reader, [start(), ending(said), ending("max_tokens"), STOPPED])
    assert reader.outcome().reason == meant


def test_an_end_without_a_reason() -> None:
    """It stopped; without an end it was cut off."""
    reader = wire_of(ANTHROPIC).reader()
    read_all(reader, [start(), text(0, "Hi"), ending(None)])
    with pytest.raises(ProviderError) as caught:
        reader.outcome()
    assert caught.value.failure is Failure.NETWORK
    read_all(reader, [STOPPED])
    assert reader.outcome().reason == generation_pb2.FINISH_REASON_STOP


def test_tool_calls() -> None:
    """Blocks are numbered with the texts between them; calls are not. A call without arguments has an empty object."""
    events = [
        block(0, type="text", text="I look."),
        stop(0),
        block(1, type="tool_use", id="a", name="look", input={}),
        delta(1, type="input_json_delta", partial_json=""),
        delta(1, type="input_json_delta", partial_json='{"x"'),
        delta(1, type="input_json_delta", partial_json=": 1}"),
        stop(1),
        block(2, type="tool_use", id="b", name="now", input={}),
        stop(2),
        block(3, type="tool_use", id="c", name="all", input={"y": [1.0]}),
        stop(3),
    ]
    found = read_all(wire_of(ANTHROPIC).reader(), events)
    assert found.text == "I look."
    assert found.calls == [
        Call(index=0, id="a", name="look"),
        Call(index=0, arguments_json='{"x"'),
        Call(index=0, arguments_json=": 1}"),
        Call(index=1, id="b", name="now"),
        Call(index=1, arguments_json="{}"),
        Call(index=2, id="c", name="all", arguments_json='{"y": [1.0]}'),
    ]


def test_an_empty_object_with_space_in_it_is_no_argument() -> None:
    """The arguments follow in pieces: an object before them would make both together no JSON."""
    started = json.dumps(block(0, type="tool_use", id="a", name="look", input={}))
    reader = wire_of(ANTHROPIC).reader()
    began = reader.read("", started.replace('"input": {}', '"input": { }'))
    assert began is not None
    assert began.calls == [Call(index=0, id="a", name="look")]


def test_arguments_of_no_call() -> None:
    """Nobody could say whose they are."""
    with pytest.raises(ProviderError) as caught:
        read_all(wire_of(ANTHROPIC).reader(), [delta(5, type="input_json_delta", partial_json="{")])
    assert caught.value.failure is Failure.SERVER_ERROR


def test_thoughts_are_no_part_of_the_answer() -> None:
    """Nor their signatures, nor what comes in blocks that nobody knows."""
    events = [
        block(0, type="thinking", thinking="Hm", signature=""),
        delta(0, type="thinking_delta", thinking="Hm"),
        delta(0, type="signature_delta", signature="x"),
        stop(0),
        block(1, type="server_tool_use", id="s", name="web", input={}),
        stop(1),
        text(2, "So."),
    ]
    found = read_all(wire_of(ANTHROPIC).reader(), events)
    assert (found.text, found.calls) == ("So.", [])


def test_usage_comes_as_a_sum() -> None:
    """Each takes the place of the one before; what is not told again stays (W13)."""
    reader = wire_of(ANTHROPIC).reader()
    assert reader.usage_so_far() is None
    read_all(reader, [start(input_tokens=10, output_tokens=1), ending(None, output_tokens=5)])
    assert reader.usage_so_far() == generation_pb2.Usage(prompt_tokens=10, completion_tokens=5)
    read_all(reader, [ending(None, input_tokens=11, output_tokens=6)])
    assert reader.usage_so_far() == generation_pb2.Usage(prompt_tokens=11, completion_tokens=6)
    # Servers after its model put zeros where they know no better.
    read_all(reader, [ending("end_turn", input_tokens=0, output_tokens=7)])
    assert reader.usage_so_far() == generation_pb2.Usage(prompt_tokens=11, completion_tokens=7)


@pytest.mark.parametrize(
    ("kind", "failure"),
    [
        ("overloaded_error", Failure.SERVER_ERROR),
        ("api_error", Failure.SERVER_ERROR),
        ("timeout_error", Failure.SERVER_ERROR),
        ("rate_limit_error", Failure.RATE_LIMITED),
        ("authentication_error", Failure.UNAUTHORIZED),
        ("permission_error", Failure.FORBIDDEN),
        ("invalid_request_error", Failure.REJECTED),
        ("something_new", Failure.SERVER_ERROR),
    ],
)
def test_errors_within_the_stream(kind: str, failure: Failure) -> None:
    """What HTTP would have said of them, without the credential that a message may quote."""
    error = {"type": kind, "message": f"sorry {SECRET}"}
    with pytest.raises(ProviderError) as caught:
        read_all(wire_of(ANTHROPIC).reader(), [start(), {"type": "error", "error": error}])
    assert caught.value.failure is failure
    assert SECRET not in caught.value.message


def test_a_server_that_does_not_stream() -> None:
    """The whole message is one piece, and its end."""
    content = [
        {"type": "thinking", "thinking": "Hm"},
        {"type": "text", "text": "Hello"},
        {"type": "tool_use", "id": "a", "name": "now", "input": {}},
    ]
    usage = {"input_tokens": 2, "output_tokens": 3}
    whole = {"type": "message", "content": content, "stop_reason": "max_tokens", "usage": usage}
    reader = wire_of(ANTHROPIC).reader()
    found = read_all(reader, [whole])
    assert reader.is_complete
    assert found.text == "Hello"
    assert found.calls == [Call(index=0, id="a", name="now", arguments_json="{}")]
    outcome = reader.outcome()
    assert outcome.reason == generation_pb2.FINISH_REASON_LENGTH
    assert outcome.usage == generation_pb2.Usage(prompt_tokens=2, completion_tokens=3)
