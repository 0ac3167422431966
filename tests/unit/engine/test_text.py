"""Characters and stop texts."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.answer import Answer
from services.engine.text import Detokenizer, StopMatcher, Stopped

# The machine of a test run is busy: no deadline per example.
QUICK = settings(deadline=None, max_examples=60)

ALPHABET = "abé☃"


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = [0, *sorted(place % (len(data) + 1) for place in at), len(data)]
    return [data[a:b] for a, b in pairwise(places)]


@QUICK
@given(st.binary(max_size=40), st.lists(st.integers(0, 1000)))
def test_text_does_not_depend_on_how_bytes_are_cut(data: bytes, at: list[int]) -> None:
    """However tokens cut the bytes, the text is that of all of them, with U+FFFD for what is no UTF-8."""
    detokenizer = Detokenizer()
    text = "".join(detokenizer.push(piece) for piece in cut(data, at)) + detokenizer.flush()
    assert text == data.decode(errors="replace")


def run(text: str, stops: list[str], at: list[int]) -> tuple[str, str | None]:
    matcher, shown = StopMatcher(stops), ""
    places = [0, *sorted(place % (len(text) + 1) for place in at), len(text)]
    for a, b in pairwise(places):
        found = matcher.push(text[a:b])
        if isinstance(found, Stopped):
            return shown + found.text, found.stop
        shown += found
    return shown + matcher.flush(), None


STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=4), min_size=1, max_size=4)


@QUICK
@given(st.text(ALPHABET, max_size=30), STOPS, st.lists(st.integers(0, 1000)))
def test_the_stop_text_found_does_not_depend_on_tokens(
    text: str, stops: list[str], at: list[int]
) -> None:
    """The match that is complete first wins, however the text is cut; without one nothing is lost."""
    expected: tuple[str, str | None] = (text, None)
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            longest = max(matches, key=len)
            expected = (text[: end - len(longest)], longest)
            break
    assert run(text, stops, at) == expected


@QUICK
@given(st.text(ALPHABET, max_size=30), STOPS, st.lists(st.integers(0, 1000)))
def test_text_before_a_possible_match_is_shown_at_once(
    text: str, stops: list[str], at: list[int]
) -> None:
    """No more is held back than a proper beginning of a stop text."""
    matcher, shown = StopMatcher(stops), ""
    places = [0, *sorted(place % (len(text) + 1) for place in at), len(text)]
    for a, b in pairwise(places):
        found = matcher.push(text[a:b])
        if isinstance(found, Stopped):
            return
        shown += found
        held = text[len(shown) : b]
        assert held == "" or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([b"Hello EN", b"D"], "Hello "), ([b"Hello E"], "Hello E"), ([b"\xe2\x98"], "\ufffd")],
)
def test_held_text_comes_out_at_the_end(tokens: list[bytes], expected: str) -> None:
    """An answer that ends by length loses nothing that was held back for a stop text or a character."""
    answer = Answer(tokens.__getitem__, (), 100, StopMatcher(["END"]))
    text = "".join(answer.take(token)[0] for token in range(len(tokens)))
    assert text + answer.flush()[0] == expected
    assert answer.stop_text == ("END" if expected == "Hello " else "")
