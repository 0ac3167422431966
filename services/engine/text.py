"""From tokens to text, as a pure stream: whole UTF-8 characters, and stop texts with hold-back."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass


class Detokenizer:
    """Joins token bytes to whole characters.

    Bytes that begin a character wait for its end; bytes that cannot be part of one become U+FFFD.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: bytes) -> str:
        """The characters that `token` completes."""
        return self._decoder.decode(token)

    def flush(self) -> str:
        """What an unfinished character comes to at the end of the answer."""
        return self._decoder.decode(b"", True)  # noqa: FBT003 - the codec takes it by position


@dataclass(frozen=True, slots=True)
class Stopped:
    """A stop text was met; `text` is what of the answer comes before it."""

    text: str
    stop: str


class StopMatcher:
    """Finds the first stop text in a stream of characters (S2.53, W59).

    The match that is complete first wins, and of those that are complete at the same character the longest: so the
    result does not depend on how the text was cut into tokens. A suffix that may still become a match is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, text: str) -> str | Stopped:
        """The text that is safe to show, or the match."""
        if not self._stops:
            return text
        seen = self._held + text
        match = self._first_match(seen)
        if match is not None:
            start, stop = match
            self._held = ""
            return Stopped(seen[:start], stop)
        keep = self._suffix_that_may_match(seen)
        cut = len(seen) - keep
        self._held = seen[cut:]
        return seen[:cut]

    def flush(self) -> str:
        """What was held back, at the end of an answer that met no stop text."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, seen: str) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = seen.find(stop)
            if start >= 0:
                candidate = (start + len(stop), start, stop)
                if best is None or candidate < best:
                    best = candidate
        return None if best is None else (best[1], best[2])

    def _suffix_that_may_match(self, seen: str) -> int:
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(seen)), longest, -1):
                if seen.endswith(stop[:length]):
                    longest = length
                    break
        return longest
