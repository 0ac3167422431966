"""Finds `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` in a stream of text (Hermes and Qwen form).

Pure. A block that is not such JSON is text, so nothing that the model wrote is lost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One complete call; `arguments_json` is a JSON object."""

    index: int
    call_id: str
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """What became clear: text to show, and calls."""

    text: str = ""
    calls: tuple[ParsedCall, ...] = ()


def call_ids(request_id: str, prompt: bytes) -> Callable[[int], str]:
    """Ids of the calls of one answer, by their place in it.

    They follow from the request alone, so that an engine that goes on with the answer of another gives the same. The prompt
    keeps those of one conversation apart if its client gives all of its requests the same id.
    """
    answer = hashlib.sha256(request_id.encode() + b"\0" + prompt)

    def call_id(index: int) -> str:
        call = answer.copy()
        call.update(index.to_bytes(4, "little"))
        return f"call-{call.hexdigest()[:24]}"

    return call_id


class ToolCallParser:
    """Splits an answer into text and calls.

    Markers are matched over the whole stream, however tokens cut them (W49). White space between calls is no text. A call
    comes out when it is complete, since only then it is known to be one.
    """

    def __init__(self, call_id: Callable[[int], str]) -> None:
        self._call_id = call_id
        self._inside = False
        self._buffer = ""
        self._blank = ""
        self.calls = 0

    def push(self, text: str) -> Parsed:
        """Takes the next piece of the answer."""
        self._buffer += text
        shown: list[str] = []
        calls: list[ParsedCall] = []
        while self._inside or self._buffer:
            before, marker, after = self._buffer.partition(CLOSE if self._inside else OPEN)
            if self._inside:
                if not marker:
                    break
                self._end_block(before, CLOSE, shown, calls)
                self._inside, self._buffer = False, after
            elif marker:
                self._show(before, shown)
                self._inside, self._buffer = True, after
            else:
                keep = _open_prefix(before)
                self._show(before[: len(before) - keep], shown)
                self._buffer = before[len(before) - keep :]
                break
        return Parsed("".join(shown), tuple(calls))

    def flush(self) -> Parsed:
        """The end of the answer: a last call whose closing marker the model left out counts; what else waits is text."""
        shown: list[str] = []
        calls: list[ParsedCall] = []
        if self._inside:
            self._end_block(self._buffer, "", shown, calls)
        else:
            self._show(self._buffer, shown)
        if not self.calls:
            shown.append(self._blank)
        self._inside, self._buffer, self._blank = False, "", ""
        return Parsed("".join(shown), tuple(calls))

    def _end_block(
        self, body: str, closing: str, shown: list[str], calls: list[ParsedCall]
    ) -> None:
        call = _parse_call(body)
        if call is None:
            self._show(f"{OPEN}{body}{closing}", shown)
            return
        name, arguments = call
        calls.append(ParsedCall(self.calls, self._call_id(self.calls), name, arguments))
        self.calls += 1
        self._blank = ""

    def _show(self, text: str, shown: list[str]) -> None:
        """White space waits for something visible after it: before and between calls it is no part of the answer."""
        visible = text.rstrip()
        if not visible:
            self._blank += text
            return
        shown.append(self._blank + visible)
        self._blank = text[len(visible) :]


def _open_prefix(text: str) -> int:
    for length in range(min(len(OPEN) - 1, len(text)), 0, -1):
        if text.endswith(OPEN[:length]):
            return length
    return 0


def _parse_call(body: str) -> tuple[str, str] | None:
    try:
        call = json.loads(body)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
            return None
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(arguments, dict):
            return None
        return call["name"], json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    # RecursionError: thousands of nested brackets are no call either.
    except (ValueError, RecursionError):
        return None
