"""Tool calls in a stream of text."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.tool_calls import ToolCallParser

# The machine of a test run is busy: no deadline per example.
QUICK = settings(deadline=None, max_examples=60)

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>'
TEXTS = st.lists(
    st.sampled_from([CALL, "x", " ", "\n", "<tool", "<tool_call>", "</tool_call>", "{", "é"]),
    max_size=8,
).map("".join)


def run(text: str, at: list[int] | None = None) -> tuple[str, list[tuple[int, str, str, str]]]:
    parser = ToolCallParser(lambda index: f"call-{index + 1}")
    places = [0, *sorted(place % (len(text) + 1) for place in at or []), len(text)]
    results = [parser.push(text[a:b]) for a, b in pairwise(places)]
    results.append(parser.flush())
    calls = [call for result in results for call in result.calls]
    return "".join(result.text for result in results), [
        (call.index, call.call_id, call.name, call.arguments_json) for call in calls
    ]


def test_a_call_is_found_with_its_arguments() -> None:
    """Name, id and arguments come out as one call, and no text."""
    assert run(CALL) == ("", [(0, "call-1", "add", '{"a": 1, "b": "é"}')])


def test_several_calls_are_counted_and_white_space_between_them_is_no_text() -> None:
    """Calls have their place in the answer; line breaks around them are not shown."""
    text, calls = run(f"Let me see.\n{CALL}\n{CALL}\n")
    assert text == "Let me see."
    assert [(index, call_id) for index, call_id, _, _ in calls] == [(0, "call-1"), (1, "call-2")]


@QUICK
@given(TEXTS, st.lists(st.integers(0, 1000)))
def test_the_result_does_not_depend_on_how_the_text_is_cut(text: str, at: list[int]) -> None:
    """Markers are matched over the whole stream (W49)."""
    assert run(text, at) == run(text)


@QUICK
@given(st.text("<tool_call>/{} \nab", max_size=60))
def test_text_without_a_call_is_unchanged(text: str) -> None:
    """What is no call is text, to the last character."""
    shown, calls = run(text)
    assert calls or shown == text


@pytest.mark.parametrize(
    "body",
    [
        "nonsense",
        '{"name": 5, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": {"x": NaN}}',
        '["f"]',
        "[" * 100_000,
    ],
)
def test_a_malformed_call_is_text(body: str) -> None:
    """A block that is no call is shown as the model wrote it."""
    text = f"<tool_call>{body}</tool_call>"
    assert run(text) == (text, [])


def test_a_call_that_lacks_its_closing_marker_counts_at_the_end() -> None:
    """Models leave the last marker out; the call is complete all the same."""
    assert run('<tool_call>{"name": "f", "arguments": {}}')[1] == [(0, "call-1", "f", "{}")]


def test_arguments_given_as_text_are_read() -> None:
    """Some models write the arguments as a string that holds JSON."""
    inner = json.dumps({"city": "Bonn"})
    text = f"<tool_call>{json.dumps({'name': 'f', 'arguments': inner})}</tool_call>"
    assert run(text)[1] == [(0, "call-1", "f", inner)]
