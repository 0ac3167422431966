"""The text side of one answer: bytes of tokens in, text and tool calls out. Pure; it never changes which tokens run."""

from __future__ import annotations

from services.engine.text import Detokenizer, StopMatcher, Stopped
from services.engine.tool_calls import Parsed, ParsedCall, ToolCallParser


class Answer:
    """Detokenizer, then stop texts, then tool calls."""

    __slots__ = ("_decode", "_detokenizer", "_stops", "_tools", "stop_text")

    def __init__(self, stops: StopMatcher | None, tools: ToolCallParser | None) -> None:
        self._detokenizer = Detokenizer()
        self._decode = self._detokenizer.push
        self._stops = stops
        self._tools = tools
        self.stop_text = ""

    @property
    def called_tools(self) -> bool:
        """Whether a call was found."""
        return self._tools is not None and self._tools.calls > 0

    @property
    def plain(self) -> bool:
        """Whether text passes unchanged, so that `push_plain` may be used."""
        return self._stops is None and self._tools is None

    def push_plain(self, token: bytes) -> str:
        """`push` for an answer without stop texts and tools."""
        return self._decode(token)

    def push(self, token: bytes) -> Parsed:
        """Takes the bytes of a token; `stop_text` is set once a stop text was met."""
        text = self._decode(token)
        if self._stops is not None:
            found = self._stops.push(text)
            if isinstance(found, Stopped):
                self.stop_text = found.stop
                text = found.text
            else:
                text = found
        return self._tools.push(text) if self._tools is not None else Parsed(text)

    def flush(self) -> Parsed:
        """What was held back, at the end of the answer, however it ended."""
        text = ""
        if not self.stop_text:
            text = self._detokenizer.flush()
            if self._stops is not None:
                text = self._end_stops(text)
        if self._tools is None:
            return Parsed(text)
        first = self._tools.push(text)
        last = self._tools.flush()
        calls: tuple[ParsedCall, ...] = first.calls + last.calls
        return Parsed(first.text + last.text, calls)

    def _end_stops(self, tail: str) -> str:
        assert self._stops is not None
        found = self._stops.push(tail)
        if isinstance(found, Stopped):
            self.stop_text = found.stop
            return found.text
        return found + self._stops.flush()
