"""Server-sent events and plain answers of the OpenAI API, byte for byte and read back."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.openai_answer import AnswerHead, Served
from services.gateway.openai_plain import PlainAnswer
from services.gateway.openai_request import parse_chat, parse_completion
from services.gateway.openai_stream import DONE, KEEPALIVE, error_event, open_stream
from services.gateway.requests import InferenceRequest
from services.runtime.errors import CaravanError

HEAD = AnswerHead("req-7", "demo", 1_700_000_000)
SERVED = Served("engine-1", "demo")
STOP = generation_pb2.FINISH_REASON_STOP
PREFIX = '"created":1700000000,"model":"demo","system_fingerprint":"caravan-1","choices":'


def _chat(**fields: Any) -> InferenceRequest:
    body = {"model": "demo", "messages": [{"role": "user", "content": "x"}], **fields}
    return parse_chat(json.dumps(body).encode())


def _completion(**fields: Any) -> InferenceRequest:
    return parse_completion(json.dumps({"model": "demo", "prompt": "x", **fields}).encode())


def _finished(reason: generation_pb2.FinishReason.ValueType = STOP) -> engine_pb.Finished:
    usage = generation_pb2.Usage(prompt_tokens=5, completion_tokens=3, cached_tokens=4)
    return engine_pb.Finished(reason=reason, usage=usage)


def _logprob(token: bytes, logprob: float = -0.5, *top: bytes) -> generation_pb2.TokenLogprob:
    return generation_pb2.TokenLogprob(
        token=token,
        logprob=logprob,
        top=[generation_pb2.TopLogprob(token=t, logprob=-1) for t in top],
    )


def _events(body: bytes) -> list[dict[str, Any]]:
    """Reads a stream by the rules of server-sent events; the last event must be [DONE]."""
    assert body.endswith(DONE)
    read = []
    for block in body.removesuffix(DONE).decode().split("\n\n")[:-1]:
        lines = block.splitlines()
        assert len(lines) == 1, "one line per event, for any reader's notion of a line"
        assert lines[0].startswith("data: ")
        read.append(json.loads(lines[0].removeprefix("data: ")))
    return read


def _stream(request: InferenceRequest, *deltas: engine_pb.Delta) -> list[dict[str, Any]]:
    stream = open_stream(request, HEAD)
    return _events(b"".join(stream.delta(d) for d in deltas) + stream.finished(_finished(), SERVED))


def test_chat_stream_golden() -> None:
    """Role first, then content, then a chunk with the reason and no content, then [DONE]."""
    stream = open_stream(_chat(stream=True), HEAD)
    first = stream.delta(engine_pb.Delta(text="Hi", token_ids=[1, 2]))
    start = 'data: {"id":"chatcmpl-7","object":"chat.completion.chunk",' + PREFIX
    assert first.decode() == (
        f'{start}[{{"index":0,"delta":{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}]}}\n\n'
        f'{start}[{{"index":0,"delta":{{"content":"Hi"}},"logprobs":null,"finish_reason":null}}]}}\n\n'
    )
    assert stream.finished(_finished(), SERVED).decode() == (
        f'{start}[{{"index":0,"delta":{{}},"logprobs":null,"finish_reason":"stop"}}]}}\n\n'
        "data: [DONE]\n\n"
    )


def test_completion_stream_golden() -> None:
    """The older form: text instead of a delta, and no role."""
    stream = open_stream(_completion(stream=True), HEAD)
    start = 'data: {"id":"cmpl-7","object":"text_completion",' + PREFIX
    assert stream.delta(engine_pb.Delta(text="Hi")).decode() == (
        f'{start}[{{"text":"Hi","index":0,"logprobs":null,"finish_reason":null}}]}}\n\n'
    )
    assert stream.finished(_finished(), SERVED).decode() == (
        f'{start}[{{"text":"","index":0,"logprobs":null,"finish_reason":"stop"}}]}}\n\n'
        "data: [DONE]\n\n"
    )


@pytest.mark.parametrize("make", [_chat, _completion])
def test_usage_comes_last_and_only_if_asked_for(make: Any) -> None:
    """With include_usage every chunk has usage null, but the last, which has no choices; without, none has it."""
    deltas = (engine_pb.Delta(text="a"), engine_pb.Delta(text="b"))
    asked = _stream(make(stream=True, stream_options={"include_usage": True}), *deltas)
    assert [chunk["usage"] for chunk in asked[:-1]] == [None] * (len(asked) - 1)
    assert asked[-1]["choices"] == []
    assert asked[-1]["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert all("usage" not in chunk for chunk in _stream(make(stream=True), *deltas))


@pytest.mark.parametrize("make", [_chat, _completion])
def test_a_delta_without_text_shows_nothing(make: Any) -> None:
    """Tokens whose text is held back make no chunk."""
    stream = open_stream(make(stream=True), HEAD)
    assert stream.delta(engine_pb.Delta(token_ids=[1])) == b""


def test_an_empty_answer_still_has_a_role() -> None:
    """A model that says nothing answers with the role chunk and the finish chunk."""
    chunks = _stream(_chat(stream=True))
    assert [c["choices"][0]["delta"] for c in chunks] == [{"role": "assistant", "content": ""}, {}]


def test_tool_calls_stream_in_pieces() -> None:
    """Id, type and name stand in the first piece of a call; the pieces of arguments join to the JSON text."""
    chunks = _stream(
        _chat(stream=True),
        engine_pb.Delta(
            tool_calls=[chat_pb2.ToolCallDelta(index=0, id="call-1", name="f", arguments_json="")]
        ),
        engine_pb.Delta(
            tool_calls=[
                chat_pb2.ToolCallDelta(index=0, arguments_json='{"a"'),
                chat_pb2.ToolCallDelta(index=0, arguments_json=":1}"),
            ]
        ),
    )
    assert chunks[1]["choices"][0]["delta"] == {
        "tool_calls": [
            {
                "index": 0,
                "id": "call-1",
                "type": "function",
                "function": {"name": "f", "arguments": ""},
            }
        ]
    }
    assert chunks[2]["choices"][0]["delta"] == {
        "tool_calls": [
            {"index": 0, "function": {"arguments": '{"a"'}},
            {"index": 0, "function": {"arguments": ":1}"}},
        ]
    }


def test_chat_logprobs() -> None:
    """Each token with its bytes; minus infinity, which JSON lacks, is -9999."""
    delta = engine_pb.Delta(
        text="é", logprobs=[_logprob(b"\xc3"), _logprob(b"\xa9", -math.inf, b"x")]
    )
    shown = _stream(_chat(stream=True, logprobs=True, top_logprobs=1), delta)[1]["choices"][0]
    assert shown["delta"] == {"content": "é"}
    first, second = shown["logprobs"]["content"]
    assert first == {"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3], "top_logprobs": []}
    assert second["logprob"] == -9999.0
    assert second["top_logprobs"] == [{"token": "x", "logprob": -1.0, "bytes": [120]}]


def test_completion_logprobs() -> None:
    """Lists side by side; offsets count characters, over all chunks; a part of a character has a name of its own."""
    chunks = _stream(
        _completion(stream=True, logprobs=2),
        engine_pb.Delta(text="é", logprobs=[_logprob(b"\xc3"), _logprob(b"\xa9")]),
        engine_pb.Delta(text="bc", logprobs=[_logprob(b"bc", -0.5, b"bc", b"d")]),
    )
    assert chunks[0]["choices"][0]["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert chunks[1]["choices"][0]["logprobs"] == {
        "tokens": ["bc"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"bc": -1.0, "d": -1.0}],
        "text_offset": [1],
    }


@given(st.lists(st.text(max_size=20), max_size=5))
def test_any_text_comes_back(texts: list[str]) -> None:
    """Whatever the text, the stream has one line per event, and its pieces join to the text."""
    texts = [t.encode("utf-8", "ignore").decode() for t in texts]
    deltas = [engine_pb.Delta(text=t) for t in texts]
    chat = _stream(_chat(stream=True), *deltas)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chat) == "".join(texts)
    text = _stream(_completion(stream=True), *deltas)
    assert "".join(c["choices"][0]["text"] for c in text) == "".join(texts)


def test_line_ends_of_unicode_are_escaped() -> None:
    """Readers that split lines as Unicode does must not cut an event."""
    body = open_stream(_completion(stream=True), HEAD).delta(
        engine_pb.Delta(text="a\u2028b\u2029c\u0085d\r\n")
    )
    assert len(body.decode().strip().splitlines()) == 1
    assert "a\\u2028b\\u2029c\\u0085d\\r\\n" in body.decode()


def test_error_event() -> None:
    """The event has the body that the same error has as a reply."""
    event = error_event(CaravanError("ENGINE_LOST", "Gone.", engine_id="e"))
    assert event == (
        b'data: {"error":{"message":"Gone.","type":"server_error","param":null,"code":"engine_lost"}}\n\n'
    )


def test_keepalive_is_a_comment() -> None:
    """Lines that begin with a colon are ignored by every reader of server-sent events."""
    assert KEEPALIVE == b": keepalive\n\n"


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        (generation_pb2.FINISH_REASON_STOP, "stop"),
        (generation_pb2.FINISH_REASON_LENGTH, "length"),
        (generation_pb2.FINISH_REASON_TOOL_CALLS, "tool_calls"),
        (generation_pb2.FINISH_REASON_CONTENT_FILTER, "content_filter"),
    ],
)
def test_finish_reasons(reason: generation_pb2.FinishReason.ValueType, word: str) -> None:
    """The words of the OpenAI API, in both forms of answer."""
    plain = json.loads(PlainAnswer(_chat(), HEAD).finished(_finished(reason), SERVED))
    assert plain["choices"][0]["finish_reason"] == word
    body = open_stream(_chat(stream=True), HEAD).finished(_finished(reason), SERVED)
    assert _events(body)[-1]["choices"][0]["finish_reason"] == word


@pytest.mark.parametrize("make", [_chat, _completion])
def test_a_cancelled_answer_is_an_error(make: Any) -> None:
    """The OpenAI API has no word for it."""
    finished = _finished(generation_pb2.FINISH_REASON_CANCELLED)
    with pytest.raises(CaravanError, match="cancelled"):
        PlainAnswer(make(), HEAD).finished(finished, SERVED)
    with pytest.raises(CaravanError, match="cancelled"):
        open_stream(make(stream=True), HEAD).finished(finished, SERVED)


def test_plain_chat() -> None:
    """One JSON object with the whole message; content is null where the model only called tools."""
    answer = PlainAnswer(_chat(), HEAD)
    answer.delta(engine_pb.Delta(text="Hi "))
    answer.delta(engine_pb.Delta(text="you"))
    assert json.loads(answer.finished(_finished(), SERVED)) == {
        "id": "chatcmpl-7",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "demo",
        "system_fingerprint": "caravan-1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi you", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 3,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }


def test_refusals() -> None:
    """A chat has a place for them, beside the text if there is one; a completion has none, and shows them as its text."""
    deltas = [
        engine_pb.Delta(text="Well. "),
        engine_pb.Delta(refusal="I "),
        engine_pb.Delta(refusal="can't."),
    ]
    chat, completion = PlainAnswer(_chat(), HEAD), PlainAnswer(_completion(), HEAD)
    for delta in deltas:
        chat.delta(delta)
        completion.delta(delta)
    message = json.loads(chat.finished(_finished(), SERVED))["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Well. ", "refusal": "I can't."}
    (choice,) = json.loads(completion.finished(_finished(), SERVED))["choices"]
    assert choice["text"] == "Well. I can't."

    chunks = [event["choices"][0]["delta"] for event in _stream(_chat(stream=True), *deltas)]
    assert chunks[1:-1] == [{"content": "Well. "}, {"refusal": "I "}, {"refusal": "can't."}]
    events = _stream(_completion(stream=True), *deltas)
    assert "".join(event["choices"][0]["text"] for event in events) == "Well. I can't."


def test_plain_tool_calls() -> None:
    """Pieces of several calls join in the order of their index."""
    answer = PlainAnswer(_chat(), HEAD)
    for index, arguments in ((1, '{"b'), (0, "{}"), (1, '":2}')):
        answer.delta(
            engine_pb.Delta(
                tool_calls=[
                    chat_pb2.ToolCallDelta(
                        index=index, id=f"call-{index}", name=f"f{index}", arguments_json=arguments
                    )
                ]
            )
        )
    message = json.loads(answer.finished(_finished(), SERVED))["choices"][0]["message"]
    assert message["content"] is None
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "f0", "arguments": "{}"},
        {"name": "f1", "arguments": '{"b":2}'},
    ]


def test_plain_logprobs() -> None:
    """Both forms hold every token of the answer."""
    delta = engine_pb.Delta(text="ab", logprobs=[_logprob(b"a"), _logprob(b"b")])
    chat, completion = (
        PlainAnswer(_chat(logprobs=True), HEAD),
        PlainAnswer(_completion(logprobs=0), HEAD),
    )
    chat.delta(delta)
    completion.delta(delta)
    shown = json.loads(chat.finished(_finished(), SERVED))["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in shown] == ["a", "b"]
    older = json.loads(completion.finished(_finished(), SERVED))["choices"][0]
    assert older["text"] == "ab"
    assert older["logprobs"]["text_offset"] == [0, 1]
