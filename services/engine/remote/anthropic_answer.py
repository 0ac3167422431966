"""Answers of the Anthropic API: events of a message, and whole messages where a server does not stream. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
from caravan.core.v1 import generation_pb2

from services.engine.remote.answer_values import (
    CallPieces,
    Ending,
    add_told,
    count,
    decoded,
    no_answer,
)
from services.engine.remote.anthropic_errors import error_of_event
from services.engine.remote.provider import Provider
from services.engine.remote.wire import Outcome, Piece
from services.runtime.clock import IdSource

_ANTHROPIC: Final = Provider.ANTHROPIC
_REASONS: Final[Mapping[str, generation_pb2.FinishReason.ValueType]] = {
    "end_turn": generation_pb2.FINISH_REASON_STOP,
    "stop_sequence": generation_pb2.FINISH_REASON_STOP,
    "max_tokens": generation_pb2.FINISH_REASON_LENGTH,
    "model_context_window_exceeded": generation_pb2.FINISH_REASON_LENGTH,
    "tool_use": generation_pb2.FINISH_REASON_TOOL_CALLS,
    "refusal": generation_pb2.FINISH_REASON_CONTENT_FILTER,
}
_EMPTY: Final = frozenset({b"", b"{}", b"null"})


class _Usage(msgspec.Struct):
    """All counts are sums up to the event."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None


class _Block(msgspec.Struct):
    type: str = ""
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: msgspec.Raw = msgspec.Raw()


class _Message(msgspec.Struct):
    usage: _Usage | None = None


class _Delta(msgspec.Struct):
    """Of a block, or of the message. Thoughts and citations are no part of the answer."""

    type: str = ""
    text: str | None = None
    partial_json: str | None = None
    stop_reason: str | None = None
    stop_sequence: str | None = None


class _Event(msgspec.Struct):
    type: str
    index: int = 0
    message: _Message | None = None
    content_block: _Block | None = None
    delta: _Delta | None = None
    usage: _Usage | None = None
    error: Any = None
    # Of a whole message.
    content: list[_Block] | None = None
    stop_reason: str | None = None
    stop_sequence: str | None = None


_EVENTS: Final = msgspec.json.Decoder(_Event)


class AnthropicReader:
    """Reads one answer. The prompt is counted at the start, and what the provider read from or put into its cache apart from it (W13)."""

    def __init__(self, redact: Callable[[str], str], ids: IdSource) -> None:
        self._redact = redact
        self._calls = CallPieces(_ANTHROPIC, ids)
        self._without_arguments: set[int] = set()
        self._ending = Ending(_ANTHROPIC)
        self._usage: _Usage | None = None

    @property
    def is_complete(self) -> bool:
        """See AnswerReader."""
        return self._ending.done

    def read(self, event: str, data: str) -> Piece | None:
        """See AnswerReader. The name of an event is its type too; types that are not known are to be ignored."""
        if not data:
            return None
        given = decoded(_EVENTS, data, _ANTHROPIC)
        kind = given.type
        if kind == "content_block_delta":
            return self._delta(given)
        if kind == "content_block_start":
            return self._start(given)
        if kind == "content_block_stop":
            return self._stop(given)
        if kind == "message_start":
            self._count(given.message.usage if given.message else None)
        elif kind == "message_delta":
            self._count(given.usage)
            if given.delta is not None:
                self._finish(given.delta.stop_reason, given.delta.stop_sequence)
        elif kind == "message_stop":
            self._ending.done = True
        elif kind == "error":
            raise error_of_event(given.error, self._redact)
        elif kind == "message":
            return self._whole(given)
        return None

    def usage_so_far(self) -> generation_pb2.Usage | None:
        """See AnswerReader."""
        usage = self._usage
        if usage is None:
            return None
        return generation_pb2.Usage(
            prompt_tokens=count(
                usage.input_tokens,
                usage.cache_creation_input_tokens,
                usage.cache_read_input_tokens,
            ),
            completion_tokens=count(usage.output_tokens),
            cached_tokens=count(usage.cache_read_input_tokens),
        )

    def outcome(self) -> Outcome:
        """See AnswerReader."""
        return self._ending.outcome(self.usage_so_far(), called=len(self._calls) > 0)

    def _count(self, given: _Usage | None) -> None:
        if given is None:
            return
        if self._usage is None:
            self._usage = _Usage()
        add_told(self._usage, given)

    def _finish(self, reason: str | None, stop_text: str | None) -> None:
        if reason:
            known = _REASONS.get(reason, generation_pb2.FINISH_REASON_STOP)
            self._ending.finish(known, stop_text)

    def _delta(self, given: _Event) -> Piece | None:
        delta = given.delta
        if delta is None:
            return None
        if delta.type == "text_delta" and delta.text:
            return Piece(text=delta.text)
        if delta.type == "input_json_delta" and delta.partial_json:
            if not self._calls.knows(given.index):
                raise no_answer(_ANTHROPIC)
            self._without_arguments.discard(given.index)
            return Piece(calls=[self._calls.piece(given.index, None, None, delta.partial_json)])
        return None

    def _start(self, given: _Event) -> Piece | None:
        block = given.content_block
        if block is None:
            return None
        if block.type == "tool_use":
            arguments = _arguments(block)
            if not arguments:
                self._without_arguments.add(given.index)
            return Piece(calls=[self._calls.piece(given.index, block.id, block.name, arguments)])
        return Piece(text=block.text) if block.type == "text" and block.text else None

    def _stop(self, given: _Event) -> Piece | None:
        if given.index not in self._without_arguments:
            return None
        # A tool without parameters is called without arguments: no JSON has come, and the caller wants some.
        self._without_arguments.discard(given.index)
        return Piece(calls=[self._calls.piece(given.index, None, None, "{}")])

    def _whole(self, given: _Event) -> Piece:
        self._count(given.usage)
        self._finish(given.stop_reason, given.stop_sequence)
        self._ending.done = True
        piece = Piece()
        for index, block in enumerate(given.content or ()):
            if block.type == "text":
                piece.text += block.text or ""
            elif block.type == "tool_use":
                arguments = _arguments(block) or "{}"
                piece.calls.append(self._calls.piece(index, block.id, block.name, arguments))
        return piece


def _arguments(block: _Block) -> str:
    raw = bytes(block.input)
    # The API writes an empty object where pieces of the arguments follow, and servers after its model may put a space into it.
    return "" if b"".join(raw.split()) in _EMPTY else raw.decode()
