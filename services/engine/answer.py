"""The text side of one answer: tokens in, text, tool calls and the end of the answer out. Pure; it never changes which tokens
run.

An answer that another engine began is brought to where it stood by replaying its tokens; what comes out then was sent by the
other engine. That works to the character because a token and the text that it completed are never told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final

from caravan.core.v1 import generation_pb2

from services.engine.text import Detokenizer, StopMatcher, Stopped
from services.engine.tool_calls import ParsedCall, ToolCallParser
from services.runtime.errors import CaravanError

STOP: Final = generation_pb2.FINISH_REASON_STOP
LENGTH: Final = generation_pb2.FINISH_REASON_LENGTH
TOOL_CALLS: Final = generation_pb2.FINISH_REASON_TOOL_CALLS
Shown = tuple[str, tuple[ParsedCall, ...]]
"""Text and calls that are to be sent."""
NOTHING: Final[Shown] = ("", ())


class Answer:
    """Detokenizer, then stop texts, then tool calls; ends by an end token, a stop text or `max_tokens`.

    `end_tokens` end the answer: none where the end is to be ignored. `reason` is a FinishReason once it has ended.
    """

    __slots__ = (
        "_decode",
        "_detokenizer",
        "_end_tokens",
        "_max_tokens",
        "_plain",
        "_stops",
        "_token_bytes",
        "_tools",
        "reason",
        "stop_text",
        "tokens",
    )

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        end_tokens: Collection[int],
        max_tokens: int,
        stops: StopMatcher | None = None,
        tools: ToolCallParser | None = None,
    ) -> None:
        self._token_bytes = token_bytes
        self._end_tokens = end_tokens
        self._max_tokens = max_tokens
        self._detokenizer = Detokenizer()
        self._decode = self._detokenizer.push
        self._stops = stops
        self._tools = tools
        # Most answers have neither: their text is as it is.
        self._plain = stops is None and tools is None
        self.tokens = 0
        """Tokens of the answer so far."""
        self.stop_text = ""
        self.reason: generation_pb2.FinishReason.ValueType | None = None

    def take(self, token: int) -> Shown:
        """What the next token completes; everything that was held back if it ends the answer, which sets `reason`."""
        self.tokens += 1
        shown = NOTHING
        if token in self._end_tokens:
            self.reason = STOP
        else:
            text = self._decode(self._token_bytes(token))
            shown = (text, ()) if self._plain else self._parse(text)
        if self.reason is None and self.tokens >= self._max_tokens:
            self.reason = LENGTH
        return shown if self.reason is None else _joined(shown, self.flush())

    def flush(self) -> Shown:
        """What was held back, at the end of the answer, however it ended."""
        text = ""
        if not self.stop_text:
            text = self._detokenizer.flush()
            if self._stops is not None:
                text = self._end_stops(text)
        shown: Shown = (text, ())
        if self._tools is not None:
            first, last = self._tools.push(text), self._tools.flush()
            shown = first.text + last.text, first.calls + last.calls
        if self.reason == LENGTH and self.stop_text:
            self.reason = STOP
        if self.reason == STOP and self._tools is not None and self._tools.calls:
            self.reason = TOOL_CALLS
        return shown

    def replay(self, tokens: Sequence[int]) -> None:
        """Takes tokens that were sent already. Raises INVALID_VALUE where the answer ends before the last of them."""
        for index, token in enumerate(tokens):
            if self.reason is not None:
                raise CaravanError(
                    "INVALID_VALUE",
                    f"The answer ends with {index} tokens; {len(tokens)} are said to be there.",
                    param=f"resume.token_ids[{index}]",
                )
            self.take(token)

    def _parse(self, text: str) -> Shown:
        if self._stops is not None:
            found = self._stops.push(text)
            if isinstance(found, Stopped):
                self.stop_text, self.reason = found.stop, STOP
                text = found.text
            else:
                text = found
        if self._tools is None:
            return text, ()
        parsed = self._tools.push(text)
        return parsed.text, parsed.calls

    def _end_stops(self, tail: str) -> str:
        assert self._stops is not None
        found = self._stops.push(tail)
        if isinstance(found, Stopped):
            self.stop_text = found.stop
            return found.text
        return found + self._stops.flush()


def _joined(first: Shown, second: Shown) -> Shown:
    return first[0] + second[0], first[1] + second[1]
