"""Text for terminals: nothing wraps, nothing commands the terminal, and columns stand below each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cli.tables import age, aligned, columns_of, count, cut, printable, share, size, span


@given(st.text(), st.integers(0, 40))
def test_cut_text_fits(text: str, columns: int) -> None:
    """What is cut is the beginning of the text, within the columns, and no character less than would fit."""
    shown = cut(text, columns)
    assert text.startswith(shown)
    assert columns_of(shown) <= columns
    if shown != text:
        assert columns_of(text[: len(shown) + 1]) > columns


def test_wide_characters_count_twice() -> None:
    """A terminal gives them two columns, and accents none."""
    assert columns_of("駱駝") == 4
    assert columns_of("e\u0301") == 1
    assert cut("駱駝", 3) == "駱"
    lines = list(aligned([("A", "B"), ("駱駝", "x"), ("abc", "y")]))
    assert lines == ["A     B", "駱駝  x", "abc   y"]


@given(st.text())
def test_strangers_do_not_command_the_terminal(text: str) -> None:
    """Neither escape sequences nor line ends get through, and nothing else changes."""
    shown = printable(text)
    assert len(shown) == len(text)
    assert shown.isprintable()
    assert all(a in (b, "?") for a, b in zip(shown, text, strict=True))
    assert printable("\x1b[2Jid\n") == "?[2Jid?"


def test_numbers_stand_at_the_right() -> None:
    """The columns that are asked for; the others at the left, without spaces at the end."""
    assert list(aligned([("N", "NAME"), ("10", "a"), ("9", "bc")], right=[0])) == [
        " N  NAME",
        "10  a",
        " 9  bc",
    ]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (size(1023), "1023 B"),
        (size(1536), "1.5 KiB"),
        (age(59.9), "59 s"),
        (age(-1), "0 s"),
        (age(3_600), "1 h"),
        (span(0.26), "0.3 s"),
        (span(-0.1), "0.0 s"),
        (span(61), "1 min"),
        (share(1, 3), "33%"),
        (share(0, 0), "-"),
        (count(1, "engine"), "1 engine"),
        (count(0, "engine"), "0 engines"),
    ],
)
def test_words(shown: str, expected: str) -> None:
    """Sizes, spans and counts as people write them."""
    assert shown == expected
