"""Text for terminals: sizes, spans of time, tables. Aligned by the columns that a character takes; cut, never wrapped. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Final

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: int) -> str:
    """Bytes for people, such as `12.5 MiB`."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{count} B"


def age(seconds: float) -> str:
    """A span of time for people, such as `3 min`."""
    for length, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(0, int(seconds))} s"


def span(seconds: float) -> str:
    """A span of time that may be short, such as `0.3 s`; from a minute on as `age`."""
    return age(seconds) if seconds >= 60 else f"{max(0.0, seconds):.1f} s"


def share(part: int, whole: int) -> str:
    """A percentage; a dash where there is nothing to divide by."""
    return f"{part / whole:.0%}" if whole else "-"


def count(number: int, word: str) -> str:
    """`1 request`, `2 requests`."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def enum_word(enum: Any, prefix: str, value: int) -> str:
    """The name of an enum's value without its prefix, in small letters; a number for one that a newer service knows."""
    try:
        return str(enum.Name(value)).removeprefix(prefix).lower()
    except ValueError:
        return str(value)


def printable(text: str) -> str:
    """Text of strangers as it may be shown: what could command the terminal becomes `?`."""
    return "".join(character if character.isprintable() else "?" for character in text)


def columns_of(text: str) -> int:
    """Columns that a terminal gives the text."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, columns: int | None) -> str:
    """The beginning of the text that fits; None: all of it."""
    if columns is None or columns_of(text) <= columns:
        return text
    used = 0
    for at, character in enumerate(text):
        used += _columns(character)
        if used > columns:
            return text[:at]
    return text


def aligned(table: Sequence[Sequence[str]], right: Collection[int] = ()) -> Iterator[str]:
    """The lines of a table, whose first row is its head; the columns in `right` are aligned to the right."""
    widths = [max(map(columns_of, column)) for column in zip(*table, strict=True)]
    for line in table:
        yield "  ".join(_cells(line, widths, right)).rstrip()


def _cells(line: Iterable[str], widths: Iterable[int], right: Collection[int]) -> Iterator[str]:
    for at, (cell, width) in enumerate(zip(line, widths, strict=True)):
        padding = " " * (width - columns_of(cell))
        yield padding + cell if at in right else cell + padding
