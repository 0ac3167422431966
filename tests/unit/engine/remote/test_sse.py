"""Server-sent events out of bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.remote.sse import EVENT_BYTES_MAX, Event, EventError, EventReader


def events(*pieces: bytes) -> list[Event]:
    """All events of a stream that comes in these pieces."""
    reader = EventReader()
    found = [event for piece in pieces for event in reader.feed(piece)]
    return found + reader.finish()


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"", []),
        (b"data: a\n\n", [("", "a")]),
        (b"data:a\n\ndata:  b\n\n", [("", "a"), ("", " b")]),
        (b"event: e\ndata: a\n\ndata: b\n\n", [("e", "a"), ("", "b")]),
        (b"data: a\ndata: b\ndata\n\n", [("", "a\nb\n")]),
        (b": alive\n\n:\n\ndata: a\n\n", [("", "a")]),
        (b"event: e\n\ndata: a\n\n", [("", "a")]),
        (b"id: 1\nretry: 10\nwhat: ever\ndata: a\n\n", [("", "a")]),
        (b"data: a\r\n\r\ndata: b\r\rdata: c\n\n", [("", "a"), ("", "b"), ("", "c")]),
        (b"\xef\xbb\xbfdata: a\n\n", [("", "a")]),
        ("data: a\n\ufeffdata: b\n\n".encode(), [("", "a")]),
        (b"data: [DONE]", [("", "[DONE]")]),
        (b"data: [DONE]\n", [("", "[DONE]")]),
        ("data: \u2028é\n\n".encode(), [("", "\u2028é")]),
    ],
)
def test_streams(stream: bytes, expected: list[tuple[str, str]]) -> None:
    """As the HTML standard reads them, and the last one also without its empty line."""
    assert events(stream) == expected
    assert events(*(stream[place : place + 1] for place in range(len(stream)))) == expected


LINES = st.sampled_from(
    ["data: é", "data:", "data", "event: x", ": hi", "", "", "id: 7", "\ufeff", "data: \U0001f600"]
)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])


@given(st.lists(st.tuples(LINES, ENDS)), st.lists(st.integers(0, 200)), st.booleans())
def test_any_cut_gives_the_same_events(
    lines: list[tuple[str, str]], cuts: list[int], mark: bool
) -> None:
    """In the middle of a character, of a line's end, or of the byte order mark."""
    text = "".join(line + end for line, end in lines)
    stream = (b"\xef\xbb\xbf" if mark else b"") + text.encode()
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    pieces = [stream[a:b] for a, b in pairwise(places)]
    assert events(*pieces) == events(stream)


def test_events_are_bounded() -> None:
    """Whether it is one line or many, with an end or without."""
    line = b"data: " + b"x" * 1000 + b"\n"
    for stream in (b"x" * (EVENT_BYTES_MAX + 1), line * 1100, line * 2000 + b"\n"):
        reader = EventReader()
        with pytest.raises(EventError):
            reader.feed(stream)


def test_signs_of_life_may_go_on_for_ever() -> None:
    """They are no part of an event."""
    reader = EventReader()
    for _ in range(3000):
        assert reader.feed(b": " + b"x" * 1000 + b"\n") == []
    assert reader.feed(b"data: a\n\n") == [("", "a")]


def test_what_is_no_utf8() -> None:
    """It is no text with marks of replacement: an answer is exact, or it is none."""
    with pytest.raises(EventError):
        events(b"data: \xff\n\n")
