"""The text side of an answer: its ends, and that it goes on from any token as it would have."""

from __future__ import annotations

import pytest
from caravan.core.v1 import generation_pb2 as generation
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.answer import Answer
from services.engine.text import StopMatcher
from services.engine.tool_calls import ParsedCall, ToolCallParser, call_ids
from services.runtime.errors import CaravanError

QUICK = settings(deadline=None, max_examples=300)
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
END = 0
# Token 0 ends an answer, the others are pieces of text, some of which cut characters and markers.
PIECES = [
    b"",
    b"a",
    b"b",
    b" ",
    b"\xe2\x98",
    b"\x83",
    b"<tool_call>",
    b'{"name": "add"',
    b', "arguments": {}}',
    b"</tool",
    b"_call>",
    CALL.encode(),
    "é".encode(),
]
TOKENS = st.lists(st.integers(1, len(PIECES) - 1), min_size=1, max_size=30)


def answer(stops: list[str], *, tools: bool, max_tokens: int) -> Answer:
    return Answer(
        PIECES.__getitem__,
        {END},
        max_tokens,
        StopMatcher(stops) if stops else None,
        ToolCallParser(call_ids("request", b"prompt")) if tools else None,
    )


def run(one: Answer, tokens: list[int]) -> tuple[list[int], str, tuple[ParsedCall, ...]]:
    """Takes tokens until the answer ends: those that it took, and all that came out."""
    taken: list[int] = []
    text, calls = "", tuple[ParsedCall, ...]()
    for token in tokens:
        if one.reason is not None:
            break
        more, further = one.take(token)
        taken.append(token)
        text, calls = text + more, calls + further
    return taken, text, calls


@QUICK
@given(
    TOKENS,
    st.lists(st.sampled_from(["ab", "b ", "☃", "a☃b", "</tool_call>", "é"]), max_size=2),
    st.booleans(),
    st.integers(1, 30),
    st.data(),
)
def test_an_answer_goes_on_from_any_token(
    tokens: list[int], stops: list[str], tools: bool, max_tokens: int, data: st.DataObject
) -> None:
    """Text, calls with their ids, reason and stop text are those of the undisturbed answer (I2)."""
    tokens = [*tokens, END]
    whole = answer(stops, tools=tools, max_tokens=max_tokens)
    taken, text, calls = run(whole, tokens)
    assert whole.reason is not None
    cut = data.draw(st.integers(1, len(taken)))
    first = answer(stops, tools=tools, max_tokens=max_tokens)
    second = answer(stops, tools=tools, max_tokens=max_tokens)
    _, head, head_calls = run(first, taken[:cut])
    second.replay(taken[:cut])
    assert second.tokens == cut
    rest, tail, tail_calls = run(second, taken[cut:])
    assert rest == taken[cut:]
    assert (head + tail, head_calls + tail_calls) == (text, calls)
    assert (second.reason, second.stop_text) == (whole.reason, whole.stop_text)


@pytest.mark.parametrize(
    ("tokens", "stops", "tools", "reason", "shown"),
    [
        ([1, 2, END], [], False, generation.FINISH_REASON_STOP, "ab"),
        ([1, 2, 3, 1], [], False, generation.FINISH_REASON_LENGTH, "ab a"),
        ([1, 2], ["ab"], False, generation.FINISH_REASON_STOP, ""),
        ([1, 1, 1, 4], ["a\N{REPLACEMENT CHARACTER}"], False, generation.FINISH_REASON_STOP, "aa"),
        ([11, END], [], True, generation.FINISH_REASON_TOOL_CALLS, ""),
        ([1, 6, 7, 8], [], True, generation.FINISH_REASON_LENGTH, "a"),
    ],
)
def test_what_ends_an_answer(
    tokens: list[int], stops: list[str], *, tools: bool, reason: int, shown: str
) -> None:
    """The last token brings all that was held back, so that nobody can have one without the other."""
    one = answer(stops, tools=tools, max_tokens=4)
    taken, text, _calls = run(one, tokens)
    assert (taken, one.reason, text) == (tokens, reason, shown)


def test_tokens_behind_the_end_are_refused() -> None:
    """Who sends them has an answer that this engine would not have given."""
    with pytest.raises(CaravanError) as caught:
        answer(["ab"], tools=False, max_tokens=9).replay([1, 2, 3])
    assert (caught.value.reason, caught.value.param) == ("INVALID_VALUE", "resume.token_ids[2]")


def test_ids_of_calls_follow_from_the_request() -> None:
    """The same on every engine; others for another place, another request, and another prompt under the same id."""
    ids = call_ids("request", b"prompt")
    assert [ids(0), ids(1)] == [call_ids("request", b"prompt")(index) for index in (0, 1)]
    others = {ids(0), ids(1), call_ids("other", b"prompt")(0), call_ids("request", b"longer")(0)}
    assert len(others) == 4
    assert all(len(one) == len("call-") + 24 for one in others)
