"""What holds for the readers of all wires, whatever comes."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from caravan.core.v1 import generation_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.remote.failure import ProviderError
from services.engine.remote.provider import Provider
from services.engine.remote.sse import EventError, EventReader
from services.engine.remote.wire import Outcome, Piece
from tests.support.wires import wire_of

PROVIDERS = [Provider.OPENAI, Provider.ANTHROPIC, Provider.GEMINI]
every_wire = pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.value)

# The names that readers look for, with values of every type: nearly right, and wrong.
NAMES = st.sampled_from(
    re.findall(
        r"\w+",
        """
        choices delta message content refusal tool_calls index id function name arguments finish_reason stop_reason logprobs
        tokens token_logprobs top_logprobs token logprob bytes usage prompt_tokens completion_tokens prompt_tokens_details
        cached_tokens error type code text content_block partial_json input stop_sequence input_tokens output_tokens
        cache_read_input_tokens candidates parts functionCall args thought finishReason usageMetadata promptTokenCount
        candidatesTokenCount promptFeedback blockReason logprobsResult chosenCandidates topCandidates logProbability
        """,
    )
)
KINDS = st.sampled_from(
    re.findall(
        r"\w+",
        """
        message_start content_block_start content_block_delta content_block_stop message_delta message_stop error message ping
        text tool_use text_delta input_json_delta stop length STOP SAFETY
        """,
    )
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | KINDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=25,
)
EVENTS = st.lists(
    VALUES.map(json.dumps)
    | st.dictionaries(NAMES | st.just("type"), VALUES | KINDS, max_size=5).map(json.dumps)
    | st.text(max_size=20)
    | st.just("[DONE]")
    | st.just('{"error": ' + "[" * 5000),
    max_size=8,
)


@every_wire
@settings(max_examples=300, deadline=None)
@given(events=EVENTS)
def test_readers_raise_nothing_but_provider_errors(provider: Provider, events: list[str]) -> None:
    """Whatever a provider sends; and there is at most one ending."""
    reader = wire_of(provider).reader()
    with suppress(ProviderError):
        for event in events:
            piece = reader.read("", event)
            assert piece is None or isinstance(piece, Piece)
            if reader.is_complete:
                break
        assert reader.outcome().reason != generation_pb2.FINISH_REASON_UNSPECIFIED
    reader.usage_so_far()


@pytest.mark.parametrize(
    ("provider", "event"),
    [
        *((provider, '{"error": ' + "[" * 5000) for provider in PROVIDERS),
        (
            Provider.OPENAI,
            '{"choices": [{"logprobs": {"content": [{"token": "a", "bytes": [300]}]}}]}',
        ),
        (Provider.OPENAI, '{"choices": [{"delta": {"content": "\\ud800"}}]}'),
        (Provider.ANTHROPIC, '{"type": "content_block_delta", "delta": {"text": 7}}'),
        (
            Provider.GEMINI,
            '{"candidates": [{"content": {"parts": [{"functionCall": {"args": }}]}}]}',
        ),
    ],
    ids=str,
)
def test_events_that_are_nearly_right(provider: Provider, event: str) -> None:
    """What random ones hardly ever are."""
    with pytest.raises(ProviderError):
        wire_of(provider).reader().read("", event)


RECORDED: dict[Provider, list[tuple[str, Any]]] = {
    Provider.OPENAI: [
        ("", {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "Grüße"}}]}),
        ("", {"choices": [{"index": 0, "delta": {"content": " 😀"}}]}),
        (
            "",
            {
                "choices": [
                    {
                        "index": 0,
                        "delta": {
                            "tool_calls": [{"index": 0, "id": "a", "function": {"name": "now"}}]
                        },
                        "finish_reason": "tool_calls",
                    }
                ]
            },
        ),
        ("", {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}),
    ],
    Provider.ANTHROPIC: [
        ("message_start", {"type": "message_start", "message": {"usage": {"input_tokens": 3}}}),
        (
            "content_block_delta",
            {
                "type": "content_block_delta",
                "index": 0,
                "delta": {"type": "text_delta", "text": "Grüße 😀"},
            },
        ),
        (
            "content_block_start",
            {
                "type": "content_block_start",
                "index": 1,
                "content_block": {"type": "tool_use", "id": "a", "name": "now", "input": {}},
            },
        ),
        ("content_block_stop", {"type": "content_block_stop", "index": 1}),
        (
            "message_delta",
            {
                "type": "message_delta",
                "delta": {"stop_reason": "tool_use"},
                "usage": {"output_tokens": 4},
            },
        ),
        ("message_stop", {"type": "message_stop"}),
    ],
    Provider.GEMINI: [
        ("", {"candidates": [{"content": {"parts": [{"text": "Grüße 😀"}]}}]}),
        (
            "",
            {
                "candidates": [
                    {
                        "content": {"parts": [{"functionCall": {"name": "now", "id": "a"}}]},
                        "finishReason": "STOP",
                    }
                ],
                "usageMetadata": {"promptTokenCount": 3, "candidatesTokenCount": 4},
            },
        ),
    ],
}


def _stream(provider: Provider, end: str) -> bytes:
    lines = [
        (f"event: {name}{end}" if name else "")
        + f"data: {json.dumps(event, ensure_ascii=False)}{end}{end}"
        for name, event in RECORDED[provider]
    ]
    if provider is Provider.OPENAI:
        lines.append(f"data: [DONE]{end}{end}")
    return "".join(lines).encode()


def _answer(provider: Provider, pieces: list[bytes]) -> tuple[str, list[Any], Outcome]:
    sse = EventReader()
    reader = wire_of(provider).reader()
    text, calls = "", []
    for piece in [*pieces, None]:
        for event in sse.finish() if piece is None else sse.feed(piece):
            if reader.is_complete:
                break
            found = reader.read(event.event, event.data)
            if found is not None:
                text += found.text
                calls += [(c.index, c.id, c.name, c.arguments_json) for c in found.calls]
    return text, calls, reader.outcome()


@every_wire
@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 1500)), end=st.sampled_from(["\n", "\r\n"]))
def test_any_split_of_the_bytes_gives_the_same_answer(
    provider: Provider, cuts: list[int], end: str
) -> None:
    """Networks cut where they like."""
    stream = _stream(provider, end)
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    pieces = [stream[a:b] for a, b in pairwise(places)]
    found = _answer(provider, pieces)
    assert found == _answer(provider, [stream])
    text, calls, outcome = found
    assert text == "Grüße 😀"
    assert calls[0][:3] == (0, "a", "now")
    assert outcome.reason == generation_pb2.FINISH_REASON_TOOL_CALLS
    assert outcome.usage == generation_pb2.Usage(prompt_tokens=3, completion_tokens=4)


@every_wire
@given(cut=st.integers(0, 2000))
def test_an_answer_that_stops_anywhere_is_no_other_answer(provider: Provider, cut: int) -> None:
    """It is the whole one, or an error."""
    stream = _stream(provider, "\n")
    try:
        text, _, outcome = _answer(provider, [stream[:cut]])
    except (ProviderError, EventError):
        return
    assert text == "Grüße 😀"
    assert outcome.reason == generation_pb2.FINISH_REASON_TOOL_CALLS
